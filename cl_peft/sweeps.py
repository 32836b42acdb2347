"""What a sweep's jobs know of each other: when it began, what failed, what is left for the end.

Jobs may run in this process, in others, or on other machines: they hear through the environment.
Imports no torch.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from cl_peft.atomic import write_atomic
from cl_peft.config import plain
from cl_peft.errors import ConfigError, UserError
from cl_peft.runs import RunFolder

#: Table of all runs of a group, in the group's folder; written when a sweep ends.
TABLE = "status.csv"
#: Environment variable that tells a sweep's jobs when it began, in seconds of the epoch.
BEGAN = "CL_PEFT_SWEEP_BEGAN"
#: Environment variable that names the file of the jobs that are left for the end.
LEFT = "CL_PEFT_SWEEP_LEFT"
#: The sweep of this process: where its runs go and when it began. Filled by :class:`Sweep`.
_sweeps: list[tuple[Path, float]] = []


class Sweep(Callback):
    """Hydra callback: marks the groups that a sweep's jobs belong to, whose tables are shown."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:  # noqa: ANN401
        """Called once in the process that starts the sweep."""
        began = time.time()
        _sweeps.append((Path(str(config.paths.runs)).expanduser(), began))
        os.environ[BEGAN] = repr(began)  # what runs jobs inherits it
        os.environ.pop(LEFT, None)  # another sweep's
        with suppress(OSError):  # without it, a job that is left is not looked at again
            handle, os.environ[LEFT] = tempfile.mkstemp(prefix="cl_peft-left-", suffix=".jsonl")
            os.close(handle)

    def on_job_end(self, config: DictConfig, **kwargs: Any) -> None:  # noqa: ANN401
        """Called in the process of every job, also of one that failed."""
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            group = Path(str(config.paths.runs)).expanduser() / str(config.group)
            if group.is_dir():
                (group / TABLE).touch()


def leave(config: Mapping[str, Any], jobs: int) -> str:
    """Leave a validated configuration for the sweep's end; says in words who looks at it then.

    Args:
        config: Of a job that another process is running.
        jobs: How many jobs of the sweep run side by side.
    """
    later = "should that process die, the same sweep again goes on with it"
    path = Path(os.environ.get(LEFT, ""))
    if not path.is_file():  # a job on another machine than the process that started the sweep
        return later
    line = json.dumps([config, jobs]) + "\n"
    try:
        file = os.open(path, os.O_WRONLY | os.O_APPEND)
        try:
            os.write(file, line.encode())  # at once: lines of others stay whole
        finally:
            os.close(file)
    except OSError as error:
        return f"{later} (it could not be noted for the end: {error.strerror})"
    return "it is looked at again in the end"


def left() -> list[tuple[dict[str, Any], int]]:
    """What this process' sweep left for its end: configurations, and their number of jobs."""
    path = Path(os.environ.pop(LEFT, "") if _sweeps else "")
    if not path.is_file():
        return []
    found = []
    for line in path.read_text().splitlines():
        with suppress(ValueError):  # cut off by a full disk: the same sweep again finds that job
            config, jobs = json.loads(line)
            found.append((config, jobs))
    path.unlink()
    return found


def refuse_after_failure(group: Path) -> None:
    """With ``fail_fast``, start no job when another one of this sweep has failed.

    Raises:
        UserError: One has.
    """
    began = float(os.environ.get(BEGAN, "inf"))
    for path in group.glob("*/status.json"):
        if path.stat().st_mtime < began - 1:  # clocks of file systems are coarse
            continue
        if RunFolder(path.parent).status().get("state") == "failed":
            raise UserError(
                f"not started, since {path.parent.name} failed (fail_fast=true). The same sweep "
                "again retries what failed and goes on."
            )


def record_refused(cfg: DictConfig, error: ConfigError) -> None:
    """Leave a refused job of a sweep visible in the sweep's table."""
    try:
        config = plain(cfg)
    except ConfigError:
        return
    group = str(config.get("group"))
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", group):
        return
    identity = json.dumps(config, sort_keys=True, default=str).encode()
    name = f"refused-{hashlib.sha256(identity).hexdigest()[:10]}"
    folder = Path(config["paths"]["runs"]).expanduser() / group / name
    status = {"state": "refused", "tasks_done": 0, "tasks": 0, "error": str(error), "seconds": 0.0}
    write_atomic(folder / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(config)).encode())
    write_atomic(folder / "status.json", json.dumps(status, indent=1).encode())


def show_tables() -> None:
    """Show and store the table of all jobs of every group that this process' sweep touched."""
    from cl_peft.console import Console
    from cl_peft.group import sweep_status

    for runs, began in _sweeps:
        for path in sorted(runs.glob(f"*/{TABLE}")):
            if path.stat().st_mtime >= began - 1:  # clocks of file systems are coarse
                write_atomic(path, sweep_status(path.parent).to_csv(index=False).encode())
                Console().status(path.parent)
                print(f"status table: {path}")
