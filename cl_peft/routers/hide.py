r"""A classifier trained on features drawn from stored class Gaussians.

The task-identity inference of HiDe-Prompt (Wang et al. 2023, arXiv:2310.07234); SLCA
(arXiv:2303.05118) aligns its classifier the same way.

Every (task, class) pair keeps the mean and covariance of its frozen features. After each task a
classifier over all pairs is trained from scratch on pseudo-features drawn from them:

.. math::
    x \sim \mathcal{N}(\mu_c, F_c F_c^T + \mathrm{diag}(d_c^2)), \qquad
    \min_\omega \; \mathbb{E}_{c, x} \bigl[ -\log \mathrm{softmax}(h_\omega(x))_c \bigr]

with ``F_c (H, r)`` the ``r`` principal axes of the class's covariance times their standard
deviations, and ``d_c`` what they leave of each dimension's: so variances are exact at any rank, 0
gives the diagonal and null (``r = H``, ``d = 0``) the full covariance; the authors' code has both,
and several centroids per class as its default. The full one costs :math:`H^2` numbers per class.

- ``h`` is linear, or has one hidden ReLU layer. Its inputs are standardised by the mean and
  variance of the mixture of all Gaussians; that is folded into its weights when training ends.
- Adam with a cosine rate for a fixed number of steps; the authors' code takes SGD at 0.005 for 30
  epochs, with new draws in each.
- The Gaussians do not depend on the order of tasks. The classifier depends on it through the draws.

A score is the log-softmax over all pairs; a task's score is its best pair's. State: means
``(K, H)``, factors ``(K, H, r)``, remainders ``d (K, H)``, and the classifier.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Any, ClassVar

import torch
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor
from torch.nn.functional import cross_entropy, log_softmax

from cl_peft.routers.base import Choice, ClassColumns, Router
from cl_peft.store import require
from cl_peft.training import generator

#: Batches that are drawn at a time.
ROUND = 16


class HiDe(Router):
    """Class Gaussians and a classifier trained on draws from them.

    Args:
        rank: Principal axes kept of each class's covariance; 0: variances alone; null: all.
        hidden: Width of the classifier's hidden layer; null: linear.
        steps: Of Adam, after each task.
        batch_size: Pseudo-features per step.
        learning_rate: Peak of the cosine.
        common: See :class:`~cl_peft.routers.base.Router`.
    """

    knows_classes: ClassVar[bool] = True

    def __init__(
        self,
        rank: NonNegativeInt | None = 16,
        hidden: PositiveInt | None = None,
        steps: PositiveInt = 600,
        batch_size: PositiveInt = 128,
        learning_rate: PositiveFloat = 0.005,
        **common: Any,  # noqa: ANN401
    ) -> None:
        super().__init__(**common)
        self.rank, self.hidden = rank, hidden
        self.steps, self.batch_size, self.learning_rate = steps, batch_size, learning_rate

    def start(self, width: int, seed: int) -> None:
        """Nothing is known yet."""
        self.seed = seed
        self.columns = ClassColumns()
        rank = width if self.rank is None else min(self.rank, width)
        self.gaussians = {
            "means": torch.zeros(0, width),
            "factors": torch.zeros(0, width, rank),
            "remainders": torch.zeros(0, width),
        }
        self.weights: dict[str, Tensor] = {}

    def fit(self, features: Tensor, labels: Tensor, task: int) -> None:
        """Add the Gaussians of the task's classes, train the classifier over all pairs."""
        self.columns.extend(labels, task)
        rank = self.gaussians["factors"].shape[2]
        new = [_gaussian(features[labels == c], rank) for c in labels.unique()]
        for name, old in self.gaussians.items():
            self.gaussians[name] = torch.cat([old, torch.stack([g[name] for g in new])])
        self.weights = self._train(generator(self.seed, task))

    def _draws(self, random: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches ``(x (B, H), column (B,))`` without end; all pairs equally often."""
        means, factors, remainders = self.gaussians.values()
        n = math.ceil(ROUND * self.batch_size / len(means))
        columns = torch.arange(len(means)).repeat_interleave(n)
        while True:
            z = torch.randn(len(means), n, factors.shape[2], generator=random)
            rest = torch.randn(len(means), n, means.shape[1], generator=random)
            x = means[:, None] + z @ factors.mT + rest * remainders[:, None]
            for rows in torch.randperm(len(columns), generator=random).split(self.batch_size):
                yield x.flatten(0, 1)[rows], columns[rows]

    def _train(self, random: torch.Generator) -> dict[str, Tensor]:
        mean, scale = self._moments()
        hidden = [] if self.hidden is None else [self.hidden]
        sizes = [len(mean), *hidden, len(self.columns.pairs)]
        weights: dict[str, Tensor] = {}
        for layer, (rows, columns) in enumerate(pairwise(sizes)):
            bound = 0.0 if self.hidden is None else rows**-0.5  # a linear one has one optimum
            uniform = 2 * torch.rand(rows, columns, generator=random) - 1
            weights[f"weight_{layer}"] = bound * uniform
            weights[f"bias_{layer}"] = torch.zeros(columns)
        draws = self._draws(random)
        with torch.enable_grad():
            leaves = [tensor.requires_grad_() for tensor in weights.values()]
            optimizer = torch.optim.Adam(leaves, lr=self.learning_rate)
            for step in range(self.steps):
                for group in optimizer.param_groups:
                    cosine = 0.5 * (1 + math.cos(math.pi * step / self.steps))
                    group["lr"] = self.learning_rate * cosine
                x, column = next(draws)
                optimizer.zero_grad()
                cross_entropy(_logits(weights, (x - mean) / scale), column).backward()
                optimizer.step()
        first = weights["weight_0"].detach().double() / scale.double()[:, None]
        bias = weights["bias_0"].detach() - mean.double() @ first
        folded = {"weight_0": first.float(), "bias_0": bias.float()}
        return {name: folded.get(name, tensor.detach()) for name, tensor in weights.items()}

    def _moments(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the mixture of all Gaussians; 1 where nothing moves."""
        means, factors, remainders = self.gaussians.values()
        within = factors.square().sum(2) + remainders.square()
        scale = (means.var(0, correction=0) + within.mean(0)).sqrt()
        return means.mean(0), torch.where(scale > 1e-4 * scale.mean(), scale, torch.ones(()))

    def choose(self, features: Tensor, tasks: Tensor | None = None) -> Choice:
        """Task of the most probable pair."""
        # float64: float32 products round differently in batches of different size
        weights = {name: tensor.double() for name, tensor in self.weights.items()}
        scores = log_softmax(_logits(weights, features.double()), dim=1)
        return Choice.best_class(scores.float(), self.columns)

    def state(self) -> dict[str, Tensor]:
        """Gaussians, classifier, and the seed of those to come."""
        about = {"columns": self.columns.tensor(), "seed": torch.tensor(self.seed)}
        return {**self.gaussians, **self.weights, **about}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """The inverse of :meth:`state`."""
        layers = range(1 if self.hidden is None else 2)
        names = [f"{kind}_{layer}" for layer in layers for kind in ("weight", "bias")]
        require(state, {*self.gaussians, *names, "columns", "seed"}, "router=hide")
        self.gaussians = {name: state[name] for name in self.gaussians}
        self.weights = {name: state[name] for name in names}
        self.columns, self.seed = ClassColumns.from_tensor(state["columns"]), int(state["seed"])


def _gaussian(x: Tensor, rank: int) -> dict[str, Tensor]:
    """Mean, factor and remainder of the examples ``x (n, H)`` of one class."""
    x = x.double()
    centred = (x - x.mean(0)) / max(len(x) - 1, 1) ** 0.5  # covariance: centred^T centred
    factor = x.new_zeros(x.shape[1], rank)
    if rank:
        _, deviations, axes = torch.linalg.svd(centred, full_matrices=False)
        kept = min(rank, len(deviations))
        factor[:, :kept] = axes[:kept].T * deviations[:kept]
    left = centred.square().sum(0) - factor.square().sum(1)
    remainder = left.clamp_min(0).sqrt()
    return {"means": x.mean(0).float(), "factors": factor.float(), "remainders": remainder.float()}


def _logits(weights: dict[str, Tensor], x: Tensor) -> Tensor:
    x = x @ weights["weight_0"] + weights["bias_0"]
    if "weight_1" in weights:
        x = torch.relu(x) @ weights["weight_1"] + weights["bias_1"]
    return x
