"""The words of a stream: examples, tasks, and the source that delivers them. Imports no torch."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

#: Called with (bytes so far, all bytes).
Progress = Callable[[int, int], None]
Scenario = Literal["class", "task", "domain"]


@dataclass(frozen=True)
class Examples:
    """Examples of one split, as a source delivers them.

    Attributes:
        inputs: One text (or image array) per example.
        labels: ``(N,)`` int64, index into :attr:`RawData.class_names`.
        domains: One domain name per example, or None where the source knows none.
        rows: ``(N,)`` row of each example in its file, from 0, where some rows were left out.
    """

    inputs: Sequence[Any]
    labels: np.ndarray
    domains: Sequence[str] | None = None
    rows: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.inputs)


@dataclass(frozen=True)
class RawData:
    """All that a source knows: its splits and the names of its classes (no tasks yet).

    Attributes:
        groups: Classes that belong together, by name, where the source says so: each group becomes
            one task. Disjoint, and every class is in one.
        orders: Published orders of the groups, by number.
    """

    train: Examples
    test: Examples
    class_names: tuple[str, ...]
    validation: Examples | None = None
    groups: Mapping[str, tuple[int, ...]] | None = None
    orders: Mapping[int, Sequence[str]] = field(default_factory=dict)


class Source(ABC):
    """Where examples come from. One subclass per file in ``streams/``; see ``streams/files.py``.

    A source reads and checks; it never samples, shuffles or splits, which is the protocol's part.
    Its constructor's annotated keyword arguments are the keys that its configuration may have.

    Attributes:
        modality: What the inputs are; must equal the backbone's.
        groups: Whether it says which classes form a task (:attr:`RawData.groups`).
    """

    modality: ClassVar[Literal["text", "image"]] = "text"
    groups: ClassVar[bool] = False

    def files(self) -> Sequence[Path]:
        """Local files that it reads; none for a source that downloads or makes its examples."""
        return ()

    @abstractmethod
    def load(self, cache: Path, progress: Progress | None = None) -> RawData:
        """Read everything.

        Args:
            cache: Folder for what has to be downloaded; sources that read local files ignore it.
            progress: Called with (bytes so far, all bytes) during a download.

        Raises:
            DataError: A file, column or label does not fit.
            DownloadError: Something could not be fetched.
        """


@dataclass(frozen=True)
class Split:
    """Examples of one task. ``rows`` are rows in the source's split, from 0: stable names."""

    rows: np.ndarray
    inputs: list[Any] = field(repr=False)
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.inputs)


@dataclass(frozen=True)
class Task:
    """One step of a stream.

    Attributes:
        index: 0-based position in the stream. Files and tables show ``index + 1``.
        name: ``"task 1"``, or the name of the domain or data set.
        classes: Global class ids the task can answer, ascending: every label of its training
            examples.
        train: Training examples.
        validation: Held-out part of the training examples; may be empty.
        test: Test examples of the classes it owns (and of this domain).
        borrowed: Those of ``classes`` that it only trains, since a neighbouring task owns and
            tests them; none but in a blurry stream.
    """

    index: int
    name: str
    classes: tuple[int, ...]
    train: Split
    validation: Split
    test: Split
    borrowed: tuple[int, ...] = ()

    @property
    def owned(self) -> tuple[int, ...]:
        """Classes of its test examples, ascending."""
        return tuple(c for c in self.classes if c not in self.borrowed)


@dataclass(frozen=True)
class Stream:
    """Ordered tasks plus the protocol they were cut by."""

    name: str
    scenario: Scenario
    class_names: tuple[str, ...]
    tasks: tuple[Task, ...]

    def after(self, done: int) -> tuple[Task, ...]:
        """Tasks that remain when the first ``done`` are finished."""
        return self.tasks[done:]

    def seen(self, task: Task) -> tuple[Task, ...]:
        """Tasks up to and including ``task``."""
        return self.tasks[: task.index + 1]

    @property
    def owners(self) -> np.ndarray:
        """``(classes,)`` index of the task that owns each class.

        -1 where several do (all of a domain-incremental stream, repeated tasks), or none does.
        """
        owners = np.full(len(self.class_names), -1)
        counts = np.zeros(len(self.class_names), dtype=np.int64)
        for task in self.tasks:
            owners[list(task.owned)] = task.index
            counts[list(task.owned)] += 1
        return np.where(counts == 1, owners, -1)

    @property
    def fingerprint(self) -> str:
        """Sha256 over every input and label in order: equal streams, equal fingerprint."""
        digest = hashlib.sha256(repr((self.scenario, self.class_names)).encode())
        for task in self.tasks:
            digest.update(repr((task.name, task.classes)).encode())
            if task.borrowed:
                digest.update(repr(task.borrowed).encode())
            for split in (task.train, task.validation, task.test):
                digest.update(split.rows.tobytes() + split.labels.tobytes())
                for item in split.inputs:
                    digest.update(content_id(item).encode())
        return digest.hexdigest()

    def test_digest(self, task: Task) -> str:
        """Name of a task's test examples, 64 bits as 16 hex digits.

        The sum, modulo 2^64, over its examples, of 64 bits of BLAKE2b over row, class name and
        content. A sum knows no order, so the digests of all tasks add up to the same whatever the
        tasks' order is, or their number.
        """
        total, test = 0, task.test
        for row, label, item in zip(test.rows, test.labels, test.inputs, strict=True):
            name = repr((int(row), self.class_names[int(label)], content_id(item))).encode()
            total += int.from_bytes(hashlib.blake2b(name, digest_size=8).digest())
        return f"{total % 2**64:016x}"


def content_id(item: Any) -> str:  # noqa: ANN401 (a text or an array)
    """Name of one input by its content: 128 bits of BLAKE2b, as hex.

    Texts hash their UTF-8 bytes, arrays their dtype, shape and bytes.
    """
    if isinstance(item, str):
        data = b"text:" + item.encode("utf-8", "surrogatepass")
    else:
        array = np.ascontiguousarray(item)
        data = f"array:{array.dtype}:{array.shape}:".encode() + array.tobytes()
    return hashlib.blake2b(data, digest_size=16).hexdigest()
