"""Joint training: a fresh module on all data seen so far; the upper bound.

It keeps every example, which no continual learner may; it exists to be compared with.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
from torch import Tensor

from cl_peft.learners.shared import SharedModule
from cl_peft.modules.head import Head
from cl_peft.streams.base import Split, Task
from cl_peft.training import generator


class Joint(SharedModule):
    """One module, trained from scratch on the union of all tasks seen.

    Args:
        when: ``every_task``: after each task, which gives every cell of the accuracy matrix and the
            reference for intransigence, at T/2 times the cost; ``last``: only after the last task,
            and the other rows stay empty.
    """

    keeps_examples: ClassVar[bool] = True

    def __init__(self, when: Literal["every_task", "last"] = "every_task") -> None:
        self.when = when
        self._seen: list[Task] = []

    def learn(self, task: Task) -> None:
        """Train a fresh module on everything."""
        self._seen.append(task)
        self.units, self.report = {}, None
        if self.when == "last" and task.index + 1 < self.tools.n_tasks:
            return
        random = generator(self.tools.seeds.init, task.index)
        classes = tuple(dict.fromkeys(c for t in self._seen for c in t.classes))
        module = self.tools.bank.fresh(random, self.tools.words(classes))
        head = Head.fresh(classes, self.tools.backbone.width, random, self._device)
        train = _union([t.train for t in self._seen])
        self._fit(task, module, head, train, _union([t.validation for t in self._seen]))
        self._keep(task.index, module, head)

    def recall(self, task: Task, tensors: dict[str, Tensor]) -> None:
        """Remember the task; put the module back if there is one."""
        self._seen.append(task)
        self.units = {}
        super().recall(task, tensors)


def _union(splits: list[Split]) -> Split:
    return Split(
        np.concatenate([s.rows for s in splits]),
        [item for s in splits for item in s.inputs],
        np.concatenate([s.labels for s in splits]),
    )
