"""Frozen: no module at all; a linear head per task on frozen features."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from cl_peft.learners.base import Learner
from cl_peft.streams.base import Task


class Frozen(Learner):
    """Linear probes: what the backbone knows without any module."""

    uses_module: ClassVar[bool] = False
    needs_features: ClassVar[bool] = True

    def learn(self, task: Task) -> None:
        """Train a head on cached features."""
        module, head = self._fresh(task)
        self._fit(task, module, head, task.train, task.validation)
        self.units[task.index] = self._unit(-1, head)

    def restore(self, snapshots: Mapping[int, dict[str, Tensor]], seen: Sequence[Task]) -> None:
        """Put all heads back."""
        for task in seen:
            _, head = self._load(snapshots[task.index], task.index)
            self.units[task.index] = self._unit(-1, head)

    @torch.no_grad()
    def logits(self, inputs: Sequence[Any], units: np.ndarray, title: str = "") -> Tensor:
        """Heads on cached features; no backbone pass."""
        features = self.tools.features.features(inputs).to(self._device)
        return self._answer(features, units)

    def _pooled(self, inputs: Sequence[Any], rows: np.ndarray) -> Tensor:
        return self.tools.features.features([inputs[r] for r in rows]).to(self._device)
