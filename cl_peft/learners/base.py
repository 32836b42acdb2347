"""What a learner has to do: learn tasks one after another, and answer with a named unit.

A *unit* is what gives one prediction: a module (a row of the bank, or none) and a head. A learner
with one module per task has a unit per task, and a router chooses among them; a learner with a
single module has one unit at a time, which answers for all tasks seen so far. A learner never sees
a task id at test time.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from cl_peft.backbones.base import Backbone
from cl_peft.backbones.features import Features
from cl_peft.batching import by_length
from cl_peft.config import Seeds
from cl_peft.console import Console
from cl_peft.modules.bank import Bank, Module, Route, flatten
from cl_peft.modules.head import Head
from cl_peft.store import require, tensor_fingerprint
from cl_peft.streams.base import Split, Task
from cl_peft.tracking import Tracker
from cl_peft.training import Job, OptimizerFactory, Report, Trainer, generator


@dataclass(frozen=True)
class Tools:
    """What a learner works with."""

    backbone: Backbone
    bank: Bank
    features: Features
    trainer: Trainer
    optimizer: OptimizerFactory
    seeds: Seeds
    n_classes: int
    n_tasks: int
    console: Console
    tracker: Tracker


@dataclass(frozen=True)
class Unit:
    """What gives one prediction.

    Attributes:
        row: Row of the bank; -1 is the frozen backbone.
        head: Its classifier.
        fingerprint: Name of all its values; the key of remembered predictions.
    """

    row: int
    head: Head
    fingerprint: str


class Learner(ABC):
    """A continual-learning algorithm.

    Attributes:
        uses_router: Whether a router chooses among its units.
        uses_module: Whether it trains modules at all.
        needs_features: Whether it looks at frozen features.
        keeps: Which stored units a resumed run needs: ``all``, or the ``last``.
    """

    uses_router: ClassVar[bool] = True
    uses_module: ClassVar[bool] = True
    needs_features: ClassVar[bool] = False
    keeps: ClassVar[Literal["all", "last"]] = "all"

    def start(self, tools: Tools) -> None:
        """Receive the tools; called once, before anything else."""
        self.tools = tools
        self.units: dict[int, Unit] = {}
        self.passes = 0  # test examples that went through the backbone
        self.steps = 0  # optimizer steps, over all tasks
        self.report: Report | None = None

    @abstractmethod
    def learn(self, task: Task) -> None:
        """Learn a task; earlier ones are available only to a learner that says so."""

    def unit_for(self, task: int) -> int | None:
        """Key of the unit that answers for a task; None where there is none (yet)."""
        return task if task in self.units else None

    def snapshot(self) -> dict[str, Tensor]:
        """Tensors of the newest unit, as stored on disk; empty if the last task made none."""
        unit = self.units.get(self._newest)
        if unit is None:
            return {}
        module = self.tools.bank.get(unit.row) if unit.row >= 0 else {}
        tensors = {**flatten(module), **unit.head.tensors()}
        return {name: tensor.clone() for name, tensor in tensors.items()}

    @abstractmethod
    def restore(self, snapshots: Mapping[int, dict[str, Tensor]], seen: Sequence[Task]) -> None:
        """Come back to the state after the tasks ``seen``.

        Args:
            snapshots: By task index, what :meth:`snapshot` gave; all of them, or only the last.
            seen: The tasks learned so far.
        """

    @torch.no_grad()
    def logits(self, inputs: Sequence[Any], units: np.ndarray, title: str = "") -> Tensor:
        """Logits over all classes of the stream, each sample by its own unit.

        Args:
            inputs: Raw inputs, ``N``.
            units: ``(N,)`` key of each sample's unit.
            title: What the progress bar says.

        Returns:
            ``(N, classes)`` float32 on the CPU; ``-inf`` for classes that the unit's head lacks.
        """
        out = torch.full((len(inputs), self.tools.n_classes), float("-inf"))
        encoded = self.tools.features.encoded(inputs)
        batches = list(by_length(encoded.lengths, self.tools.trainer.eval_batch_size))
        with self.tools.console.bar(title, total=len(batches)) as bar:
            for rows in batches:
                keys = units[rows]
                chosen = torch.tensor([self.units[k].row for k in keys], device=self._device)
                with self.tools.bank.use(Route.each(chosen)):
                    pooled = self.tools.backbone(self.tools.backbone.collate(encoded.take(rows)))
                out[torch.from_numpy(rows)] = self._answer(pooled, keys)
                bar.advance()
        self.passes += len(inputs)
        return out

    def _answer(self, pooled: Tensor, keys: np.ndarray) -> Tensor:
        out = torch.full((len(pooled), self.tools.n_classes), float("-inf"))
        for key in np.unique(keys):
            mine = torch.from_numpy(np.flatnonzero(keys == key))
            head = self.units[int(key)].head
            answer = head(pooled[mine.to(pooled.device)]).float().cpu()
            out[mine[:, None], torch.tensor(head.classes)[None]] = answer
        return out

    def _fit(self, task: Task, module: Module, head: Head, train: Split, validation: Split) -> None:
        """Train a module and a head on ``train`` by cross-entropy over the head's classes.

        Leaf tensors are trained in place; :attr:`report` says how it went.
        """
        tools = self.tools
        lengths = tools.features.encoded(train.inputs).lengths
        labels = head.local(torch.from_numpy(train.labels)).to(self._device)

        def loss(rows: np.ndarray) -> Tensor:
            with tools.bank.training(module):
                pooled = self._pooled(train.inputs, rows)
            target = labels[torch.from_numpy(rows).to(self._device)]
            return torch.nn.functional.cross_entropy(head(pooled), target)

        @torch.no_grad()
        def accuracy() -> float:
            target = head.local(torch.from_numpy(validation.labels))
            right = 0
            encoded = tools.features.encoded(validation.inputs)
            for rows in by_length(encoded.lengths, tools.trainer.eval_batch_size):
                with tools.bank.use(module):
                    pooled = self._pooled(validation.inputs, rows)
                right += int((head(pooled).argmax(1).cpu() == target[torch.from_numpy(rows)]).sum())
            return right / len(validation)

        def on_step(step: int, values: dict[str, float]) -> None:
            named = {f"train/{name}": value for name, value in values.items()}
            tools.tracker.log_training(task.index + 1, self.steps + step, named)

        job = Job(
            task=task.index,
            title=f"task {task.index + 1}/{tools.n_tasks}",
            module=[t for params in module.values() for t in params.values()],
            head=head.parameters,
            lengths=lengths,
            loss=loss,
            seed=(tools.seeds.data, tools.seeds.init),
            validate=accuracy if len(validation) else None,
            on_step=on_step,
        )
        self.report = tools.trainer.fit(job, tools.optimizer, self._device, tools.console)
        self.steps += self.report.steps

    def _pooled(self, inputs: Sequence[Any], rows: np.ndarray) -> Tensor:
        """Pooled features of ``inputs[rows]`` under the scope that is open."""
        encoded = self.tools.features.encoded([inputs[r] for r in rows])
        return self.tools.backbone(self.tools.backbone.collate(encoded))

    def _fresh(self, task: Task) -> tuple[Module, Head]:
        """A fresh module and a head for the task's classes, decided by (seed.init, task)."""
        random = generator(self.tools.seeds.init, task.index)
        module = self.tools.bank.fresh(random)
        return module, Head.fresh(task.classes, self.tools.backbone.width, random, self._device)

    def _unit(self, row: int, head: Head) -> Unit:
        module = flatten(self.tools.bank.get(row)) if row >= 0 else {}
        return Unit(row, head.frozen(), tensor_fingerprint({**module, **head.tensors()}))

    def _load(self, tensors: dict[str, Tensor], task: int) -> tuple[Module, Head]:
        """Module and head out of a stored unit; refuses tensors that do not fit."""
        source = f"the stored module of task {task + 1}"
        heads = {n: t for n, t in tensors.items() if n.startswith("head.")}
        require(heads, {"head.weight", "head.bias", "head.classes"}, source)
        own = {n: t for n, t in tensors.items() if n not in heads}
        return self.tools.bank.check(own, source), Head.from_tensors(heads, self._device)

    @property
    def _newest(self) -> int:
        return max(self.units, default=-1)

    @property
    def _device(self) -> torch.device:
        return self.tools.backbone.device
