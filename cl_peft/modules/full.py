r"""Full fine-tuning as a module: a dense change of every linear layer, one per task.

.. math:: h = W x + b + \Delta W\, x + \Delta b

The classical baseline, in the form that fits a bank: what a task learns is kept as the difference
to the frozen weights, so tasks do not overwrite each other. It is also what GaLore trains.

Shapes: ``dW (out, in)`` and, where the layer has a bias, ``db (out,)``. Start: zero, so a fresh
module changes nothing, and the gradient is that of the layer's own weight. Parameters per site:
``out in + out``; a module is as large as the layers it acts on, and is reported so. With weight
decay the difference shrinks: weights are pulled towards the pretrained ones (Li et al. 2018,
arXiv:1802.01483), not towards zero.

A batch with a route per sample gathers one dense matrix per sample and site; a batch that goes
through one module does not.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from cl_peft.modules.base import Method, Params, Site, linear_sites


class Full(Method):
    """A trained difference to the weight and bias of linear layers.

    Args:
        sites: Name patterns of layers, or ``all`` linear ones.
        layers: ``upper_half``, ``upper_third``, or numbers from 1; null: all.
    """

    def __init__(
        self,
        sites: list[str] = ("all",),  # type: ignore[assignment]
        layers: Literal["upper_half", "upper_third"] | list[PositiveInt] | None = None,
    ) -> None:
        self.patterns, self.layers = list(sites), layers

    def sites(self, model: nn.Module) -> list[Site]:
        """Linear layers that match the patterns."""
        return linear_sites(model, self.patterns, self.layers)

    def init(self, site: Site, generator: torch.Generator) -> Params:
        """Zero."""
        params = {"dW": torch.zeros(site.d_out, site.d_in)}
        if site.bias is not None:
            params["db"] = torch.zeros(site.d_out)
        return params

    def one(self, site: Site, x: Tensor, y: Tensor, p: Params) -> Tensor:
        """``y + x dW^T + db``."""
        bias = p["db"].to(x.dtype) if "db" in p else None
        return y + nn.functional.linear(x, p["dW"].to(x.dtype), bias)

    def mixed(self, site: Site, x: Tensor, y: Tensor, p: Params, weights: Tensor) -> Tensor:
        """``y_n + x_n (sum_k w_nk dW_nk)^T + sum_k w_nk db_nk``."""
        w = weights.to(y.dtype)
        change = torch.einsum("nk,nkoi->nio", w, p["dW"].to(y.dtype))
        out = torch.baddbmm(y, x, change)
        if "db" in p:
            out = out + torch.einsum("nk,nko->no", w, p["db"].to(y.dtype)).unsqueeze(1)
        return out

    def delta(self, site: Site, p: Params) -> tuple[Tensor, Tensor | None]:
        """The module itself."""
        return p["dW"], p.get("db")
