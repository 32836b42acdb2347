"""Learners that can train a head alone, on the features of a module that no longer changes."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cl_peft.batching import by_length
from cl_peft.learners.base import Fit, Learner
from cl_peft.modules.bank import Module
from cl_peft.modules.head import Head
from cl_peft.streams.base import Task


class Probe(Learner):
    """Features of a finished module are computed once per task, not once per epoch.

    So epochs of a head cost next to nothing, and it can have as many as it needs.
    """

    def _fit_head(
        self,
        task: Task,
        module: Module,
        head: Head,
        epochs: int,
        extra: dict[str, Tensor] | None = None,
    ) -> None:
        """Train a head on a task whose module stays as it is, for epochs of its own."""
        self._fixed = {
            id(split.inputs): self._through(module, split.inputs)
            for split in (task.train, task.validation)
        }
        tools, trainer = self.tools, copy.copy(self.tools.trainer)
        trainer.epochs = epochs
        self.tools = dataclasses.replace(tools, trainer=trainer)
        try:
            self._fit(task, {}, head, task.train, task.validation, extra)
        finally:
            self.tools = tools
            del self._fixed

    @torch.no_grad()
    def _through(self, module: Module, inputs: Sequence[Any]) -> Tensor:
        """Pooled features ``(N, H)`` of all inputs."""
        out = torch.zeros(len(inputs), self.tools.backbone.width, device=self._device)
        lengths = self.tools.features.encoded(inputs).lengths
        with self.tools.bank.use(module):
            for rows in by_length(lengths, self.tools.trainer.eval_batch_size):
                index = torch.from_numpy(rows).to(self._device)
                out[index] = self._pooled(inputs, rows).float()
        return out

    def _feature(self, fit: Fit, inputs: Sequence[Any], rows: np.ndarray, training: bool) -> Tensor:
        known: dict[int, Tensor] = getattr(self, "_fixed", {})
        if id(inputs) in known:
            return known[id(inputs)][torch.from_numpy(rows).to(self._device)]
        return super()._feature(fit, inputs, rows, training)
