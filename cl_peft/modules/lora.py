r"""LoRA: low-rank adaptation (Hu et al. 2021, arXiv:2106.09685, equation 3).

.. math:: h = W x + b + \frac{\alpha}{r} B A \,\mathrm{drop}(x)

Shapes: ``A (r, in)``, ``B (out, r)``. Start: ``A`` Kaiming-uniform with ``a = sqrt(5)``, which is
``U(-1/sqrt(in), 1/sqrt(in))``; ``B`` zero, so a fresh module changes nothing.
Parameters per site: ``r (in + out)``.
"""

from __future__ import annotations

import math
from typing import Annotated

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor, nn

from cl_peft.modules.base import Method, Params, Site, linear_sites


class LoRA(Method):
    """Low-rank adaptation of linear layers.

    Args:
        rank: ``r``.
        alpha: Numerator of the scale ``alpha / r``.
        dropout: Probability of dropping an input of the branch, in training only.
        sites: Name patterns of linear layers, or ``all``.
    """

    def __init__(
        self,
        rank: PositiveInt = 8,
        alpha: PositiveFloat = 16.0,
        dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0,
        sites: list[str] = ("all",),  # type: ignore[assignment]
    ) -> None:
        self.rank = rank
        self.scale = alpha / rank
        self.dropout = dropout
        self.patterns = list(sites)
        self._training = False

    def sites(self, model: nn.Module) -> list[Site]:
        """Linear layers that match the patterns."""
        return linear_sites(model, self.patterns)

    def init(self, site: Site, generator: torch.Generator) -> Params:
        """``A`` uniform, ``B`` zero."""
        bound = 1 / math.sqrt(site.d_in)
        a = torch.empty(self.rank, site.d_in).uniform_(-bound, bound, generator=generator)
        return {"A": a, "B": torch.zeros(site.d_out, self.rank)}

    def one(self, site: Site, x: Tensor, y: Tensor, p: Params) -> Tensor:
        """``y + s (drop(x) A^T) B^T``."""
        u = self._drop(x) @ p["A"].T.to(x.dtype)
        return y + (u * self.scale) @ p["B"].T.to(x.dtype)

    def mixed(self, site: Site, x: Tensor, y: Tensor, p: Params, weights: Tensor) -> Tensor:
        """``y_n + s sum_k w_nk (x_n A_nk^T) B_nk^T``: k ranks side by side, two bmm."""
        a = p["A"].flatten(1, 2).to(x.dtype)  # (B, k r, in)
        b = p["B"].transpose(1, 2).flatten(2, 3).to(x.dtype)  # (B, out, k r)
        w = (weights * self.scale).repeat_interleave(self.rank, dim=1).to(x.dtype)  # (B, k r)
        u = torch.bmm(self._drop(x), a.transpose(1, 2)) * w.unsqueeze(1)
        return torch.baddbmm(y, u, b.transpose(1, 2))

    def training_mode(self, training: bool) -> None:
        """Switch dropout."""
        self._training = training

    def _drop(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(x, self.dropout, self._training and self.dropout > 0)
