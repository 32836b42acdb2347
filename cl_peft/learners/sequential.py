"""Sequential fine-tuning: one module trained on, task after task; the lower bound.

The head widens by each task's new classes, and the loss is cross-entropy over all classes seen so
far, with examples of the current task only.
"""

from __future__ import annotations

from cl_peft.learners.shared import SharedModule
from cl_peft.streams.base import Task
from cl_peft.training import generator


class Sequential(SharedModule):
    """One module for all tasks, without any protection against forgetting."""

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
        self._keep(task.index, module, head)
