r"""LoRA: low-rank adaptation (Hu et al. 2021, arXiv:2106.09685, equation 3).

.. math:: h = W x + b + s B A \,\mathrm{drop}(x), \qquad s = \alpha / r

or ``s = alpha / sqrt(r)`` (rsLoRA: Kalajdzievski 2023, arXiv:2312.03732, theorem 3.2).

Shapes: ``A (r, in)``, ``B (out, r)``. Start: ``A`` Kaiming-uniform with ``a = sqrt(5)``, which is
``U(-1/sqrt(in), 1/sqrt(in))``; ``B`` zero, so a fresh module changes nothing. At an embedding,
``in`` is the vocabulary and ``A x`` picks columns; there ``A`` is zero and ``B`` standard normal.
Parameters per site: ``r (in + out)``.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor, nn

from cl_peft.modules import dropping, fused
from cl_peft.modules.base import Method, Params, Site, by_pattern, linear_sites, matches


class LoRA(Method):
    """Low-rank adaptation of linear layers, and of embeddings that are named.

    Args:
        rank: ``r``.
        alpha: Numerator of the scale.
        scaling: ``r``: ``alpha / r``; ``sqrt_r``: ``alpha / sqrt(r)``.
        dropout: Probability of dropping an input of the branch, in training only.
        sites: Name patterns of layers, or ``all`` linear ones.
        layers: ``upper_half``, ``upper_third``, or numbers from 1; null: all.
        rank_pattern: Other ranks by name pattern; the first that fits counts.
        alpha_pattern: Other alphas, likewise.
    """

    def __init__(
        self,
        rank: PositiveInt = 8,
        alpha: PositiveFloat = 16.0,
        scaling: Literal["r", "sqrt_r"] = "r",
        dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0,
        sites: list[str] = ("all",),  # type: ignore[assignment]
        layers: Literal["upper_half", "upper_third"] | list[PositiveInt] | None = None,
        rank_pattern: dict[str, PositiveInt] | None = None,
        alpha_pattern: dict[str, PositiveFloat] | None = None,
    ) -> None:
        self.rank, self.alpha, self.scaling, self.dropout = rank, alpha, scaling, dropout
        self.patterns, self.layers = list(sites), layers
        self.rank_pattern, self.alpha_pattern = rank_pattern or {}, alpha_pattern or {}
        self._training = False

    def sites(self, model: nn.Module) -> list[Site]:
        """Linear layers that match the patterns; embeddings where a pattern names one."""
        tables = {n: m for n, m in model.named_modules() if isinstance(m, nn.Embedding)}
        named = {n for p in self.patterns for n in tables if p != "all" and matches(n, p)}
        linear = [p for p in self.patterns if p == "all" or not any(matches(n, p) for n in tables)]
        found = linear_sites(model, linear, self.layers) if linear else []
        return [*(Site(n, m) for n, m in tables.items() if n in named), *found]

    def rank_at(self, site: Site) -> int:
        """``r`` at a site."""
        return int(by_pattern(site.name, self.rank_pattern, self.rank))

    def scale(self, site: Site) -> float:
        """``s`` at a site."""
        rank = self.rank_at(site)
        alpha = float(by_pattern(site.name, self.alpha_pattern, self.alpha))
        return alpha / (rank if self.scaling == "r" else math.sqrt(rank))

    def init(self, site: Site, generator: torch.Generator) -> Params:
        """``A`` uniform, ``B`` zero; at an embedding ``A`` zero, ``B`` normal."""
        rank = self.rank_at(site)
        if isinstance(site.layer, nn.Embedding):
            table = site.layer
            b = torch.empty(table.embedding_dim, rank).normal_(generator=generator)
            return {"A": torch.zeros(rank, table.num_embeddings), "B": b}
        bound = 1 / math.sqrt(site.d_in)
        a = torch.empty(rank, site.d_in).uniform_(-bound, bound, generator=generator)
        return {"A": a, "B": torch.zeros(site.d_out, rank)}

    def one(self, site: Site, x: Tensor, y: Tensor, p: Params) -> Tensor:
        """``y + s (drop(x) A^T) B^T``."""
        if isinstance(site.layer, nn.Embedding):
            u = nn.functional.embedding(x, p["A"].T)
        else:
            x = self._drop(x)
            u = x @ p["A"].T.to(x.dtype)
        return y + (u * self.scale(site)) @ p["B"].T.to(u.dtype)

    def fused(self, site: Site, x: Tensor, y: Tensor, p: Params) -> Tensor:
        """The same in place, where the layer is a plain one; see ``fused.py``."""
        if not fused.fits(site, x, y, p):
            return self.one(site, x, y, p)
        keep, scale = None, self.scale(site)
        if self._training and self.dropout > 0:
            keep, share = dropping.kept(x, self.dropout)
            scale /= share
        return fused.LowRank.apply(x, y.detach(), p["A"], p["B"], site.weight, scale, keep)

    def mixed(self, site: Site, x: Tensor, y: Tensor, p: Params, weights: Tensor) -> Tensor:
        """``y_n + s sum_k w_nk (x_n A_nk^T) B_nk^T``: k ranks side by side, two bmm."""
        a = p["A"].flatten(1, 2).to(y.dtype)  # (B, k r, in)
        b = p["B"].transpose(1, 2).flatten(2, 3).to(y.dtype)  # (B, out, k r)
        rank = a.shape[1] // weights.shape[1]
        w = (weights * self.scale(site)).repeat_interleave(rank, dim=1).to(y.dtype)  # (B, k r)
        if isinstance(site.layer, nn.Embedding):
            u = torch.stack([row[:, ids].T for row, ids in zip(a, x, strict=True)])
        else:
            u = torch.bmm(self._drop(x), a.transpose(1, 2))
        return torch.baddbmm(y, u * w.unsqueeze(1), b.transpose(1, 2))

    def mixed_fused(self, site: Site, x: Tensor, y: Tensor, p: Params, weights: Tensor) -> Tensor:
        """The same in place, where the layer is a plain one and nothing is dropped."""
        if (self._training and self.dropout > 0) or not fused.fits(site, x, y, p):
            return self.mixed(site, x, y, p, weights)
        a = p["A"].flatten(1, 2)  # (B, k r, in)
        b = p["B"].transpose(1, 2).flatten(2, 3)  # (B, out, k r)
        rank = a.shape[1] // weights.shape[1]
        w = (weights * self.scale(site)).repeat_interleave(rank, dim=1).to(y.dtype)  # (B, k r)
        return fused.MixedLowRank.apply(x, y.detach(), a, b, w, site.weight)

    def join(self, site: Site, p: Params, weights: Tensor) -> Params | None:
        """All ranks side by side: ``A`` stacked, the weighted ``B`` beside each other."""
        b = p["B"] * weights.to(p["B"].dtype)[:, None, None]  # (k, out, r)
        return {"A": p["A"].flatten(0, 1), "B": b.transpose(0, 1).flatten(1, 2)}

    def delta(self, site: Site, p: Params) -> tuple[Tensor, Tensor | None]:
        """``s B A``, transposed for an embedding table ``(vocabulary, out)``."""
        change = self.scale(site) * p["B"] @ p["A"]
        return (change.T if isinstance(site.layer, nn.Embedding) else change), None

    def peft_config(self, sites: list[Site]) -> dict[str, Any] | None:
        """A ``LoraConfig`` whose targets are exactly these sites."""
        ranks = {s.name: self.rank_at(s) for s in sites}
        alphas = {s.name: float(by_pattern(s.name, self.alpha_pattern, self.alpha)) for s in sites}
        return {
            "peft_type": "LORA",
            "r": self.rank,
            "lora_alpha": self.alpha,
            "lora_dropout": self.dropout,
            "use_rslora": self.scaling == "sqrt_r",
            "use_dora": False,
            "target_modules": sorted(ranks),
            "rank_pattern": {n: r for n, r in ranks.items() if r != self.rank},
            "alpha_pattern": {n: a for n, a in alphas.items() if a != self.alpha},
        }

    def peft_name(self, site: Site, name: str) -> str:
        """``lora_A.weight`` and ``lora_B.weight``, or ``lora_embedding_A``."""
        embedding = isinstance(site.layer, nn.Embedding)
        return f"lora_embedding_{name}" if embedding else f"lora_{name}.weight"

    def training_mode(self, training: bool) -> None:
        """Switch dropout."""
        self._training = training

    def _drop(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(x, self.dropout, self._training and self.dropout > 0)
