r"""(IA)^3: vectors that rescale activations (Liu et al. 2022, arXiv:2205.05638, section 3.3).

.. math:: k' = l_k \circ k, \quad v' = l_v \circ v, \quad h = W_2 (l_{ff} \circ x) + b_2

Keys and values are rescaled where they come out, the feed-forward's inner activation ``x`` where it
enters the last linear layer. Shapes: ``l (out,)`` at keys and values, ``l (in,)`` at the
feed-forward. Start: ones, so a fresh module changes nothing. Parameters per layer:
``d_k + d_v + d_ff``.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from cl_peft.modules.base import Method, Params, Site
from cl_peft.modules.roles import role_of, role_sites


class IA3(Method):
    """Rescaling of keys, values and the feed-forward's activations.

    Args:
        layers: ``upper_half``, ``upper_third``, or numbers from 1; null: all.
    """

    def __init__(
        self,
        layers: Literal["upper_half", "upper_third"] | list[PositiveInt] | None = None,
    ) -> None:
        self.layers = layers

    def sites(self, model: nn.Module) -> list[Site]:
        """Keys, values, and the feed-forward's last layer."""
        return role_sites(model, ("key", "value", "ffn_out"), self.layers)

    def init(self, site: Site, generator: torch.Generator) -> Params:
        """Ones."""
        return {"l": torch.ones(site.d_in if role_of(site.name) == "ffn_out" else site.d_out)}

    def one(self, site: Site, x: Tensor, y: Tensor, p: Params) -> Tensor:
        """``l * y``, or ``y + W ((l - 1) * x)``, which is ``W (l * x) + b``."""
        return y + self._change(site, x, y, p["l"] - 1)

    def mixed(self, site: Site, x: Tensor, y: Tensor, p: Params, weights: Tensor) -> Tensor:
        """The change is linear in ``l - 1``, so k vectors add up before it."""
        total = (weights.unsqueeze(-1) * (p["l"] - 1)).sum(1, keepdim=True)
        return y + self._change(site, x, y, total)

    def delta(self, site: Site, p: Params) -> tuple[Tensor, Tensor | None]:
        """Rows of ``W`` and ``b`` scaled, or columns of ``W``."""
        if role_of(site.name) == "ffn_out":
            return site.weight * (p["l"] - 1), None
        change = p["l"] - 1
        return site.weight * change[:, None], None if site.bias is None else site.bias * change

    def _change(self, site: Site, x: Tensor, y: Tensor, less_one: Tensor) -> Tensor:
        if role_of(site.name) == "ffn_out":
            return nn.functional.linear(x * less_one.to(x.dtype), site.weight.to(x.dtype))
        return y * less_one.to(y.dtype)
