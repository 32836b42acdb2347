"""Run folders into frames. What a run wrote is checked against its manifest before it is used."""

from __future__ import annotations

import hashlib
import io
import json
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from cl_peft.archives import short_name
from cl_peft.errors import DamagedRunError, DataError, did_you_mean

#: Column of the tidy frame -> key of the resolved configuration it comes from.
CONFIG_COLUMNS = {
    "group": "group",
    "module": "module.name",
    "router": "router.name",
    "learner": "learner.name",
    "stream": "stream.name",
    "backbone": "backbone.name",
    "seed_order": "seed.order",
    "seed_init": "seed.init",
    "seed_data": "seed.data",
}
#: Columns that describe the run, in the order of the tidy frame.
RUN_COLUMNS = ("run", "group", "state", *list(CONFIG_COLUMNS)[1:])
SEED_COLUMNS = ("seed_order", "seed_init", "seed_data")
RESULT_COLUMNS = ("after_task", "eval_task", "routing", "metric", "value")
#: Files that mark a run folder. Two of the three suffice, so that one that lost a file is noticed.
MARKERS = ("config.yaml", "status.json", "manifest.json")


def load_runs(
    folder: str | Path,
    *,
    metric: str | Iterable[str] | None = None,
    where: Mapping[str, Any] | None = None,
    config: Sequence[str] = (),
) -> pd.DataFrame:
    """Read the results of every run under ``folder``, at any depth, into one tidy frame.

    Runs that are not finished are included with the tasks they have committed; column ``state``
    tells (running, finished, failed, refused). A run that has committed nothing has no rows.

    Args:
        folder: Folder of runs, such as ``"runs"`` or one sweep's, or a single run folder.
        metric: Keep only this metric, or these.
        where: Keep only runs with these values: ``{"router": "ridge", "seed_init": [0, 1]}``.
        config: Keys of the configuration to add as columns: ``["module.rank", "trainer.epochs"]``.

    Returns:
        One row per number, with columns run, group, state, module, router, learner, stream,
        backbone, seed_order, seed_init, seed_data, those of ``config``, after_task (1-based),
        eval_task (1-based; NA = over all tasks seen), routing (oracle, routed or none), metric,
        value. Runs in the order of their folders.

    Warns:
        UserWarning: A damaged run folder was skipped (its path and what is wrong with it), or
            there is no run folder at all.

    Raises:
        DataError: No such folder; or ``metric``, ``where`` or ``config`` names something that no
            run has.
    """
    wanted = [metric] if isinstance(metric, str) else None if metric is None else list(metric)
    conditions = _conditions(where or {}, (*RUN_COLUMNS, *config))
    frames, described = [], []
    known_metrics: set[str] = set()
    known_keys: set[str] = set()
    for path in run_folders(folder):
        try:
            settings = load_config(path)
            about = {"state": _status(path)["state"]}
            about |= {column: settings.get(key) for column, key in CONFIG_COLUMNS.items()}
            about["backbone"] = short_name(str(about["backbone"]))
            about["group"] = about["group"] or path.parent.name
            about |= {key: _cell(settings.get(key)) for key in config}
            results = _load_tasks(path, "results.parquet", ("run", *RESULT_COLUMNS))
        except DamagedRunError as error:
            warnings.warn(f"skipped a damaged run: {error}", stacklevel=2)
            continue
        described.append(path)
        known_keys |= settings.keys()
        if results.empty or not all(
            (str(results["run"].iloc[0]) if column == "run" else about[column]) in values
            for column, values in conditions.items()
        ):
            continue
        known_metrics |= set(results["metric"])
        if wanted is not None:
            results = results[results["metric"].isin(wanted)]
        frames.append(results.assign(**about))
    if not described:
        warnings.warn(f"no run folder under {folder}", stacklevel=2)
    elif known_metrics:
        _refuse_unknown("metric", set(wanted or ()) - known_metrics, known_metrics)
    if described:
        _refuse_unknown("configuration key", set(config) - known_keys, known_keys)
    return _typed(frames, config)


def run_folders(folder: str | Path) -> list[Path]:
    """Every run folder under ``folder``, sorted; ``folder`` itself may be one.

    A run folder holds at least two of config.yaml, status.json and manifest.json. Hidden folders
    are not entered.

    Raises:
        DataError: There is no such folder.
    """
    root = Path(folder)
    if not root.is_dir():
        raise DataError(
            f"There is no folder {root}. Give the folder that holds run folders, such as 'runs'."
        )
    found = []
    for path, folders, files in os.walk(root):
        if sum(marker in files for marker in MARKERS) >= 2:
            found.append(Path(path))
            folders.clear()  # what a run keeps inside (its tracker's files) is not searched
        else:
            folders[:] = sorted(name for name in folders if not name.startswith("."))
    return sorted(found)


def load_config(run_folder: str | Path) -> dict[str, Any]:
    """Read the resolved configuration of a run as a flat dict: ``{"module.rank": 8, ...}``.

    Raises:
        DamagedRunError: config.yaml is missing or is not a YAML mapping.
    """
    path = Path(run_folder) / "config.yaml"
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times faster where libyaml is
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), Loader=loader)  # noqa: S506 (a safe one)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise _damaged(path, f"cannot be read ({_short(error)})") from error
    if not isinstance(tree, dict):
        raise _damaged(path, "is not a mapping")
    return _flat(tree)


