r"""Experience replay (Chaudhry et al. 2019, arXiv:1902.10486; Ratcliff 1990).

.. math:: L = \frac{1}{|B| + |M|} \sum_{(x, y) \in B \cup M} -\log p(y \mid x)

with the step's batch B and as many examples M drawn from a reservoir buffer; cross-entropy over all
classes seen so far. At test time one module and one widening head answer for all tasks.

Stored: positions of the buffer's examples (``buffer.py``). Defaults: a buffer of 200, the smallest
of Buzzega et al. (2020, arXiv:2004.07211, table 2), and as many replayed examples as new ones,
mammoth's ``minibatch_size``. Chaudhry et al. train each example once; here a task has the
trainer's epochs, and its examples are offered in each of them, as in mammoth.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from cl_peft.learners.base import Fit
from cl_peft.learners.buffer import Rehearsal


class Replay(Rehearsal):
    """Cross-entropy on new and buffered examples together."""

    def _loss(self, fit: Fit, rows: np.ndarray) -> Tensor:
        inputs, labels, _ = self._replayed(fit)
        logits = torch.cat(self._answers(fit, rows, inputs))
        self._filling.offer(fit.task.index, rows)
        targets = torch.cat([fit.targets(rows), labels])
        return torch.nn.functional.cross_entropy(logits, targets)
