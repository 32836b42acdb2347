r"""Dark experience replay, DER++ (Buzzega et al. 2020, arXiv:2004.07211).

.. math::
    L = \mathrm{CE}(B)
      + \alpha \, \overline{(z_c(x') - z'_c)^2}
      + \beta \, \mathrm{CE}(M'')

with two independent draws M' and M'' from a reservoir buffer that holds, for each example, the
logits :math:`z'` that the model in training gave when the example was offered. The mean runs over
examples and over the classes that the head knew at that time; a class that came later has no
logit there. At test time one module and one widening head answer for all tasks.

Stored: positions of the buffer's examples and their logits ``(M, classes)`` (``buffer.py``).
Defaults: :math:`\alpha = .1, \beta = .5` and a buffer of 200, mammoth's for sequential CIFAR-10.
In mammoth the head has all classes from the start, so its mean also runs over classes to come.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from pydantic import NonNegativeFloat
from torch import Tensor
from torch.nn.functional import cross_entropy

from cl_peft.learners.base import Fit
from cl_peft.learners.buffer import Rehearsal


class DERpp(Rehearsal):
    """Replay of labels and of logits.

    Args:
        alpha: Weight of the logits.
        beta: Weight of the labels.
        common: See :class:`~cl_peft.learners.buffer.Rehearsal`.
    """

    def __init__(
        self,
        alpha: NonNegativeFloat = 0.1,
        beta: NonNegativeFloat = 0.5,
        **common: Any,  # noqa: ANN401
    ) -> None:
        super().__init__(**common)
        self.alpha, self.beta = alpha, beta

    def _loss(self, fit: Fit, rows: np.ndarray) -> Tensor:
        dark, _, stored = self._replayed(fit)
        labelled, labels, _ = self._replayed(fit)
        new, old, again = self._answers(fit, rows, dark, labelled)
        loss = cross_entropy(new, fit.targets(rows))
        if len(dark):
            known = ~stored.isnan()
            wrong = (old[:, : stored.shape[1]].float() - stored)[known]
            loss = loss + self.alpha * wrong.square().mean()
            loss = loss + self.beta * cross_entropy(again, labels)
        self._filling.offer(fit.task.index, rows, new.detach().float().cpu())
        return loss
