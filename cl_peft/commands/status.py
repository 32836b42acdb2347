"""The table of all runs of a group: once, or kept up to date while they run."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.live import Live

from cl_peft.console import group_view
from cl_peft.group import sweep_status

if TYPE_CHECKING:
    import pandas as pd

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
    out.print(group_view(status, folder, not out.is_terminal, folders=True))
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
    with Live(
        group_view(status, folder, plain, folders=True), console=out, auto_refresh=False
    ) as live:
        try:
            while True:
                began = time.monotonic()
                status = sweep_status(folder)
                live.update(group_view(status, folder, plain, folders=True), refresh=not plain)
                now = time.monotonic()
                if (status["state"] == "running").any():
                    quiet_since = None
                elif quiet_since is None:
                    quiet_since = now
                if quiet_since is not None and now - quiet_since >= patience:
                    break
                time.sleep(max(every, (now - began) * (1 / SHARE - 1)))
        except KeyboardInterrupt:
            live.update(group_view(status, folder, plain, folders=True))
    return status


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
