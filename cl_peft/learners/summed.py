r"""What learners have in common that grow a module per task and keep all of them active together.

With modules :math:`\Delta_1 .. \Delta_t` (``s B_k A_k x`` for a low-rank one) every site computes

.. math:: h(x) = W x + b + \sum_{k \le t} w_k \Delta_k(x)

so nothing has to be chosen at test time, and no router is consulted. One head widens with the
classes. Earlier modules are never written to again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from cl_peft.learners.base import Fit, among_task
from cl_peft.learners.shared import SharedModule
from cl_peft.modules.bank import Given, Module
from cl_peft.modules.head import Head
from cl_peft.streams.base import Task
from cl_peft.training import generator


class Summed(SharedModule):
    """A module per task, all of them active with weight 1, under one widening head.

    Args:
        classes: Classes among which the cross-entropy compares: those of the example's ``task``,
            so that the head's rows for other tasks keep their values; or all ``seen`` so far.
    """

    keeps: ClassVar[Literal["all", "last"]] = "all"
    modules: ClassVar[tuple[str, ...]] = ("lora",)

    def __init__(self, classes: Literal["task", "seen"] = "task") -> None:
        self.classes = classes

    def learn(self, task: Task) -> None:
        """Train a new module beside the finished ones."""
        module, head = self._begin(task)
        self._fit(task, module, head, task.train, task.validation)
        self._keep(task.index, module, head)

    def recall(self, task: Task, tensors: dict[str, Tensor]) -> None:
        """Put the module back into the bank."""
        self._keep(task.index, *self._load(tensors, task.index))

    def _begin(self, task: Task) -> tuple[Module, Head]:
        """A fresh module, and the head with rows for the task's classes."""
        if not self.units:
            return self._fresh(task)
        random = generator(self.tools.seeds.init, task.index)
        module = self.tools.bank.fresh(random)
        return module, self.units[self._newest].head.widen(task.classes, random)

    def _keep(self, task: int, module: Module, head: Head) -> None:
        """Append the module; all rows together are the one unit."""
        row = self.tools.bank.add(module)
        self.units = {task: self._unit(row, head, [(other, 1.0) for other in range(row)])}

    def _given(self, fit: Fit, rows: np.ndarray, inputs: Sequence[Any]) -> Given:
        """What is active while ``fit.module`` trains on ``inputs[rows]``."""
        bank = self.tools.bank
        ones = torch.ones(bank.count + 1, device=self._device)
        return bank.compose(range(bank.count), ones, fit.module)

    def _feature(self, fit: Fit, inputs: Sequence[Any], rows: np.ndarray, training: bool) -> Tensor:
        with self.tools.bank.give(self._given(fit, rows, inputs), training=training):
            return self._pooled(inputs, rows)

    def _logits(self, fit: Fit, pooled: Tensor) -> Tensor:
        logits = fit.head(pooled)
        return logits if self.classes == "seen" else among_task(fit, logits)
