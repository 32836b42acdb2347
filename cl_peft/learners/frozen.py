"""Frozen: no module at all; a linear head per task on frozen features."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
from torch import Tensor

from cl_peft.learners.base import Learner
from cl_peft.modules.bank import Route
from cl_peft.streams.base import Task


class Frozen(Learner):
    """Linear probes: what the backbone knows without any module."""

    uses_module: ClassVar[bool] = False
    needs_features: ClassVar[bool] = True
    history: ClassVar[Literal["task", "stream"]] = "task"

    def learn(self, task: Task) -> None:
        """Train a head on cached features."""
        module, head = self._fresh(task)
        self._fit(task, module, head, task.train, task.validation)
        self.units[task.index] = self._unit(-1, head)

    def recall(self, task: Task, tensors: dict[str, Tensor]) -> None:
        """Put the head back."""
        _, head = self._load(tensors, task.index)
        self.units[task.index] = self._unit(-1, head)

    def _evaluated(
        self, inputs: Sequence[Any], route: Callable[[np.ndarray], Route | None], title: str
    ) -> Iterator[tuple[np.ndarray, Tensor]]:
        """Cached features; no backbone pass."""
        yield np.arange(len(inputs)), self.tools.features.features(inputs).to(self._device)

    def _pooled(self, inputs: Sequence[Any], rows: np.ndarray) -> Tensor:
        return self.tools.features.features([inputs[r] for r in rows]).to(self._device)
