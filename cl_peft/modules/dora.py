r"""DoRA: weight-decomposed low-rank adaptation (Liu et al. 2024, arXiv:2402.09353, equation 5).

.. math::
    W' = m \frac{W + s B A}{\lVert W + s B A \rVert_{\mathrm{row}}}, \qquad
    h = W' x + b = (y - b) + (\tfrac{m}{n} - 1)(y - b) + \tfrac{m}{n} s B A x + b

``m (out,)`` is one magnitude per output row and starts at the rows' norms; ``n`` is the norm of
``W + s B A``, treated as a constant in the gradient (section 4.3). The bias is not scaled. ``W + s
B A`` is never materialised:

.. math::
    n^2 = \lVert W \rVert^2 + 2 s \sum_j (W A^T \circ B)_{\cdot j}
          + s^2 \sum_j (B A A^T \circ B)_{\cdot j}

Shapes and start of ``A`` and ``B`` as in LoRA. Parameters per site: ``r (in + out) + out``.
With dropout, the scaled base output is computed from the dropped input too, as in the official
code.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from cl_peft.modules import fused
from cl_peft.modules.base import Params, Site, linear_sites
from cl_peft.modules.lora import LoRA


class DoRA(LoRA):
    """LoRA on the direction of each weight row, with the row's magnitude trained beside it."""

    def sites(self, model: nn.Module) -> list[Site]:
        """Linear layers that match the patterns."""
        return linear_sites(model, self.patterns, self.layers)

    def init(self, site: Site, generator: torch.Generator) -> Params:
        """``A`` uniform, ``B`` zero, ``m`` the norms of the frozen rows."""
        return {**super().init(site, generator), "m": _squares(site).sqrt().cpu()}

    def one(self, site: Site, x: Tensor, y: Tensor, p: Params) -> Tensor:
        """``y + (m/n - 1)(y - b) + (m/n) s (drop(x) A^T) B^T``."""
        ratio = p["ratio"] if "ratio" in p else p["m"] / self._norm(site, p)
        ratio = ratio.to(y.dtype)
        dropped = self._drop(x)
        if self._training and self.dropout > 0:
            base = nn.functional.linear(dropped, site.weight.to(x.dtype))
        else:
            base = y if site.bias is None else y - site.bias.to(y.dtype)
        u = (dropped @ p["A"].T.to(x.dtype)) * self.scale(site)
        return y + (ratio - 1) * base + ratio * (u @ p["B"].T.to(u.dtype))

    def fused(self, site: Site, x: Tensor, y: Tensor, p: Params) -> Tensor:
        """The same in place, without dropout; see ``fused.py``."""
        ratio = p["ratio"] if "ratio" in p else p["m"] / self._norm(site, p)
        dropped = self._training and self.dropout > 0
        # the gradient divides by the ratio
        if dropped or not fused.fits(site, x, y, p) or float(ratio.detach().abs().min()) < 0.01:
            return self.one(site, x, y, p)
        bias = y.new_zeros(site.d_out) if site.bias is None else site.bias
        args = (x, y.detach(), p["A"], p["B"], ratio, site.weight, bias, self.scale(site))
        return fused.ScaledLowRank.apply(*args)

    def mixed(self, site: Site, x: Tensor, y: Tensor, p: Params, weights: Tensor) -> Tensor:
        """``y_n + sum_k w_nk [(c_nk - 1)(y_n - b) + c_nk s x_n A_nk^T B_nk^T]``, ``c = m/n``."""
        ratio = p["ratio"].to(y.dtype)  # (B, k, out)
        w = weights.to(y.dtype)
        base = y if site.bias is None else y - site.bias.to(y.dtype)
        scaled = {"A": p["A"], "B": p["B"] * ratio.unsqueeze(-1).to(p["B"].dtype)}
        out = super().mixed(site, x, y, scaled, weights)
        return out + (w.unsqueeze(-1) * (ratio - 1)).sum(1, keepdim=True) * base

    def mixed_fused(self, site: Site, x: Tensor, y: Tensor, p: Params, weights: Tensor) -> Tensor:
        """No faster way than :meth:`mixed`."""
        return self.mixed(site, x, y, p, weights)

    def join(self, site: Site, p: Params, weights: Tensor) -> Params | None:
        """None: the magnitudes of several modules do not make one."""
        return None

    def derive(self, site: Site, p: Params) -> Params:
        """``m / n``, which no longer changes once the module is finished."""
        return {"ratio": p["m"] / self._norm(site, p)}

    def delta(self, site: Site, p: Params) -> tuple[Tensor, Tensor | None]:
        """``(c - 1) W + c s B A``."""
        ratio = (p["m"] / self._norm(site, p)).unsqueeze(1)
        low_rank = self.scale(site) * p["B"] @ p["A"]
        return (ratio - 1) * site.weight + ratio * low_rank, None

    def peft_config(self, sites: list[Site]) -> dict[str, Any] | None:
        """A ``LoraConfig`` with ``use_dora``."""
        config = super().peft_config(sites)
        return None if config is None else {**config, "use_dora": True}

    def peft_name(self, site: Site, name: str) -> str:
        """As LoRA, and ``lora_magnitude_vector``."""
        return "lora_magnitude_vector" if name == "m" else super().peft_name(site, name)

    @torch.no_grad()
    def _norm(self, site: Site, p: Params) -> Tensor:
        """``n (out,)`` by the factored identity; a constant for the gradient."""
        a, b, s = p["A"].float(), p["B"].float(), self.scale(site)
        cross = ((site.weight.float() @ a.T) * b).sum(1)
        square = ((b @ (a @ a.T)) * b).sum(1)
        return (_squares(site) + 2 * s * cross + s * s * square).clamp_min(0).sqrt()


@torch.no_grad()
def _squares(site: Site) -> Tensor:
    """Squared norms of the frozen rows, ``(out,)``; they never change, so they are kept."""
    kept = getattr(site.layer, "_row_squares", None)
    stored = site.layer.weight
    assert isinstance(stored, Tensor)
    if kept is None or kept.device != stored.device:
        kept = site.weight.float().square().sum(1)
        site.layer.__dict__["_row_squares"] = kept  # no buffer: the backbone's state stays as it is
    return kept
