r"""Bottleneck adapters (Houlsby et al. 2019, arXiv:1902.00751, section 2.1 and figure 2).

.. math:: h = y + W_2 \,\mathrm{gelu}(W_1 z + b_1) + b_2

Placement ``houlsby``: twice per layer, on the output ``y = z`` of the attention's and of the
feed-forward's last linear layer, before residual and norm. ``pfeiffer``: after the feed-forward
only (Pfeiffer et al. 2021, arXiv:2005.00247). ``parallel``: ``z`` is what enters the feed-forward,
and the sum is scaled (He et al. 2022, arXiv:2110.04366, table 1).

The norms inside the transformer's layers are trained per task as part of the module.

Shapes: ``W1 (m, H)``, ``b1 (m,)``, ``W2 (H, m)``, ``b2 (H,)``; per norm ``weight`` and ``bias``
``(H,)``. Start: near the identity, weights from a normal of standard deviation ``init_scale`` cut
at two of them, biases zero (section 3.6 of the paper); norms as the backbone has them. Parameters:
``2 H m + H + m`` per adapter, and what the norms hold.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

import torch
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor, nn

from cl_peft.modules.base import Handle, Method, Params, Site
from cl_peft.modules.roles import norm_sites, role_sites

if TYPE_CHECKING:
    from cl_peft.modules.bank import Bank


class Adapter(Method):
    """Houlsby adapters, and the Pfeiffer and parallel placements.

    Args:
        bottleneck: ``m``.
        placement: Where adapters are.
        scale: Factor of a parallel adapter; the others are not scaled.
        init_scale: Standard deviation of the weights at the start; 0 starts at the identity.
        norms: Whether the layers' norms are trained.
        layers: ``upper_half``, ``upper_third``, or numbers from 1; null: all.
    """

    def __init__(
        self,
        bottleneck: PositiveInt = 64,
        placement: Literal["houlsby", "pfeiffer", "parallel"] = "houlsby",
        scale: PositiveFloat = 4.0,
        init_scale: NonNegativeFloat = 0.01,
        norms: bool = True,
        layers: Literal["upper_half", "upper_third"] | list[PositiveInt] | None = None,
    ) -> None:
        self.bottleneck, self.placement, self.norms = bottleneck, placement, norms
        self.scale = scale if placement == "parallel" else 1.0
        self.init_scale, self.layers = init_scale, layers
        self._entering: dict[str, Tensor] = {}

    def sites(self, model: nn.Module) -> list[Site]:
        """Last linear layers of attention and feed-forward, and norms."""
        if self.placement == "houlsby":
            adapters = role_sites(model, ("attention_out", "ffn_out"), self.layers)
        else:
            adapters = role_sites(model, ("ffn_out",), self.layers)
        return [*adapters, *(norm_sites(model, self.layers) if self.norms else [])]

    def install(self, bank: Bank, model: nn.Module) -> list[Handle]:
        """Parallel adapters also look at what enters the feed-forward."""
        handles = super().install(bank, model)
        if self.placement == "parallel":
            for site in role_sites(model, ("ffn_in",), self.layers):
                handles.append(site.layer.register_forward_pre_hook(self._remember(site)))
        return handles

    def source(self, site: Site, x: Tensor) -> Tensor:
        """``z``: for a parallel adapter, what entered the feed-forward of the site's layer."""
        if self.placement == "parallel" and isinstance(site.layer, nn.Linear):
            return self._entering[_layer(site.name)]
        return x

    def init(self, site: Site, generator: torch.Generator) -> Params:
        """Near the identity; norms as they are."""
        if not isinstance(site.layer, nn.Linear):
            return {n: p.detach().float().cpu().clone() for n, p in site.layer.named_parameters()}
        m, width = self.bottleneck, site.d_out

        def normal(*shape: int) -> Tensor:
            draw = torch.empty(*shape)
            return nn.init.trunc_normal_(draw, 0.0, 1.0, -2, 2, generator) * self.init_scale

        return {
            "W1": normal(m, width),
            "b1": torch.zeros(m),
            "W2": normal(width, m),
            "b2": torch.zeros(width),
        }

    def one(self, site: Site, x: Tensor, y: Tensor, p: Params) -> Tensor:
        """``y + s (W2 gelu(W1 z + b1) + b2)``; at a norm, the task's own affine."""
        if not isinstance(site.layer, nn.Linear):
            return _affine(_normalised(site, x), p)
        z = x if self.placement == "parallel" else y
        u = nn.functional.gelu(z @ p["W1"].T.to(z.dtype) + p["b1"].to(z.dtype))
        return y + self.scale * (u @ p["W2"].T.to(u.dtype) + p["b2"].to(u.dtype))

    def mixed(self, site: Site, x: Tensor, y: Tensor, p: Params, weights: Tensor) -> Tensor:
        """``y_n + sum_k w_nk`` times what :meth:`one` adds with module ``k`` of sample ``n``."""
        out = y
        for k in range(weights.shape[1]):
            w = weights[:, k, None, None].to(y.dtype)
            q = {name: tensor[:, k] for name, tensor in p.items()}
            if isinstance(site.layer, nn.Linear):
                z = x if self.placement == "parallel" else y
                u = torch.baddbmm(q["b1"].unsqueeze(1), z, q["W1"].transpose(1, 2))
                u = nn.functional.gelu(u)
                change = torch.baddbmm(q["b2"].unsqueeze(1), u, q["W2"].transpose(1, 2))
                out = out + w * self.scale * change
            else:
                rows = {name: tensor.unsqueeze(1) for name, tensor in q.items()}
                out = out + w * (_affine(_normalised(site, x), rows) - y)
        return out

    def _remember(self, site: Site) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
            self._entering[_layer(site.name)] = args[0]

        return hook


def _layer(name: str) -> str:
    """``encoder.layer.3`` of any name inside that layer."""
    parts = name.split(".")
    last = max(i for i, part in enumerate(parts) if part.isdigit())
    return ".".join(parts[: last + 1])


def _affine(normalised: Tensor, p: Params) -> Tensor:
    scaled = normalised * p["weight"].to(normalised.dtype)
    return scaled + p["bias"].to(scaled.dtype) if "bias" in p else scaled


def _normalised(site: Site, x: Tensor) -> Tensor:
    """A norm's output before its affine part."""
    layer = site.layer
    if isinstance(layer, nn.LayerNorm):
        return nn.functional.layer_norm(x, layer.normalized_shape, None, None, layer.eps)
    eps = float(getattr(layer, "variance_epsilon", getattr(layer, "eps", 1e-6)))
    return x * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps).to(x.dtype)
