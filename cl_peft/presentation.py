"""What a finished run shows: figure, report, the line per task, numbers for the tracker.

Imports no torch: a finished run that is recognised later is shown the same way.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from cl_peft import bounds
from cl_peft.atomic import write_atomic
from cl_peft.console import Console
from cl_peft.report import write_report
from cl_peft.view import ResultView

FIGURE = "accuracy_matrix.png"


@dataclass(frozen=True)
class Final:
    """A finished run's numbers and files.

    Attributes:
        score: Final routed average accuracy.
        summary: Final numbers by name.
        figures: Image files by name.
        tables: Long tables by name.
    """

    score: float
    summary: dict[str, float]
    figures: dict[str, Path]
    tables: dict[str, pd.DataFrame]


def write(folder: Path) -> Final:
    """Draw the figure, write the report, and gather the final numbers.

    Args:
        folder: A finished run's folder.
    """
    view = ResultView.from_folder(folder)
    figure = folder / FIGURE
    if not figure.exists():
        from analysis.figures import accuracy_matrices, png  # a second, saved where it is there

        title = f"{view.config['stream']['name']}: {folder.name}"
        drawn = accuracy_matrices(view.matrix("oracle"), view.matrix("routed"), title=title)
        write_atomic(figure, png(drawn))
    measured = bounds.read(folder)
    if not (folder / "report.md").exists():
        write_report(folder)
    return Final(
        score=view.value("average_accuracy", "routed"),
        summary={**_summary(view), **(measured.numbers() if measured else {})},
        figures={"accuracy_matrix": figure},
        tables={"results": view.results, "misrouted": _misrouted(view)},
    )


def show(folder: Path, console: Console) -> float:
    """Print a finished run's result screen; returns its score."""
    final = write(folder)
    console.result(ResultView.from_folder(folder))
    return final.score


def task_line(console: Console, rows: pd.DataFrame, tasks: int, seconds: float) -> None:
    """One line for the task just finished."""
    whole = rows[rows["eval_task"].isna()].set_index(["metric", "routing"])["value"]
    console.task_done(
        int(rows["after_task"].iloc[0]),
        tasks,
        seconds,
        float(whole["average_accuracy", "oracle"]),
        float(whole["average_accuracy", "routed"]),
        float(whole["router_accuracy", "none"]),
    )


def _summary(view: ResultView) -> dict[str, float]:
    """Numbers over all tasks, named ``<metric>`` or ``<routing>/<metric>``."""
    last = view.results[
        (view.results["after_task"] == view.done) & view.results["eval_task"].isna()
    ]
    names = last["metric"].where(last["routing"] == "none", last["routing"] + "/" + last["metric"])
    numbers = dict(zip(names.tolist(), last["value"].tolist(), strict=True))
    if not math.isnan(view.total_seconds):
        numbers["seconds"] = view.total_seconds
    return numbers


def _misrouted(view: ResultView) -> pd.DataFrame:
    rows = view.predictions()
    return rows[(rows["routed_task"] != rows["eval_task"]) & (rows["routed_task"] > 0)]
