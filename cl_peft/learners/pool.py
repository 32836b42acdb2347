r"""What learners have in common that compose each sample's prompts out of a pool, by its query.

The query is the sample's frozen pooled feature ``q(x) (H,)``, so two passes answer a sample, and
its prompts depend on nothing but itself. A pool is a few named tensors: stacks of prompts ``(M, P,
...)`` as :meth:`Bank.fresh` starts them (a prefix without its network), and vectors ``(M, H)`` to
compare queries with. One head widens with the classes; with the option ``train_mask`` the
cross-entropy compares the task's own classes only, so that new classes do not push old ones down.

At test time one unit answers for all tasks: a forward pass with the sample's prompts, and the whole
head. Stored: pool and head, both after the latest task. The pool is no row of the bank.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from cl_peft.batching import by_length
from cl_peft.errors import DamagedRunError
from cl_peft.learners.base import Fit, Tools, Unit
from cl_peft.learners.shared import SharedModule
from cl_peft.modules.bank import Active, Route
from cl_peft.modules.head import Head
from cl_peft.store import require, tensor_fingerprint
from cl_peft.streams.base import Task
from cl_peft.training import generator

Pool = dict[str, Tensor]


class PromptPool(SharedModule):
    """A pool of prompts, and a rule that makes each sample's prompts out of it.

    Args:
        train_mask: Cross-entropy among the task's classes only.

    Attributes:
        prompts: Names of the pool's tensors that are prompts.
        vectors: Names of those that are compared with queries.
        grown: Names of those that every task appends to; what earlier tasks appended is fixed.
    """

    needs_features: ClassVar[bool] = True
    modules: ClassVar[tuple[str, ...]] = ("prompt", "prefix")
    prompts: ClassVar[tuple[str, ...]] = ("prompts",)
    vectors: ClassVar[tuple[str, ...]] = ("keys",)
    grown: ClassVar[tuple[str, ...]] = ()

    def __init__(self, train_mask: bool = True) -> None:
        self.train_mask = train_mask

    def start(self, tools: Tools) -> None:
        """Receive the tools."""
        super().start(tools)
        self.pool: Pool = {}

    # ------------------------------------------------------------------ a method's own

    @abstractmethod
    def _start(self, random: torch.Generator) -> Pool:
        """What trains on the next task, as it starts; :attr:`pool` is what there is so far."""

    @abstractmethod
    def _compose(self, pool: Pool, queries: Tensor, training: bool) -> Tensor:
        """Prompts ``(B, k, P, ...)`` of queries ``(B, H)``, each by itself."""

    @abstractmethod
    def _penalty(self, pool: Pool, queries: Tensor) -> Tensor:
        """What is added to the cross-entropy."""

    # ------------------------------------------------------------------ learning

    def learn(self, task: Task) -> None:
        """Train what the method trains, and the head."""
        random = generator(self.tools.seeds.init, task.index)
        if self.units:
            head = self.units[self._newest].head.widen(task.classes, random)
        else:
            head = Head.fresh(task.classes, self.tools.backbone.width, random, self._device)
        new = {n: t.detach().clone().to(self._device) for n, t in self._start(random).items()}
        new = {n: t.requires_grad_(True) for n, t in new.items()}
        self._fit(task, {}, head, task.train, task.validation, extra=new)
        self._put(task.index, {n: t.detach() for n, t in self._whole(new).items()}, head)

    def snapshot(self) -> dict[str, Tensor]:
        """Pool and head."""
        if not self.units:
            return {}
        pool = {f"pool.{n}": t.clone() for n, t in self.pool.items()}
        return {**pool, **self.units[self._newest].head.tensors()}

    def recall(self, task: Task, tensors: dict[str, Tensor]) -> None:
        """Put pool and head back, if they were kept.

        Raises:
            DamagedRunError: They do not fit.
        """
        if not tensors:
            return
        source = f"the stored module of task {task.index + 1}"
        names = {f"pool.{n}" for n in (*self.prompts, *self.vectors)}
        require(tensors, names | {"head.weight", "head.bias", "head.classes"}, source)
        pool = {n[5:]: t.to(self._device) for n, t in tensors.items() if n in names}
        like = self._draw(1, generator(0)).shape[1:]
        shapes = {n: (self.tools.backbone.width,) if n in self.vectors else like for n in pool}
        for name, tensor in pool.items():
            if tensor.shape[1:] != shapes[name]:
                have, want = tuple(tensor.shape), ("any", *shapes[name])
                raise DamagedRunError(f"{source}: pool.{name} has shape {have}, expected {want}")
        heads = {n: t for n, t in tensors.items() if n.startswith("head.")}
        self._put(task.index, pool, Head.from_tensors(heads, self._device))

    def _put(self, task: int, pool: Pool, head: Head) -> None:
        self.pool = pool
        name = tensor_fingerprint({**pool, **head.tensors()})
        self.units = {task: Unit(-1, head.frozen(), name)}

    def _whole(self, new: Pool) -> Pool:
        """The pool with what trains in its place."""
        grown = {n: torch.cat([self.pool[n], new[n]]) for n in self.grown if n in self.pool}
        return {**new, **grown}

    def _loss(self, fit: Fit, rows: np.ndarray) -> Tensor:
        logits = self._logits(fit, self._feature(fit, fit.train.inputs, rows, training=True))
        if self.train_mask:
            other = torch.tensor([c not in fit.task.classes for c in fit.head.classes])
            logits = logits.masked_fill(other.to(logits.device), float("-inf"))
        loss = nn.functional.cross_entropy(logits, fit.targets(rows))
        return loss + self._penalty(self._whole(fit.extra), self._queries(fit.train.inputs, rows))

    def _feature(self, fit: Fit, inputs: Sequence[Any], rows: np.ndarray, training: bool) -> Tensor:
        with self._give(self._whole(fit.extra), self._queries(inputs, rows), training):
            return self._pooled(inputs, rows)

    # ------------------------------------------------------------------ answering

    def _evaluated(
        self, inputs: Sequence[Any], route: Callable[[np.ndarray], Route | None], title: str
    ) -> Iterator[tuple[np.ndarray, Tensor]]:
        """As for any learner, but a sample's prompts come from its query instead of a route."""
        queries = self._queries(inputs, np.arange(len(inputs)))
        encoded = self.tools.features.encoded(inputs)
        batches = list(by_length(encoded.lengths, self.tools.trainer.eval_batch_size))
        with self.tools.console.bar(title, total=len(batches)) as bar:
            for rows in batches:
                with self._give(self.pool, queries[torch.from_numpy(rows)], training=False):
                    yield rows, self._pooled(inputs, rows)
                bar.advance()
        self.passes += len(inputs)

    def _give(self, pool: Pool, queries: Tensor, training: bool) -> AbstractContextManager[None]:
        """The scope in which each sample of a batch has its own prompts."""
        tokens = self._compose(pool, queries, training)
        active = Active({"tokens": tokens}, tokens.new_ones(tokens.shape[:2]))
        return self.tools.bank.give({self.tools.bank.sites[0].name: active}, training=training)

    def _queries(self, inputs: Sequence[Any], rows: np.ndarray) -> Tensor:
        """Frozen features ``(B, H)`` of ``inputs[rows]``."""
        return self.tools.features.features([inputs[r] for r in rows]).to(self._device)

    def _draw(self, count: int, random: torch.Generator) -> Tensor:
        """Fresh prompts ``(count, P, ...)``, each as a module starts."""
        method, (site,) = self.tools.bank.method, self.tools.bank.sites
        drawn = [method.fold(site, method.init(site, random))["tokens"] for _ in range(count)]
        return torch.stack(drawn).detach()


def similarity(queries: Tensor, keys: Tensor) -> Tensor:
    """Cosines ``(B, M)`` of queries ``(B, H)`` with keys ``(M, H)``."""
    return nn.functional.normalize(queries, dim=1) @ nn.functional.normalize(keys, dim=1).T
