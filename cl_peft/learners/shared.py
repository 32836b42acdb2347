"""What learners with a single module have in common: one unit, replaced after every task."""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor

from cl_peft.learners.base import Learner
from cl_peft.modules.bank import Module
from cl_peft.modules.head import Head
from cl_peft.streams.base import Task


class SharedModule(Learner):
    """One module and one widening head answer for all tasks, so no router is consulted."""

    uses_router: ClassVar[bool] = False
    keeps: ClassVar[Literal["all", "last"]] = "last"

    def unit_for(self, task: int) -> int | None:
        """The one unit there is, if there is one."""
        return self._newest if self.units else None

    def recall(self, task: Task, tensors: dict[str, Tensor]) -> None:
        """Put the module back, if it was kept."""
        if tensors:
            self._keep(task.index, *self._load(tensors, task.index))

    def _keep(self, task: int, module: Module, head: Head) -> None:
        """Make this the one unit, in row 0 of the bank."""
        if self.tools.bank.count:
            self.tools.bank.replace(0, module)
        else:
            self.tools.bank.add(module)
        self.units = {task: self._unit(0, head)}
