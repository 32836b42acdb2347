r"""Gaussian classes on frozen features: linear, or regularised quadratic, discriminant analysis.

.. math::
    s_c(f) = -\tfrac12 (f - \mu_c)^T S_c^{-1} (f - \mu_c) - \tfrac12 \log\det S_c

the log density up to a constant, with equal priors. With one *shared* covariance the determinant
is left out, and this is the Mahalanobis distance to class means (LDA; as a head on frozen features
in Hayes and Kanan 2020, arXiv:1909.01520). With a covariance per *class* it is regularised
discriminant analysis (RDA: Friedman 1989, doi:10.1080/01621459.1989.10478752):

.. math::
    \Sigma_c = \frac{1}{n_c} \sum_{i: y_i = c} (f_i - \mu_c)(f_i - \mu_c)^T, \qquad
    \Sigma = \frac{\sum_c n_c \Sigma_c}{\sum_c n_c}, \qquad
    R(A) = (1 - \alpha) A + \alpha \frac{\mathrm{tr} A}{H} I

    S_c = R(\Sigma) \ \text{(shared)}, \qquad
    S_c = (1 - \lambda) R(\Sigma_c) + \lambda R(\Sigma) \ \text{(class)}

Friedman mixes sums of squares; mixing covariances keeps the weight of a class's own shape as more
tasks arrive. ``auto`` is the intensity of the Oracle Approximating Shrinkage estimator (Chen et al.
2010, arXiv:0907.4698, equation 23 without its terms in 2/H, as in scikit-learn), with :math:`n` the
number of examples behind ``A``:

.. math::
    \alpha = \min\Big(1, \frac{\overline{A^2} + m^2}{(n + 1)(\overline{A^2} - m^2 / H)}\Big),
    \qquad m = \mathrm{tr} A / H, \qquad \overline{A^2} = \text{mean squared entry}

State: means ``(K, H)``, counts, and sums of squares about the means: one ``(H, H)`` in float64, or
``(K, H, H)`` in float32. Only sums: it does not depend on the order of tasks.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from cl_peft.routers.base import Choice, ClassColumns, Router
from cl_peft.store import require

#: Added to every variance, relative to the mean pooled one: a class of one example, or a feature
#: that never changes, has none.
FLOOR = 1e-6


class Gaussian(Router):
    """Density of a Gaussian per class.

    Args:
        covariance: ``shared`` by all classes, or one per ``class``.
        shrinkage: ``alpha``, towards a multiple of the identity; ``auto``: from the data.
        pooled: ``lambda``, the share of the pooled covariance in that of a class; a shared one is
            all pooled.
        common: See :class:`~cl_peft.routers.base.Router`.
    """

    knows_classes: ClassVar[bool] = True

    def __init__(
        self,
        covariance: Literal["shared", "class"] = "shared",
        shrinkage: Annotated[float, Field(ge=0, le=1)] | Literal["auto"] = "auto",
        pooled: Annotated[float, Field(ge=0, le=1)] = 0.5,
        **common: Any,  # noqa: ANN401
    ) -> None:
        super().__init__(**common)
        self.covariance = covariance
        self.shrinkage = shrinkage
        self.pooled = pooled

    def start(self, width: int, seed: int) -> None:
        """All sums are zero."""
        shared = self.covariance == "shared"
        kind = torch.float64 if shared else torch.float32  # one matrix may be exact, K are many
        self.columns = ClassColumns()
        self.means = torch.zeros(0, width, dtype=torch.float64)
        self.counts = torch.zeros(0, dtype=torch.int64)
        self.scatter = torch.zeros(1 if shared else 0, width, width, dtype=kind)
        self._factors: Tensor | None = None

    def fit(self, features: Tensor, labels: Tensor, task: int) -> None:
        """Add the task's sums."""
        self.columns.extend(labels, task)
        groups = [features[labels == c].double() for c in labels.unique()]
        means = torch.stack([g.mean(0) for g in groups])
        centred = [g - mean for g, mean in zip(groups, means, strict=True)]
        squares = torch.stack([c.T @ c for c in centred])
        self.means = torch.cat([self.means, means])
        self.counts = torch.cat([self.counts, torch.tensor([len(g) for g in groups])])
        if self.covariance == "shared":
            self.scatter = self.scatter + squares.sum(0)
        else:
            self.scatter = torch.cat([self.scatter, squares.float()])
        self._factors = None

    def choose(self, features: Tensor, tasks: Tensor | None = None) -> Choice:
        """Task of the class with the highest density."""
        factors, x = self._cholesky(), features.double()
        if self.covariance == "shared":
            x, means = (
                torch.linalg.solve_triangular(factors[0], v.T, upper=False).T
                for v in (x, self.means)
            )
            distances = torch.cdist(x, means, compute_mode="donot_use_mm_for_euclid_dist")
            scores = -0.5 * distances.square()
        else:
            scores = x.new_empty(len(x), len(factors))
            for c, (factor, mean) in enumerate(zip(factors, self.means, strict=True)):
                z = torch.linalg.solve_triangular(factor, (x - mean).T, upper=False)
                scores[:, c] = -0.5 * z.square().sum(0) - factor.diagonal().log().sum()
        return Choice.best_class(scores.float(), self.columns)

    def _cholesky(self) -> Tensor:
        """Factors ``L`` of :math:`S_c = L L^T`, ``(1 or K, H, H)``; kept until the next task."""
        if self._factors is None:
            total, width = int(self.counts.sum()), self.means.shape[1]
            sigma = self.scatter.double().sum(0) / total
            variance = float(sigma.trace()) / width
            floor = FLOOR * variance if variance > 0 else 1.0
            shared = shrunk(sigma, total, self.shrinkage)
            shared.diagonal().add_(floor)
            mixed = [shared]
            if self.covariance == "class":
                mixed = [
                    (1 - self.pooled) * shrunk(s.double() / n, int(n), self.shrinkage)
                    + self.pooled * shared
                    for s, n in zip(self.scatter, self.counts, strict=True)
                ]
                for matrix in mixed:
                    matrix.diagonal().add_((1 - self.pooled) * floor)
            self._factors = torch.stack([torch.linalg.cholesky(matrix) for matrix in mixed])
        return self._factors

    def state(self) -> dict[str, Tensor]:
        """Sums, and the class of each."""
        return {
            "means": self.means,
            "counts": self.counts,
            "scatter": self.scatter,
            "columns": self.columns.tensor(),
        }

    def load_state(self, state: dict[str, Tensor]) -> None:
        """The inverse of :meth:`state`."""
        require(state, {"means", "counts", "scatter", "columns"}, "router=gaussian")
        self.means, self.counts, self.scatter = state["means"], state["counts"], state["scatter"]
        self.columns = ClassColumns.from_tensor(state["columns"])
        self._factors = None


def shrunk(sigma: Tensor, n: int, shrinkage: float | Literal["auto"]) -> Tensor:
    """Shrink a covariance ``(H, H)`` towards its mean variance times the identity.

    Args:
        sigma: Covariance, divided by ``n``.
        n: Examples behind it.
        shrinkage: Intensity from 0 to 1, or ``auto``.
    """
    mean = sigma.trace() / len(sigma)
    alpha = oas(sigma, n) if shrinkage == "auto" else shrinkage
    out = (1 - alpha) * sigma
    out.diagonal().add_(alpha * mean)
    return out


def oas(sigma: Tensor, n: int) -> float:
    """Shrinkage intensity of a covariance of ``n`` examples; see the head of this file."""
    mean, square = sigma.trace() / len(sigma), sigma.square().mean()
    spread = (n + 1) * (square - mean.square() / len(sigma))
    return min(1.0, float((square + mean.square()) / spread)) if spread > 0 else 1.0
