r"""Learning without forgetting (Li and Hoiem 2016, arXiv:1606.09282, section 3).

.. math::
    L = \mathrm{CE}(z, y) - \alpha \, \frac{1}{|B|} \sum_{x \in B} \sum_{c \in \mathrm{old}}
        \sigma(z'(x) / T)_c \, \log \sigma(z_{\mathrm{old}}(x) / T)_c

:math:`z'` are the logits of the module and head before this task on the new examples, computed once
per task; :math:`\sigma` is the softmax over the classes they know. Cross-entropy runs over all
classes seen so far. At test time one module and one widening head answer for all tasks. Stored:
nothing; the teacher is the stored unit.

Defaults: ``T = 2`` as in the paper, and ``alpha = .5`` as in mammoth's ``lwf.py``. The
paper has a head per task and hence the new classes alone in the cross-entropy; class-incremental
use, as in mammoth, needs all. Left out: their first phase, which trains the new head alone.
"""

from __future__ import annotations

import numpy as np
import torch
from pydantic import NonNegativeFloat, PositiveFloat
from torch import Tensor
from torch.nn.functional import cross_entropy

from cl_peft.learners.base import Fit
from cl_peft.learners.sequential import Sequential
from cl_peft.streams.base import Task


class LwF(Sequential):
    """Distillation of the old classes' answers on new examples.

    Args:
        alpha: Weight of the distillation.
        temperature: ``T``.
    """

    def __init__(self, alpha: NonNegativeFloat = 0.5, temperature: PositiveFloat = 2.0) -> None:
        self.alpha, self.temperature = alpha, temperature

    def learn(self, task: Task) -> None:
        """Ask the teacher once, then train the module on."""
        self._teacher: Tensor | None = None
        if self.units:
            unit = np.full(len(task.train), self._newest)
            answers = self.logits(task.train.inputs, unit, "teacher")
            classes = list(self.units[self._newest].head.classes)
            self._teacher = (answers[:, classes] / self.temperature).softmax(1)
        super().learn(task)

    def _loss(self, fit: Fit, rows: np.ndarray) -> Tensor:
        logits = self._logits(fit, self._feature(fit, fit.train.inputs, rows, training=True))
        loss = cross_entropy(logits, fit.targets(rows))
        if self._teacher is None:
            return loss
        wanted = self._teacher[torch.from_numpy(rows)].to(logits.device)
        old = logits[:, : wanted.shape[1]].float() / self.temperature
        return loss + self.alpha * cross_entropy(old, wanted)
