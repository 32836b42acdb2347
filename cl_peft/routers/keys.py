r"""Learned cosine keys (the query-key matching of L2P: Wang et al. 2022, arXiv:2112.08654).

A task's keys :math:`k_1 \dots k_K` (each ``(H,)``) are trained on its frozen features alone, by
L2P's key loss, which pulls the best matching key towards each feature:

.. math::
    \min_k \frac{1}{N} \sum_i \bigl(1 - \max_j \cos(f_i, k_j)\bigr), \qquad
    s_t(f) = \max_j \cos(f, k_j^t)

What is to be expected of it:

- With one key the optimum is known: the mean of the features' directions,
  :math:`\sum_i f_i / \lVert f_i \rVert`, up to its length. Training then is a slow way of computing
  a mean, and the router is the nearest task mean by cosine.
- With ``keys_per_task`` above one, it is spherical k-means by gradient descent: a local optimum,
  where each key is the mean direction of the features that are closest to it. It depends on the
  start, so on the seed.
- Fewer ``steps`` stop short of either.
- Nothing pushes a task's keys away from another's. (Tried: a penalty on the cosine to earlier
  tasks' keys. It cost accuracy at every weight.)

L2P shares one pool of 10 keys among all tasks and picks 5 prompts; here keys belong to tasks, as in
DualPrompt (arXiv:2204.04799), so that they name a module. A start by the features' own mean and
variance instead of L2P's uniform one leaves no key without features; all features of a task are one
batch. Adam and its rate are L2P's.

State: ``keys`` ``(T, K, H)``. Classes are not used, and not known.
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor
from torch.nn.functional import normalize

from cl_peft.routers.base import Choice, Router
from cl_peft.store import require
from cl_peft.training import generator


class Keys(Router):
    """Cosine to learned keys of each task.

    Args:
        keys_per_task: ``K``.
        steps: Of Adam, each on all of the task's features.
        learning_rate: Of Adam, constant.
        common: See :class:`~cl_peft.routers.base.Router`.
    """

    def __init__(
        self,
        keys_per_task: PositiveInt = 20,
        steps: PositiveInt = 100,
        learning_rate: PositiveFloat = 0.03,
        **common: Any,  # noqa: ANN401
    ) -> None:
        super().__init__(**common)
        self.keys_per_task, self.steps = keys_per_task, steps
        self.learning_rate = learning_rate

    def start(self, width: int, seed: int) -> None:
        """Nothing is known yet."""
        self.seed = seed
        self.keys = torch.zeros(0, self.keys_per_task, width)

    def fit(self, features: Tensor, labels: Tensor, task: int) -> None:
        """Train the task's keys; earlier ones stay as they are.

        Raises:
            ValueError: Tasks do not arrive in order, once each.
        """
        if task != len(self.keys):
            raise ValueError(f"task {task + 1} was fitted before, or is not the next")
        unit = normalize(features, dim=1)
        shape = self.keys_per_task, features.shape[1]
        noise = torch.randn(shape, generator=generator(self.seed, task))
        keys = unit.mean(0) + unit.std(0, correction=0) * noise
        with torch.enable_grad():
            keys.requires_grad_()
            optimizer = torch.optim.Adam([keys], lr=self.learning_rate)
            for _ in range(self.steps):
                optimizer.zero_grad()
                (1 - (unit @ normalize(keys, dim=1).T).amax(1)).mean().backward()
                optimizer.step()
        self.keys = torch.cat([self.keys, normalize(keys.detach(), dim=1)[None]])

    def choose(self, features: Tensor, tasks: Tensor | None = None) -> Choice:
        """Task of the most similar key."""
        # float64: float32 products round differently in batches of different size
        unit, keys = normalize(features.double(), dim=1), self.keys.double()
        cosines = unit @ keys.flatten(0, 1).T
        return Choice.best(cosines.unflatten(1, keys.shape[:2]).amax(2).float())

    def state(self) -> dict[str, Tensor]:
        """Keys, and the seed of those to come."""
        return {"keys": self.keys, "seed": torch.tensor(self.seed)}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """The inverse of :meth:`state`."""
        require(state, {"keys", "seed"}, "router=keys")
        self.keys, self.seed = state["keys"], int(state["seed"])
