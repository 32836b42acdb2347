r"""Progressive Prompts (Razdaibiedina et al. 2023, ICLR, arXiv:2301.12314).

Task t trains a prompt ``P_t`` before all earlier ones, which are fixed, and a head of its own:

.. math:: L = \mathrm{CE}(h_t(f([P_t ; P_{t-1} ; ... ; P_1 ; x])), y)

The unit of task t is its head and prompts 1 to t, so whoever chooses a task (the paper: an oracle)
chooses how many prompts stand before a sample. With the oracle nothing is forgotten, and a later
task starts from what earlier prompts found. The sequence grows by ``module.tokens`` per task.

Stored per task: its prompt ``(P, H)`` and head. With ``module=prefix`` the keys and values of all
tasks stand side by side at every layer. Default: prompts of 10 tokens (``prefix_len`` in
T5_codebase/train_t5_cl.py of github.com/arazd/ProgressivePrompts), so ``module.tokens=10``.

Differences: the residual network through which the paper's T5 prompts train is left out. The paper
generates label words with T5; here, as in its BERT experiments, each task has a classifier.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from cl_peft.learners.base import Fit, Learner
from cl_peft.modules.bank import Active, Given, Module
from cl_peft.modules.head import Head
from cl_peft.streams.base import Task


class Progressive(Learner):
    """A prompt per task, before those of all earlier tasks."""

    modules: ClassVar[tuple[str, ...]] = ("prompt", "prefix")

    def learn(self, task: Task) -> None:
        """Train a new prompt before the finished ones."""
        module, head = self._fresh(task)
        self._fit(task, module, head, task.train, task.validation)
        self._keep(task.index, module, head)

    def recall(self, task: Task, tensors: dict[str, Tensor]) -> None:
        """Put the prompt back into the bank."""
        self._keep(task.index, *self._load(tensors, task.index))

    @property
    def at_once(self) -> int:
        """The prompts of all tasks."""
        return self.tools.n_tasks

    def _keep(self, task: int, module: Module, head: Head) -> None:
        row = self.tools.bank.add(module)
        self.units[task] = self._unit(row, head, [(other, 1.0) for other in reversed(range(row))])

    def _feature(self, fit: Fit, inputs: Sequence[Any], rows: np.ndarray, training: bool) -> Tensor:
        with self.tools.bank.give(self._given(fit.module, len(rows)), training=training):
            return self._pooled(inputs, rows)

    def _given(self, module: Module, batch: int) -> Given:
        """The prompt in training, then finished ones, newest first: the order a route gives."""
        bank = self.tools.bank
        earlier = [bank.get(row) for row in reversed(range(bank.count))]
        given = {}
        for site in bank.sites:
            own = bank.method.fold(site, module[site.name])
            stacks = {
                n: torch.stack([t, *(m[site.name][n] for m in earlier)]) for n, t in own.items()
            }
            wide = {n: t.expand(batch, *t.shape) for n, t in stacks.items()}
            given[site.name] = Active(wide, torch.ones(batch, bank.count + 1, device=self._device))
        return given
