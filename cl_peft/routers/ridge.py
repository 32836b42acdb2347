r"""Ridge regression on a random projection (RanPAC: McDonnell et al. 2023, arXiv:2307.02251).

.. math::
    h = \mathrm{relu}(f P), \quad G = \sum h h^T, \quad C = \sum h y^T, \quad
    W = (G + \lambda I)^{-1} C

with ``P`` fixed Gaussian and ``y`` one-hot over (task, class). Only the sums ``G`` and ``C`` are
kept, never examples, so the state after all tasks does not depend on their order.

The ridge strength is chosen on held-out data, and that from sums as well: a share of every task
feeds ``G_v, C_v`` instead of ``G, C``. With one eigendecomposition ``G = U D U^T``, and
``A = U^T C``, the held-out squared error of every strength is

.. math::
    e(\lambda) = s^T (U^T G_v U \circ A A^T) s - 2 \, s \cdot \mathrm{rowsum}(A \circ U^T C_v)
    + n_v, \qquad s = (D + \lambda)^{-1}

The final weights use all sums at the chosen strength. RanPAC does the same on the latest task
only; with sums all tasks count alike.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from cl_peft.routers.base import Choice, ClassColumns, Router
from cl_peft.store import require

#: Candidate ridge strengths, relative to the mean eigenvalue of G. Float32 sums know eigenvalues to
#: about 1e-5 of it: below that, held-out errors would be rounding noise.
STRENGTHS = tuple(10.0**e for e in range(-4, 4))


class Ridge(Router):
    """RanPAC as a router.

    Args:
        projection: ``M``, width of the random projection.
        held_out: Share of each task's features that chooses the strength.
    """

    def __init__(
        self,
        projection: PositiveInt = 2000,
        held_out: Annotated[float, Field(gt=0, lt=1)] = 0.2,
    ) -> None:
        self.projection = projection
        self.held_out = held_out

    def start(self, width: int, seed: int) -> None:
        """Draw ``P``; all sums are zero."""
        generator = torch.Generator().manual_seed(seed)
        self.seed = seed
        self.P = torch.randn(width, self.projection, generator=generator)
        self.columns = ClassColumns()
        size = self.projection
        self.sums = {
            "G": torch.zeros(size, size),
            "C": torch.zeros(size, 0),
            "G_v": torch.zeros(size, size),
            "C_v": torch.zeros(size, 0),
        }
        self.n_v = torch.zeros((), dtype=torch.int64)
        self.W = torch.zeros(size, 0)

    def fit(self, features: Tensor, labels: Tensor, task: int) -> None:
        """Add the task's sums, choose the strength, solve."""
        first, end = self.columns.extend(labels, task)
        for name in ("C", "C_v"):
            wider = self.sums[name].new_zeros(self.projection, end - first)
            self.sums[name] = torch.cat([self.sums[name], wider], dim=1)
        held = torch.zeros(len(labels), dtype=torch.bool)
        for c in labels.unique():  # the same share of every class, the same examples in any order
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + int(c))
            mine = torch.nonzero(labels == c).flatten()
            mine = mine[torch.randperm(len(mine), generator=generator)]
            held[mine[: int(self.held_out * len(mine))]] = True
        h, y = self._project(features), self.columns.one_hot(labels, task)
        for suffix, rows in (("", ~held), ("_v", held)):
            self.sums[f"G{suffix}"] += h[rows].T @ h[rows]
            self.sums[f"C{suffix}"] += h[rows].T @ y[rows]
        self.n_v += held.sum()
        self.W = self._solve(self._strength())

    def _project(self, features: Tensor) -> Tensor:
        return torch.relu(features @ self.P)

    def _strength(self) -> float:
        """The strength with the least held-out squared error."""
        scale = float(self.sums["G"].diagonal().double().mean())
        if int(self.n_v) == 0:  # too few examples to hold any out
            return 1e-2 * scale
        errors = self._held_out_errors([strength * scale for strength in STRENGTHS])
        return STRENGTHS[errors.index(min(errors))] * scale

    def _held_out_errors(self, strengths: list[float]) -> list[float]:
        """``e(lambda)`` of each strength, from sums alone."""
        # float64: with more columns than examples, float32 LAPACK may fail to converge
        values, u = torch.linalg.eigh(self.sums["G"].double())
        a = u.T @ self.sums["C"].double()
        quadratic = (u.T @ self.sums["G_v"].double() @ u) * (a @ a.T)
        linear = (a * (u.T @ self.sums["C_v"].double())).sum(1)
        values = values.clamp_min(0)
        shrunk = [1 / (values + strength) for strength in strengths]
        return [float(s @ quadratic @ s - 2 * s @ linear) + int(self.n_v) for s in shrunk]

    def _solve(self, strength: float) -> Tensor:
        gram = (self.sums["G"] + self.sums["G_v"]).double()
        gram.diagonal().add_(strength)
        target = (self.sums["C"] + self.sums["C_v"]).double()
        return torch.cholesky_solve(target, torch.linalg.cholesky(gram)).float()

    def choose(self, features: Tensor, tasks: Tensor | None = None) -> Choice:
        """Task of the class with the highest regression score."""
        return Choice.best(self.columns.task_scores(self._project(features) @ self.W))

    def state(self) -> dict[str, Tensor]:
        """Sums, projection and solved weights: enough to go on, and to route without solving."""
        counters = {"n_v": self.n_v, "seed": torch.tensor(self.seed)}
        return {
            **self.sums, **counters, "P": self.P, "W": self.W, "columns": self.columns.tensor()
        }  # fmt: skip

    def load_state(self, state: dict[str, Tensor]) -> None:
        """The inverse of :meth:`state`."""
        require(state, {"G", "C", "G_v", "C_v", "n_v", "seed", "P", "W", "columns"}, "router=ridge")
        self.sums = {name: state[name] for name in ("G", "C", "G_v", "C_v")}
        self.n_v, self.seed = state["n_v"], int(state["seed"])
        self.P, self.W = state["P"], state["W"]
        self.columns = ClassColumns.from_tensor(state["columns"])
