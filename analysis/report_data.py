"""What the page of :mod:`analysis.report` is made of: runs, their matrices, misrouted examples.

Everything comes from the run folders, nothing from their place or from the clock: equal folders
give equal data.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis.folders import load_predictions, load_stream
from analysis.listing import natural
from analysis.load import SEED_COLUMNS, load_run_table, load_runs, varying_keys
from analysis.samples import misrouted, routing_confusion
from analysis.seeds import as_seed
from analysis.tables import configuration_columns, configuration_labels, describing_columns, summary
from cl_peft.errors import DamagedRunError, DataError, some
from cl_peft.runs import is_held

#: Columns of an example in the page's data.
EXAMPLE = (
    *("eval_task", "row", "label", "oracle_prediction", "routed_prediction", "routed_task"),
    *("margin", "confidence"),
)
#: Numbers of a cell in the page's data: samples, then how many of them were ...
CELL = ("n", "oracle_right", "routed_right", "route_right", "lost", "lucky")
#: Unfinished runs that a warning names.
NAMED = 5
SEED_KEYS = ("seed.order", "seed.init", "seed.data")
#: What provenance.json says twice or says of a single run.
_NOT_PROVENANCE = ("run", "seeds", "sessions")


@dataclass(frozen=True)
class Sweep:
    """All runs under one folder.

    Attributes:
        name: The folder's name.
        root: The folder.
        table: One row per run, from :func:`analysis.load_run_table`; a run that nobody is computing
            although it says so is "interrupted".
        frame: Their numbers, from :func:`analysis.load_runs`, with every key that varies.
        varying: Keys of the configuration in which the runs differ, seeds aside.
        problems: Runs that were skipped and files that could not be read, and why.
    """

    name: str
    root: Path
    table: pd.DataFrame
    frame: pd.DataFrame
    varying: list[str]
    problems: list[str]

    @property
    def finished(self) -> pd.DataFrame:
        """The numbers of finished runs."""
        return self.frame[self.frame["state"] == "finished"]

    def problem(self, error: object) -> None:
        """Note, and warn of, what has to be left out; places are given below the folder."""
        text = str(error).replace(f"{self.root}/", "").strip()
        if text not in self.problems:
            self.problems.append(text)
            warnings.warn(text, stacklevel=3)


def gather(folder: str | Path, over: str | None = None) -> Sweep:
    """Read the runs of a sweep; warns of those that were skipped and of unfinished ones.

    Args:
        folder: Of the runs.
        over: A key whose values count as seeds; see :func:`analysis.seeds.as_seed`.

    Raises:
        DataError: There is no such folder, or no run in it, or the runs do not differ in ``over``.
    """
    root = Path(folder)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        table = load_run_table(root)
        frame = load_runs(root, config="varying")
        if over is not None and len(frame):
            frame = as_seed(frame, over)
    told = dict.fromkeys(str(w.message) for w in caught if issubclass(w.category, UserWarning))
    if table.empty:
        raise DataError(
            f"There is no run to report in {root}. " + " ".join(told) + "\n"
            "  Give the folder of a group, such as runs/newsgroups."
        )
    states = [
        "interrupted" if state == "running" and not is_held(Path(path)) else state
        for state, path in zip(table["state"], table["folder"], strict=True)
    ]
    sweep = Sweep(root.resolve().name, root, table.assign(state=states), frame,
                  varying_keys(table), [])  # fmt: skip
    for text in told:
        sweep.problem(text)
    unfinished = sweep.table[sweep.table["state"] != "finished"]
    if len(unfinished):
        named = [f"{run} ({state})" for run, state in zip(unfinished["run"], unfinished["state"],
                                                          strict=True)]  # fmt: skip
        warnings.warn(
            f"{len(named)} of {len(table)} runs are not finished and not in tables and figures of "
            f"results: {some(named, NAMED)}",
            stacklevel=2,
        )
    return sweep


def overview(sweep: Sweep) -> pd.DataFrame:
    """One row per run: what tells it apart, how it went, its latest numbers over all tasks seen.

    Returns:
        The run table with ``label`` (the configuration in words), and from :func:`analysis.summary`
        the columns ``learned`` (tasks) and all metrics; NaN for a run without any number.
    """
    table = sweep.table
    keys = [key for key in sweep.varying if key in table.columns]
    shown = ["group", *keys] if table["group"].nunique() > 1 else keys
    table = table.assign(label=configuration_labels(table, shown))
    numbers = summary(sweep.frame) if len(sweep.frame) else pd.DataFrame({"group": [], "run": []})
    about = [c for c in describing_columns(sweep.frame) if c not in ("group", "run")]
    numbers = numbers.drop(columns=[c for c in about if c in numbers.columns])
    numbers = numbers.rename(columns={"tasks": "learned"})
    # as cl-peft status shows it: a finished run's own time, without what loading took
    table["seconds"] = [
        _total_seconds(Path(path), seconds)
        for path, seconds in zip(table["folder"], table["seconds"], strict=True)
    ]
    both = table.merge(numbers, on=["group", "run"], how="left")
    learned = both["learned"] if "learned" in both.columns else pd.Series(np.nan, both.index)
    return both.assign(learned=learned.fillna(both["tasks_done"]))


def best_configurations(sweep: Sweep, most: int) -> tuple[pd.DataFrame, int]:
    """Numbers of the ``most`` configurations of highest final routed accuracy, best first.

    Returns:
        The finished runs' numbers with a column ``label``, and how many configurations there are.
    """
    frame = sweep.finished
    keys = configuration_columns(frame)
    runs = summary(frame)
    runs = runs.assign(label=configuration_labels(runs, keys).replace("", "all runs"))
    means = runs.groupby("label", sort=False)["average_accuracy_routed"].mean()
    order = list(means.sort_values(ascending=False, kind="stable").index)
    rows = runs[["group", "run", "label"]]
    labelled = frame.merge(rows[rows["label"].isin(order[:most])], on=["group", "run"])
    rank = labelled["label"].map({label: k for k, label in enumerate(order)})
    return labelled.iloc[rank.argsort(kind="stable")], len(order)


def payload(sweep: Sweep, runs: pd.DataFrame, *, examples: int, most: int) -> dict[str, Any]:
    """Everything that the page's script shows, as plain JSON.

    Args:
        sweep: The runs.
        runs: From :func:`overview`.
        examples: Misrouted examples per run, most certain mistakes first.
        most: Runs with matrices and examples; the first ones.
    """
    streams: dict[str, int] = {}
    frame = sweep.frame
    parts = dict(iter(frame.groupby(["group", "run"], sort=False)))
    entries = []
    for row in runs.head(most).to_dict("records"):
        part = parts.get((row["group"], row["run"]))
        try:
            entries.append(_entry(row, part, streams, sweep, examples))
        except DamagedRunError as error:
            sweep.problem(error)
    return {
        "cell": list(CELL),
        "example": list(EXAMPLE),
        "of_no_routing": sorted(set(frame.loc[frame["routing"] == "none", "metric"])),
        "streams": [json.loads(text) for text in streams],
        "runs": entries,
        "left_out": max(0, len(runs) - most),
    }


def provenance(sweep: Sweep) -> dict[str, dict[str, list[str]]]:
    """What the runs say about where they come from: fact -> value -> runs that say so."""
    facts: dict[str, dict[str, list[str]]] = {}
    for row in sweep.table.to_dict("records"):
        path = Path(row["folder"]) / "provenance.json"
        try:
            content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        except (OSError, ValueError) as error:
            sweep.problem(f"{path} cannot be read ({error}).")
            continue
        for key, value in flat({k: v for k, v in content.items() if k not in _NOT_PROVENANCE}):
            facts.setdefault(key, {}).setdefault(plain(value), []).append(str(row["run"]))
    return facts


def configuration(sweep: Sweep) -> tuple[dict[str, dict[str, list[str]]], dict[str, str]]:
    """Keys in which runs differ (value -> runs), seeds last, and what all runs have in common."""
    table = sweep.table
    keys = [c for c in table.columns if "." in c and c.split(".")[0] != "paths"]
    values = {key: [plain(value) for value in table[key]] for key in keys}
    differ = [key for key in sweep.varying if key in values]
    differ += [key for key in SEED_KEYS if key in values and len(set(values[key])) > 1]
    found: dict[str, dict[str, list[str]]] = {}
    for key in differ:
        pairs = zip(values[key], table["run"], strict=True)
        for value, run in sorted(pairs, key=lambda pair: natural(pair[0])):
            found.setdefault(key, {}).setdefault(value, []).append(str(run))
    return found, {key: seen[0] for key, seen in values.items() if len(set(seen)) == 1}


def seeds(row: Mapping[Any, Any]) -> str:
    """Order, init and data seed as ``0.1.0``."""
    return ".".join("?" if pd.isna(row[name]) else str(int(row[name])) for name in SEED_COLUMNS)


def first_line(error: object) -> str:
    """The line of an error that says what happened: the first, or a traceback's last."""
    lines = (error if isinstance(error, str) else "").strip().splitlines() or [""]
    return lines[-1 if lines[0].startswith("Traceback") else 0]


