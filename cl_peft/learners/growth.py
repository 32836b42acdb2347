r"""Growth on demand, after SEMA (Wang et al. 2024, arXiv:2403.18886).

Before a task is learned, its frozen features are compared with those that each existing module was
trained on. A module m remembers the mean :math:`\mu` and the first k principal directions U of its
task's features, and with them reconstructs x; its record is the mean and standard deviation of the
error on its own task:

.. math::
    e_m(x) = |(I - U U^T)(x - \mu)|, \qquad
    z_m = \frac{1}{N} \sum_n \frac{e_m(x_n) - \mathrm{mean}_m}{\mathrm{std}_m}

If :math:`\min_m z_m` is at most the threshold, the task is explained: it reuses the best module,
frozen, and trains a new head alone. Else it grows a module. The record is cross-fitted (each half
of the examples by the directions of the other), since errors on the fitted examples are too small.

Each task has a unit, so any router chooses among them; several units may share a module. Loss:
cross-entropy over the task's own classes. Stored besides units: :math:`\mu` and U of every module
``(M, H)``, ``(M, k, H)``, its record, and each task's module and z. The decision is in run.log.

SEMA has an adapter and an autoencoder at each layer, decides per layer on the mean :math:`|z|` of a
batch, and mixes adapters by a trained router. Here the whole module is grown or not; PCA, the best
linear autoencoder, stands for the trained one; z keeps its sign, since features that are
reconstructed better than usual are no news. The threshold of one standard deviation and k are ours:
on MiniLM's features of CLINC150, three tasks of 10 intents each coming twice, z lies from -.2 to
-.1 for a task's second visit and from 1.6 to 2.4 for another task.
"""

from __future__ import annotations

import logging
import math
from typing import ClassVar

import torch
from pydantic import PositiveInt
from torch import Tensor

from cl_peft.learners.base import Tools, Unit
from cl_peft.learners.probe import Probe
from cl_peft.modules.bank import flatten
from cl_peft.store import require
from cl_peft.streams.base import Task

log = logging.getLogger(__name__)


class Growth(Probe):
    """A module per task, unless an existing one's task looked the same.

    Args:
        threshold: Largest ``z`` at which a task counts as explained.
        components: ``k``.
        head_epochs: Epochs of a head alone, where a module is reused.
    """

    needs_features: ClassVar[bool] = True

    def __init__(
        self,
        threshold: float = 1.0,
        components: PositiveInt = 32,
        head_epochs: PositiveInt = 40,
    ) -> None:
        self.threshold, self.components, self.head_epochs = threshold, components, head_epochs

    def start(self, tools: Tools) -> None:
        """No module, no statistics."""
        super().start(tools)
        width = self.tools.backbone.width
        self.mean = torch.zeros(0, width, dtype=torch.float64)
        self.basis = torch.zeros(0, self.components, width, dtype=torch.float64)
        self.record = torch.zeros(0, 2, dtype=torch.float64)  # mean, std of the error
        self.decisions: list[tuple[int, float]] = []  # by task: row of the bank, smallest z

    def learn(self, task: Task) -> None:
        """Decide; then train a module and a head, or a head alone."""
        features = self.tools.features.features(task.train.inputs).double()
        z = self.novelty(features)
        best, smallest = (int(z.argmin()), float(z.min())) if len(z) else (-1, math.nan)
        module, head = self._fresh(task)
        if smallest <= self.threshold:
            self._fit_head(task, self.tools.bank.get(best), head, self.head_epochs)
            row = best
        else:
            self._fit(task, module, head, task.train, task.validation)
            row = self.tools.bank.add(module)
            self._remember(features)
        self.units[task.index] = self._unit(row, head)
        self.decisions.append((row, smallest))
        self._say()

    def recall(self, task: Task, tensors: dict[str, Tensor]) -> None:
        """Put the module back into the bank, or the head beside the module that it reuses."""
        rest = dict(tensors)
        row = rest.pop("head.row", None)
        if row is None:
            module, head = self._load(rest, task.index)
            row = torch.tensor(self.tools.bank.add(module))
        else:
            shared = flatten(self.tools.bank.get(int(row)))
            _, head = self._load({**rest, **shared}, task.index)
        self.units[task.index] = self._unit(int(row), head)

    def snapshot(self) -> dict[str, Tensor]:
        """The newest unit; of one that reuses a module, the head and the row of the bank."""
        tensors, unit = super().snapshot(), self.units.get(self._newest)
        if unit is None or not self._reuses(unit):
            return tensors
        own = {name: t for name, t in tensors.items() if name.startswith("head.")}
        return {**own, "head.row": torch.tensor(unit.row)}

    def state(self) -> dict[str, Tensor]:
        """Statistics of every module, and every task's decision."""
        return {
            "mean": self.mean,
            "basis": self.basis,
            "record": self.record,
            "rows": torch.tensor([row for row, _ in self.decisions]),
            "z": torch.tensor([z for _, z in self.decisions], dtype=torch.float64),
        }

    def load_state(self, state: dict[str, Tensor]) -> None:
        """The inverse of :meth:`state`."""
        require(state, {"mean", "basis", "record", "rows", "z"}, "learner=growth")
        self.mean, self.basis, self.record = state["mean"], state["basis"], state["record"]
        self.decisions = list(zip(state["rows"].tolist(), state["z"].tolist(), strict=True))
        self._say()

    def novelty(self, features: Tensor) -> Tensor:
        """``z`` of every module ``(M,)`` for features ``(N, H)``."""
        scores = [
            ((residual(features, mean, basis) - record[0]) / record[1]).mean()
            for mean, basis, record in zip(self.mean, self.basis, self.record, strict=True)
        ]
        return torch.stack(scores) if scores else torch.zeros(0, dtype=torch.float64)

    def _remember(self, features: Tensor) -> None:
        halves = features[::2], features[1::2]
        errors = torch.cat(
            [
                residual(tested, *directions(fitted, self.components))
                for fitted, tested in (halves, halves[::-1])
                if len(fitted) and len(tested)
            ]
            or [torch.zeros(1, dtype=torch.float64)]
        )
        mean, basis = directions(features, self.components)
        spread = errors.std(correction=0).clamp_min(1e-12)
        self.mean = torch.cat([self.mean, mean[None]])
        self.basis = torch.cat([self.basis, basis[None]])
        self.record = torch.cat([self.record, torch.stack([errors.mean(), spread])[None]])

    def _reuses(self, unit: Unit) -> bool:
        return any(u.row == unit.row for t, u in self.units.items() if t < self._newest)

    def _say(self) -> None:
        """Log the newest decision."""
        row, z = self.decisions[-1]
        task, new = len(self.decisions), all(r != row for r, _ in self.decisions[:-1])
        if math.isnan(z):
            log.info("task %d: first, grows module %d", task, row + 1)
        else:
            did = "grows" if new else "reuses"
            log.info("task %d: z = %.2f, threshold %g: %s module %d",
                     task, z, self.threshold, did, row + 1)  # fmt: skip


def directions(features: Tensor, components: int) -> tuple[Tensor, Tensor]:
    """Mean ``(H,)`` and principal directions ``(k, H)`` of ``(N, H)``; zeros if there are fewer."""
    mean = features.mean(0)
    found = torch.linalg.svd(features - mean, full_matrices=False)[2][:components]
    return mean, torch.nn.functional.pad(found, (0, 0, 0, components - len(found)))


def residual(features: Tensor, mean: Tensor, basis: Tensor) -> Tensor:
    """Reconstruction error ``(N,)`` of ``(N, H)``."""
    centred = features - mean
    return (centred - centred @ basis.T @ basis).norm(dim=1)
