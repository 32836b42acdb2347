"""All runs of a group as one table. Imports no torch."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cl_peft.errors import DamagedRunError
from cl_peft.view import ResultView, flatten

if TYPE_CHECKING:
    import pandas as pd

#: What tells runs apart.
SETTINGS = ("stream", "backbone", "module", "router", "learner", "optimizer", "trainer", "seed")
STATUS_COLUMNS = [
    *("run", "settings", "state", "tasks_done", "tasks", "seconds"),
    *("routed_average_accuracy", "error"),
]


def sweep_status(folder: Path) -> pd.DataFrame:
    """All runs of a group, one row each, for ``status.csv`` and the terminal.

    Args:
        folder: A group's folder, such as ``runs/newsgroups``.

    Returns:
        Columns ``run``, ``settings`` (what differs between these runs), ``state``, ``tasks_done``,
        ``tasks``, ``seconds``, ``routed_average_accuracy`` (NaN unless finished), ``error`` (in one
        line). A folder that cannot be read has state ``damaged`` and says why.
    """
    import pandas as pd

    rows, configs = [], []
    for path in sorted(p for p in folder.glob("*") if (p / "status.json").exists()):
        try:
            view = ResultView.from_folder(path)
            state, error, config = view.state, view.error, view.config
            done, tasks, seconds = view.done, view.tasks, view.total_seconds
            accuracy = view.value("average_accuracy", "routed")
        except DamagedRunError as damage:
            state, error, config = "damaged", str(damage), {}
            done, tasks, seconds, accuracy = 0, 0, math.nan, math.nan
        configs.append(config)
        rows.append(
            {
                "run": path.name,
                "state": state,
                "tasks_done": done,
                "tasks": tasks,
                "seconds": seconds,
                "routed_average_accuracy": accuracy if state == "finished" else math.nan,
                "error": _headline(error),
            }
        )
    table = pd.DataFrame(rows, columns=STATUS_COLUMNS)
    return table.assign(settings=differences(configs))


def differences(configs: list[dict[str, Any]]) -> list[str]:
    """Name each configuration by the settings in which they differ: ``learner=joint seed.init=1``.

    Where an axis differs in its name, its other keys follow from it and are left out. A key that a
    configuration does not have (a refused one was never completed) says nothing about it.
    """
    flat = [{k: v for k, v in flatten(c) if k.split(".")[0] in SETTINGS} for c in configs]
    keys = dict.fromkeys(key for one in flat for key in one)
    differ = [key for key in keys if len({repr(one[key]) for one in flat if key in one}) > 1]
    named = {key.removesuffix(".name") for key in differ if key.endswith(".name")}
    shown = [
        key
        for key in differ
        if not key.endswith("._target_")
        and (key.endswith(".name") or key.split(".")[0] not in named)
    ]
    return [
        " ".join(f"{k.removesuffix('.name')}={one[k]}" for k in shown if k in one) for one in flat
    ]


def _headline(error: str | None) -> str:
    """The line that says what happened: the first, or a traceback's last."""
    lines = (error or "").strip().splitlines() or [""]
    return lines[-1 if lines[0].startswith("Traceback") else 0]
