"""Many runs into one frame. What a run wrote is checked against its manifest before it is used.

Nothing is read that is not asked for: :func:`load_run_table` opens no table at all, and
:func:`load_runs` only those of the runs that ``where`` keeps. With ``cache=True`` all numbers are
also kept in one Parquet file, from which later calls read only the metrics they need.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from analysis.cache import NAME as CACHE_NAME
from analysis.cache import ResultCache
from analysis.folders import (
    MARKERS,
    RESULT_COLUMNS,
    RESULT_SCHEMA,
    RunFiles,
    load_config,
    load_predictions,
    load_stream,
    open_run,
    results_table,
    run_folders,
)
from analysis.pairing import changed_data, names_of_tests
from cl_peft.archives import short_name
from cl_peft.config import NOT_IDENTITY
from cl_peft.errors import DamagedRunError, DataError, did_you_mean

__all__ = [
    "CONFIG_COLUMNS",
    "MARKERS",
    "RESULT_COLUMNS",
    "RUN_COLUMNS",
    "SEED_COLUMNS",
    "load_config",
    "load_predictions",
    "load_run_table",
    "load_runs",
    "load_stream",
    "run_folders",
    "varying_keys",
]

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
RUN_COLUMNS = ("run", "group", "state", *list(CONFIG_COLUMNS)[1:], "tests")
SEED_COLUMNS = ("seed_order", "seed_init", "seed_data")
#: Columns of the run table that say how a run went, not what it was asked to do.
PROGRESS_COLUMNS = ("finished", "tasks_done", "tasks", "seconds", "error", "folder")


def load_runs(
    folder: str | Path,
    *,
    metric: str | Iterable[str] | None = None,
    where: Mapping[str, Any] | None = None,
    config: Sequence[str] | Literal["varying"] = (),
    cache: bool | str | Path = False,
) -> pd.DataFrame:
    """Read the results of every run under ``folder``, at any depth, into one tidy frame.

    Runs that are not finished are included with the tasks they have committed; column ``state``
    tells (running, finished, failed, refused). A run that has committed nothing has no rows.

    Args:
        folder: Folder of runs, such as ``"runs"`` or one sweep's, or a single run folder.
        metric: Keep only this metric, or these.
        where: Keep only runs with these values: ``{"router": "ridge", "seed_init": [0, 1]}``.
            Tables of other runs are not opened.
        config: Keys of the configuration to add as columns: ``["module.rank", "trainer.epochs"]``;
            or "varying" for every key in which the runs differ (:func:`varying_keys`).
        cache: Keep the numbers in one file, and read what is unchanged from there. True puts it
            into ``folder`` as ``.analysis.parquet`` (a single run folder gets none); a path puts it
            there. Runs that changed are read again; see :mod:`analysis.cache`.

    Returns:
        One row per number, with columns run, group, state, module, router, learner, stream,
        backbone, seed_order, seed_init, seed_data, tests (equal for runs tested on the same
        examples; see :mod:`analysis.pairing`), those of ``config``, after_task (1-based),
        eval_task (1-based; NA = over all tasks seen), routing (oracle, routed or none), metric,
        value. Runs in the order of their folders.

    Warns:
        UserWarning: A damaged run folder was skipped (its path and what is wrong with it), a run
            was found twice, there is no run folder at all, or the data changed between runs with
            the same stream settings and seeds (:func:`analysis.pairing.changed_data`).

    Raises:
        DataError: No such folder; or ``metric``, ``where`` or ``config`` names something that no
            run has.
    """
    wanted = [metric] if isinstance(metric, str) else None if metric is None else list(metric)
    keys = () if isinstance(config, str) else tuple(config)
    conditions = _conditions(where or {}, (*RUN_COLUMNS[:-1], *keys))  # tests are named later
    runs = _open_all(folder)
    if runs:
        known_keys = set[str]().union(*(run.config for run in runs))
        _refuse_unknown("configuration key", set(keys) - known_keys, known_keys)
    chosen = [
        run
        for run in runs
        if all(_described(run, keys)[column] in values for column, values in conditions.items())
    ]
    if config == "varying" and chosen:
        named = set(CONFIG_COLUMNS.values())
        keys = tuple(key for key in varying_keys(_run_table(chosen)) if key not in named)
    where_to = _cache_path(folder, runs, cache)
    chosen, table, sizes = _numbers(runs, chosen, wanted, where_to, Path(folder))
    if wanted and len(set(wanted) - set(pc.unique(table["metric"]).to_pylist())):
        _refuse_unknown_metric(wanted, chosen)
    _warn_of_changed_data(chosen)
    return _typed(table, sizes, pd.DataFrame(_all_described(chosen, keys)), keys)


def load_run_table(folder: str | Path, *, where: Mapping[str, Any] | None = None) -> pd.DataFrame:
    """One row per run with its whole configuration; opens no table of numbers.

    Args:
        folder: Folder of runs, or a single run folder.
        where: Keep only runs with these values, of any column of the result.

    Returns:
        Columns run, group, state, module, router, learner, stream, backbone, seed_order, seed_init,
        seed_data, tests; finished (bool), tasks_done, tasks, seconds, error, folder; then every key
        of the configurations, flattened (``module.rank``), None where a run does not have it. Lists
        are JSON text, so that one can group by any column.

    Warns:
        UserWarning: As :func:`load_runs`.

    Raises:
        DataError: No such folder, or ``where`` names no column.
    """
    runs = _open_all(folder)
    table = _run_table(runs)
    for column, values in _conditions(where or {}, list(table.columns)).items():
        table = table[table[column].isin(values)]
    _warn_of_changed_data([runs[row] for row in table.index])
    return table.reset_index(drop=True)


def varying_keys(runs: pd.DataFrame, *, ignore: Sequence[str] = ()) -> list[str]:
    """Everything but the seeds in which runs differ: what to group by to average over seeds.

    Grouping by the result separates exactly what differs. A key that another one already
    determines (``module._target_`` once there is ``module.name``; a rank that only one of the
    modules has) is left out, unless it is a name itself. Keys that change nothing that is computed
    (paths, tracker, device, ...) never count.

    Args:
        runs: From :func:`load_run_table`, or from :func:`load_runs` with ``config=``.
        ignore: Further columns that may differ.

    Returns:
        Columns of ``runs``: of a run table keys of the configuration (``router.name``), of a tidy
        frame its describing columns (``router``). Empty if all runs are alike but for their seeds.
    """
    dotted = [column for column in runs.columns if "." in column]
    table = "folder" in runs.columns  # then every named column also stands there under its key
    shown = [column for column in RUN_COLUMNS[3:] if column in runs.columns and not table]
    skip = {"seed.order", "seed.init", "seed.data", *SEED_COLUMNS, "tests", *ignore}
    candidates = [
        column
        for column in [*shown, *dotted]
        if column not in skip and column.split(".")[0] not in NOT_IDENTITY
    ]
    one_each = runs.drop_duplicates(["group", "run"])
    codes = {c: pd.factorize(one_each[c], use_na_sentinel=False)[0] for c in candidates}
    varying = [column for column in candidates if codes[column].max(initial=0) > 0]
    # names first, so that they explain the rest; then in the order of the configuration
    names = [column for column in varying if column in shown or column.endswith(".name")]
    kept = list(names)
    for column in varying:
        if column not in names and not any(_determines(codes[k], codes[column]) for k in kept):
            kept.append(column)
    return [column for column in varying if column in kept]


# ---------------------------------------------------------------- reading many


def _open_all(folder: str | Path) -> list[RunFiles]:
    runs: list[RunFiles] = []
    seen: dict[tuple[str, str], Path] = {}
    for path in run_folders(folder):
        try:
            run = open_run(path)
        except DamagedRunError as error:
            _skipped(error)
            continue
        name = (_group(run), path.name)
        if name in seen:
            warnings.warn(f"skipped {path}: the same run as {seen[name]}", stacklevel=3)
            continue
        seen[name] = path
        runs.append(run)
    if not runs and not seen:
        warnings.warn(f"no run folder under {folder}", stacklevel=3)
    return runs


def _numbers(
    runs: Sequence[RunFiles],
    chosen: Sequence[RunFiles],
    metric: Sequence[str] | None,
    cache: ResultCache | None,
    root: Path,
) -> tuple[list[RunFiles], pa.Table, list[int]]:
    """The chosen runs that are whole, their rows one after another, and how many each has."""
    if cache is None:
        read = _read(chosen, results_table)
        tables = [_filtered(table, metric) for _, table in read]
    else:
        names = {run.path: run.path.relative_to(root).as_posix() for run in runs}
        keys = {run.path: key for run, key in _read(runs, RunFiles.key)}
        current = {names[path]: key for path, key in keys.items()}
        kept = [run for run in chosen if run.path in keys]
        if current == cache.keys:
            stored = cache.read([names[run.path] for run in kept], metric)
            if stored is not None:
                return kept, *stored
        whole = _refreshed(cache, [run for run in runs if run.path in keys], names, current)
        read = [(run, whole[run.path]) for run in kept if run.path in whole]
        tables = [_filtered(table, metric) for _, table in read]
    rows = pa.concat_tables([RESULT_SCHEMA.empty_table(), *tables])
    return [run for run, _ in read], rows, [table.num_rows for table in tables]


def _refreshed(
    cache: ResultCache,
    runs: Sequence[RunFiles],
    names: Mapping[Path, str],
    current: Mapping[str, str],
) -> dict[Path, pa.Table]:
    """Every run's numbers, unchanged ones from the cache; writes the cache anew."""
    fresh = [run for run in runs if cache.keys.get(names[run.path]) == current[names[run.path]]]
    stored = cache.read([names[run.path] for run in fresh]) if fresh else None
    whole: dict[Path, pa.Table] = {}
    if stored is not None:
        table, sizes = stored
        for run, start, size in zip(fresh, np.cumsum([0, *sizes[:-1]]), sizes, strict=True):
            whole[run.path] = table.slice(int(start), size)
    stale = [run for run in runs if run.path not in whole]
    whole |= {run.path: table for run, table in _read(stale, results_table)}
    kept = [run for run in runs if run.path in whole]  # damaged ones are looked at every time
    cache.write(
        {names[run.path]: current[names[run.path]] for run in kept},
        [whole[run.path] for run in kept],
    )
    return whole


