r"""Ridge regression on a random projection (RanPAC: McDonnell et al. 2023, arXiv:2307.02251).

.. math::
    h = \mathrm{relu}(f P), \quad G = \sum h h^T, \quad C = \sum h y^T, \quad
    W = (G + \lambda I)^{-1} C

with ``P`` fixed Gaussian and ``y`` one-hot over (task, class). Only the sums ``G`` and ``C`` are
kept, never examples, so the state after all tasks does not depend on their order.

The ridge strength is chosen on held-out data, and that from sums as well: a share of every task
feeds ``G_v, C_v`` instead of ``G, C``, and the held-out squared error of a strength is

.. math::
    e(\lambda) = \mathrm{tr}(W_\lambda^T G_v W_\lambda) - 2 \, \mathrm{tr}(W_\lambda^T C_v) + n_v

The final weights use all sums at the chosen strength. RanPAC does the same on the latest task
only; with sums all tasks count alike.

An *ensemble* averages the scores of independent draws of ``P``, each with sums, strength and
weights of its own. State per draw: ``P`` ``(H, M)``, twice ``(M, M)``, three times ``(M, K)``.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from cl_peft.routers.base import Choice, ClassColumns, Router
from cl_peft.store import require

#: Candidate ridge strengths, relative to the mean eigenvalue of G. Float32 sums know eigenvalues to
#: about 1e-5 of it: below that, held-out errors would be rounding noise.
STRENGTHS = tuple(10.0**e for e in range(-4, 4))


class Projection:
    """One draw of ``P`` with its sums and solved weights.

    Args:
        tensors: By name: ``P``, ``G``, ``C``, ``G_v``, ``C_v`` and ``W``.
    """

    NAMES = ("P", "G", "C", "G_v", "C_v", "W")

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors

    @staticmethod
    def draw(width: int, size: int, generator: torch.Generator) -> Projection:
        """Draw ``P`` ``(width, size)``; all sums are zero."""
        P = torch.randn(width, size, generator=generator)
        square, empty = (size, size), (size, 0)
        shapes = {"G": square, "C": empty, "G_v": square, "C_v": empty, "W": empty}
        return Projection({"P": P, **{name: torch.zeros(shape) for name, shape in shapes.items()}})

    def add(self, features: Tensor, targets: Tensor, held: Tensor) -> None:
        """Add sums of examples.

        Args:
            features: ``(N, H)``.
            targets: ``(N, K)`` one-hot, with columns that may be new.
            held: ``(N,)`` bool: which choose the strength.
        """
        h = torch.relu(features @ self.tensors["P"])
        for suffix, rows in (("", ~held), ("_v", held)):
            c = self.tensors[f"C{suffix}"]
            wider = c.new_zeros(len(c), targets.shape[1] - c.shape[1])
            self.tensors[f"G{suffix}"] += h[rows].T @ h[rows]
            self.tensors[f"C{suffix}"] = torch.cat([c, wider], 1) + h[rows].T @ targets[rows]

    def strength(self, n_v: int) -> float:
        """The strength with the least held-out squared error, of ``n_v`` examples held out."""
        scale = float(self.tensors["G"].diagonal().double().mean()) or 1.0  # 0: nothing but zeros
        if n_v == 0:  # too few examples to hold any out
            return 1e-2 * scale
        errors = self.held_out_errors([strength * scale for strength in STRENGTHS], n_v)
        return STRENGTHS[errors.index(min(errors))] * scale

    def held_out_errors(self, strengths: list[float], n_v: int) -> list[float]:
        """``e(lambda)`` of each strength, from sums alone.

        A Cholesky factor per strength takes less time than one eigendecomposition for all of them.
        """
        G, C, G_v, C_v = (self.tensors[name].double() for name in ("G", "C", "G_v", "C_v"))
        errors = []
        for strength in strengths:
            try:
                W = _ridge(G, C, strength)
            except torch.linalg.LinAlgError:  # lost in the rounding of G: not a strength to choose
                errors.append(float("inf"))
                continue
            errors.append(float((W * (G_v @ W)).sum() - 2 * (W * C_v).sum()) + n_v)
        return errors

    def solve(self, strength: float) -> None:
        """Weights from all sums."""
        t = self.tensors
        W = _ridge((t["G"] + t["G_v"]).double(), (t["C"] + t["C_v"]).double(), strength)
        t["W"] = W.float()

    def scores(self, features: Tensor) -> Tensor:
        """Regression scores ``(N, K)``."""
        return torch.relu(features @ self.tensors["P"]) @ self.tensors["W"]


class Ridge(Router):
    """RanPAC as a router.

    Args:
        projection: ``M``, width of the random projection.
        held_out: Share of each task's features that chooses the strength.
        ensemble: Independent projections whose scores are averaged.
        common: See :class:`~cl_peft.routers.base.Router`.
    """

    knows_classes: ClassVar[bool] = True

    def __init__(
        self,
        projection: PositiveInt = 2000,
        held_out: Annotated[float, Field(gt=0, lt=1)] = 0.2,
        ensemble: PositiveInt = 1,
        **common: Any,  # noqa: ANN401
    ) -> None:
        super().__init__(**common)
        self.projection = projection
        self.held_out = held_out
        self.ensemble = ensemble

    def start(self, width: int, seed: int) -> None:
        """Draw projections; all sums are zero."""
        generator = torch.Generator().manual_seed(seed)
        self.seed = seed
        self.columns = ClassColumns()
        self.members = [
            Projection.draw(width, self.projection, generator) for _ in range(self.ensemble)
        ]
        self.n_v = torch.zeros((), dtype=torch.int64)

    def fit(self, features: Tensor, labels: Tensor, task: int) -> None:
        """Add the task's sums, choose the strength, solve."""
        self.columns.extend(labels, task)
        held = torch.zeros(len(labels), dtype=torch.bool)
        for c in labels.unique():  # the same share of every class, the same examples in any order
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + int(c))
            mine = torch.nonzero(labels == c).flatten()
            mine = mine[torch.randperm(len(mine), generator=generator)]
            held[mine[: int(self.held_out * len(mine))]] = True
        self.n_v += held.sum()
        targets = self.columns.one_hot(labels, task)
        for member in self.members:
            member.add(features, targets, held)
            member.solve(member.strength(int(self.n_v)))

    def choose(self, features: Tensor, tasks: Tensor | None = None) -> Choice:
        """Task of the class with the highest regression score."""
        scores = torch.stack([member.scores(features) for member in self.members]).mean(0)
        return Choice.best_class(scores, self.columns)

    def state(self) -> dict[str, Tensor]:
        """Sums, projections and solved weights: enough to go on, and to route without solving."""
        own = {"n_v": self.n_v, "seed": torch.tensor(self.seed), "columns": self.columns.tensor()}
        return own | {
            _name(name, index): member.tensors[name]
            for index, member in enumerate(self.members)
            for name in Projection.NAMES
        }

    def load_state(self, state: dict[str, Tensor]) -> None:
        """The inverse of :meth:`state`."""
        names = [{n: _name(n, i) for n in Projection.NAMES} for i in range(self.ensemble)]
        all_names = {name for member in names for name in member.values()}
        require(state, all_names | {"n_v", "seed", "columns"}, "router=ridge")
        self.members = [Projection({n: state[key] for n, key in m.items()}) for m in names]
        self.n_v, self.seed = state["n_v"], int(state["seed"])
        self.columns = ClassColumns.from_tensor(state["columns"])


def _name(name: str, index: int) -> str:
    """Name in the state of a tensor of draw ``index``; the first keeps the bare name."""
    return name if index == 0 else f"{name}.{index}"


def _ridge(gram: Tensor, target: Tensor, strength: float) -> Tensor:
    """Solve ``(gram + strength I) W = target`` in float64."""
    shifted = gram.clone()
    shifted.diagonal().add_(strength)
    return torch.cholesky_solve(target, torch.linalg.cholesky(shifted))
