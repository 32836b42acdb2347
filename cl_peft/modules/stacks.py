"""Memory for the bank's rows: per site and parameter one tensor ``(capacity, ...)``.

On a CPU memory that was never touched is free, so room for many rows is asked for at once, and
nothing is ever copied; elsewhere the capacity doubles.
"""

from __future__ import annotations

from typing import Any

import torch

from cl_peft.modules.base import Params

#: By site name and parameter.
Stacks = dict[str, Params]
#: Bytes of address space to ask for on a CPU: a thousand modules of 2 MB.
RESERVED = 2 * 1024**3
#: Rows that there is room for from the start, however large they are.
FEWEST = 4


def capacity(stacks: Stacks) -> int:
    """Rows that there is room for."""
    return next((len(t) for params in stacks.values() for t in params.values()), 0)


def grown(stacks: Stacks, like: Stacks, count: int) -> Stacks:
    """Stacks with room for ``count`` rows and, where it can be had, for more.

    Args:
        stacks: What there is so far; its rows are copied.
        like: One module as a row holds it.
        count: Rows needed.

    Raises:
        RuntimeError: There is no memory for that many rows.
    """
    had = capacity(stacks)
    tensors = [t for params in like.values() for t in params.values()]
    wanted = max(2 * had, count)
    if all(t.device.type == "cpu" for t in tensors):
        each = sum(t.numel() * t.element_size() for t in tensors)
        wanted = max(wanted, FEWEST, RESERVED // max(1, each))
    while True:
        try:
            bigger = _untouched(like, wanted)
            break
        except RuntimeError:  # some systems promise no more memory than they have
            if wanted == count:
                raise
            wanted = max(count, wanted // 2)
    for site, params in stacks.items():
        for name, tensor in params.items():
            bigger[site][name][:had] = tensor
    return bigger


def _untouched(like: Stacks, rows: int) -> Stacks:
    """Stacks with meaningless values, which are never read."""
    deterministic: Any = torch.utils.deterministic
    fill = deterministic.fill_uninitialized_memory  # would touch all of it, as runs are
    deterministic.fill_uninitialized_memory = False
    try:
        with torch.inference_mode(False):  # whoever asks first may be in it, later ones not
            return {
                site: {name: t.new_empty((rows, *t.shape)) for name, t in params.items()}
                for site, params in like.items()
            }
    finally:
        deterministic.fill_uninitialized_memory = fill