def _read(runs: Iterable[RunFiles], what: Callable[[RunFiles], Any]) -> list[tuple[RunFiles, Any]]:
    found = []
    for run in runs:
        try:
            found.append((run, what(run)))
        except DamagedRunError as error:
            _skipped(error)
    return found


def _skipped(error: DamagedRunError) -> None:
    warnings.warn(f"skipped a damaged run: {error}", stacklevel=5)


def _warn_of_changed_data(runs: Sequence[RunFiles]) -> None:
    if text := changed_data(runs):
        warnings.warn(text, stacklevel=3)


def _cache_path(
    folder: str | Path, runs: Sequence[RunFiles], cache: bool | str | Path
) -> ResultCache | None:
    if cache is False:
        return None
    if cache is not True:
        return ResultCache(Path(cache))
    single = len(runs) == 1 and runs[0].path == Path(folder)
    return None if single else ResultCache(Path(folder) / CACHE_NAME)


def _filtered(table: pa.Table, metric: Sequence[str] | None) -> pa.Table:
    if metric is None:
        return table
    return table.filter(pc.is_in(table["metric"], pa.array(list(metric), pa.string())))


# ---------------------------------------------------------------- frames


def _described(run: RunFiles, config: Sequence[str]) -> dict[str, Any]:
    about: dict[str, Any] = {"run": run.path.name, "state": run.status["state"]}
    about |= {column: run.config.get(key) for column, key in CONFIG_COLUMNS.items()}
    about["backbone"] = short_name(str(about["backbone"]))
    about["group"] = _group(run)
    return about | {key: _cell(run.config.get(key)) for key in config}