def load_stream(run_folder: str | Path) -> dict[str, Any]:
    """Read stream.json of a run: name, scenario, class_names, and the classes of each task.

    Raises:
        DamagedRunError: The file is missing or is not JSON.
    """
    return _json(Path(run_folder) / "stream.json")


def load_predictions(run_folder: str | Path) -> pd.DataFrame:
    """Read the per-sample predictions of a run (of the tasks committed so far).

    Returns:
        One row per (after_task, test sample): after_task, eval_task (1-based), row (in the source's
        test split), label, oracle_prediction, routed_prediction (global class ids), routed_task
        (1-based, 0 = no task), margin, confidence.

    Raises:
        DamagedRunError: A file is missing, unreadable, or differs from its recorded digest.
    """
    columns = ("after_task", "eval_task", "row", "label", "oracle_prediction")
    return _load_tasks(
        Path(run_folder), "predictions.parquet", (*columns, "routed_prediction", "routed_task")
    )


# ---------------------------------------------------------------- one run folder


def _load_tasks(folder: Path, name: str, columns: Sequence[str]) -> pd.DataFrame:
    """``name`` of a finished run, or what the committed tasks of an unfinished one hold of it."""
    if not (folder / "manifest.json").exists() and not _status(folder).get("tasks_done"):
        return pd.DataFrame(columns=list(columns))
    path = folder / "manifest.json"
    manifest = _json(path)
    if manifest.get("format") != 1:
        raise _damaged(path, f"has format {manifest.get('format')!r}; this code reads format 1")
    try:
        if manifest["final"] is not None:
            parts = [(name, manifest["final"][name])]
        else:
            parts = [
                (file, task["files"][file])
                for task in manifest["tasks"]
                for file in [f"tasks/{task['task']:03d}/{name}"]
            ]
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(path, f"does not list {name} ({_short(error)})") from error
    frames = [_checked_parquet(folder / file, record, columns) for file, record in parts]
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=list(columns))


def _checked_parquet(path: Path, record: Any, columns: Sequence[str]) -> pd.DataFrame:  # noqa: ANN401
    try:
        data = path.read_bytes()
    except OSError as error:
        raise _damaged(path, f"cannot be read ({_short(error)})") from error
    if not isinstance(record, dict) or hashlib.sha256(data).hexdigest() != record.get("sha256"):
        raise _damaged(path, "differs from the digest in manifest.json")
    try:
        frame = pd.read_parquet(io.BytesIO(data))
    except (OSError, ValueError) as error:
        raise _damaged(path, f"is not Parquet ({_short(error)})") from error
    missing = [column for column in columns if column not in frame.columns]
    if missing:
        raise _damaged(path, f"lacks column {', '.join(missing)}")
    return frame


def _status(folder: Path) -> dict[str, Any]:
    status = _json(folder / "status.json")
    if "state" not in status:
        raise _damaged(folder / "status.json", "has no 'state'")
    return status


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _damaged(path, f"cannot be read ({_short(error)})") from error
    if not isinstance(content, dict):
        raise _damaged(path, "is not a JSON object")
    return content


def _damaged(path: Path, what: str) -> DamagedRunError:
    return DamagedRunError(f"{path} {what}.")


def _short(error: Exception) -> str:
    reason = error.strerror if isinstance(error, OSError) else None
    return reason or f"{type(error).__name__}: {error}".splitlines()[0]


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        flat |= _flat(value, f"{name}.") if isinstance(value, dict) and value else {name: value}
    return flat


# ---------------------------------------------------------------- the tidy frame


def _typed(frames: list[pd.DataFrame], config: Sequence[str]) -> pd.DataFrame:
    order = [*RUN_COLUMNS, *config, *RESULT_COLUMNS]
    frame = pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=order)
    text = [c for c in (*RUN_COLUMNS, "routing", "metric") if c not in SEED_COLUMNS]
    kinds = dict.fromkeys(text, "str") | dict.fromkeys(SEED_COLUMNS, "Int64")
    kinds |= {"after_task": "int32", "eval_task": "Int32", "value": "float64"}
    return frame[order].astype(kinds)


def _conditions(where: Mapping[str, Any], columns: Sequence[str]) -> dict[str, list[Any]]:
    _refuse_unknown("column in where", set(where) - set(columns), columns)
    return {
        column: list(values) if isinstance(values, (list, tuple, set, range)) else [values]
        for column, values in where.items()
    }


def _refuse_unknown(what: str, unknown: set[str], known: Iterable[str]) -> None:
    if unknown:
        word, names = min(unknown), sorted(known)
        raise DataError(
            f"No {what} is called {word!r}.{did_you_mean(word, names)}\n"
            f"  there are: {', '.join(names)}"
        )


def _cell(value: Any) -> Any:  # noqa: ANN401 (a configuration value of any type)
    """A configuration value that fits into one cell and can be grouped by: lists become text."""
    return json.dumps(value) if isinstance(value, (list, dict)) else value
