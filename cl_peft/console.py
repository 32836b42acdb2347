"""What a person sees in the terminal: progress on stderr, the result on stdout.

Colours, bars and box characters appear only at a terminal. Anywhere else the same text comes plain,
in ASCII, with one line per finished task for progress.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from rich import box
from rich.console import Console as RichConsole
from rich.console import Group
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table
from rich.text import Text

from cl_peft.group import sweep_status
from cl_peft.view import ResultView, duration, percent, size

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

__all__ = ["Bar", "Console", "ResultView", "group_view", "sweep_status"]

#: Width where no terminal sets one: both matrices of six tasks fit side by side.
PLAIN_WIDTH = 100
#: A longer matrix shows its first and last rows.
MAX_ROWS = 20
STATE_STYLES = {"failed": "red", "damaged": "red", "refused": "red", "running": "yellow",
                "unknown": "red"}  # fmt: skip
RESULT_AXES = ("stream", "module", "router", "learner")
MATRICES = ("oracle", "routed")
LEGEND = "oracle: each sample's true task is given; routed: the router chooses it"
ASCII_RULE = box.Box("    \n    \n -- \n    \n    \n    \n    \n    \n", ascii=True)


class Bar:
    """One progress bar; does nothing where there is no terminal."""

    def __init__(self, progress: Progress | None = None, task: TaskID | None = None) -> None:
        self._progress = progress
        self._task = task

    def advance(self, steps: float = 1, **values: float) -> None:
        """Move on, and show ``values`` (such as ``loss=0.31``) behind the bar."""
        if self._progress is None or self._task is None:
            return
        note = {"note": "  ".join(f"{k} {v:.4g}" for k, v in values.items())} if values else {}
        self._progress.update(self._task, advance=steps, **note)  # type: ignore[arg-type]

    def describe(self, text: str) -> None:
        """Change the text before the bar."""
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, description=text)


class Console:
    """The terminal of one run.

    Args:
        stdout: Where results go; ``sys.stdout`` if None.
        stderr: Where progress, messages and errors go; ``sys.stderr`` if None.
        width: Columns; if None, the terminal's, and 100 where there is none.
        bars: Whether to draw progress bars; if None, where stderr is a terminal. Jobs that share a
            terminal say False.
    """

    def __init__(
        self,
        stdout: TextIO | None = None,
        stderr: TextIO | None = None,
        width: int | None = None,
        bars: bool | None = None,
    ) -> None:
        self._out = _rich(stdout or sys.stdout, width)
        self._err = _rich(stderr or sys.stderr, width)
        self.bars = self._err.is_terminal and not self._err.is_dumb_terminal
        if bars is not None:
            self.bars = bars
        self._progress: Progress | None = None

    @contextmanager
    def bar(self, text: str, total: float | None = None, unit: str = "") -> Iterator[Bar]:
        """Show a progress bar while the block runs; bars opened inside appear below it.

        Args:
            text: What is going on, such as ``task 2/5  epoch 1/3``.
            total: Number of steps; None where unknown.
            unit: ``bytes`` shows amounts in MB.
        """
        if not self.bars:
            yield Bar()
            return
        outermost = self._progress is None
        progress = self._progress or self._start()
        task = progress.add_task(text, total=total, unit=unit, note="")
        try:
            yield Bar(progress, task)
        finally:
            progress.remove_task(task)
            if outermost:
                progress.stop()
                self._progress = None

    def _start(self) -> Progress:
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=20),
            _Amount(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}", markup=False, style="dim"),
            console=self._err,
            transient=True,  # bars vanish, what was printed stays
            refresh_per_second=8,
            # A library's print belongs above the bars, but never into stderr's file.
            redirect_stdout=self._out.is_terminal,
        )
        self._progress.start()
        return self._progress

    def task_done(
        self, task: int, tasks: int, seconds: float, oracle: float, routed: float, router: float
    ) -> None:
        """Print one line for a finished task.

        Args:
            task: Task just finished, from 1.
            tasks: Number of tasks.
            seconds: Time it took to learn.
            oracle: Average accuracy with the true task's module, as a share.
            routed: Average accuracy as routed.
            router: Router accuracy; NaN where nothing routes.
        """
        self.message(
            f"task {task}/{tasks}  learned {seconds:.1f} s  oracle {percent(oracle)}  "
            f"routed {percent(routed)}  router {percent(router)}"
        )

    def message(self, text: str) -> None:
        """Say something on stderr, above the bars."""
        self._err.print(Text(text), soft_wrap=True)

    def error(self, text: str) -> None:
        """Say what went wrong, complete and in the user's words."""
        self._err.print(Text.assemble(("error: ", "bold red"), text), soft_wrap=True)

    def result(self, view: ResultView) -> None:
        """Print a run's final screen."""
        settings = [f"{axis} {view.config.get(axis, {}).get('name', '?')}" for axis in RESULT_AXES]
        seeds = [f"{key} {value}" for key, value in view.config.get("seed", {}).items()]
        settings.append(f"seeds: {', '.join(seeds)}")
        self._line("")
        self._line(view.title, style="bold")
        self._out.print(Text("  ".join(settings)))
        if view.state != "finished":
            self._line(f"{view.state}, with {view.done} of {view.tasks} tasks done", style="yellow")
        if view.error:
            self._line(view.error.strip())
        if view.done:
            self._line("")
            self._matrices(view)
            self._line("")
            self._metrics(view)
        self._line("")
        for name, path in view.paths():
            line = Text.assemble((f"{name:<8}", "bold"), str(path))
            self._out.print(line, soft_wrap=True)  # unbroken, to be copied

    def status(self, folder: Path) -> None:
        """Print the table of all runs of a group."""
        self._line("")
        self._out.print(group_view(sweep_status(folder), folder, plain=not self._out.is_terminal))

    def _line(self, text: str, style: str = "") -> None:
        self._out.print(Text(text, style=style), soft_wrap=True)

    def _matrices(self, view: ResultView) -> None:
        """Both matrices: side by side where they fit, else one above the other."""
        cells = [view.matrix(routing) for routing in MATRICES]
        plain, width = not self._out.is_terminal, self._out.width
        label = len(f"after {view.done}")
        side_by_side = [g for g in (2, 1) if 2 * (label + view.done * (5 + g)) + 4 <= width]
        stacked = [g for g in (2, 1) if label + view.done * (5 + g) <= width]
        gap = (side_by_side or stacked or [1])[0]
        columns = (width - label) // (5 + gap)
        titled = []
        for routing, matrix in zip(MATRICES, cells, strict=True):
            grid = Table.grid()
            grid.add_row(Text(f"{routing} accuracy, %", style="bold", no_wrap=True))
            grid.add_row(_matrix(matrix, gap, max(columns, 3), plain))
            titled.append(grid)
        if side_by_side:
            both = Table.grid(padding=(0, 4, 0, 0))
            both.add_row(*titled)
            self._out.print(both)
        else:
            self._out.print(titled[0])
            self._line("")
            self._out.print(titled[1])
        self._line(LEGEND, style="dim")
        if view.done > min(columns, MAX_ROWS):
            self._line("..  left out here; report.md has every cell", style="dim")

    def _metrics(self, view: ResultView) -> None:
        table = _table(gap=2, plain=not self._out.is_terminal)
        for name in ("%, over all seen tasks", "oracle", "routed"):
            table.add_column(name, justify="right" if name in MATRICES else "left", no_wrap=True)
        for row in view.metrics():
            table.add_row(*row)
        self._out.print(table)
        self._line("")
        facts = Table.grid(padding=(0, 2, 0, 0))
        for name, text in view.facts():
            facts.add_row(Text(name, style="bold", no_wrap=True), Text(text))
        self._out.print(facts)


