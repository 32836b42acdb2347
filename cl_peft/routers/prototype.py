r"""Nearest class mean by cosine (NCM; SimpleCIL: Zhou et al. 2023, arXiv:2303.07338, equation 3).

.. math:: s_c(f) = \cos(f, \mu_c), \qquad \mu_c = \frac{1}{n_c} \sum_{i: y_i = c} f_i

A task's score is its best class's. State: one mean per class.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cl_peft.routers.base import Choice, ClassColumns, Router
from cl_peft.store import require


class Prototype(Router):
    """Cosine similarity to class means."""

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
        unit = torch.nn.functional.normalize(features, dim=1)
        scores = unit @ torch.nn.functional.normalize(self.means, dim=1).T
        return Choice.best(self.columns.task_scores(scores))

    def state(self) -> dict[str, Tensor]:
        """Means and the class of each."""
        return {"means": self.means, "columns": self.columns.tensor()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """The inverse of :meth:`state`."""
        require(state, {"means", "columns"}, "router=prototype")
        self.means = state["means"]
        self.columns = ClassColumns.from_tensor(state["columns"])
