r"""VeRA: vector-based random adaptation (Kopiczko et al. 2024, arXiv:2310.11454, equation 2).

.. math:: h = W x + b + \Lambda_b B \Lambda_d A x

``A (r, in)`` and ``B (out, r)`` are random, frozen and shared by all tasks and layers: the upper
left parts of one pair that is as large as the largest layer, Kaiming-uniform, drawn from ``seed``.
A task trains ``d (r,)`` and ``b (out,)``. Start: ``d`` constant, ``b`` zero, so a fresh module
changes nothing. Parameters per site: ``r + out``; the shared pair is never stored.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn

from cl_peft.modules.base import Method, Params, Site, linear_sites


class VeRA(Method):
    """Trained vectors around a shared random pair of matrices.

    Args:
        rank: ``r``.
        d_initial: Value at which ``d`` starts.
        seed: Draws the shared pair.
        sites: Name patterns of linear layers, or ``all``.
        layers: ``upper_half``, ``upper_third``, or numbers from 1; null: all.
    """

    def __init__(
        self,
        rank: PositiveInt = 256,
        d_initial: PositiveFloat = 0.1,
        seed: NonNegativeInt = 0,
        sites: list[str] = ("all",),  # type: ignore[assignment]
        layers: Literal["upper_half", "upper_third"] | list[PositiveInt] | None = None,
    ) -> None:
        self.rank, self.d_initial, self.seed = rank, d_initial, seed
        self.patterns, self.layers = list(sites), layers

    def sites(self, model: nn.Module) -> list[Site]:
        """Linear layers that match the patterns; draws the shared pair for their sizes."""
        sites = linear_sites(model, self.patterns, self.layers)
        random = torch.Generator().manual_seed(self.seed)
        d_in, d_out = max(s.d_in for s in sites), max(s.d_out for s in sites)
        device = next(model.parameters()).device
        self.A = _kaiming(self.rank, d_in, random).to(device)
        self.B = _kaiming(d_out, self.rank, random).to(device)
        return sites

    def init(self, site: Site, generator: torch.Generator) -> Params:
        """``d`` constant, ``b`` zero."""
        return {"d": torch.full((self.rank,), self.d_initial), "b": torch.zeros(site.d_out)}

    def one(self, site: Site, x: Tensor, y: Tensor, p: Params) -> Tensor:
        """``y + b * (((x A^T) * d) B^T)``."""
        a, b = self._pair(site, x)
        return y + p["b"].to(y.dtype) * (((x @ a.T) * p["d"].to(x.dtype)) @ b.T)

    def mixed(self, site: Site, x: Tensor, y: Tensor, p: Params, weights: Tensor) -> Tensor:
        """The shared products once, the vectors per sample."""
        a, b = self._pair(site, x)
        u, out = x @ a.T, y
        for k in range(weights.shape[1]):
            d, scale = p["d"][:, k, None].to(x.dtype), p["b"][:, k, None].to(y.dtype)
            out = out + weights[:, k, None, None].to(y.dtype) * scale * ((u * d) @ b.T)
        return out

    def delta(self, site: Site, p: Params) -> tuple[Tensor, Tensor | None]:
        """``diag(b) B diag(d) A``."""
        a, b = self._pair(site, p["d"])
        return (p["b"][:, None] * b * p["d"]) @ a, None

    def _pair(self, site: Site, like: Tensor) -> tuple[Tensor, Tensor]:
        return self.A[:, : site.d_in].to(like.dtype), self.B[: site.d_out].to(like.dtype)


def _kaiming(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    bound = math.sqrt(2) * math.sqrt(3 / columns)
    return torch.empty(rows, columns).uniform_(-bound, bound, generator=generator)
