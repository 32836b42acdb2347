"""Tiny made-up texts whose classes are told apart by their words: for smoke tests, offline."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import Field, PositiveInt

from cl_peft.streams.base import Examples, Progress, RawData, Source

_SYLLABLES = ("ba", "de", "fi", "go", "hu", "ka", "le", "mi", "no", "pu", "ra", "se", "ti", "vo")


class Synthetic(Source):
    """Texts drawn from per-class vocabularies.

    Every class owns four invented words; a text mixes them with words that all classes share, so
    that classes are separable but not by a single token.

    Args:
        classes: Number of classes.
        train_per_class: Training texts of each class.
        test_per_class: Test texts of each class.
        noise: Share of words that belong to no class.
        seed: Decides the texts; no other seed touches them.
    """

    def __init__(
        self,
        classes: PositiveInt = 6,
        train_per_class: PositiveInt = 24,
        test_per_class: PositiveInt = 8,
        noise: Annotated[float, Field(ge=0, lt=1)] = 0.5,
        seed: int = 0,
    ) -> None:
        self.classes = classes
        self.per_class = {"train": train_per_class, "test": test_per_class}
        self.noise = noise
        self.seed = seed

    def load(self, cache: Path, progress: Progress | None = None) -> RawData:
        """Make the texts; nothing is fetched."""
        rng = np.random.default_rng([self.seed, 7])
        words = [_word(i) for i in rng.permutation(len(_SYLLABLES) ** 3)[: 4 * self.classes + 40]]
        shared, own = words[:40], np.array(words[40:]).reshape(self.classes, 4)
        splits = {}
        for split, count in self.per_class.items():
            labels = np.repeat(np.arange(self.classes), count)
            texts = []
            for label in labels:
                length = int(rng.integers(5, 12))
                pick = rng.random(length) < self.noise
                chosen = [str(rng.choice(shared if p else own[label])) for p in pick]
                texts.append(" ".join([*chosen, str(rng.choice(own[label]))]))
            splits[split] = Examples(texts, labels)
        names = tuple(f"class{i:02d}" for i in range(self.classes))
        return RawData(splits["train"], splits["test"], names)


def _word(index: int) -> str:
    base = len(_SYLLABLES)
    return "".join(_SYLLABLES[index // base**k % base] for k in range(3))
