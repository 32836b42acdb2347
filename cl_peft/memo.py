"""What units answered, remembered; and the questions that routers and evaluations ask.

A prediction is computed once per (unit, example), whoever wants it: the oracle, the routed answer,
a router that compares what all units say, later evaluations, a resumed run.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from cl_peft.backbones.features import Features
from cl_peft.learners.base import Learner
from cl_peft.streams.base import Task

#: A unit, and an example by its true task and its row in the source.
Key = tuple[str, int, int]


class Memo:
    """Answers that were given before, by unit and example: the unit's logits over its classes."""

    COLUMNS = ("unit", "task", "row", "logits")

    def __init__(self) -> None:
        self._entries: dict[Key, np.ndarray] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: Key) -> bool:
        return key in self._entries

    def get(self, keys: Sequence[Key]) -> np.ndarray:
        """Logits of these keys, ``(N, C)`` float32; all by units with the same classes."""
        return np.stack([self._entries[key] for key in keys])

    def add(self, frame: pd.DataFrame) -> None:
        """Remember the rows of a frame with :attr:`COLUMNS`."""
        keys = zip(frame["unit"], frame["task"].tolist(), frame["row"].tolist(), strict=True)
        self._entries.update(zip(keys, frame["logits"], strict=True))


def among_tasks(tasks: Sequence[Task], n_classes: int) -> Tensor:
    """``(tasks, classes)``: 0 for a task's own classes, else ``-inf``; to be added to logits."""
    mask = torch.full((len(tasks), n_classes), float("-inf"))
    for row, task in enumerate(tasks):
        mask[row, list(task.owned)] = 0.0
    return mask


class Questions:
    """Inputs, and what units answer to them: computed once, by the memo.

    This is what a router may look at.

    Args:
        learner: Who answers.
        memo: What was answered before.
        features: Frozen features.
        inputs: Raw inputs, N.
        rows: ``(N,)`` names of the inputs within their task.
        true: ``(N,)`` their true tasks.
        tasks: Number of tasks learned.
    """

    def __init__(
        self,
        learner: Learner,
        memo: Memo,
        features: Features,
        inputs: Sequence[Any],
        rows: np.ndarray,
        true: np.ndarray,
        tasks: int,
    ) -> None:
        self.learner, self.memo, self._features = learner, memo, features
        self.inputs, self.rows, self.true, self.tasks = inputs, rows, true, tasks
        self._news: list[pd.DataFrame] = []

    def __len__(self) -> int:
        return len(self.inputs)

    @property
    def n_classes(self) -> int:
        """Number of classes of the stream."""
        return self.learner.tools.n_classes

    def features(self, layers: Sequence[int] | None) -> Tensor:
        """Frozen features ``(N, H)``."""
        return self._features.features(self.inputs, layers)

    def true_tasks(self) -> Tensor:
        """``(N,)``."""
        return torch.from_numpy(self.true)

    def logits(self) -> dict[int, Tensor]:
        """By task, what its unit answers for all samples, over its own classes."""
        units = {task: self.unit(task) for task in range(self.tasks)}
        every = np.arange(len(self))
        self._compute([(every, np.full(len(self), unit)) for unit in units.values()])
        return {task: self._recall(every, unit) for task, unit in units.items()}

    def ask(self, *tasks: np.ndarray) -> list[Tensor]:
        """Logits over all classes, each sample by one task's unit.

        Args:
            tasks: ``(N,)`` task of each sample, any number of times.

        Returns:
            For each, ``(N, classes)``; ``-inf`` for classes that a unit does not know.
        """
        units = [self._units(t) for t in tasks]
        self._compute([(np.arange(len(self)), u) for u in units])
        return [self._everywhere(u) for u in units]

    def mixture(self, weights: Tensor) -> Tensor:
        """Logits over all classes, each sample by a weighted mixture of the tasks' modules."""
        prints = [self.learner.units[self.unit(t)].fingerprint for t in range(weights.shape[1])]
        names = [
            hashlib.sha256(repr([(prints[t], row[t]) for t in np.flatnonzero(row)]).encode())
            for row in weights.numpy()
        ]
        keys = [
            (name.hexdigest(), int(t), int(r))
            for name, t, r in zip(names, self.true, self.rows, strict=True)
        ]
        missing = np.array(
            [i for i, key in enumerate(keys) if key not in self.memo], dtype=np.int64
        )
        if len(missing):
            inputs = [self.inputs[i] for i in missing]
            answers = self.learner.mixture(inputs, weights[torch.from_numpy(missing)], "evaluation")
            self._remember([keys[i] for i in missing], list(answers.numpy()))
        return torch.from_numpy(self.memo.get(keys))

    def news(self) -> pd.DataFrame:
        """What was not in the memo before."""
        if not self._news:
            return pd.DataFrame(columns=list(Memo.COLUMNS))
        return pd.concat(self._news, ignore_index=True)

    def unit(self, task: int) -> int:
        """Key of the unit that answers for a task."""
        unit = self.learner.unit_for(int(task))
        if unit is None:
            raise RuntimeError(f"no unit answers for task {task + 1}")
        return unit

    def _units(self, tasks: np.ndarray) -> np.ndarray:
        table = {int(t): self.unit(int(t)) for t in np.unique(tasks)}
        return np.array([table[int(t)] for t in tasks])

    def _keys(self, positions: np.ndarray, units: np.ndarray) -> list[Key]:
        names = {int(u): self.learner.units[int(u)].fingerprint for u in np.unique(units)}
        true, rows = self.true[positions].tolist(), self.rows[positions].tolist()
        return [(names[u], t, r) for u, t, r in zip(units.tolist(), true, rows, strict=True)]

    def _compute(self, wanted: Sequence[tuple[np.ndarray, np.ndarray]]) -> None:
        """Ask units for (position, unit) pairs that are not in the memo, all in one go."""
        missing: dict[Key, tuple[int, int]] = {}
        for positions, units in wanted:
            for key, position, unit in zip(
                self._keys(positions, units), positions.tolist(), units.tolist(), strict=True
            ):
                if key not in self.memo:
                    missing.setdefault(key, (position, unit))
        if not missing:
            return
        asked = np.array([unit for _, unit in missing.values()])
        inputs = [self.inputs[position] for position, _ in missing.values()]
        answers = self.learner.logits(inputs, asked, "evaluation")
        classes = {int(u): list(self.learner.units[int(u)].head.classes) for u in np.unique(asked)}
        own = [row[classes[u]].numpy() for row, u in zip(answers, asked.tolist(), strict=True)]
        self._remember(list(missing), own)

    def _remember(self, keys: list[Key], logits: list[np.ndarray]) -> None:
        frame = pd.DataFrame(
            {
                "unit": [unit for unit, _, _ in keys],
                "task": np.array([task for _, task, _ in keys], dtype=np.int16),
                "row": np.array([row for _, _, row in keys], dtype=np.int32),
                "logits": logits,
            }
        )
        self.memo.add(frame)
        self._news.append(frame)

    def _recall(self, positions: np.ndarray, unit: int) -> Tensor:
        return torch.from_numpy(self.memo.get(self._keys(positions, np.full(len(positions), unit))))

    def _everywhere(self, units: np.ndarray) -> Tensor:
        out = torch.full((len(units), self.learner.tools.n_classes), float("-inf"))
        for unit in np.unique(units):
            mine = np.flatnonzero(units == unit)
            classes = torch.tensor(self.learner.units[int(unit)].head.classes)
            out[torch.from_numpy(mine)[:, None], classes[None]] = self._recall(mine, int(unit))
        return out
