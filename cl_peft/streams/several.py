"""Several data sets as one stream: each is one task, with classes of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from cl_peft.config import build
from cl_peft.errors import DataError, UserError
from cl_peft.streams.base import Examples, Progress, RawData, Source


class Several(Source):
    """Joins data sets; a class is called ``DATA SET: LABEL``, so labels never collide.

    Args:
        sets: By name, each data set's own source: ``_target_`` and the keys of its class.
        orders: Published orders of the data sets, by number; choose one with ``stream.order=1``.
        path: Folder with one folder per data set, named like it. It takes the place of the data
            sets' own ``path``.
        sample: Folder inside each of those, where there are several samples of a data set.
    """

    groups: ClassVar[bool] = True

    def __init__(
        self,
        sets: dict[str, dict[str, Any]],
        orders: dict[int, list[str]] | None = None,
        path: str | None = None,
        sample: str | None = None,
    ) -> None:
        self.sets = sets
        self.orders = orders or {}
        self.path = path
        self.sample = sample

    def files(self) -> Sequence[Path]:
        """See :meth:`Source.files`."""
        parts = (build(self._placed(name, node)) for name, node in self.sets.items())
        return [path for part in parts for path in part.files()]

    def load(self, cache: Path, progress: Progress | None = None) -> RawData:
        """Load every data set and join them; see :meth:`Source.load`.

        Raises:
            DataError: Only some of the data sets have validation examples.
        """
        loaded: dict[str, RawData] = {}
        for name, node in self.sets.items():
            try:
                loaded[name] = build(self._placed(name, node)).load(cache, progress)
            except UserError as error:
                words = str(error).replace("stream.", f"stream.sets.{name}.")
                raise type(error)(f"data set '{name}': {words}") from error
        without = [name for name, raw in loaded.items() if raw.validation is None]
        if 0 < len(without) < len(loaded):
            raise DataError(
                f"Some data sets have validation examples, but not {', '.join(without)}. Give "
                "them some, or set validation_split=null (or validation=null) for the others."
            )
        groups: dict[str, tuple[int, ...]] = {}
        names: list[str] = []
        for name, raw in loaded.items():
            groups[name] = tuple(range(len(names), len(names) + len(raw.class_names)))
            names += [f"{name}: {label}" for label in raw.class_names]
        shifts = [classes[0] for classes in groups.values()]
        given = [raw.validation for raw in loaded.values() if raw.validation is not None]
        return RawData(
            train=_join([raw.train for raw in loaded.values()], shifts),
            test=_join([raw.test for raw in loaded.values()], shifts),
            class_names=tuple(names),
            validation=_join(given, shifts) if given else None,
            groups=groups,
            orders=self.orders,
        )

    def _placed(self, name: str, node: Mapping[str, Any]) -> dict[str, Any]:
        if self.path is None:
            return dict(node)
        return {**node, "path": str(Path(self.path, name, self.sample or ""))}


def _join(parts: Sequence[Examples], shifts: Sequence[int]) -> Examples:
    """All parts' examples, one after another; labels become global class ids."""
    labels = [part.labels + shift for part, shift in zip(parts, shifts, strict=True)]
    return Examples([item for part in parts for item in part.inputs], np.concatenate(labels))
