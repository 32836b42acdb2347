"""The report of a run as Markdown, written from what the run folder holds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from cl_peft.archives import short_name
from cl_peft.atomic import write_atomic
from cl_peft.view import ResultView, flatten, percent, read_json

NAME = "report.md"


def write_report(folder: Path) -> Path:
    """Write ``report.md`` into a run folder, finished or not; an older one is replaced as a whole.

    Args:
        folder: The run folder.

    Returns:
        The report's path.

    Raises:
        DamagedRunError: A file that the report needs is damaged; it is named.
        UserError: The report cannot be written.
    """
    path = folder / NAME
    write_atomic(path, render(ResultView.from_folder(folder)).encode())
    return path


def render(view: ResultView) -> str:
    """The report as text: equal run folders, equal text."""
    provenance = dict(flatten(read_json(view.folder / "provenance.json")))
    parts = [f"# {view.title}", *_state(view)]
    command = provenance.pop("command", None)
    if command:
        text = command if isinstance(command, str) else " ".join(str(word) for word in command)
        parts += ["To reproduce:", f"```\n{text}\n```"]
    if view.done:
        parts += _results(view)
        if (view.folder / "accuracy_matrix.png").exists():
            parts.append("![accuracy matrices](accuracy_matrix.png)")
        parts += _confusion(view)
    parts += ["## Configuration", markdown_table(("key", "value"), _rows(flatten(view.config)))]
    if provenance:
        parts += ["## Provenance", markdown_table(("what", "value"), _rows(provenance.items()))]
    return "\n\n".join(parts) + "\n"


def _state(view: ResultView) -> list[str]:
    axes = ("stream", "backbone", "module", "router", "learner")
    names = [short_name(str(view.config.get(axis, {}).get("name", "?"))) for axis in axes]
    settings = [f"{axis} {name}" for axis, name in zip(axes, names, strict=True)]
    settings += [f"seed.{key} {value}" for key, value in view.config.get("seed", {}).items()]
    lines = [", ".join(settings) + "."]
    if view.state != "finished":
        lines.append(f"**{view.state}**, with {view.done} of {view.tasks} tasks done.")
    if view.error:
        lines.append(f"```\n{view.error.strip()}\n```")
    return lines


def _results(view: ResultView) -> list[str]:
    parts = ["## Results"]
    parts.append(markdown_table(("%, over all seen tasks", "oracle", "routed"), view.metrics()))
    parts.append(markdown_table(("", ""), view.facts()))
    parts.append(
        "Oracle: each sample's true task is given. Routed: the router chooses it. Forgetting is "
        "Chaudhry et al. 2018; backward transfer divides by T - 1. All variants are in "
        "`results.parquet`."
    )
    for routing in ("oracle", "routed"):
        cells = view.matrix(routing)
        head = ["after task", *(str(i + 1) for i in range(view.done))]
        rows = [[str(t + 1), *(percent(value, "") for value in row)] for t, row in enumerate(cells)]
        parts += [f"### Accuracy, {routing}, %", markdown_table(head, rows)]
    return parts


def _confusion(view: ResultView) -> list[str]:
    """Which task the router chose for the samples of each task, after the last task."""
    import pandas as pd

    rows = view.predictions()
    if rows.empty or (rows["routed_task"] == 0).all():
        return []
    counts = pd.crosstab(rows["eval_task"], rows["routed_task"])
    right = (rows["eval_task"] == rows["routed_task"]).groupby(rows["eval_task"]).mean()
    names = ["none" if task == 0 else str(task) for task in counts.columns]
    table = markdown_table(
        ("true task", *names, "right, %"),
        [
            (str(task), *(str(count) for count in line), percent(share))
            for task, line, share in zip(counts.index, counts.to_numpy(), right, strict=True)
        ],
    )
    return [
        f"### Router confusion after task {view.done}",
        "Test samples by true task (rows) and by the task that the router chose (columns).",
        table,
    ]


def _rows(pairs: Iterable[tuple[str, Any]]) -> list[tuple[str, str]]:
    return [(key, f"`{value}`") for key, value in pairs]


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table: the first column left, the others right aligned where there are many."""
    align = ["---", *["---" if len(head) == 2 else "---:"] * (len(head) - 1)]
    lines = [head, align, *rows]
    return "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
