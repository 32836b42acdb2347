"""Evaluation after a task: predictions, both accuracy matrices, where the errors come from.

Every test example of every seen task gets two predictions: the oracle's, by the unit of its true
task among that task's classes, and the routed one, by what the router chose (or, for a learner
with one unit, among all classes seen so far). Predictions are remembered by (unit, example), so
after a task only its own test set and the samples whose route moved pass through the backbone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch

from cl_peft import metrics
from cl_peft.backbones.features import Features
from cl_peft.learners.base import Learner
from cl_peft.routers.base import Router
from cl_peft.streams.base import Stream, Task

NAN = float("nan")


class Memo:
    """Predictions that were made before, by unit and example.

    An entry says what a unit answers for one test example: the best of all its classes
    (``label``), the best of the example's true task's classes (``within``), and the softmax of
    ``label`` (``confidence``).
    """

    COLUMNS = ("unit", "task", "row", "label", "within", "confidence")

    def __init__(self) -> None:
        self._entries: dict[tuple[str, int, int], tuple[int, int, float]] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: tuple[str, int, int]) -> bool:
        return key in self._entries

    def get(self, keys: Sequence[tuple[str, int, int]]) -> tuple[np.ndarray, ...]:
        """``label``, ``within`` and ``confidence`` arrays of these keys."""
        rows = [self._entries[key] for key in keys]
        label, within, confidence = zip(*rows, strict=True) if rows else ((), (), ())
        return (
            np.array(label, dtype=np.int32),
            np.array(within, dtype=np.int32),
            np.array(confidence, dtype=np.float32),
        )

    def add(self, frame: pd.DataFrame) -> None:
        """Remember the rows of a frame with :attr:`COLUMNS`."""
        keys = zip(frame["unit"], frame["task"].tolist(), frame["row"].tolist(), strict=True)
        values = zip(
            frame["label"].tolist(),
            frame["within"].tolist(),
            frame["confidence"].tolist(),
            strict=True,
        )
        self._entries.update(zip(keys, values, strict=True))


@dataclass(frozen=True)
class Results:
    """What one evaluation gave.

    Attributes:
        rows: Result rows (``after_task`` 1-based), as stored in ``results.parquet``.
        predictions: One row per seen test example.
        memo: What was newly remembered.
        passes: Test examples that went through the backbone for it.
    """

    rows: pd.DataFrame
    predictions: pd.DataFrame
    memo: pd.DataFrame
    passes: int


class Evaluator:
    """Evaluates a learner after each task, and keeps the matrices.

    Args:
        run: Name of the run, a column of every result row.
        stream: What is evaluated on.
        learner: Who answers.
        router: Who chooses a task per sample; ignored by learners that use none.
        features: Frozen features, for the router.
    """

    def __init__(
        self, run: str, stream: Stream, learner: Learner, router: Router, features: Features
    ) -> None:
        self.run, self.stream, self.features = run, stream, features
        self.learner, self.router = learner, router
        self.memo = Memo()
        n = len(stream.tasks)
        self.oracle = np.full((n, n), np.nan)
        self.routed = np.full((n, n), np.nan)
        self.counts = np.array([len(task.test) for task in stream.tasks])
        self._task_of_class = np.zeros(len(stream.class_names), dtype=np.int64)
        for task in stream.tasks:
            self._task_of_class[list(task.classes)] = task.index

    def restore(self, results: pd.DataFrame, memos: Sequence[pd.DataFrame]) -> None:
        """Come back to the state after the tasks that ``results`` covers."""
        cells = results[(results["metric"] == "accuracy") & results["eval_task"].notna()]
        for name, matrix in (("oracle", self.oracle), ("routed", self.routed)):
            mine = cells[cells["routing"] == name]
            matrix[mine["after_task"] - 1, mine["eval_task"].astype(int) - 1] = mine["value"]
        for frame in memos:
            self.memo.add(frame)

    def after(self, task: Task, costs: dict[str, float]) -> Results:
        """Evaluate on all tasks seen.

        Args:
            task: The task just learned.
            costs: Parameters and bytes, stored as result rows with routing ``none``.
        """
        seen = self.stream.seen(task)
        passes = self.learner.passes
        frame, memo = self._predict(seen)
        parts = []
        for other in seen:
            mine = frame[frame["eval_task"] == other.index + 1]
            parts.append(self._cell(mine) if len(mine) else None)
            if len(mine):
                self.oracle[task.index, other.index] = parts[-1].oracle_accuracy  # type: ignore[union-attr]
                self.routed[task.index, other.index] = parts[-1].accuracy  # type: ignore[union-attr]
        frame.insert(0, "after_task", np.int16(task.index + 1))
        rows = self._rows(task, parts, costs, known=bool((frame["routed_task"] > 0).all()))
        return Results(rows, frame, memo, self.learner.passes - passes)

    def _predict(self, seen: Sequence[Task]) -> tuple[pd.DataFrame, pd.DataFrame]:
        """Predictions for all test examples of ``seen``; and what was newly computed."""
        inputs = [item for t in seen for item in t.test.inputs]
        rows = np.concatenate([t.test.rows for t in seen])
        labels = np.concatenate([t.test.labels for t in seen])
        true = np.concatenate([np.full(len(t.test), t.index) for t in seen])
        if self.learner.unit_for(seen[-1].index) is None:  # nothing to ask yet
            empty = np.zeros(0, dtype=np.int64)
            return self._frame(empty, empty, empty, {}), pd.DataFrame(columns=list(Memo.COLUMNS))
        margin = np.full(len(rows), np.nan, dtype=np.float32)
        chosen = true
        if self.learner.uses_router:
            given = torch.from_numpy(true) if self.router.sees_task else None
            needs = self.router.needs_features
            features = self.features.features(inputs) if needs else torch.zeros(len(rows), 0)
            choice = self.router.choose(features, given)
            chosen, margin = choice.tasks.numpy(), choice.margin.numpy()
        own = np.array([self._unit(t) for t in true])
        other = np.array([self._unit(t) for t in chosen])
        memo = self._compute(inputs, rows, true, own, other)
        _, within, _ = self.memo.get(self._keys(own, true, rows))
        label, label_within, confidence = self.memo.get(self._keys(other, true, rows))
        if self.stream.scenario == "task":  # the task is given, so its classes are
            label, chosen = label_within, true
        elif not self.learner.uses_router:
            domain = self.stream.scenario == "domain"
            chosen = np.full(len(rows), -1) if domain else self._task_of_class[label]
        values = {
            "oracle_prediction": within,
            "routed_prediction": label,
            "routed_task": (chosen + 1).astype(np.int16),
            "margin": margin,
            "confidence": confidence,
        }
        return self._frame(true, rows, labels, values), memo

    def _unit(self, task: int) -> int:
        unit = self.learner.unit_for(int(task))
        if unit is None:
            raise RuntimeError(f"no unit answers for task {task + 1}")
        return unit

    def _keys(
        self, units: np.ndarray, true: np.ndarray, rows: np.ndarray
    ) -> list[tuple[str, int, int]]:
        names = {int(u): self.learner.units[int(u)].fingerprint for u in np.unique(units)}
        return [
            (names[u], t, r)
            for u, t, r in zip(units.tolist(), true.tolist(), rows.tolist(), strict=True)
        ]

    def _compute(
        self,
        inputs: list[Any],
        rows: np.ndarray,
        true: np.ndarray,
        own: np.ndarray,
        other: np.ndarray,
    ) -> pd.DataFrame:
        """Compute and remember the (unit, example) pairs that are not there yet."""
        wanted: dict[tuple[str, int, int], tuple[int, int]] = {}
        for units in (own, other):
            for position, key in enumerate(self._keys(units, true, rows)):
                if key not in self.memo:
                    wanted.setdefault(key, (position, int(units[position])))
        if not wanted:
            return pd.DataFrame(columns=list(Memo.COLUMNS))
        positions = np.array([p for p, _ in wanted.values()])
        units = np.array([u for _, u in wanted.values()])
        logits = self.learner.logits([inputs[p] for p in positions], units, "evaluation")
        best = logits.argmax(1)  # not of the softmax, which rounds near ties to ties
        allowed = torch.full((len(self.stream.tasks), logits.shape[1]), float("-inf"))
        for task in self.stream.tasks:
            allowed[task.index, list(task.classes)] = 0.0
        within = (logits + allowed[torch.from_numpy(true[positions])]).max(1)
        # a unit that knows none of the true task's classes has no answer within it
        best_within = torch.where(within.values.isinf(), -1, within.indices)
        memo = pd.DataFrame(
            {
                "unit": [unit for unit, _, _ in wanted],
                "task": true[positions].astype(np.int16),
                "row": rows[positions].astype(np.int32),
                "label": best.numpy().astype(np.int32),
                "within": best_within.numpy().astype(np.int32),
                "confidence": logits.softmax(1).amax(1).numpy().astype(np.float32),
            }
        )
        self.memo.add(memo)
        return memo

    def _frame(
        self, true: np.ndarray, rows: np.ndarray, labels: np.ndarray, values: dict[str, np.ndarray]
    ) -> pd.DataFrame:
        none = np.zeros(len(rows))
        return pd.DataFrame(
            {
                "eval_task": (true + 1).astype(np.int16),
                "row": rows.astype(np.int32),
                "label": labels.astype(np.int32),
                "oracle_prediction": values.get("oracle_prediction", none).astype(np.int32),
                "routed_prediction": values.get("routed_prediction", none).astype(np.int32),
                "routed_task": values.get("routed_task", none).astype(np.int16),
                "margin": values.get("margin", none).astype(np.float32),
                "confidence": values.get("confidence", none).astype(np.float32),
            }
        )

    def _cell(self, frame: pd.DataFrame) -> metrics.Decomposition:
        # routed_task 0: a single unit answers and tells no task, so nothing was misrouted
        right = (frame["routed_task"] == frame["eval_task"]) | (frame["routed_task"] == 0)
        return metrics.decompose(
            (frame["oracle_prediction"] == frame["label"]).to_numpy(),
            (frame["routed_prediction"] == frame["label"]).to_numpy(),
            right.to_numpy(),
        )

    def _rows(
        self,
        task: Task,
        parts: Sequence[metrics.Decomposition | None],
        costs: dict[str, float],
        known: bool,
    ) -> pd.DataFrame:
        """All result rows of one evaluation, in a fixed order."""
        out: list[tuple[int | None, str, str, float]] = []
        for index, part in enumerate(parts):
            for routing, matrix in (("oracle", self.oracle), ("routed", self.routed)):
                out.append((index + 1, routing, "accuracy", matrix[task.index, index]))
            accuracy = part.router_accuracy if part is not None and known else NAN
            out.append((index + 1, "none", "router_accuracy", accuracy))
            for field in dataclasses.fields(metrics.Decomposition):
                value = getattr(part, field.name) if part is not None else NAN
                out.append((index + 1, "none", field.name, value))
        block = slice(0, task.index + 1)
        for routing, matrix in (("oracle", self.oracle), ("routed", self.routed)):
            R = matrix[block, block]
            for name, value in self._summary(R, self.counts[block]).items():
                out.append((None, routing, name, value))
        whole = metrics.Decomposition.pool(p for p in parts if p is not None)
        split = metrics.forgetting_split(self.oracle[block, block], self.routed[block, block])
        summary = {
            "router_accuracy": whole.router_accuracy if known else NAN,
            "routing_loss": whole.routing_loss,
            "misroute_luck": whole.misroute_luck,
            "forgetting_module_drift": split.module_drift,
            "forgetting_routing_drift": split.routing_drift,
            **costs,
        }
        out += [(None, "none", name, value) for name, value in summary.items()]
        eval_task, routing_, metric, value_ = zip(*out, strict=True)
        return pd.DataFrame(
            {
                "run": self.run,
                "after_task": np.int32(task.index + 1),
                "eval_task": pd.array(list(eval_task), dtype="Int32"),
                "routing": list(routing_),
                "metric": list(metric),
                "value": np.array(value_, dtype=np.float64),
            }
        )

    @staticmethod
    def _summary(R: np.ndarray, n: np.ndarray) -> dict[str, float]:
        return {
            "average_accuracy": metrics.average_accuracy(R),
            "average_accuracy_micro": metrics.average_accuracy_micro(R, n),
            "average_incremental_accuracy": metrics.average_incremental_accuracy(R),
            "forgetting": metrics.forgetting(R),
            "forgetting_nonnegative": metrics.forgetting_nonnegative(R),
            "forgetting_first_last": metrics.forgetting_first_last(R),
            "forgetting_one_step": metrics.forgetting_one_step(R),
            "backward_transfer": metrics.backward_transfer(R),
            "backward_transfer_t": metrics.backward_transfer(R, "T"),
            "learning_accuracy": metrics.learning_accuracy(R),
        }
