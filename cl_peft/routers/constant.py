r"""No choice: all modules at once, with the same weights for every sample.

``uniform``: ``w_t = 1/T``, the average of all modules. ``ones``: ``w_t = 1``, their sum, as O-LoRA
(Wang et al. 2023, arXiv:2310.14152) and InfLoRA (Liang and Li 2024, arXiv:2404.00228) answer, here
on modules that were not trained for it. The heads of all tasks answer on the mixture's feature (see
:meth:`~cl_peft.learners.base.Learner.mixture`). What is lost against a router that chooses is what
choosing is worth. Stored: the number of tasks.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor

from cl_peft.routers.base import Choice, Router
from cl_peft.store import require


class Constant(Router):
    """The same weights for every sample.

    Args:
        weights: ``uniform`` or ``ones``.
    """

    needs_features: ClassVar[bool] = False
    mixes: ClassVar[bool] = True

    def __init__(self, weights: Literal["uniform", "ones"] = "uniform") -> None:
        super().__init__()
        self.value = weights
        self.tasks = 0

    def fit(self, features: Tensor, labels: Tensor, task: int) -> None:
        """One more task."""
        self.tasks = task + 1

    def choose(self, features: Tensor, tasks: Tensor | None = None) -> Choice:
        """All tasks alike; ties go to the first."""
        scores = torch.zeros(len(features), self.tasks)
        weights = torch.full_like(scores, 1 / self.tasks if self.value == "uniform" else 1.0)
        margin = torch.full((len(features),), float("nan"))
        return Choice(scores.argmax(1), scores, margin, weights=weights)

    def state(self) -> dict[str, Tensor]:
        """The number of tasks."""
        return {"tasks": torch.tensor(self.tasks)}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """The inverse of :meth:`state`."""
        require(state, {"tasks"}, "router=constant")
        self.tasks = int(state["tasks"])