def flat(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested dicts as (dotted key, value)."""
    for key, value in node.items():
        if isinstance(value, dict) and value:
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def plain(value: object) -> str:
    """A configuration value in words."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "none"
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        value = int(value)  # a column of whole numbers with gaps
    if isinstance(value, (bool, np.bool_)):
        return "true" if value else "false"
    return str(value)


# ---------------------------------------------------------------- one run


def _entry(
    row: Mapping[Any, Any],
    part: pd.DataFrame | None,
    streams: dict[str, int],
    sweep: Sweep,
    examples: int,
) -> dict[str, Any]:
    path = Path(row["folder"])
    stream = load_stream(path) if (path / "stream.json").exists() else {}
    tasks = [{"name": t.get("name"), "test": t.get("test")} for t in stream.get("tasks", [])]
    about = {"class_names": stream.get("class_names") or [], "tasks": tasks}
    text = json.dumps(about, sort_keys=True)
    entry = {
        "group": row["group"],
        "run": row["run"],
        "label": row["label"],
        "seeds": seeds(row),
        "state": row["state"],
        "tasks": _number(row["tasks"]),
        "done": 0,
        "error": row["error"] if isinstance(row["error"], str) else None,
        "stream": streams.setdefault(text, len(streams)),
        "settings": {key: plain(row[key]) for key in [*sweep.varying, *SEED_KEYS] if key in row},
        "cells": [],
        "metrics": [],
        "confusion": [],
        "examples": {"total": 0, "rows": []},
    }
    if part is None:
        return entry
    entry["done"] = int(part["after_task"].max())
    entry["cells"] = _cells(part)
    entry["metrics"] = _metrics(part)
    try:
        rows = load_predictions(path, after_task=-1)
    except DamagedRunError as error:  # the matrices stand in another file
        sweep.problem(error)
        return entry | {"examples": None}
    if len(rows):
        entry["confusion"] = routing_confusion(rows).to_numpy().tolist()
        wrong = misrouted(rows)
        shown = wrong.head(examples)[list(EXAMPLE)]
        entry["examples"] = {
            "total": len(wrong),
            "rows": [_example(line) for line in shown.to_numpy(np.float64).tolist()],
        }
    return entry


def _cells(part: pd.DataFrame) -> list[list[list[float | None] | None]]:
    """``cells[t][i]``: the numbers of :data:`CELL`; None for a cell that was not evaluated."""
    rows = part[part["eval_task"].notna()]
    column = rows["metric"].where(rows["routing"] == "none", rows["routing"] + "_" + rows["metric"])
    wide = rows.assign(column=column).pivot(
        index=["after_task", "eval_task"], columns="column", values="value"
    )
    names = ("n", "oracle_accuracy", "routed_accuracy", "router_accuracy")
    wide = wide.reindex(columns=[*names, "n_lost_by_routing", "n_lucky"])
    done = int(part["after_task"].max())
    cells: list[list[list[float | None] | None]] = [[None] * (t + 1) for t in range(done)]
    for (after, task), values in zip(wide.index, wide.to_numpy(), strict=True):
        n, shares = values[0], values[1:4]
        counts = [_number(n), *(_number(share * n) for share in shares)]
        cells[after - 1][task - 1] = [*counts, *map(_number, values[4:])]
    return cells


def _metrics(part: pd.DataFrame) -> list[list[Any]]:
    """Rows ``[metric, oracle, routed, neither]`` over all tasks seen after the latest one."""
    rows = part[part["eval_task"].isna() & (part["after_task"] == part["after_task"].max())]
    found: dict[str, list[Any]] = {}
    for metric, routing, value in zip(rows["metric"], rows["routing"], rows["value"], strict=True):
        line = found.setdefault(metric, [metric, None, None, None])
        line[1 + ("oracle", "routed", "none").index(routing)] = _number(value)
    return list(found.values())


def _total_seconds(run: Path, seconds: Any) -> Any:  # noqa: ANN401 (a number or nothing)
    try:
        return json.loads((run / "timing.json").read_text(encoding="utf-8"))["total_seconds"]
    except (OSError, ValueError, KeyError, TypeError):  # unfinished, or written by hand
        return seconds


def _example(line: list[float]) -> list[float | int | None]:
    *ids, margin, confidence = (_number(value) for value in line)
    short = (None if v is None else float(f"{v:.6g}") for v in (margin, confidence))  # float32
    return [*ids, *short]


def _number(value: Any) -> float | int | None:  # noqa: ANN401 (numpy's and pandas' scalars)
    """A JSON number: None where undefined, whole where it is whole (counts come as shares of n)."""
    if value is None or pd.isna(value):
        return None
    near = round(float(value))
    return near if abs(value - near) < 1e-9 else float(value)


def as_json(data: object) -> str:
    """JSON that can stand inside a script element whatever its strings hold."""
    text = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text
