r"""Nearest of a few k-means centroids per task (S-Prompts: Wang et al. 2022, arXiv:2207.12819).

.. math::
    s_t(f) = -\min_{j \le k} \| \hat f - m_{tj} \|_p, \qquad \hat f = f / \|f\|_2

The centroids :math:`m_{tj}` of a task come from k-means on its features, scaled to unit length.
That scaling, k = 5, and the :math:`L_1` distance at test time (k-means itself minimises
:math:`L_2`) are those of the official code. Knows tasks, no classes. State: at most ``k`` centroids
of size ``H`` per task.

k-means is Lloyd's algorithm in float64 from k-means++ starts (Arthur and Vassilvitskii 2007), the
best of a few by inertia. Its random numbers depend on the seed alone, not on the task's place.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import PositiveInt
from torch import Tensor

from cl_peft.routers.base import Choice, ClassColumns, Router
from cl_peft.store import require

#: Starts of k-means, of which the best counts.
STARTS = 4
#: Lloyd iterations at most; with some thousand examples it stands still long before.
ITERATIONS = 300


class KMeans(Router):
    """Distance to the nearest centroid of each task.

    Args:
        clusters: ``k``, centroids per task.
        distance: ``l1`` as in the official code, or ``l2``.
        common: See :class:`~cl_peft.routers.base.Router`.
    """

    def __init__(
        self,
        clusters: PositiveInt = 5,
        distance: Literal["l1", "l2"] = "l1",
        **common: Any,  # noqa: ANN401
    ) -> None:
        super().__init__(**common)
        self.clusters = clusters
        self.distance = distance

    def start(self, width: int, seed: int) -> None:
        """Nothing is known yet."""
        self.seed = seed
        self.columns = ClassColumns()  # one per (task, cluster)
        self.centroids = torch.zeros(0, width)

    def fit(self, features: Tensor, labels: Tensor, task: int) -> None:
        """Cluster the task's features; labels are not looked at."""
        unit = torch.nn.functional.normalize(features.double(), dim=1)
        generator = torch.Generator().manual_seed(self.seed)
        runs = [lloyd(unit, plus_plus(unit, self.clusters, generator)) for _ in range(STARTS)]
        centroids = min(runs, key=lambda run: run[1])[0]
        self.columns.extend(torch.arange(len(centroids)), task)
        self.centroids = torch.cat([self.centroids, centroids.float()])

    def choose(self, features: Tensor, tasks: Tensor | None = None) -> Choice:
        """Task of the nearest centroid."""
        unit = torch.nn.functional.normalize(features.double(), dim=1)
        p = 1.0 if self.distance == "l1" else 2.0
        distances = torch.cdist(
            unit, self.centroids.double(), p=p, compute_mode="donot_use_mm_for_euclid_dist"
        )
        return Choice.best(self.columns.task_scores(-distances.float()))

    def state(self) -> dict[str, Tensor]:
        """Centroids, the task of each, and the seed that later tasks start from."""
        return {
            "centroids": self.centroids,
            "columns": self.columns.tensor(),
            "seed": torch.tensor(self.seed),
        }

    def load_state(self, state: dict[str, Tensor]) -> None:
        """The inverse of :meth:`state`."""
        require(state, {"centroids", "columns", "seed"}, "router=kmeans")
        self.centroids, self.seed = state["centroids"], int(state["seed"])
        self.columns = ClassColumns.from_tensor(state["columns"])


def plus_plus(points: Tensor, k: int, generator: torch.Generator) -> Tensor:
    r"""Draw starting centroids: each point with probability proportional to its squared distance.

    Args:
        points: ``(N, H)`` float64.
        k: How many.
        generator: Where random numbers come from.

    Returns:
        ``(k, H)`` different points; fewer where there are no more.
    """
    first = torch.randint(len(points), (1,), generator=generator)
    chosen = points[first]
    nearest = _squared(points, chosen)[:, 0]
    while len(chosen) < k and nearest.sum() > 0:
        new = points[torch.multinomial(nearest, 1, generator=generator)]
        chosen = torch.cat([chosen, new])
        nearest = torch.minimum(nearest, _squared(points, new)[:, 0])
    return chosen


def lloyd(points: Tensor, centroids: Tensor) -> tuple[Tensor, float]:
    """Move centroids to the means of the points nearest to them until nothing changes.

    A centroid that lost all its points stays where it is.

    Args:
        points: ``(N, H)`` float64.
        centroids: ``(k, H)`` where to start.

    Returns:
        Centroids ``(k, H)``, and inertia: the sum of squared distances to the nearest.
    """
    owner = torch.full((len(points),), -1)
    for _ in range(ITERATIONS):
        previous, owner = owner, _squared(points, centroids).argmin(1)
        if torch.equal(owner, previous):
            break
        member = torch.nn.functional.one_hot(owner, len(centroids)).to(points.dtype)
        counts = member.sum(0)[:, None]
        centroids = torch.where(counts > 0, member.T @ points / counts.clamp_min(1), centroids)
    return centroids, float(_squared(points, centroids).amin(1).sum())


def _squared(points: Tensor, centroids: Tensor) -> Tensor:
    """Squared distances ``(N, k)``; exactly zero where a point is a centroid."""
    exact = "donot_use_mm_for_euclid_dist"
    return torch.cdist(points, centroids, compute_mode=exact).square()
