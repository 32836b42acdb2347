r"""A reservoir of training examples, and what learners that rehearse from one have in common.

Reservoir sampling (algorithm R: Vitter 1985, doi:10.1145/3147.3165). Offer number n, counted from
0 over the whole stream, takes

.. math:: \mathrm{slot}_n = n \ (n < M), \qquad \mathrm{slot}_n \sim U\{0, \dots, n\} \ (n \geq M)

if that is below the size M, and is dropped otherwise. After n offers each of them is in the buffer
with probability :math:`\min(1, M / n)`. Slot n is drawn by ``(seed, n)`` alone: neither the size of
batches nor an interruption changes what is kept.

Every step of training draws from the buffer, trains, and then offers its batch, in every epoch, as
in mammoth (Buzzega et al. 2020, arXiv:2004.07211). So an example can be in it more than once, and
examples of the current task are replayed as well.

Stored: per slot the task and the position in its training split, and for learners that want them
values ``(V,)``, such as logits; NaN where an older offer had fewer. The examples stay where the
stream has them, and are not counted in the bytes of the state.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch
from pydantic import PositiveInt
from torch import Tensor

from cl_peft.learners.base import Fit, Tools
from cl_peft.learners.sequential import Sequential
from cl_peft.store import require
from cl_peft.streams.base import Task

_SLOT, _DRAW = 29, 31  # one random stream per purpose


class Reservoir:
    """A uniform sample of everything that was offered.

    Args:
        size: ``M``.
        seed: Decides what is kept.
    """

    def __init__(self, size: int, seed: int) -> None:
        self.size, self.seed, self.seen = size, seed, 0
        self._places = torch.zeros(size, 2, dtype=torch.int64)  # task, row
        self._values = torch.zeros(size, 0)

    def __len__(self) -> int:
        return min(self.seen, self.size)

    @property
    def places(self) -> Tensor:
        """``(n, 2)`` task and row of what is kept."""
        return self._places[: len(self)]

    @property
    def values(self) -> Tensor:
        """``(n, V)`` values that are kept with it."""
        return self._values[: len(self)]

    def offer(self, task: int, rows: np.ndarray, values: Tensor | None = None) -> None:
        """Offer examples, one after another.

        Args:
            task: Their task.
            rows: ``(N,)`` positions in its training split.
            values: ``(N, V)`` what is to be kept with them.
        """
        values = torch.zeros(len(rows), 0) if values is None else values
        self._values = _padded(self._values, values.shape[1])
        values = _padded(values, self._values.shape[1])
        for row, value in zip(rows.tolist(), values, strict=True):
            slot = self._slot()
            self.seen += 1
            if slot < self.size:
                self._places[slot] = torch.tensor([task, row])
                self._values[slot] = value

    def draw(self, count: int, random: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Places ``(n, 2)`` and values ``(n, V)`` of different slots; fewer if there are fewer."""
        count = min(count, len(self))
        slots = random.choice(len(self), count, replace=False) if count else np.zeros(0, np.int64)
        index = torch.from_numpy(slots)
        return self.places[index], self.values[index]

    def copy(self) -> Reservoir:
        """A reservoir that goes on independently."""
        return Reservoir.from_tensors(self.tensors(), self.size, self.seed)

    def tensors(self) -> dict[str, Tensor]:
        """As stored on disk."""
        return {"places": self.places, "values": self.values, "seen": torch.tensor(self.seen)}

    @staticmethod
    def from_tensors(tensors: dict[str, Tensor], size: int, seed: int) -> Reservoir:
        """The inverse of :meth:`tensors`."""
        out = Reservoir(size, seed)
        out.seen = int(tensors["seen"])
        out._values = torch.zeros(size, tensors["values"].shape[1])
        out.places.copy_(tensors["places"])
        out.values.copy_(tensors["values"])
        return out

    def _slot(self) -> int:
        if self.seen < self.size:
            return self.seen
        return int(np.random.default_rng([self.seed, _SLOT, self.seen]).integers(self.seen + 1))


class Rehearsal(Sequential):
    """One module trained on from task to task, with a buffer of earlier examples.

    Args:
        size: Examples that the buffer holds.
        replay_batch: Examples drawn from it per step; None: as many as ``trainer.batch_size``.
    """

    keeps_examples: ClassVar[bool] = True
    splits: ClassVar[bool] = False  # every loss draws from the buffer and offers to it

    def __init__(self, size: PositiveInt = 200, replay_batch: PositiveInt | None = None) -> None:
        self.size, self.replay_batch = size, replay_batch

    def start(self, tools: Tools) -> None:
        """The buffer is empty."""
        super().start(tools)
        self.buffer = Reservoir(self.size, self.tools.seeds.data)
        self._tasks: dict[int, Task] = {}

    def learn(self, task: Task) -> None:
        """Train the module on; the buffer changes only if that succeeds."""
        self._tasks[task.index] = task
        self._filling = self.buffer.copy()
        self._random = np.random.default_rng([self.tools.seeds.data, _DRAW, task.index])
        super().learn(task)
        self.buffer = self._filling

    def recall(self, task: Task, tensors: dict[str, Tensor]) -> None:
        """Remember the task, whose examples the buffer points at; put the module back."""
        self._tasks[task.index] = task
        super().recall(task, tensors)

    def state(self) -> dict[str, Tensor]:
        """The buffer."""
        return self.buffer.tensors()

    def load_state(self, state: dict[str, Tensor]) -> None:
        """The inverse of :meth:`state`."""
        require(state, {"places", "values", "seen"}, f"learner={type(self).__name__.lower()}")
        self.buffer = Reservoir.from_tensors(state, self.size, self.tools.seeds.data)

    def _replayed(self, fit: Fit) -> tuple[list[Any], Tensor, Tensor]:
        """A batch of the buffer: inputs, positions of their labels in the head, values."""
        count = self.replay_batch or self.tools.trainer.batch_size
        places, values = self._filling.draw(count, self._random)
        splits = [self._tasks[t].train for t in places[:, 0].tolist()]
        rows = places[:, 1].tolist()
        labels = torch.tensor([s.labels[r] for s, r in zip(splits, rows, strict=True)]).long()
        inputs = [s.inputs[r] for s, r in zip(splits, rows, strict=True)]
        return inputs, fit.head.local(labels).to(self._device), values.to(self._device)

    def _answers(self, fit: Fit, rows: np.ndarray, *more: list[Any]) -> list[Tensor]:
        """Logits of the training examples at ``rows`` and of further inputs, in one pass."""
        parts = [[fit.train.inputs[r] for r in rows], *more]
        inputs = [item for part in parts for item in part]
        pooled = self._feature(fit, inputs, np.arange(len(inputs)), training=True)
        return list(self._logits(fit, pooled).split([len(part) for part in parts]))


def _padded(values: Tensor, width: int) -> Tensor:
    """Values ``(N, V)`` with NaN columns up to ``width``."""
    missing = width - values.shape[1]
    return torch.nn.functional.pad(values, (0, max(0, missing)), value=float("nan"))
