r"""EASE: expandable subspace ensemble (Zhou et al. 2024, CVPR, arXiv:2403.12030, section 4).

A module per task, trained with a head that is thrown away; each module i is a subspace with the
feature ``f_i(x)``. A class c of task b is a prototype ``p_{c,i} (H,)`` in every subspace: the mean
of its training features for ``i <= b``. In a later subspace n, whose task no longer has the class's
examples, it is synthesised from the new classes j by their likeness in the class's own subspace b
(equations 8 and 9):

.. math:: p_{c,n} = \sum_j \mathrm{softmax}_j(\cos(p_{c,b}, p_{j,b}))\, p_{j,n}

The answer counts the class's own subspace fully and the others by ``alpha`` (equation 12; divided
by their number, as in the official code):

.. math:: z_c(x) = \cos(f_b(x), p_{c,b})
    + \frac{\alpha}{t - 1} \sum_{i \ne b} \cos(f_i(x), p_{c,i})

One unit answers for all tasks, by T passes per sample. A new module changes all answers, so every
evaluation makes all passes again: features kept from an earlier one would differ in their last bits
from what a resumed run computes.

Stored: per task its module; after the latest task the prototypes ``(C, t, H)`` and each one's class
and task. A class that comes again gets a prototype per visit, and the best of them counts.

Source, and ``alpha = 0.1``: github.com/sun-hailong/CVPR24-Ease. Differences: the paper's module is
an adapter, here any; its head in training is a cosine classifier, here the platform's linear one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from pydantic import NonNegativeFloat
from torch import Tensor, nn

from cl_peft.learners.base import Learner, Tools, Unit
from cl_peft.modules.bank import Route, flatten
from cl_peft.modules.head import Head
from cl_peft.store import require, tensor_fingerprint
from cl_peft.streams.base import Task


class EASE(Learner):
    """A module per task, prototypes of all classes in all their subspaces.

    Args:
        alpha: Weight of subspaces that are not the class's own.
    """

    uses_router: ClassVar[bool] = False

    def __init__(self, alpha: NonNegativeFloat = 0.1) -> None:
        self.alpha = alpha

    def start(self, tools: Tools) -> None:
        """Receive the tools."""
        super().start(tools)
        self.prototypes = torch.zeros(0, 0, tools.backbone.width)  # (C, t, H)
        self.classes = torch.zeros(0, dtype=torch.int64)  # (C,)
        self.owners = torch.zeros(0, dtype=torch.int64)  # (C,) task that brought them

    def learn(self, task: Task) -> None:
        """Train a module, and place all classes in its subspace."""
        module, head = self._fresh(task)
        self._fit(task, module, head, task.train, task.validation)
        row = self.tools.bank.add(module)
        labels = torch.from_numpy(task.train.labels)
        classes = labels.unique()
        features = torch.stack(
            [self._features(task.train.inputs, i, "prototypes") for i in range(row + 1)], dim=1
        )
        new = torch.stack([features[labels == c].mean(0) for c in classes])
        old = torch.cat([self.prototypes, synthesised(self.prototypes, self.owners, new)], dim=1)
        self.prototypes = torch.cat([old, new])
        self.classes = torch.cat([self.classes, classes])
        self.owners = torch.cat([self.owners, torch.full_like(classes, row)])
        self._answer_as_one()

    def recall(self, task: Task, tensors: dict[str, Tensor]) -> None:
        """Put the module back into the bank."""
        self.tools.bank.add(
            self.tools.bank.check(tensors, f"the stored module of task {task.index + 1}")
        )

    def unit_for(self, task: int) -> int | None:
        """The one unit there is, if there is one."""
        return self._newest if self.units else None

    def snapshot(self) -> dict[str, Tensor]:
        """The newest module."""
        if not self.tools.bank.count:
            return {}
        module = flatten(self.tools.bank.get(self.tools.bank.count - 1))
        return {name: tensor.clone() for name, tensor in module.items()}

    def state(self) -> dict[str, Tensor]:
        """The prototypes."""
        return {"prototypes": self.prototypes, "classes": self.classes, "owners": self.owners}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take them back."""
        require(state, {"prototypes", "classes", "owners"}, "learner=ease")
        self.prototypes, self.classes = state["prototypes"], state["classes"]
        self.owners = state["owners"]
        self._answer_as_one()

    @torch.no_grad()
    def logits(self, inputs: Sequence[Any], units: np.ndarray, title: str = "") -> Tensor:
        """Logits over all classes of the stream, by all modules; see the top of this file."""
        count = self.tools.bank.count
        scores = torch.zeros(len(inputs), len(self.classes))
        for i in range(count):
            weights = torch.full((len(self.classes),), self.alpha / max(1, count - 1))
            weights[self.owners == i] = 1.0
            features = nn.functional.normalize(self._features(inputs, i, title), dim=1)
            scores += weights * (features @ nn.functional.normalize(self.prototypes[:, i], dim=1).T)
        out = torch.full((len(inputs), self.tools.n_classes), float("-inf"))
        return out.scatter_reduce_(1, self.classes.expand_as(scores), scores, "amax")

    def _features(self, inputs: Sequence[Any], row: int, title: str) -> Tensor:
        """Pooled features ``(N, H)`` through one module, on the CPU."""
        out = torch.empty(len(inputs), self.tools.backbone.width)

        def route(rows: np.ndarray) -> Route:
            return Route.to(row, len(rows), self._device)

        with torch.no_grad():
            for rows, pooled in self._evaluated(inputs, route, title):
                out[torch.from_numpy(rows)] = pooled.float().cpu()
        return out

    def _answer_as_one(self) -> None:
        """Name the one unit; its head is the classifier of the newest subspace alone."""
        bank, (classes, first) = self.tools.bank, _first(self.classes)
        newest = bank.count - 1
        weight = nn.functional.normalize(self.prototypes[first, newest], dim=1).to(self._device)
        head = Head(weight, torch.zeros(len(classes), device=self._device), classes)
        modules = {
            f"{row}/{n}": t for row in range(bank.count) for n, t in flatten(bank.get(row)).items()
        }
        self.units = {newest: Unit(newest, head, tensor_fingerprint({**modules, **self.state()}))}


def synthesised(prototypes: Tensor, owners: Tensor, new: Tensor) -> Tensor:
    """Old classes in the newest subspace, ``(C, 1, H)``.

    Args:
        prototypes: ``(C, t - 1, H)`` old classes in the earlier subspaces.
        owners: ``(C,)`` each one's own subspace.
        new: ``(c, t, H)`` new classes in all subspaces.
    """
    own = prototypes[torch.arange(len(owners)), owners]  # (C, H)
    there = new[:, owners].transpose(0, 1)  # (C, c, H)
    likeness = nn.functional.cosine_similarity(own[:, None], there, dim=2).softmax(1)
    return (likeness @ new[:, -1]).unsqueeze(1)


def _first(classes: Tensor) -> tuple[tuple[int, ...], list[int]]:
    """Distinct classes by arrival, and where each first stands."""
    known: dict[int, int] = {}
    for position, label in enumerate(classes.tolist()):
        known.setdefault(label, position)
    return tuple(known), list(known.values())
