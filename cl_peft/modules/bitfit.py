r"""BitFit: only biases are trained (Ben Zaken et al. 2022, arXiv:2106.10199).

.. math:: h = y + \delta_b

at every linear layer and norm inside the transformer's layers. Shape: ``b (out,)``. Start: zero, so
a fresh module changes nothing. Parameters per site: ``out``. Where a layer has no bias (Llama), the
task brings one.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from cl_peft.modules.base import Method, Params, Site, linear_sites
from cl_peft.modules.roles import norm_sites


class BitFit(Method):
    """A bias per layer and task.

    Args:
        layers: ``upper_half``, ``upper_third``, or numbers from 1; null: all.
    """

    def __init__(
        self,
        layers: Literal["upper_half", "upper_third"] | list[PositiveInt] | None = None,
    ) -> None:
        self.layers = layers

    def sites(self, model: nn.Module) -> list[Site]:
        """All linear layers and norms."""
        return [*linear_sites(model, ["all"], self.layers), *norm_sites(model, self.layers)]

    def init(self, site: Site, generator: torch.Generator) -> Params:
        """Zero."""
        return {"b": torch.zeros(site.d_out if isinstance(site.layer, nn.Linear) else _width(site))}

    def one(self, site: Site, x: Tensor, y: Tensor, p: Params) -> Tensor:
        """``y + b``."""
        return y + p["b"].to(y.dtype)

    def mixed(self, site: Site, x: Tensor, y: Tensor, p: Params, weights: Tensor) -> Tensor:
        """``y_n + sum_k w_nk b_nk``."""
        return y + (weights.unsqueeze(-1) * p["b"]).sum(1, keepdim=True).to(y.dtype)


def _width(site: Site) -> int:
    return next(site.layer.parameters()).shape[-1]
