r"""The low-rank branch of a linear layer, with its small products added into the large ones.

Written as it stands, ``y + s (x A^T) B^T`` reads and writes the layer's output three times and its
gradient twice more; these passes over memory, not the products, are what LoRA costs. Here

.. math::
    z = y + s\,u B^T, \quad u = x A^T, \qquad v = s\,g B, \qquad
    \partial x = g W + v A, \quad \partial A = v^T x, \quad \partial B = s\,g^T u

is computed with every sum inside a matrix product: ``z`` in the place of the frozen output ``y = x
W^T + b``, ``v A`` into ``g W``. Only ``x`` and ``u`` ``(N, r)`` are kept for the backward pass. The
derivative of ``y`` is known, ``W``, so the frozen layer's own graph is not used.

DoRA's ``c = m / n`` scales rows, ``out = c (z - b) + b``: there ``B`` and ``W`` are scaled instead
of activations, and ``dc = sum_n g (out - b) / c``.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from cl_peft.modules.base import Params, Site


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


def kept(x: Tensor, p: float) -> tuple[Tensor, float]:
    """What dropout keeps: ones and zeros like ``x``, and the probability of a one.

    torch draws about 5 ns per value on a CPU, which made LoRA's dropout a third of a training step.
    16 random bits decide each value here, so ``1 - p`` is rounded to a multiple of 2^-16; the
    stream of bits is seeded from torch's global generator.
    """
    if x.device.type != "cpu":
        return torch.empty_like(x).bernoulli_(1 - p), 1 - p
    limit = max(1, round((1 - p) * 2**16))
    bits = np.random.Generator(np.random.SFC64(int(torch.randint(2**62, ()))))
    words = bits.integers(0, 2**64, size=-(-x.numel() // 4), dtype=np.uint64)
    ones = words.view(np.uint16)[: x.numel()] <= np.uint16(limit - 1)
    return torch.from_numpy(ones.astype(np.float32)).to(x.dtype).view(x.shape), limit / 2**16


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
            keep: What dropout multiplies ``x`` by, shaped like it; None: nothing is dropped.
        """
        flat = x.reshape(-1, x.shape[-1])
        seen = flat if keep is None else flat * keep.view_as(flat)
        u = seen @ a.T
        y.view(-1, y.shape[-1]).addmm_(u, b.T, alpha=scale)
        ctx.mark_dirty(y)
        ctx.save_for_backward(seen, u, a, b, weight, keep)
        ctx.scale, ctx.shape = scale, x.shape
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        """Gradients for ``x``, ``A`` and ``B``."""
        seen, u, a, b, weight, keep = ctx.saved_tensors
        want_x, _, want_a, want_b, *_ = ctx.needs_input_grad
        g = g.reshape(-1, g.shape[-1])
        v = ctx.scale * (g @ b)
        dx = None
        if want_x:
            dx = g @ weight
            if keep is None:
                dx.addmm_(v, a)
            else:
                dx.addcmul_(v @ a, keep.view_as(dx))
            dx = dx.view(ctx.shape)
        da = v.T @ seen if want_a else None
        db = ctx.scale * (u.T @ g).T if want_b else None  # thrice as fast as g.T @ u
        return dx, None, da, db, None, None, None


class MixedLowRank(torch.autograd.Function):
    """``y_n + x_n A_n^T B_n^T`` in the place of ``y``: every sample its own pair."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        x: Tensor,
        y: Tensor,
        a: Tensor,
        b: Tensor,
        weight: Tensor,
    ) -> Tensor:
        """Overwrite ``y``.

        Args:
            ctx: Autograd's.
            x: ``(B, L, in)``.
            y: ``(B, L, out)``, the frozen layer's output, without its graph.
            a: ``(B, r, in)``.
            b: ``(B, out, r)``, weights and scale in it.
            weight: ``(out, in)``, frozen.
        """
        u = torch.bmm(x, a.transpose(1, 2))
        y.baddbmm_(u, b.transpose(1, 2))
        ctx.mark_dirty(y)
        ctx.save_for_backward(x, u, a, b, weight)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        """Gradients for ``x``, ``A`` and ``B``."""
        x, u, a, b, weight = ctx.saved_tensors
        want_x, _, want_a, want_b, _ = ctx.needs_input_grad
        v = torch.bmm(g, b)
        dx = (g @ weight).baddbmm_(v, a) if want_x else None
        da = torch.bmm(v.transpose(1, 2), x) if want_a else None
        db = torch.bmm(u.transpose(1, 2), g).transpose(1, 2) if want_b else None
        return dx, None, da, db, None


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
        v = g @ (ctx.scale * rows * b)
        dx = (g @ (rows * weight)).addmm_(v, a).view(ctx.shape) if want_x else None
        da = v.T @ flat if want_a else None
        wide = (u.T @ g).T  # (out, r + 1): the last column is the sum of g
        db = ctx.scale * rows * wide[:, :-1]
        dc = ((g * out.view_as(g)).sum(0) - wide[:, -1] * bias) / c if want_c else None
        return dx, None, da, db, dc, None, None, None
