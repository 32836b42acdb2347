"""Tables from per-sample predictions and frozen features: misroutes, confusion, abstention."""

from __future__ import annotations

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from cl_peft import metrics
from cl_peft.errors import DataError


def misrouted(predictions: pd.DataFrame, after_task: int | None = None) -> pd.DataFrame:
    """Samples that the router sent to another task, most confident mistakes first.

    Args:
        predictions: From :func:`analysis.load_predictions`.
        after_task: 1-based; None is the latest task.

    Returns:
        Rows of ``predictions`` with two more columns: oracle_right, routed_right (bool). Samples
        that were routed to no task at all are not among them.
    """
    rows = _after(predictions, after_task)
    rows = rows[(rows["routed_task"] != rows["eval_task"]) & (rows["routed_task"] != 0)]
    rows = rows.assign(
        oracle_right=rows["oracle_prediction"] == rows["label"],
        routed_right=rows["routed_prediction"] == rows["label"],
    )
    keys = [column for column in ("margin", "confidence") if column in rows.columns]
    order = [*keys, "eval_task", "row"]
    ascending = [False] * len(keys) + [True, True]
    return rows.sort_values(order, ascending=ascending).reset_index(drop=True)


def routing_confusion(predictions: pd.DataFrame, after_task: int | None = None) -> pd.DataFrame:
    """Counts of true task (rows) against routed task (columns, ``"none"`` last) of a run.

    Args:
        predictions: From :func:`analysis.load_predictions`.
        after_task: 1-based; None is the latest task.
    """
    rows = _after(predictions, after_task)
    true = rows["eval_task"].to_numpy(dtype=np.int64) - 1
    routed = rows["routed_task"].to_numpy(dtype=np.int64) - 1
    n_tasks = int(max(true.max(initial=-1), routed.max(initial=-1))) + 1
    tasks = list(range(1, n_tasks + 1))
    return pd.DataFrame(
        metrics.routing_confusion(true, routed, n_tasks),
        index=pd.Index(tasks, name="eval_task"),
        columns=pd.Index([*tasks, "none"], name="routed_task", dtype="object"),
    )


def abstention_curve(
    predictions: pd.DataFrame, *, score: str = "margin", after_task: int | None = None
) -> pd.DataFrame:
    """Accuracy on the samples answered if the least certain ones are handed on.

    For each threshold ``s``, the samples with ``score >= s`` are answered: coverage is their share,
    accuracy and router accuracy are over them alone (El-Yaniv and Wiener 2010, selective
    classification). Samples with equal scores are answered or handed on together.

    Args:
        predictions: From :func:`analysis.load_predictions`.
        score: Column that says how sure: "margin" (of the router) or "confidence" (of the head).
        after_task: 1-based; None is the latest task.

    Returns:
        One row per distinct score, highest threshold first, so coverage rises to 1: threshold,
        answered, coverage, accuracy (routed), router_accuracy.

    Raises:
        DataError: The samples have no such score, as with a learner that has no router.
    """
    rows = _after(predictions, after_task)
    if score not in rows.columns or rows[score].isna().any() or rows.empty:
        raise DataError(
            f"These predictions have no {score!r} for every sample. A learner without a router has "
            "no margin; use score='confidence'."
        )
    rows = rows.assign(
        right=rows["routed_prediction"] == rows["label"],
        routed_right=rows["routed_task"] == rows["eval_task"],
    )
    groups = rows.groupby(score)[["right", "routed_right"]]
    sums = groups.sum().sort_index(ascending=False).cumsum()
    answered = groups.size().sort_index(ascending=False).cumsum().to_numpy()
    return pd.DataFrame(
        {
            "threshold": sums.index.to_numpy(dtype=np.float64),
            "answered": answered,
            "coverage": answered / len(rows),
            "accuracy": sums["right"].to_numpy() / answered,
            "router_accuracy": sums["routed_right"].to_numpy() / answered,
        }
    )


def task_similarity(means: ArrayLike, *, centre: bool = True) -> pd.DataFrame:
    """Cosine between the mean frozen features of tasks: which ones a router can confuse.

    ``S[i, j] = <u_i, u_j> / (|u_i| |u_j|)``, ``u_i = m_i - mean(m)``. Without centring, features of
    a transformer all point the same way and every cosine is near 1.

    Args:
        means: ``(T, D)`` mean feature of each task.
        centre: Subtract the mean over tasks first.

    Returns:
        ``(T, T)``, index and columns the tasks, 1-based; NaN for a task whose mean is the origin.

    Raises:
        DataError: Not a matrix.
    """
    vectors = np.asarray(means, dtype=np.float64)
    if vectors.ndim != 2 or not len(vectors):
        raise DataError(f"Task means must be (tasks, features), not {vectors.shape}.")
    if centre and len(vectors) > 1:
        vectors = vectors - vectors.mean(axis=0)
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        unit = vectors / norms
    tasks = pd.RangeIndex(1, len(vectors) + 1, name="task")
    cosine = np.clip(unit @ unit.T, -1.0, 1.0)
    return pd.DataFrame(cosine, index=tasks, columns=tasks.rename("other_task"))


def _after(predictions: pd.DataFrame, after_task: int | None) -> pd.DataFrame:
    at = predictions["after_task"].max() if after_task is None else after_task
    return predictions[predictions["after_task"] == at]
