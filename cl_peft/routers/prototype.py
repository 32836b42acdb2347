r"""Nearest class mean (NCM; SimpleCIL: Zhou et al. 2023, arXiv:2303.07338).

.. math::
    s_c(f) = \cos(f, \mu_c) \quad\text{or}\quad s_c(f) = -\|f - \mu_c\|^2, \qquad
    \mu_c = \frac{1}{n_c} \sum_{i: y_i = c} f_i

Cosine is SimpleCIL's; the squared Euclidean distance is that of iCaRL's mean-of-exemplars rule
(Rebuffi et al. 2017, arXiv:1611.07725). A task's score is its best class's. State: one
mean per class, ``(K, H)``.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from cl_peft.routers.base import Choice, ClassColumns, Router
from cl_peft.store import require


class Prototype(Router):
    """Similarity to class means.

    Args:
        metric: ``cosine`` similarity, or minus the squared ``euclidean`` distance.
        common: See :class:`~cl_peft.routers.base.Router`.
    """

    knows_classes: ClassVar[bool] = True

    def __init__(
        self,
        metric: Literal["cosine", "euclidean"] = "cosine",
        **common: Any,  # noqa: ANN401
    ) -> None:
        super().__init__(**common)
        self.metric = metric

    def start(self, width: int, seed: int) -> None:
        """Nothing is known yet."""
        self.columns = ClassColumns()
        self.means = torch.zeros(0, width)

    def fit(self, features: Tensor, labels: Tensor, task: int) -> None:
        """Add the means of the task's classes."""
        self.columns.extend(labels, task)
        means = [features[labels == c].double().mean(0).float() for c in labels.unique()]
        self.means = torch.cat([self.means, torch.stack(means)])

    def choose(self, features: Tensor, tasks: Tensor | None = None) -> Choice:
        """Task of the most similar mean."""
        if self.metric == "cosine":
            unit = torch.nn.functional.normalize(features, dim=1)
            scores = unit @ torch.nn.functional.normalize(self.means, dim=1).T
        else:  # from differences: the expanded square would round where means are far from zero
            distances = torch.cdist(
                features, self.means, compute_mode="donot_use_mm_for_euclid_dist"
            )
            scores = -distances.square()
        return Choice.best_class(scores, self.columns)

    def state(self) -> dict[str, Tensor]:
        """Means and the class of each."""
        return {"means": self.means, "columns": self.columns.tensor()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """The inverse of :meth:`state`."""
        require(state, {"means", "columns"}, "router=prototype")
        self.means = state["means"]
        self.columns = ClassColumns.from_tensor(state["columns"])
