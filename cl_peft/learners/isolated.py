"""Isolated: one module and one head per task, trained alone and never touched again.

With the oracle router forgetting is exactly zero, since nothing that answers for a finished task
ever changes; what is lost in class-incremental use, routing loses.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor

from cl_peft.learners.base import Later, Learner, Unit
from cl_peft.streams.base import Task


class Isolated(Learner):
    """One module per task."""

    history: ClassVar[Literal["task", "stream"]] = "task"

    def learn(self, task: Task) -> None:
        """Grow, train and freeze a module."""
        module, head = self._fresh(task)
        self._fit(task, module, head, task.train, task.validation)
        self.units[task.index] = self._unit(self.tools.bank.add(module), head)

    def recall(self, task: Task, tensors: dict[str, Tensor]) -> None:
        """Put the module back into the bank."""
        module, head = self._load(tensors, task.index)
        self.units[task.index] = self._unit(self.tools.bank.add(module), head)

    def recall_later(self, task: Task, stored: Later) -> None:
        """Leave the module in its file until a sample is routed to it."""
        head = self._load_head(stored.head, task.index).frozen()
        row = self.tools.bank.add_later(lambda: self._load(stored.read(), task.index)[0])
        self.units[task.index] = Unit(row, head, stored.digest)
