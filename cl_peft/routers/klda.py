r"""Discriminant analysis on random Fourier features (KLDA: Momeni et al. 2025, arXiv:2412.15571).

.. math::
    h = \sqrt{2 / D} \, \cos(W^T f + b), \qquad W_{ij} \sim N(0, 2 \gamma), \quad
    b_j \sim U(0, 2 \pi)

so that :math:`h(f) \cdot h(g) \approx \exp(-\gamma \|f - g\|^2)` (Rahimi and Recht 2007), and on
these features linear discriminant analysis with equal priors and one covariance for all classes,

.. math::
    S = (1 - \alpha) \Sigma + \alpha \frac{\mathrm{tr} \Sigma}{D} I, \qquad
    l_c(f) = \mu_c^T S^{-1} h - \tfrac12 \mu_c^T S^{-1} \mu_c, \qquad
    s_c = \log \tfrac{1}{E} \sum_{e=1}^{E} \mathrm{softmax}_c(l^{(e)})

over ``E`` independent draws of ``W`` and ``b``: the paper's KLDA-E averages their posteriors.

The official code inverts the sum of squares by a pseudo-inverse, undivided by the number of
examples. Dividing leaves its choices alone for one draw, and makes the softmax a posterior; the
shrinkage takes the pseudo-inverse's place. The paper has D = 5000; the state grows with D squared,
so the default here is 2000, with a gamma that fits the features instead of one per data set.

``gamma: median`` is the median heuristic :math:`1 / (2 m)`, ``m`` the median squared distance
between features of the *first* task, which is the one thing that depends on the order of tasks.

State per draw: ``W`` ``(H, D)``, ``b``, sum of squares about class means ``(D, D)``, class means
``(K, D)``.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor

from cl_peft.routers.base import Choice, ClassColumns, Router
from cl_peft.store import require

#: Examples of the first task whose distances give the median.
MEDIAN_OF = 1000
#: Added to every variance: the least that keeps S invertible where all examples are the same.
TINY = 1e-12


class KLDA(Router):
    """Linear discriminant analysis in the space of an RBF kernel.

    Args:
        projection: ``D``, number of random Fourier features.
        gamma: Of the kernel; ``median``: from distances within the first task.
        shrinkage: ``alpha``, towards a multiple of the identity.
        ensemble: ``E``, independent draws whose posteriors are averaged.
        common: See :class:`~cl_peft.routers.base.Router`.
    """

    knows_classes: ClassVar[bool] = True

    def __init__(
        self,
        projection: PositiveInt = 2000,
        gamma: PositiveFloat | Literal["median"] = "median",
        shrinkage: Annotated[float, Field(gt=0, le=1)] = 1e-4,
        ensemble: PositiveInt = 1,
        **common: Any,  # noqa: ANN401
    ) -> None:
        super().__init__(**common)
        self.projection = projection
        self.kernel = gamma
        self.shrinkage = shrinkage
        self.ensemble = ensemble

    def start(self, width: int, seed: int) -> None:
        """Draw ``W`` (for a gamma of one half) and ``b``; all sums are zero."""
        generator = torch.Generator().manual_seed(seed)
        draws = [
            (
                torch.randn(width, self.projection, generator=generator),
                2 * math.pi * torch.rand(self.projection, generator=generator),
            )
            for _ in range(self.ensemble)
        ]
        self.W, self.b = torch.stack([w for w, _ in draws]), torch.stack([b for _, b in draws])
        fixed = 0.0 if self.kernel == "median" else self.kernel
        self.gamma = torch.tensor(fixed, dtype=torch.float64)  # 0: not known yet
        self.columns = ClassColumns()
        self.count = torch.zeros((), dtype=torch.int64)
        self.scatter = torch.zeros(self.ensemble, self.projection, self.projection)
        self.means = torch.zeros(self.ensemble, 0, self.projection)
        self._linear: list[tuple[Tensor, Tensor]] | None = None

    def fit(self, features: Tensor, labels: Tensor, task: int) -> None:
        """Add the task's class means and sums of squares."""
        if self.gamma == 0:
            self.gamma = torch.tensor(median_gamma(features), dtype=torch.float64)
        self.columns.extend(labels, task)
        classes, member = labels.unique(return_inverse=True)
        counts = torch.bincount(member, minlength=len(classes))[:, None]
        means = []
        for e in range(self.ensemble):
            h = self._project(features, e)
            mean = h.new_zeros(len(classes), self.projection).index_add_(0, member, h) / counts
            h -= mean[member]
            self.scatter[e] += h.T @ h
            means.append(mean.float())
        self.means = torch.cat([self.means, torch.stack(means)], dim=1)
        self.count += len(labels)
        self._linear = None

    def _project(self, features: Tensor, e: int) -> Tensor:
        """``(N, D)`` float64: solutions of systems in S magnify rounding."""
        angles = features.double() @ self.W[e].double() * (2 * self.gamma).sqrt()
        return math.sqrt(2 / self.projection) * torch.cos(angles.add_(self.b[e]))

    def choose(self, features: Tensor, tasks: Tensor | None = None) -> Choice:
        """Task of the most probable class."""
        logs = []
        for e, (weight, bias) in enumerate(self._solved()):
            logs.append((self._project(features, e) @ weight + bias).log_softmax(1))
        scores = torch.stack(logs).logsumexp(0) - math.log(self.ensemble)
        return Choice.best_class(scores.float(), self.columns)

    def _solved(self) -> list[tuple[Tensor, Tensor]]:
        """Per draw :math:`S^{-1} M^T` ``(D, K)`` and bias ``(K,)``; kept until the next task."""
        if self._linear is None:
            self._linear = []
            for scatter, means in zip(self.scatter, self.means.double(), strict=True):
                sigma = scatter.double() / int(self.count)
                variance = float(sigma.diagonal().mean())
                sigma *= 1 - self.shrinkage
                sigma.diagonal().add_(self.shrinkage * variance + TINY)
                weight = torch.cholesky_solve(means.T, torch.linalg.cholesky(sigma))
                self._linear.append((weight, -0.5 * (means.T * weight).sum(0)))
        return self._linear

    def state(self) -> dict[str, Tensor]:
        """Draws and sums; a draw more, that much more."""
        return {
            "W": self.W,
            "b": self.b,
            "gamma": self.gamma,
            "count": self.count,
            "scatter": self.scatter,
            "means": self.means,
            "columns": self.columns.tensor(),
        }

    def load_state(self, state: dict[str, Tensor]) -> None:
        """The inverse of :meth:`state`."""
        names = {"W", "b", "gamma", "count", "scatter", "means", "columns"}
        require(state, names, "router=klda")
        self.W, self.b, self.gamma = state["W"], state["b"], state["gamma"]
        self.count, self.scatter, self.means = state["count"], state["scatter"], state["means"]
        self.columns = ClassColumns.from_tensor(state["columns"])
        self._linear = None


def median_gamma(features: Tensor) -> float:
    """``1 / (2 m)`` with ``m`` the median squared distance between features ``(N, H)``.

    Of at most :data:`MEDIAN_OF` examples, evenly spaced; 1 where all are the same.
    """
    some = features[:: math.ceil(len(features) / MEDIAN_OF)].double()
    distances = torch.pdist(some).square()
    distances = distances[distances > 0]
    return float(0.5 / distances.median()) if len(distances) else 1.0
