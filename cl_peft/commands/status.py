"""The table of all runs of a group: once, or kept up to date while they run."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from cl_peft.group import sweep_status
from cl_peft.view import duration, percent

if TYPE_CHECKING:
    import pandas as pd

STYLES = {"failed": "red", "damaged": "red", "refused": "red", "running": "yellow"}
#: Width where there is no terminal: run folder and settings side by side.
PLAIN_WIDTH = 140
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
    out.print(view(status, folder, plain=not out.is_terminal))
    return status


def watch(
    folder: Path, *, every: float = 2.0, patience: float = 30.0, console: Console | None = None
) -> pd.DataFrame:
    """Keep the table up to date until no run has been going on for a while, or until Ctrl-C.

    Args:
        folder: A group's folder.
        every: Seconds between two looks; more where a look takes long.
        patience: Seconds without a running run after which it ends: a sweep has such moments
            between two of its jobs.
        console: Where; the terminal if None. Where it is no terminal, only the last table is
            printed.

    Returns:
        The last table.
    """
    out = console or _terminal()
    plain = not out.is_terminal
    status, quiet_since = sweep_status(folder), None
    with Live(view(status, folder, plain), console=out, auto_refresh=False) as live:
        try:
            while True:
                began = time.monotonic()
                status = sweep_status(folder)
                live.update(view(status, folder, plain), refresh=not plain)
                now = time.monotonic()
                if (status["state"] == "running").any():
                    quiet_since = None
                elif quiet_since is None:
                    quiet_since = now
                if quiet_since is not None and now - quiet_since >= patience:
                    break
                time.sleep(max(every, (now - began) * (1 / SHARE - 1)))
        except KeyboardInterrupt:
            live.update(view(status, folder, plain))
    return status


def view(status: pd.DataFrame, folder: Path, plain: bool = False) -> Group:
    """The table with a line of counts above it.

    Args:
        status: As :func:`cl_peft.group.sweep_status` gives it.
        folder: The group's folder.
        plain: ASCII only.
    """
    from cl_peft.console import ASCII_RULE, box

    counts = status["state"].value_counts()
    parts = [f"{count} {state}" for state, count in counts.items()]
    title = f"{len(status)} run{'s' * (len(status) != 1)} in {folder}"
    table = Table(
        box=ASCII_RULE if plain else box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, 0, 0, 1),
    )
    settings = bool(status["settings"].any())
    table.add_column("folder", overflow="fold")
    if settings:
        table.add_column("settings", overflow="fold")
    table.add_column("state", no_wrap=True)
    for name in ("task", "time", "routed, %"):
        table.add_column(name, justify="right", no_wrap=True)
    if status["error"].any():
        table.add_column("error", overflow="fold")
    for row in status.to_dict("records"):
        cells = [
            row["run"],
            *([row["settings"]] if settings else []),
            row["state"],
            f"{row['tasks_done']}/{row['tasks'] or '?'}",
            duration(row["seconds"]),
            percent(row["routed_average_accuracy"], ""),
            row["error"],
        ]
        shown = [Text(str(cell)) for cell in cells[: len(table.columns)]]
        table.add_row(*shown, style=STYLES.get(str(row["state"]), ""))
    head = Text(f"{title}: {', '.join(parts)}" if parts else title, style="bold")
    return Group(head, table)


def _terminal() -> Console:
    terminal = sys.stdout.isatty()
    return Console(
        force_terminal=terminal,
        no_color=None if terminal else True,
        width=None if terminal else PLAIN_WIDTH,
        highlight=False,
        markup=False,
        emoji=False,
    )
