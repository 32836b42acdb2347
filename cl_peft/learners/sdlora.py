r"""SD-LoRA: magnitude and direction apart (Wu et al. 2025, arXiv:2501.13198, section 3.2).

Finished modules keep their direction for ever; their magnitudes are learned again, together with
the new module, on each task's data:

.. math::
    h(x) = W x + b + s \Big( \sum_{k < t} \alpha_k \frac{B_k}{\|B_k\|_F} \frac{A_k}{\|A_k\|_F}
           + \alpha_t B_t A_t \Big) x

with cross-entropy alone as the loss. One scalar :math:`\alpha_k` per task, shared by all sites.
Shapes: ``A (r, in)``, ``B (out, r)``. At test time all are summed, by the latest magnitudes.

In the bank, row 0 is the newest module as it was learned, ``alpha_t`` multiplied into ``B``; row
``k`` is the direction of task k. Stored: module and head per task, from which directions follow,
and the latest magnitudes (state). Source: backbone/lora.py of github.com/WuYichen-97/SD-Lora-CL,
where magnitudes start at 0.8 with every task (``restart=constant``). The variants with falling
ranks and with distilled directions (RR, KD) are not here.

Both factors are divided by their Frobenius norms, as in that code, to which 0.8 belongs: 1 is then
about the size that the product of the norms has after training, while that of ``B A`` is smaller.
The paper's equation 4 divides the product, the newest one too, and its magnitudes start at 1.
Not in that code: ``restart=keep`` starts where the last task ended (the newest at its own size,
averaged over sites), so that a task begins from nearly the model that the last one left.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from pydantic import PositiveFloat
from torch import Tensor

from cl_peft.learners.base import Fit
from cl_peft.learners.summed import Summed
from cl_peft.modules.bank import Given, Module
from cl_peft.modules.base import Params
from cl_peft.modules.head import Head
from cl_peft.store import require
from cl_peft.streams.base import Task


class SDLoRA(Summed):
    """A module per task; old ones as unit directions with magnitudes that go on learning.

    Args:
        magnitude: Where magnitudes start.
        restart: Old magnitudes start every task at this ``constant``, or ``keep`` their values.
        common: See :class:`~cl_peft.learners.summed.Summed`.
    """

    def __init__(
        self,
        magnitude: PositiveFloat = 0.8,
        restart: Literal["constant", "keep"] = "constant",
        **common: Any,  # noqa: ANN401
    ) -> None:
        super().__init__(**common)
        self.magnitude, self.restart = magnitude, restart
        self.magnitudes = torch.zeros(0)  # of the directions beside the newest module

    def learn(self, task: Task) -> None:
        """Train a new module, its magnitude, and those of all directions."""
        module, head = self._begin(task)
        magnitudes = self._start().to(self._device).requires_grad_(True)
        self._fit(task, module, head, task.train, task.validation, {"magnitudes": magnitudes})
        *_, own = magnitudes.detach()
        self.magnitudes = magnitudes.detach().cpu()[:-1]
        self._keep(
            task.index, {s: {**p, "B": p["B"].detach() * own} for s, p in module.items()}, head
        )

    def _start(self) -> Tensor:
        """Magnitudes of all directions, and of a new module, when a task begins."""
        bank = self.tools.bank
        start = torch.full((max(1, bank.count),), self.magnitude)
        if self.restart == "keep" and bank.count:
            newest = torch.stack([size(params) for params in bank.get(0).values()]).mean()
            start[:-1] = torch.cat([self.magnitudes, newest.cpu()[None]])
        return start

    def _given(self, fit: Fit, rows: np.ndarray, inputs: Sequence[Any]) -> Given:
        bank = self.tools.bank
        return bank.compose(range(1, bank.count), fit.extra["magnitudes"], fit.module)

    def _keep(self, task: int, module: Module, head: Head) -> None:
        """Make the module row 0, and append its direction."""
        bank = self.tools.bank
        if bank.count:
            bank.replace(0, module)
        else:
            bank.add(module)
        bank.add({site: direction(params) for site, params in module.items()})
        self._name(task, head)

    def _name(self, task: int, head: Head) -> None:
        others = [(row + 1, float(weight)) for row, weight in enumerate(self.magnitudes)]
        self.units = {task: self._unit(0, head, others)}

    def state(self) -> dict[str, Tensor]:
        """Magnitudes of the directions beside the newest module."""
        return {"magnitudes": self.magnitudes}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """The inverse of :meth:`state`."""
        require(state, {"magnitudes"}, "learner=sdlora")
        self.magnitudes = state["magnitudes"].cpu()
        ((task, unit),) = self.units.items()
        self._name(task, unit.head)


def size(params: Params) -> Tensor:
    """Product of the Frobenius norms of ``A`` and ``B``."""
    return params["A"].detach().norm() * params["B"].detach().norm()


def direction(params: Params) -> Params:
    """The module with factors of norm 1; a factor that is zero stays so."""
    return {n: t.detach() / t.detach().norm().clamp_min(1e-30) for n, t in params.items()}
