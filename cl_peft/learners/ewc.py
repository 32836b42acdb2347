r"""Elastic weight consolidation, in its online form.

Kirkpatrick et al. 2017 (arXiv:1612.00796, equation 3); Schwarz et al. 2018 (arXiv:1805.06370).

.. math::
    L = \mathrm{CE} + \frac{\lambda}{2} \sum_i F_i (\theta_i - \theta^*_i)^2, \qquad
    F \leftarrow \gamma F + \frac{1}{N} \sum_n
        \Big(\frac{\partial \log p(y_n \mid x_n)}{\partial \theta}\Big)^2

:math:`\theta` are the values of the module and of the head's rows that existed before,
:math:`\theta^*` theirs after the last task. F is the diagonal of the empirical Fisher information:
squared gradients of single examples, with their true labels, over the task's training examples,
without dropout. Cross-entropy runs over all classes seen so far. New rows of the head are free. At
test time one module and one widening head answer for all tasks.

Stored: F, as many values as module and head have. The gradients of a batch of examples come from
one backward pass, in which each example has a copy of the module.

Defaults: :math:`\lambda = 5000` as in the code of Zheng et al. (2023, arXiv:2312.07887; EWC.py),
:math:`\gamma = 1` as in all of mammoth's settings. mammoth's ``e_lambda`` has no 1/2, and it
weights each squared gradient by p(y|x).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

import numpy as np
import torch
from pydantic import Field, NonNegativeFloat
from torch import Tensor
from torch.nn.functional import one_hot, pad

from cl_peft.batching import by_length
from cl_peft.learners.base import Fit
from cl_peft.learners.sequential import Sequential
from cl_peft.modules.bank import Active, Given, Module, flatten
from cl_peft.modules.head import Head
from cl_peft.store import require
from cl_peft.streams.base import Task

#: Values that the copies of a module may have together, in one batch.
COPIES = 2**24


class EWC(Sequential):
    """A quadratic penalty on what mattered for earlier tasks.

    Args:
        strength: ``lambda``.
        gamma: What an earlier task's importance keeps when another is learned.
    """

    def __init__(
        self,
        strength: NonNegativeFloat = 5000.0,
        gamma: Annotated[float, Field(ge=0, le=1)] = 1.0,
    ) -> None:
        self.strength, self.gamma = strength, gamma
        self.fisher: dict[str, Tensor] = {}  # as the unit's tensors, without the classes

    def learn(self, task: Task) -> None:
        """Train the module on, then add this task's importance."""
        self._anchor = self._values() if self.units else {}
        super().learn(task)
        new = self._fisher(task)
        for name, old in self.fisher.items():
            grown = [0, 0] * (old.ndim - 1) + [0, len(new[name]) - len(old)]
            new[name] = new[name] + self.gamma * pad(old, grown)
        self.fisher = new

    def state(self) -> dict[str, Tensor]:
        """``F``."""
        return self.fisher

    def load_state(self, state: dict[str, Tensor]) -> None:
        """The inverse of :meth:`state`."""
        require(state, set(self._values()), "learner=ewc")
        self.fisher = {name: tensor.to(self._device) for name, tensor in state.items()}

    def _loss(self, fit: Fit, rows: np.ndarray) -> Tensor:
        loss = super()._loss(fit, rows)
        for name, value in _named(fit.module, fit.head):
            if name in self._anchor:
                anchor = self._anchor[name]
                change = value[: len(anchor)] - anchor  # a head's first rows are the old ones
                loss = loss + self.strength / 2 * (self.fisher[name] * change.square()).sum()
        return loss

    def _values(self) -> dict[str, Tensor]:
        """Values of the unit's module and head."""
        head = self.units[self._newest].head
        return {
            **flatten(self.tools.bank.get(0)),
            "head.weight": head.weight,
            "head.bias": head.bias,
        }

    def _fisher(self, task: Task) -> dict[str, Tensor]:
        """Mean squared gradients of the unit just learned."""
        tools, head = self.tools, self.units[self._newest].head
        values = self._values()
        out = {name: torch.zeros_like(value) for name, value in values.items()}
        module = tools.bank.get(0)
        size = max(1, sum(t.numel() for p in module.values() for t in p.values()))
        batch = max(1, min(tools.trainer.batch_size, COPIES // size))
        labels = head.local(torch.from_numpy(task.train.labels))
        lengths = tools.features.encoded(task.train.inputs).lengths
        for rows in by_length(lengths, batch):
            copies = {
                site: {n: t.expand(len(rows), *t.shape).clone().requires_grad_(True)
                       for n, t in params.items()}
                for site, params in module.items()
            }  # fmt: skip
            with tools.bank.give(self._given(copies, len(rows))):
                pooled = self._pooled(task.train.inputs, rows)
            own = labels[torch.from_numpy(rows)].to(self._device)
            logits = head(pooled)
            logits.log_softmax(1).gather(1, own[:, None]).sum().backward()
            for site, params in copies.items():
                for name, copy in params.items():
                    if copy.grad is not None:
                        out[f"{site}/{name}"] += copy.grad.square().sum(0)
            wrong = (one_hot(own, logits.shape[1]) - logits.detach().softmax(1)).square()
            out["head.weight"] += wrong.T @ pooled.detach().square()
            out["head.bias"] += wrong.sum(0)
        return {name: total / len(task.train) for name, total in out.items()}

    def _given(self, copies: Module, batch: int) -> Given:
        """Each sample with a copy ``(B, ...)`` of the module of its own."""
        given: Given = {}
        for site in self.tools.bank.sites:
            own = copies[site.name]
            derived = [
                self.tools.bank.method.derive(site, {n: t[b] for n, t in own.items()})
                for b in range(batch)
            ]
            more = {n: torch.stack([d[n] for d in derived]) for n in derived[0]}
            params = {n: t.unsqueeze(1) for n, t in {**own, **more}.items()}
            given[site.name] = Active(params, torch.ones(batch, 1, device=self._device))
        return given


def _named(module: Module, head: Head) -> Iterator[tuple[str, Tensor]]:
    for site, params in module.items():
        for name, value in params.items():
            yield f"{site}/{name}", value
    yield "head.weight", head.weight
    yield "head.bias", head.bias
