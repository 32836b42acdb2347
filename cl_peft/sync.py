"""Upload W&B runs that were tracked offline, wherever they lie in nested sweep folders."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from cl_peft.errors import DataError
from cl_peft.runs import is_held
from cl_peft.view import size

#: What wandb writes beside a run's file once it is uploaded.
DONE = ".synced"
STATES = {
    "offline": "to upload",
    "synced": "uploaded before",
    "running": "still running",
    "empty": "nothing inside",
}


@dataclass(frozen=True)
class OfflineRun:
    """One offline W&B run; a resumed run has several of the same id.

    Attributes:
        path: ``.../RUN/wandb/offline-run-YYYYMMDD_HHMMSS-ID``.
        id: The W&B id.
        state: ``offline`` (to upload), ``synced``, ``running`` or ``empty``.
        bytes: Of everything in the folder.
    """

    path: Path
    id: str
    state: str
    bytes: int

    @property
    def run_folder(self) -> Path:
        """The run folder that it mirrors."""
        return self.path.parent.parent


def find(folder: Path) -> list[OfflineRun]:
    """All offline runs below a folder, parts of a resumed run in the order of their start.

    Folders that were set aside by ``fresh=true`` (hidden ones) are not entered.

    Raises:
        DataError: There is no such folder.
    """
    if not folder.is_dir():
        raise DataError(f"There is no folder {folder}; give runs, a group's or a run's folder.")
    found = []
    for path in sorted(folder.rglob("wandb/offline-run-*")):
        above = path.relative_to(folder).parts
        if path.is_dir() and not any(part.startswith(".") for part in above):
            found.append(_offline_run(path))
    return found


def listing(folder: Path, runs: Sequence[OfflineRun]) -> str:
    """One line per offline run: what happens to it, its size, where it lies."""
    if not runs:
        return f"There is no offline W&B run below {folder}."
    lines = [f"{STATES[run.state]:<16} {size(run.bytes):>10}  {run.path}" for run in runs]
    waiting = [run for run in runs if run.state == "offline"]
    total = size(sum(run.bytes for run in waiting))
    mirrors = len({run.id for run in waiting})
    lines.append(
        f"{len(waiting)} of {len(runs)} to upload, as {mirrors} W&B "
        f"run{'s' * (mirrors != 1)}: {total}"
    )
    return "\n".join(lines)


def upload(
    runs: Sequence[OfflineRun],
    *,
    entity: str | None = None,
    project: str | None = None,
    call: Callable[[list[str]], int] | None = None,
) -> int:
    """Give every run that is to be uploaded to ``wandb sync``, one W&B run at a time.

    All parts of a resumed run go in one call, also those uploaded before: wandb brings them into
    the order of their start, and a later part alone would not continue what is there. One that
    cannot be uploaded does not stop the others.

    Args:
        runs: From :func:`find`.
        entity: W&B user or team; None is what the runs were tracked with.
        project: W&B project; None is what the runs were tracked with.
        call: Runs a command and returns its exit code; None is :func:`subprocess.call`.

    Returns:
        0, or 1 if one of them failed.
    """
    options = [
        *(["--entity", entity] if entity else []),
        *(["--project", project] if project else []),
    ]
    call = call or subprocess.call
    failed = []
    for _, group in groupby(sorted(runs, key=lambda run: run.id), key=lambda run: run.id):
        parts = [p for p in sorted(group, key=lambda run: run.path.name) if p.state != "empty"]
        states = {part.state for part in parts}
        if "offline" not in states:
            continue
        again = ["--include-synced"] if "synced" in states else []
        command = [sys.executable, "-m", "wandb", "sync", *options, *again]
        if call([*command, *(str(part.path) for part in parts)]):
            failed.append(parts[0].run_folder)
    for folder in failed:
        print(f"not uploaded: {folder}", file=sys.stderr)
    if failed:
        print(
            f"{len(failed)} failed. The same command tries them again; without a login, run "
            "wandb login or set WANDB_API_KEY first.",
            file=sys.stderr,
        )
    return int(bool(failed))


def _offline_run(path: Path) -> OfflineRun:
    files = list(path.glob("*.wandb"))
    if not files:
        state = "empty"
    elif all(file.with_name(file.name + DONE).exists() for file in files):
        state = "synced"
    elif is_held(path.parent.parent):
        state = "running"
    else:
        state = "offline"
    total = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return OfflineRun(path, path.name.rsplit("-", 1)[1], state, total)
