r"""CODA-Prompt (Smith et al. 2023, CVPR, arXiv:2211.13218).

A sample's prompt is a sum of components ``P_m``, weighted by how its query ``q`` (its frozen
feature), seen through an attention ``A_m (H,)``, agrees with a key ``K_m (H,)``:

.. math::
    p(x) = \sum_m \alpha_m P_m, \qquad \alpha_m = \cos(q \odot A_m, K_m)

    L = \mathrm{CE}(h(f([p(x) ; x])), y)
      + \lambda (L_\perp(P) + L_\perp(K) + L_\perp(A)), \qquad
    L_\perp(B) = \mathrm{mean}_{ij} (B B^T - I)_{ij}^2

Each of the stream's T tasks brings ``size / T`` components; earlier ones are fixed but stay in the
sum, in training and at test time. The cross-entropy compares the task's classes (official: logits
of earlier classes are ``-inf``).

Shapes: prompts ``(M, P, ...)``, flat for the penalty; keys and attention ``(M, H)``. All start as
unit vectors orthogonal to each other and to earlier components, as far as there is room (random
ones beyond). Stored: the components so far and the widening head.

Defaults: official code (github.com/GT-RIPL/CODA-Prompt: experiments/cifar-100.sh, models/zoo.py).
100 components, ``lambda = 0.1``, the mean as in its latest version; its prompts have 8 tokens, half
keys and half values.

Differences: the official prompts are prefixes of layers 1 to 5, each layer with components of its
own. Here one set of weights serves the prefixes of all layers (``module=prefix module.tokens=4``),
or the prompt stands at the input (``module=prompt module.tokens=8``).
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import NonNegativeFloat, PositiveInt
from torch import Tensor, nn

from cl_peft.learners.pool import Pool, PromptPool


class CODAPrompt(PromptPool):
    """One prompt per sample, a weighted sum of components that grow with the tasks.

    Args:
        size: Components of the whole stream, split among its tasks (at least one each).
        ortho: Weight ``lambda`` of the penalties on components that are not orthonormal.
        common: See :class:`~cl_peft.learners.pool.PromptPool`.
    """

    vectors: ClassVar[tuple[str, ...]] = ("keys", "attention")
    grown: ClassVar[tuple[str, ...]] = ("prompts", "keys", "attention")

    def __init__(
        self,
        size: PositiveInt = 100,
        ortho: NonNegativeFloat = 0.1,
        **common: Any,  # noqa: ANN401
    ) -> None:
        super().__init__(**common)
        self.size, self.ortho = size, ortho

    def _start(self, random: torch.Generator) -> Pool:
        count, width = max(1, self.size // self.tools.n_tasks), self.tools.backbone.width
        shape = self._draw(1, random).shape[1:]
        widths = {"prompts": shape.numel(), "keys": width, "attention": width}
        old = {n: self.pool[n].cpu().flatten(1) if n in self.pool else None for n in widths}
        new = {n: orthonormal(old[n], count, width, random) for n, width in widths.items()}
        return {**new, "prompts": new["prompts"].unflatten(1, shape)}

    def _compose(self, pool: Pool, queries: Tensor, training: bool) -> Tensor:
        seen = queries[:, None] * pool["attention"]  # (B, M, H)
        weights = nn.functional.cosine_similarity(seen, pool["keys"][None], dim=2)
        return torch.einsum("bm,m...->b...", weights, pool["prompts"]).unsqueeze(1)

    def _penalty(self, pool: Pool, queries: Tensor) -> Tensor:
        terms = [(t.flatten(1) @ t.flatten(1).T - _unit(len(t), t)) ** 2 for t in pool.values()]
        return self.ortho * torch.stack([term.mean() for term in terms]).sum()


def orthonormal(old: Tensor | None, count: int, width: int, random: torch.Generator) -> Tensor:
    """Unit vectors ``(count, width)``, orthogonal to each other and to ``old`` where there is room.

    Args:
        old: ``(n, width)`` vectors of any length, or none.
        count: How many.
        width: Their size; beyond it in all, further vectors are random directions.
        random: Decides them.
    """
    drawn = torch.randn(count, width, generator=random)
    n = 0 if old is None else len(old)
    room = max(0, min(count, width - n))
    before = drawn[:0] if old is None else old
    basis = torch.linalg.qr(torch.cat([before, drawn[:room]]).T).Q  # (width, n + room)
    return torch.cat([basis[:, n : n + room].T, nn.functional.normalize(drawn[room:], dim=1)])


def _unit(size: int, like: Tensor) -> Tensor:
    return torch.eye(size, dtype=like.dtype, device=like.device)