class _Amount(ProgressColumn):
    """``12/40``; ``3.1/38.0 MB`` in bytes; without a total only what is done."""

    def render(self, task: Task) -> Text:
        done, total = task.completed, task.total
        if task.fields["unit"] == "bytes":
            text = size(done) if total is None else f"{done / 1e6:.1f}/{total / 1e6:.1f} MB"
        else:
            text = f"{done:.0f}" if total is None else f"{done:.0f}/{total:.0f}"
        return Text(text, no_wrap=True, justify="right")


def group_view(
    status: pd.DataFrame, folder: Path, plain: bool = False, folders: bool = False
) -> Group:
    """All runs of a group as a table, with a line of counts above it.

    Args:
        status: As :func:`sweep_status` gives it.
        folder: The group's folder.
        plain: ASCII only.
        folders: Name each run's folder even where its settings tell it from the others.
    """
    counts = ", ".join(f"{n} {state}" for state, n in status["state"].value_counts().items())
    title = f"{len(status)} run{'s' * (len(status) != 1)} in {folder}"
    table = _table(gap=2, plain=plain)
    settings = bool(status["settings"].any())
    folders = folders or not settings
    for name, wanted in (("folder", folders), ("settings", settings)):
        if wanted:
            table.add_column(name, overflow="fold")
    table.add_column("state", no_wrap=True)
    for name in ("task", "time", "routed, %"):
        table.add_column(name, justify="right", no_wrap=True)
    if status["error"].any():
        table.add_column("error", overflow="fold")
    for row in status.to_dict("records"):
        cells = [
            *([row["run"]] if folders else []),
            *([row["settings"]] if settings else []),
            row["state"],
            f"{row['tasks_done']}/{row['tasks'] or '?'}",
            duration(row["seconds"]),
            percent(row["routed_average_accuracy"], ""),
            row["error"],
        ]
        shown = [Text(str(cell)) for cell in cells[: len(table.columns)]]
        table.add_row(*shown, style=STATE_STYLES.get(str(row["state"]), ""))
    return Group(Text(f"{title}: {counts}" if counts else title, style="bold"), table)


def _matrix(cells: np.ndarray, gap: int, columns: int, plain: bool) -> Table:
    """One accuracy matrix; the last row, which the metrics speak of, is emphasised."""
    count = len(cells)
    shown = _visible(count, columns)
    table = _table(gap, plain)
    table.add_column("task", no_wrap=True)
    for i in shown:
        head = ".." if i is None else str(i + 1)
        table.add_column(head, justify="right", no_wrap=True, min_width=2 if i is None else 5)
    for t in _visible(count, MAX_ROWS):
        if t is None:
            table.add_row("..")
            continue
        values = [".." if i is None else percent(cells[t, i], "") for i in shown]
        table.add_row(f"after {t + 1}", *values, style="bold" if t == count - 1 else "")
    return table


def _visible(count: int, limit: int) -> list[int | None]:
    """Indices that are shown: all, or the first and last ones around a None."""
    if count <= limit:
        return list(range(count))
    last = limit // 2
    return [*range(limit - 1 - last), None, *range(count - last, count)]


def _table(gap: int, plain: bool) -> Table:
    return Table(
        box=ASCII_RULE if plain else box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, 0, 0, gap - 1),
        title_justify="left",
    )


def _rich(stream: TextIO, width: int | None) -> RichConsole:
    terminal = stream.isatty()
    if not terminal and isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="backslashreplace")  # a name must not break a pipe in ASCII
    return RichConsole(
        file=stream,
        force_terminal=terminal,  # otherwise FORCE_COLOR decides
        no_color=None if terminal else True,
        width=width or (None if terminal else PLAIN_WIDTH),
        highlight=False,
        markup=False,
        emoji=False,
    )
