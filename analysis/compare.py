"""Two runs side by side: what was configured differently, what came out, which answers changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis.folders import load_predictions, load_stream, open_run
from analysis.pairing import changed_data, in_same_tasks
from analysis.statistics import mcnemar
from analysis.tables import to_markdown
from cl_peft import metrics
from cl_peft.config import NOT_IDENTITY
from cl_peft.errors import DataError

#: Numbers made of an accuracy matrix, for both routings.
OF_A_MATRIX: dict[str, Callable[[np.ndarray], float]] = {
    "average_accuracy": metrics.average_accuracy,
    "average_incremental_accuracy": metrics.average_incremental_accuracy,
    "learning_accuracy": metrics.learning_accuracy,
    "forgetting": metrics.forgetting,
    "backward_transfer": metrics.backward_transfer,
}
#: Shares of the final evaluation's samples: from oracle right, routed right, route right.
OF_SAMPLES: dict[str, Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]] = {
    "average_accuracy_micro_oracle": lambda oracle, routed, route: oracle,
    "average_accuracy_micro_routed": lambda oracle, routed, route: routed,
    "router_accuracy": lambda oracle, routed, route: route,
    "routing_loss": lambda oracle, routed, route: oracle & ~routed,
    "misroute_luck": lambda oracle, routed, route: ~oracle & routed,
}


@dataclass(frozen=True)
class RunComparison:
    """What differs between two runs.

    Attributes:
        names: The two runs as ``group/run``.
        after_task: The evaluations compared are those after this task, 1-based.
        configuration: Index key; columns a, b: keys whose values differ (None where absent).
        metrics: metric, a, b, difference (b - a), low, high: its interval over test examples.
        tasks: Index eval_task; columns a, b, difference, low, high of the final routed accuracy.
        changed: Examples that one run answers right and the other wrong: eval_task, row, label,
            outcome ("gained": b right only, "lost": a right only), prediction_a, prediction_b,
            routed_task_a, routed_task_b; with class names where the run has them.
        mcnemar_p: Exact McNemar p of the final routed answers; NaN where not paired.
        notes: What was compared and what could not be.
    """

    names: tuple[str, str]
    after_task: int
    configuration: pd.DataFrame
    metrics: pd.DataFrame
    tasks: pd.DataFrame
    changed: pd.DataFrame
    mcnemar_p: float
    notes: tuple[str, ...]

    def to_text(self, most: int = 20) -> str:
        """The comparison as Markdown, readable in a terminal.

        Args:
            most: Changed examples to list.
        """
        parts = [f"# {self.names[0]} (a) and {self.names[1]} (b), after task {self.after_task}"]
        parts += [f"- {note}" for note in self.notes]
        parts.append("\n## Configuration\n")
        same = self.configuration.empty
        parts.append("No difference." if same else to_markdown(self.configuration.astype("object")))
        parts.append("## Numbers (difference is b - a)\n")
        parts.append(to_markdown(self.metrics))
        if not self.tasks.empty:
            parts.append("## Routed accuracy per task\n")
            parts.append(to_markdown(self.tasks))
        parts.append("## Examples whose outcome changed\n")
        gained = int((self.changed["outcome"] == "gained").sum())
        lost = len(self.changed) - gained
        p = "" if np.isnan(self.mcnemar_p) else f" (McNemar p {self.mcnemar_p:.2g})"
        parts.append(f"{gained} gained, {lost} lost{p}.\n")
        if len(self.changed):
            parts.append(to_markdown(self.changed.head(most)))
        if len(self.changed) > most:
            parts.append(f"... and {len(self.changed) - most} more.")
        return "\n".join(parts).rstrip() + "\n"


def compare_runs(
    a: str | Path,
    b: str | Path,
    *,
    after_task: int | None = None,
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> RunComparison:
    """Compare two run folders.

    Where both runs were tested on the same examples in the same tasks, every difference has an
    interval: within each task the examples are drawn with replacement, the same draw for both runs
    and for all evaluations of that task (the paired percentile bootstrap, stratified by task), and
    each metric is computed anew from the accuracy matrices of the draw. Such an interval is about
    these two runs on other examples like these; whether the configurations differ over seeds is
    what :func:`analysis.compare_examples` and :func:`analysis.paired_tests` ask.

    Where tasks differ (another order), examples are matched by class name and row, and only answers
    are compared. Runs that were tested on other examples are refused (:mod:`analysis.pairing`).

    Args:
        a: A run folder.
        b: Another.
        after_task: 1-based; None is the latest that both have committed.
        level: Of the intervals.
        resamples: Number of bootstrap samples; 0 leaves the intervals out.
        seed: Of the resampling.

    Raises:
        DataError: One of the runs has not committed that task; or they were tested on other
            examples, of which it says what differs.
        DamagedRunError: A file of a run is missing or differs from its digest.
    """
    runs = [open_run(a), open_run(b)]
    names = tuple(f"{run.path.resolve().parent.name}/{run.path.resolve().name}" for run in runs)
    same_tasks = in_same_tasks(a, b)
    frames = [_with_outcomes(load_predictions(run.path)) for run in runs]
    done = [int(frame["after_task"].max()) if len(frame) else 0 for frame in frames]
    at = min(done) if after_task is None else after_task
    if not 0 < at <= min(done):
        raise DataError(
            f"There is no evaluation after task {at} in both runs: {names[0]} has {done[0]}, "
            f"{names[1]} has {done[1]}."
        )
    frames = [frame[frame["after_task"] <= at] for frame in frames]
    notes = [] if done[0] == done[1] else [f"a has {done[0]} tasks, b {done[1]}; compared at {at}."]
    if text := changed_data(runs):
        notes.append(f"Beware: {text}")
    classes = [load_stream(run.path).get("class_names") or [] for run in runs]
    final = [frame[frame["after_task"] == at] for frame in frames]
    key = ["eval_task", "row", "label"]
    both = final[0].merge(final[1], on=key, suffixes=("_a", "_b"))
    paired = same_tasks and len(both) == len(final[0]) == len(final[1])
    paired = paired and classes[0] == classes[1]
    if paired:
        notes.append(
            f"Paired on {len(both)} test examples; {100 * level:g} % intervals over examples, "
            "for these two runs (not over seeds)."
        )
    else:
        both = _matched_by_name(final, classes)
        notes.append(
            f"Other tasks: {len(both)} of {len(final[0])} and {len(final[1])} "
            "examples match by class and row. No intervals, and no accuracy per task."
        )
    numbers = _numbers(frames, at)
    low = high = pd.DataFrame(np.nan, index=numbers.index, columns=["total"])["total"]
    tasks = _tasks(final) if paired else pd.DataFrame()
    if paired and resamples:
        draws = _bootstrap(frames, at, resamples, np.random.default_rng(seed))
        ends = draws.quantile([(1 - level) / 2, (1 + level) / 2])
        low, high = ends.iloc[0], ends.iloc[1]
        tasks = tasks.assign(
            low=[low[f"task {task}"] for task in tasks.index],
            high=[high[f"task {task}"] for task in tasks.index],
        )
    table = numbers.assign(
        difference=numbers["b"] - numbers["a"],
        low=low.reindex(numbers.index),
        high=high.reindex(numbers.index),
    )
    undefined = table["difference"].isna()
    table.loc[undefined, ["low", "high"]] = np.nan
    changed = _changed(both, classes)
    lost = int((changed["outcome"] == "lost").sum())
    return RunComparison(
        names=(names[0], names[1]),
        after_task=at,
        configuration=_configuration(runs[0].config, runs[1].config),
        metrics=table.rename_axis("metric").reset_index(),
        tasks=tasks,
        changed=changed,
        mcnemar_p=mcnemar(lost, len(changed) - lost) if len(both) else float("nan"),
        notes=tuple(notes),
    )


# ---------------------------------------------------------------- parts


def _configuration(first: Mapping[str, Any], second: Mapping[str, Any]) -> pd.DataFrame:
    keys = [key for key in {**first, **second} if key.split(".")[0] not in NOT_IDENTITY]
    rows = {k: (first.get(k), second.get(k)) for k in keys if first.get(k) != second.get(k)}
    return pd.DataFrame.from_dict(
        {k: [str(v) if isinstance(v, list) else v for v in pair] for k, pair in rows.items()},
        orient="index",
        columns=["a", "b"],
        dtype="object",
    ).rename_axis("key")


def _with_outcomes(frame: pd.DataFrame) -> pd.DataFrame:
    # routed_task 0: a single module answers and tells no task, so nothing was misrouted
    return frame.assign(
        oracle_right=frame["oracle_prediction"] == frame["label"],
        routed_right=frame["routed_prediction"] == frame["label"],
        route_right=(frame["routed_task"] == frame["eval_task"]) | (frame["routed_task"] == 0),
    )


def _numbers(frames: list[pd.DataFrame], at: int) -> pd.DataFrame:
    columns: dict[str, dict[str, float]] = {}
    for side, frame in zip("ab", frames, strict=True):
        values: dict[str, float] = {}
        for routing in ("oracle", "routed"):
            means = frame.groupby(["after_task", "eval_task"])[f"{routing}_right"].mean().unstack()
            tasks = range(1, at + 1)
            matrix = means.reindex(index=tasks, columns=tasks).to_numpy(np.float64)
            values |= {f"{name}_{routing}": f(matrix) for name, f in OF_A_MATRIX.items()}
        final = frame[frame["after_task"] == at]
        outcome = [final[f"{what}_right"].to_numpy() for what in ("oracle", "routed", "route")]
        values |= {name: float(share(*outcome).mean()) for name, share in OF_SAMPLES.items()}
        if not (final["routed_task"] > 0).all():  # a single module tells no task
            values["router_accuracy"] = np.nan
        columns[side] = values
    return pd.DataFrame(columns)


def _tasks(final: list[pd.DataFrame]) -> pd.DataFrame:
    a, b = (frame.groupby("eval_task")["routed_right"].mean() for frame in final)
    return pd.DataFrame({"a": a, "b": b, "difference": b - a}).rename_axis("eval_task")


def _bootstrap(
    frames: list[pd.DataFrame], at: int, resamples: int, rng: np.random.Generator
) -> pd.DataFrame:
    """Differences b - a, one row per draw, of every number and of each task's final accuracy."""
    shape = (2, 2, resamples, at, at)
    R = np.full(shape, np.nan)  # run, routing, draw, after_task, eval_task
    sums = np.zeros((2, len(OF_SAMPLES), resamples))
    n = 0
    for task in range(1, at + 1):
        sides = [dict(_by_evaluation(frame, task)) for frame in frames]
        size = len(sides[0][at])
        n += size
        weights = rng.multinomial(size, np.full(size, 1 / size), size=resamples)
        for s, evaluations in enumerate(sides):
            for t, cell in evaluations.items():
                for r, name in enumerate(("oracle_right", "routed_right")):
                    R[s, r, :, t - 1, task - 1] = weights @ cell[name].to_numpy(np.float64) / size
            last = evaluations[at]
            outcome = [last[f"{what}_right"].to_numpy() for what in ("oracle", "routed", "route")]
            for k, f in enumerate(OF_SAMPLES.values()):
                sums[s, k] += weights @ f(*outcome).astype(np.float64)
    found: dict[str, np.ndarray] = {}
    for r, routing in enumerate(("oracle", "routed")):
        for name, f_matrix in OF_A_MATRIX.items():
            a, b = (np.array([f_matrix(draw) for draw in R[s, r]]) for s in (0, 1))
            found[f"{name}_{routing}"] = b - a
    for k, name in enumerate(OF_SAMPLES):
        found[name] = (sums[1, k] - sums[0, k]) / n
    for task in range(1, at + 1):
        found[f"task {task}"] = R[1, 1, :, at - 1, task - 1] - R[0, 1, :, at - 1, task - 1]
    return pd.DataFrame(found)


