"""The table of all runs of a group: once, or kept up to date while they run.

Where there is no terminal, a line per run for grep and awk, and nothing else.
"""

from __future__ import annotations

import io
import math
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.live import Live

from cl_peft.console import group_view
from cl_peft.group import sweep_status
from cl_peft.view import percent

if TYPE_CHECKING:
    import pandas as pd

#: Stands for what is empty, so that columns can be counted.
EMPTY = "-"
#: Reading a group may take this share of the time; more runs, fewer looks.
SHARE = 0.2


def show(folder: Path, console: Console | None = None) -> pd.DataFrame:
    """Print the table.

    Args:
        folder: A group's folder, such as ``runs/newsgroups``.
        console: Where; the terminal if None.

    Returns:
        The table, as :func:`cl_peft.group.sweep_status` gives it.
    """
    out = console or _terminal()
    status = sweep_status(folder)
    if out.is_terminal:
        out.print(group_view(status, folder, folders=True))
    else:
        out.file.write(lines(status))
    return status


def lines(status: pd.DataFrame) -> str:
    """A line per run: run, state, task, seconds, routed accuracy in %, settings, error.

    Separated by tabs; in the first five a run writes no space, and ``-`` stands for what is empty.
    """
    rows = (
        (
            row["run"],
            row["state"],
            f"{row['tasks_done']}/{row['tasks'] or '?'}",
            "" if math.isnan(row["seconds"]) else f"{row['seconds']:.1f}",
            percent(row["routed_average_accuracy"], ""),
            row["settings"],
            row["error"],
        )
        for row in status.to_dict("records")
    )
    return "".join("\t".join(" ".join(str(cell).split()) or EMPTY for cell in row) + "\n"
                   for row in rows)  # fmt: skip


def watch(
    folder: Path, *, every: float = 2.0, patience: float = 30.0, console: Console | None = None
) -> pd.DataFrame:
    """Keep the table up to date until no run has been going on for a while, or until Ctrl-C.

    Args:
        folder: A group's folder.
        every: Seconds between two looks; more where a look takes long.
        patience: Seconds without a running run after which it ends: a sweep has such moments
            between two of its jobs.
        console: Where; the terminal if None. Where it is no terminal, only the last state is
            printed.

    Returns:
        The last table.
    """
    out = console or _terminal()
    plain = not out.is_terminal
    status, quiet_since = sweep_status(folder), None
    view = group_view(status, folder, folders=True)
    with nullcontext() if plain else Live(view, console=out, auto_refresh=False) as live:
        try:
            while True:
                began = time.monotonic()
                status = sweep_status(folder)
                if live is not None:
                    live.update(group_view(status, folder, folders=True), refresh=True)
                now = time.monotonic()
                if (status["state"] == "running").any():
                    quiet_since = None
                elif quiet_since is None:
                    quiet_since = now
                if quiet_since is not None and now - quiet_since >= patience:
                    break
                time.sleep(max(every, (now - began) * (1 / SHARE - 1)))
        except KeyboardInterrupt:
            if live is not None:
                live.update(group_view(status, folder, folders=True))
    if plain:
        out.file.write(lines(status))
    return status


def _terminal() -> Console:
    terminal = sys.stdout.isatty()
    if not terminal and isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a name must not break a pipe in ASCII
    return Console(force_terminal=terminal, highlight=False, markup=False, emoji=False)