def _all_described(runs: Sequence[RunFiles], config: Sequence[str]) -> list[dict[str, Any]]:
    tests = names_of_tests([run.stream for run in runs])
    return [_described(run, config) | {"tests": t} for run, t in zip(runs, tests, strict=True)]


def _group(run: RunFiles) -> str:
    return str(run.config.get("group") or run.path.parent.name)


def _run_table(runs: Sequence[RunFiles]) -> pd.DataFrame:
    keys = list(dict.fromkeys(key for run in runs for key in run.config))
    rows = []
    for run, about in zip(runs, _all_described(runs, ()), strict=True):
        status = run.status
        progress = {
            "finished": status["state"] == "finished",
            **{name: status.get(name) for name in ("tasks_done", "tasks", "seconds", "error")},
            "folder": str(run.path),
        }
        rows.append({**about, **progress, **_described(run, keys)})
    columns = [*RUN_COLUMNS, *PROGRESS_COLUMNS, *(key for key in keys if key not in RUN_COLUMNS)]
    return pd.DataFrame(rows, columns=columns).astype(dict.fromkeys(SEED_COLUMNS, "Int64"))


def _typed(
    table: pa.Table, sizes: Sequence[int], about: pd.DataFrame, config: Sequence[str]
) -> pd.DataFrame:
    columns = [*RUN_COLUMNS, *config]
    about = about.reindex(columns=columns).astype(
        {column: "Int64" if column in SEED_COLUMNS else "str" for column in RUN_COLUMNS}
    )
    frame = about.take(np.repeat(np.arange(len(about)), sizes)).reset_index(drop=True)
    for column in RESULT_COLUMNS:
        nullable = {pa.int32(): pd.Int32Dtype()}.get if column == "eval_task" else None
        frame[column] = table[column].to_pandas(types_mapper=nullable)
    return frame.astype({"routing": "str", "metric": "str"})


def _determines(given: np.ndarray, other: np.ndarray) -> bool:
    """Whether equal codes in ``given`` imply equal codes in ``other``."""
    pairs = given.astype(np.int64) * (int(other.max(initial=0)) + 1) + other
    return len(np.unique(pairs)) == len(np.unique(given))


def _conditions(where: Mapping[str, Any], columns: Sequence[str]) -> dict[str, list[Any]]:
    _refuse_unknown("column in where", set(where) - set(columns), columns)
    return {
        column: list(values) if isinstance(values, (list, tuple, set, range)) else [values]
        for column, values in where.items()
    }


def _refuse_unknown_metric(wanted: Sequence[str], runs: Sequence[RunFiles]) -> None:
    """Some metric was found nowhere: an error if the runs hold any numbers at all."""
    known: set[str] = set()
    for _, table in _read(runs, results_table):
        known |= set(pc.unique(table["metric"]).to_pylist())
    if known:
        _refuse_unknown("metric", set(wanted) - known, known)


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
