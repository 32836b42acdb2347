"""Sequential fine-tuning: one module trained on, task after task; the lower bound.

The head widens by each task's new classes, and the loss is cross-entropy over all classes seen so
far, with examples of the current task only. With ``classes=task`` the loss compares the task's own
classes alone, so that the head's rows for old ones keep their values. Several published methods
train like that; what they add is to be measured against this variant.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from cl_peft.learners.base import Fit, among_task, trainable
from cl_peft.learners.shared import SharedModule
from cl_peft.streams.base import Task
from cl_peft.training import generator


class Sequential(SharedModule):
    """One module for all tasks, without any protection against forgetting.

    Args:
        classes: Classes that the loss compares: all ``seen``, or those of the ``task``.
    """

    classes: Literal["seen", "task"] = "seen"  # for subclasses with options of their own

    def __init__(self, classes: Literal["seen", "task"] = "seen") -> None:
        self.classes = classes

    def learn(self, task: Task) -> None:
        """Train the one module on."""
        if not self.units:
            module, head = self._fresh(task)
        else:
            module = trainable(self.tools.bank.get(0))
            old = self.units[self._newest].head
            head = old.widen(task.classes, generator(self.tools.seeds.init, task.index))
        self._fit(task, module, head, task.train, task.validation)
        self._keep(task.index, module, head)

    def _logits(self, fit: Fit, pooled: Tensor) -> Tensor:
        logits = fit.head(pooled)
        return logits if self.classes == "seen" else among_task(fit, logits)
