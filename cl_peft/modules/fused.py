r"""The low-rank branch of a linear layer, with its small products added into the large ones.

Written as it stands, ``y + s (x A^T) B^T`` reads and writes the layer's output three times and its
gradient twice more; these passes over memory, not the products, are what LoRA costs. Here

.. math::
    z = y + s\,u B^T, \quad u = x A^T, \qquad v = s\,g B, \qquad
    \partial x = g W + v A, \quad \partial A = v^T x, \quad \partial B = s\,g^T u

is computed with every sum inside a matrix product: ``z`` in the place of the frozen output ``y = x
W^T + b``, ``v A`` into ``g W``, or, where that touches fewer numbers, ``g (W + s B A)`` at once.
``x`` and ``u`` ``(N, r)`` are kept for the backward pass, with dropout a bit per value of ``x``
more. The derivative of ``y`` is known, ``W``, so the frozen layer's own graph is not used.

DoRA's ``c = m / n`` scales rows, ``out = c (z - b) + b``: there ``B`` and ``W`` are scaled instead
of activations, and ``dc = sum_n g (out - b) / c``.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from cl_peft.modules import dropping
from cl_peft.modules.base import Params, Site

#: Ranks of a sample, at most, that are weighted by a product with a matrix of that size.
SMALL = 32


def fits(site: Site, x: Tensor, y: Tensor, p: Params) -> bool:
    """Whether the functions here apply: a plain frozen linear layer, one dtype, no autocast."""
    layer = site.layer
    return (
        type(layer) is nn.Linear
        and not layer.weight.requires_grad
        and y.is_contiguous()
        and len({x.dtype, y.dtype, layer.weight.dtype, *(t.dtype for t in p.values())}) == 1
        and not torch.is_autocast_enabled(x.device.type)
    )


def back(g: Tensor, weight: Tensor, b: Tensor, a: Tensor, v: Tensor) -> Tensor:
    """``g (W + b A)``, where ``v = g b``: as ``g W + v A``, or with ``b A`` added to ``W`` before.

    The second where ``W`` is less than half as tall as ``g W``: it takes a new ``W``, too.

    Args:
        g: ``(N, out)``.
        weight: ``(out, in)``.
        b: ``(out, r)``, scale in it.
        a: ``(r, in)``.
        v: ``(N, r)``.
    """
    if 2 * len(weight) < len(g):
        return g @ torch.addmm(weight, b, a)
    return (g @ weight).addmm_(v, a)


def turned(t: Tensor, w: Tensor, by: Literal["rows", "columns"]) -> Tensor:
    """``t_n^T``, each in one piece of memory, its rows or columns times ``w_n``.

    A product with a small matrix moves numbers twice as fast as a copy.

    Args:
        t: ``(B, n, m)``.
        w: ``(B, m)`` by rows, ``(B, n)`` by columns.
        by: Which.

    Returns:
        ``(B, m, n)``.
    """
    t = t.transpose(1, 2)
    if w.shape[1] > SMALL:
        return (t * w.unsqueeze(2 if by == "rows" else 1)).contiguous()
    weights = torch.diag_embed(w)
    return torch.bmm(weights, t) if by == "rows" else torch.bmm(t, weights)


def mixed_back(g: Tensor, weight: Tensor, a: Tensor, v: Tensor) -> Tensor:
    """``g_n W + v_n A_n``; where that is wider than ``g``, ``g W`` is added inside its product.

    Args:
        g: ``(B, L, out)``.
        weight: ``(out, in)``.
        a: ``(B, r, in)``.
        v: ``(B, L, r)``.
    """
    if weight.shape[1] <= weight.shape[0]:
        return (g @ weight).baddbmm_(v, a)
    dx = torch.bmm(v, a)
    dx.view(-1, dx.shape[2]).addmm_(g.reshape(-1, g.shape[2]), weight)
    return dx


class LowRank(torch.autograd.Function):
    """``y + s drop(x) A^T B^T`` in the place of ``y``."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        x: Tensor,
        y: Tensor,
        a: Tensor,
        b: Tensor,
        weight: Tensor,
        scale: float,
        keep: Tensor | None,
    ) -> Tensor:
        """Overwrite ``y``.

        Args:
            ctx: Autograd's.
            x: ``(..., in)``.
            y: ``(..., out)``, the frozen layer's output, without its graph.
            a: ``(r, in)``.
            b: ``(out, r)``.
            weight: ``(out, in)``, frozen.
            scale: ``s``.
            keep: What dropout keeps of ``x``, see ``dropping.py``; None: all.
        """
        flat = x.reshape(-1, x.shape[-1])
        u = flat @ a.T if keep is None else dropping.product(flat, keep, a)
        y.view(-1, y.shape[-1]).addmm_(u, b.T, alpha=scale)
        ctx.mark_dirty(y)
        ctx.save_for_backward(flat, u, a, b, weight, keep)
        ctx.scale, ctx.shape = scale, x.shape
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        """Gradients for ``x``, ``A`` and ``B``."""
        flat, u, a, b, weight, keep = ctx.saved_tensors
        want_x, _, want_a, want_b, *_ = ctx.needs_input_grad
        g = g.reshape(-1, g.shape[-1])
        scaled = ctx.scale * b
        v = g @ scaled
        if keep is None:
            dx = back(g, weight, scaled, a, v) if want_x else None
            da = v.T @ flat if want_a else None
        else:
            dx, da = dropping.gradients(flat, keep, a, v, want_x, want_a)
            dx = None if dx is None else dx.addmm_(g, weight)
        dx = None if dx is None else dx.view(ctx.shape)
        db = ctx.scale * (u.T @ g).T if want_b else None  # thrice as fast as g.T @ u
        return dx, None, da, db, None, None, None


