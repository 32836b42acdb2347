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

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from cl_peft import metrics
from cl_peft.backbones.features import Features
from cl_peft.learners.base import Learner
from cl_peft.memo import Memo, Questions, among_tasks
from cl_peft.routers.base import Router
from cl_peft.streams.base import Stream, Task

NAN = float("nan")


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
        if self.learner.unit_for(seen[-1].index) is None:  # nothing to ask yet
            empty = np.zeros(0, dtype=np.int64)
            return self._frame(empty, empty, empty, {}), pd.DataFrame(columns=list(Memo.COLUMNS))
        rows = np.concatenate([t.test.rows for t in seen])
        labels = np.concatenate([t.test.labels for t in seen])
        true = np.concatenate([np.full(len(t.test), t.index) for t in seen])
        inputs = [item for t in seen for item in t.test.inputs]
        tests = Questions(self.learner, self.memo, self.features, inputs, rows, true, len(seen))
        margin, abstained = np.full(len(rows), np.nan, dtype=np.float32), np.zeros(len(rows), bool)
        (oracle,) = tests.ask(true)
        if self.learner.uses_router:
            choice, routed = self.router.answer(tests)
            chosen, margin = choice.tasks.numpy(), choice.margin.numpy()
            if choice.abstained is not None:
                abstained = choice.abstained.numpy()
            by_class = self.router.by_class(choice)
        else:
            chosen, routed, by_class = np.full(len(rows), -1), oracle, True
        mask = among_tasks(self.stream.tasks, oracle.shape[1])[torch.from_numpy(true)]
        label = routed.argmax(1).numpy()  # not of the softmax, which rounds near ties to ties
        if self.stream.scenario == "task":  # the task is given, so its classes are
            label, chosen = _best(routed + mask), true
        elif by_class:  # the task that answered is that of the class, where one task owns it
            owner = self.stream.owners[label]
            chosen = np.where(owner < 0, chosen, owner)
        values = {
            "oracle_prediction": _best(oracle + mask),
            "routed_prediction": label,
            "routed_task": (chosen + 1).astype(np.int16),
            "margin": margin,
            "confidence": routed.softmax(1).amax(1).numpy(),
            "abstained": abstained,
        }
        return self._frame(true, rows, labels, values), tests.news()

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
                "abstained": values.get("abstained", none).astype(bool),
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


def _best(logits: Tensor) -> np.ndarray:
    """Class with the highest logit; -1 where none has an answer."""
    top = logits.max(1)
    return np.asarray(torch.where(top.values.isinf(), -1, top.indices).numpy())
