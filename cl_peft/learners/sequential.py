"""Sequential fine-tuning: one module trained on, task after task; the lower bound.

The head widens by each task's new classes, and the loss is cross-entropy over all classes seen so
far, with examples of the current task only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

from torch import Tensor

from cl_peft.learners.base import Learner
from cl_peft.streams.base import Task
from cl_peft.training import generator


class Sequential(Learner):
    """One module for all tasks, without any protection against forgetting."""

    uses_router: ClassVar[bool] = False
    keeps: ClassVar[Literal["all", "last"]] = "last"

    def learn(self, task: Task) -> None:
        """Train the one module on."""
        if not self.units:
            module, head = self._fresh(task)
        else:
            stored = self.tools.bank.get(0)
            module = {
                s: {n: t.detach().clone().requires_grad_(True) for n, t in params.items()}
                for s, params in stored.items()
            }
            old = self.units[self._newest].head
            head = old.widen(task.classes, generator(self.tools.seeds.init, task.index))
        self._fit(task, module, head, task.train, task.validation)
        if self.tools.bank.count:
            self.tools.bank.replace(0, module)
        else:
            self.tools.bank.add(module)
        self.units = {task.index: self._unit(0, head)}

    def unit_for(self, task: int) -> int | None:
        """The one unit there is."""
        return self._newest if self.units else None

    def restore(self, snapshots: Mapping[int, dict[str, Tensor]], seen: Sequence[Task]) -> None:
        """Put the last module back."""
        last = seen[-1].index
        module, head = self._load(snapshots[last], last)
        self.tools.bank.add(module)
        self.units = {last: self._unit(0, head)}
