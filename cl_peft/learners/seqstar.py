r"""SEQ* (Zheng et al. 2023, arXiv:2312.07887): sequential training, repaired.

(W, F) The first task trains module and head (warm-up); then the module is frozen for good. (C) The
head is cosine-linear without bias, and rows are frozen when their task ends:

.. math:: z_c = s \, \frac{f}{|f|} \cdot \frac{w_c}{|w_c|}

After the warm-up, and in every later task, the rows of the task's new classes are trained alone, by
cross-entropy over all classes seen so far. Old rows take part in the softmax, as constants: the
official code's loss. (P) Optionally rows exist for all classes of the stream from the start; those
to come are in the softmax, and are trained, too. A prediction is by rows of classes seen.

At test time one module and one widening head answer for all tasks. The head's stored rows are
:math:`s w_c / |w_c|`. Stored besides: with (P), rows of classes to come.

Defaults of the official code (classifier.py, and SEQ_warm_fix.yaml for BERT): :math:`s = 1`, no
pre-allocation (SEQ_pre_warm_fix.yaml: with), warm-up with cross-entropy. There the warm-up has 3
epochs of its own, and the head 5 epochs of batches of 4; here the warm-up has the trainer's epochs,
and a head alone 40, which with batches of 32 is as many steps. With fewer, rows that started at
random do not reach the cosines of the older ones, and new classes lose to old ones. A task without
new classes trains nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from cl_peft.learners.base import Fit, Tools
from cl_peft.learners.probe import Probe
from cl_peft.learners.shared import SharedModule
from cl_peft.modules.bank import Route
from cl_peft.modules.head import Head
from cl_peft.store import require
from cl_peft.streams.base import Task
from cl_peft.training import generator

_FUTURE = 10**6  # another number than any task's


class SeqStar(SharedModule, Probe):
    """A module of the first task, and a cosine head whose old rows are frozen.

    Args:
        scale: ``s``.
        preallocate: Whether rows of all classes exist from the start; the number of classes of the
            stream must then be known.
        head_epochs: Epochs of a head alone.
    """

    def __init__(
        self,
        scale: PositiveFloat = 1.0,
        preallocate: bool = False,
        head_epochs: PositiveInt = 40,
    ) -> None:
        self.scale, self.preallocate, self.head_epochs = scale, preallocate, head_epochs

    def start(self, tools: Tools) -> None:
        """Rows for classes to come, if they are asked for."""
        super().start(tools)
        self.future: Tensor | None = None
        if self.preallocate:
            every = tuple(range(self.tools.n_classes))
            random = generator(self.tools.seeds.init, _FUTURE)
            head = Head.fresh(every, self.tools.backbone.width, random, self._device)
            self.future = head.weight.detach()

    def learn(self, task: Task) -> None:
        """Warm up on the first task; train the rows of new classes."""
        if self.units:
            module = self.tools.bank.get(0)
            old = self.units[self._newest].head
            head = old.widen(task.classes, generator(self.tools.seeds.init, task.index))
        else:
            module, head = self._fresh(task)
            old = Head(head.weight[:0], head.bias[:0], ())
        new = list(head.classes[len(old.classes) :])
        if not new:
            self.report = None
            return self._keep(task.index, module, head)
        head.bias.requires_grad_(False)
        later = [c for c in range(self.tools.n_classes) if c not in head.classes]
        extra = {}
        if self.future is not None:
            head.weight.data[len(old.classes) :] = self.future[new]
            extra = {"future": self.future[later].requires_grad_(True)}
        if not self.units:
            self._fit(task, module, head, task.train, task.validation, extra)
        known = torch.arange(len(old.classes), device=self._device)
        head.weight.register_hook(lambda grad: grad.index_fill(0, known, 0.0))
        self._fit_head(task, module, head, self.head_epochs, extra)
        rows = self.scale * normalize(head.weight.detach()[len(old.classes) :])
        weight = torch.cat([old.weight.detach(), rows])  # old rows to the bit
        if self.future is not None:
            self.future = self.future.clone()
            self.future[later] = extra["future"].detach()
        self._keep(task.index, module, Head(weight, torch.zeros_like(head.bias), head.classes))

    def state(self) -> dict[str, Tensor]:
        """Rows of all classes, as they were last trained while they were still to come."""
        return {} if self.future is None else {"future": self.future}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """The inverse of :meth:`state`."""
        require(state, {"future"} if self.preallocate else set(), "learner=seqstar")
        self.future = state["future"].to(self._device) if self.preallocate else None

    def _loss(self, fit: Fit, rows: np.ndarray) -> Tensor:
        feature = self._feature(fit, fit.train.inputs, rows, training=True)
        logits = self._logits(fit, feature)
        if "future" in fit.extra:
            later = self.scale * feature @ normalize(fit.extra["future"]).T
            logits = torch.cat([logits, later], dim=1)
        return cross_entropy(logits, fit.targets(rows))

    def _feature(self, fit: Fit, inputs: Sequence[Any], rows: np.ndarray, training: bool) -> Tensor:
        return normalize(super()._feature(fit, inputs, rows, training))

    def _logits(self, fit: Fit, pooled: Tensor) -> Tensor:
        return self.scale * pooled @ normalize(fit.head.weight).T

    def _evaluated(
        self, inputs: Sequence[Any], route: Callable[[np.ndarray], Route | None], title: str
    ) -> Iterator[tuple[np.ndarray, Tensor]]:
        for rows, pooled in super()._evaluated(inputs, route, title):
            yield rows, normalize(pooled.float())