def _by_evaluation(frame: pd.DataFrame, task: int) -> Iterator[tuple[int, pd.DataFrame]]:
    """Outcomes on one task's examples after each task, the examples always in the same order."""
    cells = frame[frame["eval_task"] == task].sort_values(["after_task", "row", "label"])
    for after in cells["after_task"].unique().tolist():
        yield after, cells[cells["after_task"] == after]


def _matched_by_name(final: list[pd.DataFrame], classes: list[list[str]]) -> pd.DataFrame:
    """Examples of equal row and class name, where that names one example only."""
    sides = []
    for frame, names in zip(final, classes, strict=True):
        text = frame["label"].map(dict(enumerate(names)))
        named = frame.assign(name=text).dropna(subset=["name"])
        sides.append(named[~named.duplicated(["name", "row"], keep=False)])
    both = sides[0].merge(sides[1], on=["name", "row"], suffixes=("_a", "_b"))
    return both.assign(eval_task=both["eval_task_a"], label=both["label_a"])


def _changed(both: pd.DataFrame, classes: list[list[str]]) -> pd.DataFrame:
    rows = both[both["routed_right_a"] != both["routed_right_b"]]
    names = [dict(enumerate(side)) for side in classes]
    known = all(len(side) for side in names)
    table = pd.DataFrame(
        {
            "eval_task": rows["eval_task"],
            "row": rows["row"],
            "label": rows["label"].map(names[0]) if known else rows["label"],
            "outcome": np.where(rows["routed_right_b"], "gained", "lost"),
            **{
                f"prediction_{side}": rows[f"routed_prediction_{side}"].map(names[k])
                if known
                else rows[f"routed_prediction_{side}"]
                for k, side in enumerate("ab")
            },
            **{f"routed_task_{side}": rows[f"routed_task_{side}"] for side in "ab"},
        }
    )
    return table.sort_values(["outcome", "eval_task", "row"]).reset_index(drop=True)
