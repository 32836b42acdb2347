r"""O-LoRA: LoRA in orthogonal subspaces (Wang et al. 2023, arXiv:2310.14152).

While task t trains, ``A_t`` is pushed out of the row spaces of the finished ``A_k``:

.. math::
    L = \mathrm{CE} + \lambda_1 \sum_{sites} \sum_{k < t} \sum_{i, j} |A_t A_k^T|_{ij}
      + \lambda_2 \sum_{sites} (\|A_t\|_F + \|B_t\|_F)

Shapes: ``A (r, in)``, ``B (out, r)``. At test time all modules are summed. Stored per task: module
and head. Source of the loss: ``UIETrainer.training_step`` of github.com/cmnfriend/O-LoRA, which
sums absolute values and does not square the norms; defaults: its scripts/order_1.sh (``lamda_1
0.5``, ``lamda_2 0``).

Differences: the official model generates label words, which needs no classifier; here one head
widens, by default trained among the task's own classes. The first term grows with sites, tasks and
``r^2``; where it starts above ``trainer.diverged_above``, raise that.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from pydantic import NonNegativeFloat
from torch import Tensor

from cl_peft.learners.base import Fit
from cl_peft.learners.summed import Summed


class OLoRA(Summed):
    """A module per task, summed, with its ``A`` orthogonal to those before.

    Args:
        orthogonal: ``lambda_1``.
        decay: ``lambda_2``, on the norms of the new module.
        common: See :class:`~cl_peft.learners.summed.Summed`.
    """

    def __init__(
        self,
        orthogonal: NonNegativeFloat = 0.5,
        decay: NonNegativeFloat = 0.0,
        **common: Any,  # noqa: ANN401
    ) -> None:
        super().__init__(**common)
        self.orthogonal, self.decay = orthogonal, decay

    def _loss(self, fit: Fit, rows: np.ndarray) -> Tensor:
        loss = super()._loss(fit, rows)
        if self.orthogonal and self.tools.bank.count:
            old = [self.tools.bank.get(row) for row in range(self.tools.bank.count)]
            for site, params in fit.module.items():
                before = torch.cat([module[site]["A"] for module in old])  # ((t - 1) r, in)
                loss = loss + self.orthogonal * (before @ params["A"].T).abs().sum()
        if self.decay:
            norms = [t.norm() for params in fit.module.values() for t in params.values()]
            loss = loss + self.decay * torch.stack(norms).sum()
        return loss