class MixedLowRank(torch.autograd.Function):
    """``y_n + x_n A_n^T diag(w_n) B_n^T`` in the place of ``y``: every sample its own pair."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        x: Tensor,
        y: Tensor,
        a: Tensor,
        b: Tensor,
        w: Tensor,
        weight: Tensor,
    ) -> Tensor:
        """Overwrite ``y``.

        Args:
            ctx: Autograd's.
            x: ``(B, L, in)``.
            y: ``(B, L, out)``, the frozen layer's output, without its graph.
            a: ``(B, r, in)``.
            b: ``(B, out, r)``.
            w: ``(B, r)``, weight and scale of every rank.
            weight: ``(out, in)``, frozen.
        """
        u = torch.bmm(a, x.transpose(1, 2))  # (B, r, L): an eighth faster than (B, L, r)
        if any(ctx.needs_input_grad):
            wide = turned(b, w, "rows")
            y.baddbmm_(u.transpose(1, 2), wide)
            ctx.save_for_backward(x, u, a, b if ctx.needs_input_grad[4] else None, wide, w, weight)
        else:  # nobody reads it again
            y.baddbmm_((u * w.unsqueeze(2)).transpose(1, 2), b.transpose(1, 2))
        ctx.mark_dirty(y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        """Gradients for ``x``, ``A``, ``B`` and ``w``."""
        x, u, a, b, wide, w, weight = ctx.saved_tensors
        want_x, _, want_a, want_b, want_w, _ = ctx.needs_input_grad
        v = torch.bmm(wide, g.transpose(1, 2))  # (B, r, L)
        db = turned(torch.bmm(u, g), w, "columns") if want_b else None
        dx = mixed_back(g, weight, a, v.transpose(1, 2)) if want_x else None
        da = torch.bmm(v, x) if want_a else None
        dw = (u * torch.bmm(g, b).transpose(1, 2)).sum(2) if want_w else None
        return dx, None, da, db, dw, None


class ScaledLowRank(torch.autograd.Function):
    """DoRA's ``c (y + s x A^T B^T - b0) + b0`` in the place of ``y``, ``b0`` the frozen bias."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        x: Tensor,
        y: Tensor,
        a: Tensor,
        b: Tensor,
        c: Tensor,
        weight: Tensor,
        bias: Tensor,
        scale: float,
    ) -> Tensor:
        """Overwrite ``y``; ``c (out,)``, ``bias (out,)``, the rest as in :class:`LowRank`."""
        flat, out = x.reshape(-1, x.shape[-1]), y.view(-1, y.shape[-1])
        u = torch.cat([flat @ a.T, flat.new_ones(len(flat), 1)], 1)  # a rank more, for the bias
        wide = torch.cat([(scale * c).unsqueeze(1) * b, ((1 - c) * bias).unsqueeze(1)], 1)
        out.mul_(c).addmm_(u, wide.T)
        ctx.mark_dirty(y)
        ctx.save_for_backward(flat, u, y, a, b, c, weight, bias)
        ctx.scale, ctx.shape = scale, x.shape
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        """Gradients for ``x``, ``A``, ``B`` and ``c``."""
        flat, u, out, a, b, c, weight, bias = ctx.saved_tensors
        want_x, _, want_a, _, want_c, *_ = ctx.needs_input_grad
        g, rows = g.reshape(-1, g.shape[-1]), c.unsqueeze(1)
        scaled = ctx.scale * rows * b
        v = g @ scaled
        dx = back(g, rows * weight, scaled, a, v).view(ctx.shape) if want_x else None
        da = v.T @ flat if want_a else None
        wide = (u.T @ g).T  # (out, r + 1): the last column is the sum of g
        db = ctx.scale * rows * wide[:, :-1]
        dc = ((g * out.view_as(g)).sum(0) - wide[:, -1] * bias) / c if want_c else None
        return dx, None, da, db, dc, None, None, None
