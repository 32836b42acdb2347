"""One run folder: its files, each checked against the manifest before it is used."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from cl_peft.errors import DamagedRunError, DataError

#: Files that mark a run folder. Two of the three suffice, so that one that lost a file is noticed.
MARKERS = ("config.yaml", "status.json", "manifest.json")
#: Columns of results.parquet, next to the run's name.
RESULT_COLUMNS = ("after_task", "eval_task", "routing", "metric", "value")
RESULT_SCHEMA = pa.schema(
    [
        ("after_task", pa.int32()),
        ("eval_task", pa.int32()),
        ("routing", pa.string()),
        ("metric", pa.string()),
        ("value", pa.float64()),
    ]
)
PREDICTION_COLUMNS = (
    *("after_task", "eval_task", "row", "label"),
    *("oracle_prediction", "routed_prediction", "routed_task"),
)


@dataclass(frozen=True)
class RunFiles:
    """A run folder as far as it was read without opening a table.

    Attributes:
        path: The run folder.
        config: The resolved configuration, flat: ``{"module.rank": 8, ...}``.
        status: What status.json says.
        manifest: What manifest.json says; None for a run that committed nothing.
        contents: The bytes of the marker files, by name; what the cache's key is made of.
    """

    path: Path
    config: Mapping[str, Any]
    status: Mapping[str, Any]
    manifest: Mapping[str, Any] | None
    contents: Mapping[str, bytes]

    @cached_property
    def stream(self) -> dict[str, Any]:
        """What stream.json says; empty where it is missing or unreadable."""
        try:
            return load_stream(self.path)
        except DamagedRunError:
            return {}

    def parts(self, name: str) -> list[tuple[Path, Mapping[str, Any]]]:
        """The files that hold ``name``, in the order of the tasks, with their manifest entries.

        One file for a finished run; for another, one for each task it committed.

        Raises:
            DamagedRunError: The manifest does not list ``name``.
        """
        if self.manifest is None:
            return []
        path = self.path / "manifest.json"
        try:
            if self.manifest["final"] is not None:
                return [(self.path / name, self.manifest["final"][name])]
            return [
                (self.path / file, task["files"][file])
                for task in self.manifest["tasks"]
                for file in [f"tasks/{task['task']:03d}/{name}"]
            ]
        except (KeyError, TypeError, ValueError) as error:
            raise _damaged(path, f"does not list {name} ({_short(error)})") from error

    def key(self) -> str:
        """A digest that changes whenever the run's numbers, state or configuration may have.

        Made of the contents of the marker files (the manifest holds the digest of every table) and
        of size and time of change of the tables themselves, so that a table damaged later is seen.
        """
        digest = hashlib.sha256()
        for name in MARKERS:
            digest.update(name.encode() + b"\0" + self.contents.get(name, b"") + b"\0")
        for file, _ in self.parts("results.parquet"):
            try:
                stat = file.stat()
            except OSError:
                digest.update(b"missing")
            else:
                digest.update(f"{stat.st_size} {stat.st_mtime_ns}\0".encode())
        return digest.hexdigest()


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


def open_run(folder: str | Path) -> RunFiles:
    """Read configuration, status and manifest of a run; no table is opened.

    Raises:
        DamagedRunError: One of them is missing or unreadable, or stream.json is missing although
            the manifest lists it.
    """
    path = Path(folder)
    contents = dict(_contents(path))
    config = _config(path / "config.yaml", contents.get("config.yaml"))
    status = _parsed(path / "status.json", contents.get("status.json"))
    if "state" not in status:
        raise _damaged(path / "status.json", "has no 'state'")
    manifest = None
    if "manifest.json" in contents or status.get("tasks_done"):
        manifest = _parsed(path / "manifest.json", contents.get("manifest.json"))
        if manifest.get("format") != 1:
            what = f"has format {manifest.get('format')!r}; this code reads format 1"
            raise _damaged(path / "manifest.json", what)
        if "stream.json" in (manifest.get("fixed") or ()) and not (path / "stream.json").exists():
            raise _damaged(path / "stream.json", "is missing, although manifest.json lists it")
    return RunFiles(path, config, status, manifest, contents)


def load_config(run_folder: str | Path) -> dict[str, Any]:
    """Read the resolved configuration of a run as a flat dict: ``{"module.rank": 8, ...}``.

    Raises:
        DamagedRunError: config.yaml is missing or is not a YAML mapping.
    """
    path = Path(run_folder) / "config.yaml"
    return _config(path, dict(_contents(path.parent, [path.name])).get(path.name))


def load_stream(run_folder: str | Path) -> dict[str, Any]:
    """Read stream.json of a run: name, scenario, class_names, and each task's classes and digest.

    Raises:
        DamagedRunError: The file is missing or is not JSON.
    """
    path = Path(run_folder) / "stream.json"
    return _parsed(path, dict(_contents(path.parent, [path.name])).get(path.name))


def load_predictions(
    run_folder: str | Path,
    *,
    after_task: int | None = None,
    columns: Sequence[str] | None = None,
) -> pd.DataFrame:
    """Read the per-sample predictions of a run (of the tasks committed so far).

    Args:
        run_folder: The run folder.
        after_task: Keep only the evaluation after this task, 1-based; None keeps all. -1 is the
            latest. Of an unfinished run only that task's file is opened.
        columns: Read only these columns.

    Returns:
        One row per (after_task, test sample): after_task, eval_task (1-based), row (in the source's
        test split), label, oracle_prediction, routed_prediction (global class ids), routed_task
        (1-based, 0 = no task), margin, confidence. ``attrs["run_folder"]`` says whose they are.

    Raises:
        DamagedRunError: A file is missing, unreadable, or differs from its recorded digest.
    """
    run = open_run(run_folder)
    parts = run.parts("predictions.parquet")
    if after_task is not None and run.manifest is not None and run.manifest["final"] is None:
        chosen = [part for part in parts if part[0].parent.name == f"{after_task:03d}"]
        parts = parts[-1:] if after_task == -1 else chosen
    wanted = None if columns is None else list(dict.fromkeys(["after_task", *columns]))
    tables = [
        checked_table(file, entry, PREDICTION_COLUMNS).to_pandas(ignore_metadata=True)
        for file, entry in parts
    ]
    if not tables:
        return pd.DataFrame(columns=list(columns or PREDICTION_COLUMNS))
    frame = pd.concat(tables, ignore_index=True)
    if after_task is not None:
        at = frame["after_task"].max() if after_task == -1 else after_task
        frame = frame[frame["after_task"] == at].reset_index(drop=True)
    frame = frame.drop(columns=[c for c in frame.columns if c.startswith("__index_level_")])
    frame = frame if wanted is None else frame[list(columns or ())]
    frame.attrs["run_folder"] = str(run_folder)
    return frame


def results_table(run: RunFiles) -> pa.Table:
    """The numbers of a run as an Arrow table with :data:`RESULT_SCHEMA`.

    Raises:
        DamagedRunError: A file is missing, unreadable, or differs from its recorded digest.
    """
    tables = [
        checked_table(file, entry, RESULT_COLUMNS).select(list(RESULT_COLUMNS)).cast(RESULT_SCHEMA)
        for file, entry in run.parts("results.parquet")
    ]
    return pa.concat_tables(tables) if tables else RESULT_SCHEMA.empty_table()


def checked_table(path: Path, entry: Any, columns: Iterable[str]) -> pa.Table:  # noqa: ANN401
    """A Parquet file whose bytes match their entry in the manifest.

    Raises:
        DamagedRunError: It is missing, differs from its digest, or lacks one of ``columns``.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise _damaged(path, f"cannot be read ({_short(error)})") from error
    if not isinstance(entry, Mapping) or hashlib.sha256(data).hexdigest() != entry.get("sha256"):
        raise _damaged(path, "differs from the digest in manifest.json")
    try:
        # one thread: thousands of small files are read, and starting threads costs more
        table = pq.ParquetFile(pa.BufferReader(data)).read(use_threads=False)
    except (OSError, ValueError, pa.ArrowException) as error:
        raise _damaged(path, f"is not Parquet ({_short(error)})") from error
    missing = [column for column in columns if column not in table.column_names]
    if missing:
        raise _damaged(path, f"lacks column {', '.join(missing)}")
    return table


# ---------------------------------------------------------------- small files


def _contents(folder: Path, names: Iterable[str] = MARKERS) -> Iterator[tuple[str, bytes]]:
    for name in names:
        try:
            yield name, (folder / name).read_bytes()
        except FileNotFoundError:
            continue
        except OSError as error:
            raise _damaged(folder / name, f"cannot be read ({_short(error)})") from error


def _config(path: Path, data: bytes | None) -> dict[str, Any]:
    if data is None:
        raise _damaged(path, "cannot be read (No such file or directory)")
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times faster where libyaml is
    try:
        tree = yaml.load(data.decode(), Loader=loader)  # noqa: S506 (a safe one)
    except (ValueError, yaml.YAMLError) as error:
        raise _damaged(path, f"cannot be read ({_short(error)})") from error
    if not isinstance(tree, dict):
        raise _damaged(path, "is not a mapping")
    return _flat(tree)


def _parsed(path: Path, data: bytes | None) -> dict[str, Any]:
    if data is None:
        raise _damaged(path, "cannot be read (No such file or directory)")
    try:
        content = json.loads(data)
    except ValueError as error:
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
