r"""Dropout of a low-rank branch's input, without most of what it usually costs.

With a mask ``k`` of zeros and ones (``1 / (1 - p)`` is in the branch's scale already):

.. math::
    u = (x \circ k) A^T, \qquad \partial x = (v A) \circ k + g W, \qquad
    \partial A = v^T (x \circ k)

These are a few operations per value of ``x``, so memory is what takes time: rows are taken that fit
a processor's cache together, and ``g W`` is added last, inside its own product.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

#: Numbers that stay in a processor's own cache from one operation to the next (float32: 0.25 MB).
CACHED = 2**16


@lru_cache(maxsize=16)
def patterns(p: float) -> tuple[np.ndarray, float]:
    """2^16 bytes of eight bits, each pattern as often as is probable; and the share of ones.

    A pattern that drops m of eight has probability ``p^m (1 - p)^(8 - m)``. Sums of probabilities
    are rounded to multiples of 2^-16, so the mean is ``1 - p`` to about 2^-17, a single place's to
    about 2^-12, and there is at least one 1.
    """
    every = np.arange(256, dtype=np.uint8)
    dropped = 8 - np.unpackbits(every[:, None], axis=1).sum(1, dtype=int)
    order = np.argsort(dropped, kind="stable")
    probability = p ** dropped[order] * (1 - p) ** (8 - dropped[order])
    edges = np.rint(np.cumsum(probability) * 2**16).astype(int)
    table = np.repeat(every[order], np.diff(edges, prepend=0))
    table[0] |= 128
    table.flags.writeable = False
    return table, float(np.unpackbits(table).mean())


def kept(x: Tensor, p: float) -> tuple[Tensor, float]:
    """What dropout keeps: ones, each with probability ``1 - p``; and ``1 - p``.

    torch draws about 5 ns per value on a CPU, which made LoRA's dropout a third of a training step.
    16 random bits decide eight values here, by picking one of :func:`patterns`; the stream of bits
    is seeded from torch's global generator.

    Args:
        x: ``(..., in)``.
        p: Probability of dropping a value.

    Returns:
        On a CPU a bit per value of ``x``, eight in a byte, uint8; elsewhere bools shaped like it.
    """
    if x.device.type != "cpu":
        return torch.empty(x.shape, dtype=torch.bool, device=x.device).bernoulli_(1 - p), 1 - p
    table, share = patterns(p)
    bits = np.random.Generator(np.random.SFC64(int(torch.randint(2**62, ()))))
    keep = np.empty(-(-x.numel() // 8), dtype=np.uint8)
    for start in range(0, len(keep), CACHED):
        here = keep[start : start + CACHED]
        words = bits.integers(0, 2**64, size=-(-len(here) // 4), dtype=np.uint64)
        np.take(table, words.view(np.uint16)[: len(here)], out=here, mode="clip")
    return torch.from_numpy(keep), share


def quick(x: Tensor) -> bool:
    """Whether numpy may write into it."""
    return x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64)


def rows_at_once(x: Tensor) -> int:
    """How many rows of a matrix stay in cache together, a multiple of eight.

    All of them on other devices, and in half precision, which would add up pieces too roughly.
    """
    return max(8, CACHED // x.shape[1] // 8 * 8) if quick(x) else max(1, len(x))


def pieces(x: Tensor, keep: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Which rows stay in cache together, these of ``x``, and zeros and ones to be overwritten.

    numpy turns bits into floats in a fraction of the time that torch takes for bools.
    """
    rows = rows_at_once(x)
    space = x.new_empty(min(rows, len(x)), x.shape[1])
    for i, part in enumerate(x.split(rows)):
        here = slice(i * rows, i * rows + len(part))
        numbers = space if len(part) == len(space) else space[: len(part)]
        if keep.dtype == torch.bool:
            numbers.copy_(keep.view_as(x)[here])
        else:
            packed = keep.numpy()[here.start * x.shape[1] // 8 :]
            bits = np.unpackbits(packed[: -(-part.numel() // 8)], count=part.numel())
            if quick(x):
                np.copyto(numbers.numpy(), bits.reshape(part.shape))
            else:
                numbers.copy_(torch.from_numpy(bits).view(part.shape))
        yield here, part, numbers


def product(x: Tensor, keep: Tensor, a: Tensor) -> Tensor:
    """``u = (x * keep) A^T``, ``(N, r)``."""
    u = x.new_empty(len(a), len(x))  # transposed: a quarter faster
    for here, part, numbers in pieces(x, keep):
        torch.mm(a, numbers.mul_(part).T, out=u[:, here])
    return u.T


def gradients(
    x: Tensor, keep: Tensor, a: Tensor, v: Tensor, want_x: bool, want_a: bool
) -> tuple[Tensor | None, Tensor | None]:
    """``(v A) * keep``, to which ``g W`` is still to be added, and ``v^T (x * keep)``.

    None where one is not wanted.

    Args:
        x: ``(N, in)``.
        keep: What is kept of it, as :func:`kept` gives it.
        a: ``(r, in)``.
        v: ``(N, r)``.
        want_x: Whether the first is wanted.
        want_a: Whether the second is.
    """
    dx = torch.empty_like(x) if want_x else None
    da = torch.zeros_like(a) if want_a else None
    for here, part, numbers in pieces(x, keep):
        v_part = v[here]
        if dx is not None:
            torch.mm(v_part, a, out=dx[here]).mul_(numbers)
        if da is not None:
            da.addmm_(v_part.T, numbers.mul_(part))
    return dx, da
