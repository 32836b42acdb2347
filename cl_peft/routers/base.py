"""What a router has to do: fit on frozen features as tasks arrive, and choose a task per sample.

A router keeps statistics, never examples. It never sees a task id at test time; the oracle does,
and says so by :attr:`Router.sees_task`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor


@dataclass(frozen=True)
class Choice:
    """What a router chose.

    Attributes:
        tasks: ``(N,)`` int64 task index of each sample.
        scores: ``(N, T)`` float32, higher is better.
        margin: ``(N,)`` best score minus second best; NaN with one task.
    """

    tasks: Tensor
    scores: Tensor
    margin: Tensor

    @staticmethod
    def best(scores: Tensor) -> Choice:
        """The task with the highest score; the earlier one on a tie."""
        margin = torch.full((len(scores),), float("nan"))
        if scores.shape[1] > 1:
            top = scores.topk(2, dim=1).values
            margin = top[:, 0] - top[:, 1]
        return Choice(scores.argmax(1), scores, margin)


class Router(ABC):
    """Chooses a task for each sample.

    Attributes:
        sees_task: Whether the true task is handed to it at test time (the oracle alone).
        needs_features: Whether it looks at frozen features.
    """

    sees_task: ClassVar[bool] = False
    needs_features: ClassVar[bool] = True

    def start(self, width: int, seed: int) -> None:  # noqa: B027 (an option, not a duty)
        """Prepare for features of size ``width``; called once, before anything else."""

    @abstractmethod
    def fit(self, features: Tensor, labels: Tensor, task: int) -> None:
        """Learn a new task; earlier ones are not available any more.

        Args:
            features: ``(N, H)`` frozen features of its training examples.
            labels: ``(N,)`` global class ids.
            task: Index of the task.
        """

    @abstractmethod
    def choose(self, features: Tensor, tasks: Tensor | None = None) -> Choice:
        """Choose a task per sample; each row depends on that row alone.

        Args:
            features: ``(N, H)``.
            tasks: ``(N,)`` true tasks, given only to a router that :attr:`sees_task`.
        """

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """Everything it learned, as named tensors."""

    @abstractmethod
    def load_state(self, state: dict[str, Tensor]) -> None:
        """The inverse of :meth:`state`.

        Raises:
            DamagedRunError: Tensors are missing.
        """

    def state_bytes(self) -> int:
        """Size of its state; counted as part of what grows with tasks."""
        return sum(t.numel() * t.element_size() for t in self.state().values())


class ClassColumns:
    """Bookkeeping for routers that know classes: one column per (task, class) pair, by arrival.

    A pair, not a class, since tasks of a domain-incremental stream share their classes.
    """

    def __init__(self) -> None:
        self.pairs: list[tuple[int, int]] = []

    def extend(self, labels: Tensor, task: int) -> tuple[int, int]:
        """Add columns for a new task's classes; returns their range ``(first, end)``."""
        if any(t == task for t, _ in self.pairs):
            raise ValueError(f"task {task + 1} was fitted before")
        first = len(self.pairs)
        self.pairs += [(task, int(c)) for c in labels.unique()]
        return first, len(self.pairs)

    def one_hot(self, labels: Tensor, task: int) -> Tensor:
        """``(N, columns)`` float32 indicator of each example's column."""
        column = {c: i for i, (t, c) in enumerate(self.pairs) if t == task}
        index = torch.tensor([column[int(c)] for c in labels])
        return torch.nn.functional.one_hot(index, len(self.pairs)).to(torch.float32)

    def task_scores(self, scores: Tensor) -> Tensor:
        """Best column per task: ``(N, columns)`` to ``(N, T)``."""
        tasks = torch.tensor([t for t, _ in self.pairs])
        index = tasks.expand(len(scores), -1)
        out = scores.new_full((len(scores), int(tasks.max()) + 1), float("-inf"))
        return out.scatter_reduce(1, index, scores, "amax")

    def tensor(self) -> Tensor:
        """``(columns, 2)`` int64."""
        return torch.tensor(self.pairs, dtype=torch.int64).reshape(-1, 2)

    @staticmethod
    def from_tensor(pairs: Tensor) -> ClassColumns:
        """The inverse of :meth:`tensor`."""
        columns = ClassColumns()
        columns.pairs = [(int(t), int(c)) for t, c in pairs]
        return columns
