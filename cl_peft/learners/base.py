"""What a learner has to do: learn tasks one after another, and answer with a named unit.

A *unit* is what gives one prediction: a module (a row of the bank, or none) and a head. A learner
with one module per task has a unit per task, and a router chooses among them; a learner with a
single module has one unit at a time, which answers for all tasks seen so far. A learner never sees
a task id at test time.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from cl_peft.backbones.checkpointing import checkpointed
from cl_peft.backbones.trunk import Trunk, trunk_of
from cl_peft.batching import by_length
from cl_peft.learners.parts import Fit, Later, Tools, Unit, among_task, trainable
from cl_peft.modules.bank import Module, Route, flatten
from cl_peft.modules.head import Head
from cl_peft.store import require, tensor_fingerprint
from cl_peft.streams.base import Split, Task
from cl_peft.training import Job, Report, generator

__all__ = ["Fit", "Later", "Learner", "Tools", "Unit", "among_task", "trainable"]

log = logging.getLogger(__name__)


class Learner(ABC):
    """A continual-learning algorithm.

    Attributes:
        uses_router: Whether a router chooses among its units.
        uses_module: Whether it trains modules at all.
        needs_features: Whether it looks at frozen features.
        keeps: Which stored units a resumed run needs: ``all``, or the ``last``.
        history: What a task's result depends on: this ``task`` alone, or the ``stream`` up to it.
            Equal results are looked up instead of trained again.
        keeps_examples: Whether it keeps training examples of earlier tasks.
        modules: Names of the modules that it fits; empty: any.
        splits: Whether its loss is a mean over the examples of a step, besides what does not depend
            on them: ``trainer.accumulate`` may then split a step.
    """

    uses_router: ClassVar[bool] = True
    uses_module: ClassVar[bool] = True
    needs_features: ClassVar[bool] = False
    keeps: ClassVar[Literal["all", "last"]] = "all"
    history: ClassVar[Literal["task", "stream"]] = "stream"
    keeps_examples: ClassVar[bool] = False
    modules: ClassVar[tuple[str, ...]] = ()
    splits: ClassVar[bool] = True

    def start(self, tools: Tools) -> None:
        """Receive the tools; called once, before anything else."""
        self.tools = tools
        self.units: dict[int, Unit] = {}
        self._trunk: Trunk | None = None  # of the task that trains
        self.passes = 0  # test examples that went through the backbone
        self.steps = 0  # optimizer steps, over all tasks
        self.report: Report | None = None

    @abstractmethod
    def learn(self, task: Task) -> None:
        """Learn a task; earlier ones are available only to a learner that says so."""

    @abstractmethod
    def recall(self, task: Task, tensors: dict[str, Tensor]) -> None:
        """Take a task's stored unit instead of learning it.

        Args:
            task: The next task, with its examples or without.
            tensors: What :meth:`snapshot` gave after it; empty if it was not kept.
        """

    def recall_later(self, task: Task, stored: Later) -> None:
        """Like :meth:`recall`; a learner that asks one module per sample can leave it unread."""
        self.recall(task, stored.read())

    def restore(
        self, snapshots: Mapping[int, dict[str, Tensor] | Later], seen: Sequence[Task]
    ) -> None:
        """Come back to the state after the tasks ``seen``.

        Args:
            snapshots: By task index, what :meth:`snapshot` gave; all of them, or only the last.
            seen: The tasks learned so far.
        """
        for task in seen:
            stored = snapshots.get(task.index, {})
            if isinstance(stored, Later):
                self.recall_later(task, stored)
            else:
                self.recall(task, stored)

    def unit_for(self, task: int) -> int | None:
        """Key of the unit that answers for a task; None where there is none (yet)."""
        return task if task in self.units else None

    @property
    def at_once(self) -> int:
        """How many modules one sample goes through at the same time, at most."""
        return 1

    def snapshot(self) -> dict[str, Tensor]:
        """Tensors of the newest unit, as stored on disk; empty if the last task made none."""
        unit = self.units.get(self._newest)
        if unit is None:
            return {}
        module = self.tools.bank.get(unit.row) if unit.row >= 0 else {}
        tensors = {**flatten(module), **unit.head.tensors()}
        return {name: tensor.clone() for name, tensor in tensors.items()}

    def state(self) -> dict[str, Tensor]:
        """What it keeps besides units (importance weights, a buffer, a pool), after this task."""
        return {}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """The inverse of :meth:`state`; called after the last :meth:`recall`.

        Raises:
            DamagedRunError: Tensors are missing or unknown.
        """
        require(state, set(), f"learner={type(self).__name__.lower()}")

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
        for rows, pooled in self._evaluated(inputs, lambda rows: self._route(units[rows]), title):
            out[torch.from_numpy(rows)] = self._answer(pooled, units[rows])
        return out

    @torch.no_grad()
    def mixture(self, inputs: Sequence[Any], weights: Tensor, title: str = "") -> Tensor:
        r"""Logits over all classes, each sample by its own weighted sum of the units' modules.

        The heads of all units with a weight answer on the mixture's feature ``f``:

        .. math:: z_c = \log w_t + \log \mathrm{softmax}_t(h_t(f))_c

        for class ``c`` of unit ``t``; the best where several units know a class.

        Args:
            inputs: Raw inputs, ``N``.
            weights: ``(N, T)`` over the tasks' units; a task without a unit must have 0.
            title: What the progress bar says.

        Returns:
            ``(N, classes)`` float32 on the CPU; ``-inf`` where no unit with a weight knows a class.
        """
        out = torch.full((len(inputs), self.tools.n_classes), float("-inf"))
        keys = [self.unit_for(t) for t in range(weights.shape[1])]
        rows_of = torch.tensor([-1 if k is None else self.units[k].row for k in keys])

        def route(rows: np.ndarray) -> Route | None:
            given = weights[torch.from_numpy(rows)] * (rows_of >= 0)
            if not bool(given.any()):
                return None
            k = int((given > 0).sum(1).max())
            top = given.topk(k, dim=1)
            return Route(
                rows_of[top.indices].clamp_min(0).to(self._device), top.values.to(self._device)
            )

        for rows, pooled in self._evaluated(inputs, route, title):
            where = torch.from_numpy(rows)
            out[where] = self.weighted_heads(pooled, weights[where])
        return out

    def weighted_heads(self, pooled: Tensor, weights: Tensor) -> Tensor:
        r"""``log w_t + log softmax_t(h_t(f))_c`` over all classes; see :meth:`mixture`.

        Args:
            pooled: ``(B, H)`` features.
            weights: ``(B, T)`` over the tasks' units, on the CPU.

        Returns:
            ``(B, classes)`` float32 on the CPU.
        """
        answer = torch.full((len(pooled), self.tools.n_classes), float("-inf"))
        for task in range(weights.shape[1]):
            key, asked = self.unit_for(task), torch.nonzero(weights[:, task] > 0).flatten()
            if key is None or not len(asked):
                continue
            head = self.units[key].head
            own = head(pooled[asked.to(pooled.device)]).float().log_softmax(1).cpu()
            index = (asked[:, None], torch.tensor(head.classes)[None])
            answer[index] = torch.maximum(answer[index], own + weights[asked, task].log()[:, None])
        return answer

    def _evaluated(
        self,
        inputs: Sequence[Any],
        route: Callable[[np.ndarray], Route | None],
        title: str,
    ) -> Iterator[tuple[np.ndarray, Tensor]]:
        """Pooled features of all inputs in batches of similar length, with their positions."""
        encoded = self.tools.features.encoded(inputs)
        batches = list(by_length(encoded.lengths, self.tools.trainer.eval_batch_size))
        with self.tools.console.bar(title, total=len(batches)) as bar:
            for rows in batches:
                active = route(rows)
                with nullcontext() if active is None else self.tools.bank.use(active):
                    pooled = self.tools.backbone(self.tools.backbone.collate(encoded.take(rows)))
                yield rows, pooled
                bar.advance()
        self.passes += len(inputs)

    def _route(self, keys: np.ndarray) -> Route:
        """Bank rows of a batch's units."""
        units = [self.units[int(k)] for k in keys]
        if not any(unit.others for unit in units):
            return Route.each(torch.tensor([unit.row for unit in units], device=self._device))
        pairs = [((unit.row, 1.0), *unit.others) for unit in units]
        width = max(len(p) for p in pairs)
        filled = [[*p, *[(p[0][0], 0.0)] * (width - len(p))] for p in pairs]
        rows = torch.tensor([[r for r, _ in p] for p in filled], device=self._device)
        weights = torch.tensor([[w for _, w in p] for p in filled], device=self._device)
        return Route(rows, weights)

    def _answer(self, pooled: Tensor, keys: np.ndarray) -> Tensor:
        out = torch.full((len(pooled), self.tools.n_classes), float("-inf"))
        for key in np.unique(keys):
            mine = torch.from_numpy(np.flatnonzero(keys == key))
            head = self.units[int(key)].head
            answer = head(pooled[mine.to(pooled.device)]).float().cpu()
            out[mine[:, None], torch.tensor(head.classes)[None]] = answer
        return out

    # ------------------------------------------------------------------ training

    def _fit(
        self,
        task: Task,
        module: Module,
        head: Head,
        train: Split,
        validation: Split,
        extra: dict[str, Tensor] | None = None,
    ) -> None:
        """Train a module and a head on ``train`` by :meth:`_loss`.

        Leaf tensors are trained in place; :attr:`report` says how it went. Tensors of the module
        that ask for no gradient stay as they are.

        Args:
            task: The task.
            module: Leaf tensors by site.
            head: A head that knows all labels.
            train: Examples.
            validation: Held-out examples; may be empty.
            extra: Further leaf tensors to train, at the module's learning rate.
        """
        tools = self.tools
        labels = head.local(torch.from_numpy(train.labels)).to(self._device)
        fit = Fit(task, module, head, train, labels, extra or {})

        @torch.no_grad()
        def accuracy() -> float:
            target = head.local(torch.from_numpy(validation.labels))
            right = 0
            encoded = tools.features.encoded(validation.inputs)
            for rows in by_length(encoded.lengths, tools.trainer.eval_batch_size):
                pooled = self._feature(fit, validation.inputs, rows, training=False)
                answer = self._logits(fit, pooled).argmax(1).cpu()
                right += int((answer == target[torch.from_numpy(rows)]).sum())
            return right / len(validation)

        def on_step(step: int, values: dict[str, float]) -> None:
            named = {f"train/{name}": value for name, value in values.items()}
            tools.tracker.log_training(task.index + 1, self.steps + step, named)

        own = [t for params in module.values() for t in params.values() if t.requires_grad]
        job = Job(
            task=task.index,
            title=f"task {task.index + 1}/{tools.n_tasks}",
            module=[*own, *fit.extra.values()],
            head=[t for t in head.parameters if t.requires_grad],
            lengths=tools.features.encoded(train.inputs).lengths,
            loss=lambda rows: self._loss(fit, rows),
            seed=(tools.seeds.data, tools.seeds.init),
            validate=accuracy if len(validation) else None,
            on_step=on_step,
        )
        if own:  # else only a head trains, on whatever its learner hands it
            self._trunk = self._trunk_of(train, validation, job.title)
        again = tools.trainer.checkpointing == "on"
        try:
            with checkpointed(tools.backbone.model, tools.bank) if again else nullcontext():
                self.report = tools.trainer.fit(job, tools.optimizer, self._device, tools.console)
        finally:
            self._trunk = None
        self.steps += self.report.steps

    def _loss(self, fit: Fit, rows: np.ndarray) -> Tensor:
        """Loss of the training examples at ``rows``: cross-entropy over the head's classes."""
        pooled = self._feature(fit, fit.train.inputs, rows, training=True)
        return torch.nn.functional.cross_entropy(self._logits(fit, pooled), fit.targets(rows))

    def _feature(self, fit: Fit, inputs: Sequence[Any], rows: np.ndarray, training: bool) -> Tensor:
        """Pooled features ``(B, H)`` of ``inputs[rows]`` through the module in training."""
        bank = self.tools.bank
        with bank.training(fit.module) if training else bank.use(fit.module):
            return self._pooled(inputs, rows)

    def _logits(self, fit: Fit, pooled: Tensor) -> Tensor:
        """``(B, C)`` over the head's classes."""
        return fit.head(pooled)

    def _pooled(self, inputs: Sequence[Any], rows: np.ndarray) -> Tensor:
        """Pooled features of ``inputs[rows]`` under the scope that is open."""
        items = [inputs[r] for r in rows]
        batch = self.tools.backbone.collate(self.tools.features.encoded(items))
        # right whatever scope is open and whoever asks: modules act above the trunk alone
        with nullcontext() if self._trunk is None else self._trunk.given(items):
            return self.tools.backbone(batch)

    def _trunk_of(self, train: Split, validation: Split, title: str) -> Trunk | None:
        """What is frozen below all modules, for a task's examples, if keeping it pays."""
        tools, trainer = self.tools, self.tools.trainer
        if trainer.trunk == "every_step" or trainer.epochs == 1:
            return None
        limit = 1e9 * trainer.trunk_gb
        with trainer.autocast(self._device):
            trunk = trunk_of(tools.features, tools.bank.sites, train.inputs, limit, title)
        if trunk is not None and trainer.patience is not None:  # else they pass once, in the end
            why = trunk.fill(validation.inputs, limit)  # without autocast, as they are evaluated
            if why is not None:
                log.info("%s: validation examples pass all layers in every epoch: %s", title, why)
        return trunk

    def _fresh(self, task: Task) -> tuple[Module, Head]:
        """A fresh module and a head for the task's classes, decided by (seed.init, task)."""
        random = generator(self.tools.seeds.init, task.index)
        module = self.tools.bank.fresh(random, self.tools.words(task.classes))
        return module, Head.fresh(task.classes, self.tools.backbone.width, random, self._device)

    def _unit(self, row: int, head: Head, others: Sequence[tuple[int, float]] = ()) -> Unit:
        parts = (
            {f"0/{n}": t for n, t in flatten(self.tools.bank.get(row)).items()} if row >= 0 else {}
        )
        for i, (other, weight) in enumerate(others):
            module = flatten(self.tools.bank.get(other))
            parts.update({f"{i + 1}/{n}": t for n, t in module.items()})
            parts[f"{i + 1}/weight"] = torch.tensor(weight)
        name = tensor_fingerprint({**parts, **head.tensors()})
        return Unit(row, head.frozen(), name, tuple(others))

    def _load(self, tensors: dict[str, Tensor], task: int) -> tuple[Module, Head]:
        """Module and head out of a stored unit; refuses tensors that do not fit."""
        own = {n: t for n, t in tensors.items() if not n.startswith("head.")}
        head = self._load_head({n: t for n, t in tensors.items() if n not in own}, task)
        return self.tools.bank.check(own, f"the stored module of task {task + 1}"), head

    def _load_head(self, tensors: dict[str, Tensor], task: int) -> Head:
        """Head out of a stored unit's own; refuses tensors that do not fit."""
        names = {"head.weight", "head.bias", "head.classes"}
        require(tensors, names, f"the stored module of task {task + 1}")
        return Head.from_tensors(tensors, self._device)

    @property
    def _newest(self) -> int:
        return max(self.units, default=-1)

    @property
    def _device(self) -> torch.device:
        return self.tools.backbone.device
