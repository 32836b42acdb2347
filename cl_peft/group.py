"""All runs of a group as one table. Imports no torch."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cl_peft.errors import DamagedRunError
from cl_peft.view import ResultView, flatten, read_config

if TYPE_CHECKING:
    import pandas as pd

#: What tells runs apart.
SETTINGS = ("stream", "backbone", "module", "router", "learner", "optimizer", "trainer", "seed")
#: Any of these makes a folder a run's.
OF_A_RUN = ("status.json", "config.yaml", "manifest.json", "run.log", ".lock")
#: What files raise that can be read and hold something else than a run writes.
MALFORMED = (KeyError, TypeError, ValueError, AttributeError)
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
        line). A folder that cannot be read has state ``damaged``, and one whose run wrote no status
        ``unknown``; both say why.
    """
    import pandas as pd

    rows, configs = [], []
    for path in sorted(filter(_is_run, folder.glob("*"))):
        try:
            view = ResultView.from_folder(path)
            state, error, config = view.state, view.error, view.config
            done, tasks, seconds = view.done, view.tasks, view.total_seconds
            accuracy = view.value("average_accuracy", "routed")
            if state == "unknown":
                error = error or f"{path / 'status.json'}: missing, or names no state"
        except (DamagedRunError, *MALFORMED) as damage:
            known = isinstance(damage, DamagedRunError)
            state, config = "damaged", _config(path)
            error = str(damage) if known else f"{path}: not as a run writes it ({damage!r})"
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

    Where an axis differs in its name, the name is shown; another key of that axis only where
    configurations with the same name differ in it, since the rest follows from the name. A key that
    a configuration does not have (a refused one was never completed) says nothing about it.
    """
    flat = [{k: v for k, v in flatten(c) if k.split(".")[0] in SETTINGS} for c in configs]
    found = dict.fromkeys(key for one in flat for key in one if not key.endswith("._target_"))
    axes = list(dict.fromkeys(key.split(".")[0] for key in found))
    keys = sorted(found, key=lambda key: axes.index(key.split(".")[0]))
    values: dict[tuple[str, str], set[str]] = {}  # of a key, where its axis has a certain name
    for one in flat:
        for key in keys:
            if key in one:
                values.setdefault((key, _name(one, key)), set()).add(repr(one[key]))

    def settings(one: dict[str, Any]) -> str:
        differ = (k for k in keys if k in one and len(values[k, _name(one, k)]) > 1)
        return " ".join(f"{key.removesuffix('.name')}={one[key]}" for key in differ)

    return [settings(one) for one in flat]


def _name(flat: dict[str, Any], key: str) -> str:
    """Name of a key's axis in a flat configuration; a name itself is compared among all."""
    axis = key.split(".")[0]
    return "" if key == f"{axis}.name" else str(flat.get(f"{axis}.name", ""))


def _is_run(path: Path) -> bool:
    """Whether a run was here, if only for a moment: other folders and hidden ones are none."""
    return not path.name.startswith(".") and any((path / name).exists() for name in OF_A_RUN)


def _config(path: Path) -> dict[str, Any]:
    """The configuration of a damaged run, if that much can be read."""
    try:
        return read_config(path / "config.yaml")
    except DamagedRunError:
        return {}


def _headline(error: str | None) -> str:
    """The line that says what happened: the first, or a traceback's last."""
    lines = str(error or "").strip().splitlines() or [""]
    return lines[-1 if lines[0].startswith("Traceback") else 0]
