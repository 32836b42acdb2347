r"""L2P: Learning to Prompt (Wang et al. 2022, CVPR, arXiv:2112.08654, section 4).

A pool of ``M`` prompts ``P_m`` with keys ``k_m (H,)``, shared by all tasks. A sample with query
``q`` (its frozen feature) takes the prompts of the ``N`` keys nearest to it by cosine, nearest
first, in training and at test time:

.. math::
    K_x = \mathrm{top}_N\, \cos(q, k_m), \qquad
    L = \mathrm{CE}(h(f([P_{m}: m \in K_x ; x])), y) + \lambda \sum_{m \in K_x} (1 - \cos(q, k_m))

equation 5, averaged over a batch. The cross-entropy compares the task's classes (``train_mask`` of
the official code). Shapes: prompts ``(M, P, H)``, keys ``(M, H)`` from ``U(0, 1)``. Stored: the
pool, its keys, and the widening head. All prompts train on all tasks: nothing is frozen.

Defaults: the paper's ``M = 10``, ``N = 5``, ``P = 5``, ``lambda = 0.5`` (sections 4.1 and 5.2); the
official configuration for CIFAR-100 (github.com/google-research/l2p) says 10, 4, 10 and 1.

Differences: the official code lets a batch vote on its prompts (``batchwise_prompt``), which would
make an answer depend on its neighbours: here that is off, each sample takes its own. The official
feature is the mean of the prompts' outputs; here pooling is the backbone's, over the text's own
tokens. Prompts start as the module says (official: uniform). With ``module=prefix`` the pool holds
keys and values for all layers; the code of Smith et al. 2023 (L2P++, deep) has them at layers 1-5.
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import NonNegativeFloat, PositiveInt
from torch import Tensor

from cl_peft.errors import ConfigError
from cl_peft.learners.pool import Pool, PromptPool, similarity


class L2P(PromptPool):
    """A shared pool of prompts, chosen per sample by keys.

    Args:
        size: Prompts in the pool, ``M``.
        top_k: Prompts per sample, ``N``.
        pull: Weight ``lambda`` that pulls chosen keys to the query.
        common: See :class:`~cl_peft.learners.pool.PromptPool`.
    """

    def __init__(
        self,
        size: PositiveInt = 10,
        top_k: PositiveInt = 5,
        pull: NonNegativeFloat = 0.5,
        **common: Any,  # noqa: ANN401
    ) -> None:
        super().__init__(**common)
        if top_k > size:
            raise ConfigError(
                f"learner.top_k={top_k}: the pool has {size} prompts. Use learner.top_k={size} or "
                f"less, or learner.size={top_k} or more."
            )
        self.size, self.top_k, self.pull = size, top_k, pull

    @property
    def at_once(self) -> int:
        """The chosen prompts."""
        return self.top_k

    def _start(self, random: torch.Generator) -> Pool:
        if self.pool:
            return self.pool
        prompts = self._draw(self.size, random)
        keys = torch.rand(self.size, self.tools.backbone.width, generator=random)
        return {"prompts": prompts, "keys": keys}

    def _compose(self, pool: Pool, queries: Tensor, training: bool) -> Tensor:
        return pool["prompts"][similarity(queries, pool["keys"]).topk(self.top_k).indices]

    def _penalty(self, pool: Pool, queries: Tensor) -> Tensor:
        nearest = similarity(queries, pool["keys"]).topk(self.top_k).values
        return self.pull * (1 - nearest).sum(1).mean()
