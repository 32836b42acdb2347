"""Batches of examples of similar length, so that padding wastes little."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np


def by_length(lengths: np.ndarray, batch_size: int) -> Iterator[np.ndarray]:
    """For evaluation: positions in order of length, longest first, cut into batches.

    Longest first, so that a batch that does not fit in memory fails at once. The order is stable:
    equal lengths keep their order.
    """
    order = np.argsort(-lengths, kind="stable")
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def bucketed(
    lengths: np.ndarray, batch_size: int, rng: np.random.Generator, pool: int = 8
) -> list[np.ndarray]:
    """For training: shuffled batches in which lengths are similar.

    Shuffles all examples, sorts within pools of ``pool`` batches by length, cuts batches, and
    shuffles their order. Every example appears exactly once; the last batch of a pool that is not
    full keeps what is left.
    """
    order = rng.permutation(len(lengths))
    batches = []
    for start in range(0, len(order), pool * batch_size):
        part = order[start : start + pool * batch_size]
        part = part[np.argsort(lengths[part], kind="stable")]
        batches += [part[i : i + batch_size] for i in range(0, len(part), batch_size)]
    return [batches[i] for i in rng.permutation(len(batches))]
