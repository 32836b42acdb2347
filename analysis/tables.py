"""Tables from the tidy frame of :func:`analysis.load_runs`: matrices, summaries, decompositions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from analysis.listing import in_order
from analysis.load import RESULT_COLUMNS, SEED_COLUMNS, load_runs
from cl_peft import metrics
from cl_peft.errors import DataError

#: Counts of the error decomposition, as stored per cell.
COUNTS = (
    "n",
    "n_routed_right_oracle_right",
    "n_routed_right_oracle_wrong",
    "n_misrouted_oracle_right",
    "n_misrouted_oracle_wrong",
    "n_lost_by_routing",
    "n_lucky",
)

#: How the columns of a summary are ordered, by how their names begin; others follow.
READING_ORDER = (
    "average_accuracy_oracle",
    "average_accuracy_routed",
    "average",
    "learning",
    "router_accuracy",
    "routing_loss",
    "misroute_luck",
    "forgetting_oracle",
    "forgetting_routed",
    "forgetting_module",
    "forgetting_routing",
    "forgetting",
    "backward",
)


def accuracy_matrix(
    run: pd.DataFrame | str | Path, routing: str = "routed", *, metric: str = "accuracy"
) -> pd.DataFrame:
    """One run's matrix ``R[t, i]``: accuracy on task i after learning task t.

    Args:
        run: A run folder, or a frame that holds one run.
        routing: "oracle" or "routed" (or "none" for metrics that have no routing).
        metric: Any metric that is stored per cell, such as "accuracy" or "router_accuracy".

    Returns:
        ``(T, T)``, index after_task and columns eval_task, both 1-based; T is the number of tasks
        the run has committed. Cells that do not exist are NaN.

    Raises:
        DataError: The frame holds no run or several, or no such cells.
    """
    frame = _one_run(run)
    cells = frame[
        (frame["metric"] == metric) & (frame["routing"] == routing) & frame["eval_task"].notna()
    ]
    if cells.empty:
        raise DataError(
            f"Run {frame['run'].iloc[0]} has no cells of metric {metric!r} with routing "
            f"{routing!r}. Load it without a metric filter, or ask for another."
        )
    tasks = range(1, int(max(cells["after_task"].max(), cells["eval_task"].max())) + 1)
    matrix = cells.pivot(index="after_task", columns="eval_task", values="value")
    matrix = matrix.reindex(index=tasks, columns=tasks).astype("float64")
    return matrix.rename_axis(index="after_task", columns="eval_task")


def summary(frame: pd.DataFrame) -> pd.DataFrame:
    """One row per run with its latest numbers over all tasks seen.

    Args:
        frame: From :func:`analysis.load_runs`.

    Returns:
        The columns that describe the run, ``tasks`` (learned so far), then one column per metric:
        ``average_accuracy_oracle``, ``average_accuracy_routed``, ..., and those without routing
        under their own name (``router_accuracy``, ``routing_loss``, ...).
    """
    about = describing_columns(frame)
    final = _final_rows(frame)
    tasks = final.groupby(["group", "run"])["after_task"].first().rename("tasks")
    wide = final.pivot(index=["group", "run"], columns="column", values="value")
    columns = sorted([str(column) for column in wide.columns], key=_reading_order)
    wide = wide[columns].rename_axis(columns=None)
    runs = frame[about].drop_duplicates(["group", "run"])
    runs = runs.merge(tasks, on=["group", "run"], validate="one_to_one")
    return runs.merge(wide, on=["group", "run"], validate="one_to_one")


def aggregate(
    frame: pd.DataFrame,
    *,
    by: Sequence[str] | None = None,
    metric: Sequence[str] | None = None,
    states: Sequence[str] = ("finished",),
) -> pd.DataFrame:
    """Mean and spread over seeds of the numbers of :func:`summary`.

    Args:
        frame: From :func:`analysis.load_runs`.
        by: Columns that tell configurations apart; None is every describing column but the run,
            its state and its seeds.
        metric: Columns of :func:`summary` to keep; None is all.
        states: States of the runs that count. A run that stopped half-way has numbers over fewer
            tasks, so by default only finished runs do.

    Returns:
        One row per configuration and metric: the columns of ``by``, metric, mean, std (sample
        standard deviation; NaN for one run), n (runs with a number).

    Raises:
        DataError: Two runs of one configuration have the same three seeds, so what differs between
            them is not a seed; or no run is in one of ``states``.
    """
    runs = summary(frame)
    keys = list(by) if by is not None else configuration_columns(frame)
    runs = runs[runs["state"].isin(list(states))]
    if runs.empty:
        found = ", ".join(sorted(frame["state"].unique())) or "no run at all"
        raise DataError(f"No run is {' or '.join(states)} (found: {found}); see states=.")
    refuse_hidden_differences(runs, keys)
    names = [c for c in runs.columns if c not in (*describing_columns(frame), "tasks")]
    names = names if metric is None else list(metric)
    long = in_order(runs, keys).melt(
        id_vars=keys, value_vars=names, var_name="metric", value_name="value"
    )
    groups = long.groupby([*keys, "metric"], sort=False, dropna=False)["value"]
    return groups.agg(mean="mean", std="std", n="count").reset_index()


def error_decomposition(
    run: pd.DataFrame | str | Path, after_task: int | None = None
) -> pd.DataFrame:
    """Where the errors of a run come from, per task and over all of them.

    ``accuracy = oracle_accuracy - routing_loss + misroute_luck`` in every row.

    Args:
        run: A run folder, or a frame that holds one run.
        after_task: 1-based; None is the latest task.

    Returns:
        Index: eval_task (1-based) and ``"all"``. Columns: the counts, then oracle_accuracy,
        routing_loss, misroute_luck, accuracy (routed) and router_accuracy as shares of the samples.

    Raises:
        DataError: Not exactly one run, or nothing stored after that task.
    """
    frame = _one_run(run)
    at = int(frame["after_task"].max()) if after_task is None else after_task
    cells = frame[
        (frame["after_task"] == at) & frame["eval_task"].notna() & frame["metric"].isin(COUNTS)
    ]
    if cells.empty:
        raise DataError(f"Run {frame['run'].iloc[0]} holds no counts after task {at}.")
    counts = cells.pivot(index="eval_task", columns="metric", values="value")
    lacking = [name for name in COUNTS if name not in counts.columns]
    if lacking:
        raise DataError(f"The frame lacks {', '.join(lacking)}; load it without a metric filter.")
    counts = counts[list(COUNTS)].astype("int64").rename_axis(columns=None)
    parts = {
        task: metrics.Decomposition(*(int(count) for count in row))
        for task, row in zip(counts.index, counts.to_numpy(), strict=True)
    }
    rows = {**parts, "all": metrics.Decomposition.pool(parts.values())}
    shares = ("oracle_accuracy", "routing_loss", "misroute_luck", "accuracy", "router_accuracy")
    return pd.DataFrame(
        [{name: getattr(part, name) for name in (*COUNTS, *shares)} for part in rows.values()],
        index=pd.Index(list(rows), name="eval_task", dtype="object"),
    )


def forgetting_split(run: pd.DataFrame | str | Path) -> pd.DataFrame:
    """How much of a run's forgetting is modules that changed, and how much is routing.

    Args:
        run: A run folder, or a frame that holds one run.

    Returns:
        One row per after_task: module_drift, routing_drift and their sum, the routed forgetting
        (Chaudhry); NaN after the first task.

    Raises:
        DataError: Not exactly one run, or it does not hold both matrices.
    """
    frame = _one_run(run)
    oracle = accuracy_matrix(frame, "oracle").to_numpy()
    routed = accuracy_matrix(frame, "routed").to_numpy()
    splits = [
        metrics.forgetting_split(oracle[:t, :t], routed[:t, :t]) for t in range(1, len(oracle) + 1)
    ]
    return pd.DataFrame(
        [
            {
                "module_drift": s.module_drift,
                "routing_drift": s.routing_drift,
                "forgetting": s.total,
            }
            for s in splits
        ],
        index=pd.RangeIndex(1, len(splits) + 1, name="after_task"),
    )


def forgetting_per_task(run: pd.DataFrame | str | Path) -> pd.DataFrame:
    """Each old task's share in :func:`forgetting_split` at the end of a run.

    With ``D = oracle - routed`` and ``l* = argmax_{i <= l < T} routed[l, i]`` (the earliest):
    ``module_drift = oracle[l*, i] - oracle[T, i]``, ``routing_drift = D[T, i] - D[l*, i]``, as in
    :func:`cl_peft.metrics.forgetting_split`, which averages them over tasks.

    Args:
        run: A run folder, or a frame that holds one run.

    Returns:
        Index eval_task (1 .. T - 1); columns module_drift, routing_drift, forgetting (their sum:
        the best routed accuracy before the last task, minus the last). Empty after one task.

    Raises:
        DataError: Not exactly one run, or it does not hold both matrices.
    """
    frame = _one_run(run)
    oracle = accuracy_matrix(frame, "oracle").to_numpy()
    routed = accuracy_matrix(frame, "routed").to_numpy()
    rows = []
    for i in range(len(routed) - 1):
        best = i + int(np.argmax(routed[i:-1, i]))  # a missing cell is found first and gives NaN
        module = oracle[best, i] - oracle[-1, i]
        total = routed[best, i] - routed[-1, i]
        rows.append((module, total - module, total))
    return pd.DataFrame(
        rows,
        columns=["module_drift", "routing_drift", "forgetting"],
        index=pd.RangeIndex(1, len(rows) + 1, name="eval_task"),
        dtype="float64",
    )


def costs(frame: pd.DataFrame) -> pd.DataFrame:
    """What each run trains and what it has to keep.

    Args:
        frame: From :func:`analysis.load_runs`.

    Returns:
        The describing columns, tasks, and: trainable_parameters (module and head of one task, the
        most of all tasks), stored_parameters (modules, heads and learner state, in units of 4
        bytes; of runs that did not count them, all modules and heads), router_parameters (the
        router's state in units of 4 bytes).
    """
    about = describing_columns(frame)
    names = ["module_parameters", "head_parameters", "router_state_bytes", "bank_modules"]
    names.append("stored_bytes")
    rows = frame[frame["eval_task"].isna() & frame["metric"].isin(names)]
    wide = rows.pivot(index=["group", "run", "after_task"], columns="metric", values="value")
    wide = wide.reindex(columns=names).reset_index().sort_values("after_task")
    found = []
    for (group, run), part in wide.groupby(["group", "run"], sort=False):
        known = part.dropna(subset=["module_parameters", "head_parameters"])
        own = known["module_parameters"] + known["head_parameters"]
        single = len(part) > 1 and part["bank_modules"].iloc[-1] == 1
        stored = own.iloc[-1] if single and len(own) else own.sum(min_count=1)
        router = part["router_state_bytes"].iloc[-1] / 4
        counted = part["stored_bytes"].iloc[-1] / 4 - router
        stored = stored if pd.isna(counted) else counted
        found.append((group, run, int(part["after_task"].iloc[-1]), own.max(), stored, router))
    columns = ["trainable_parameters", "stored_parameters", "router_parameters"]
    table = pd.DataFrame(found, columns=["group", "run", "tasks", *columns])
    runs = frame[about].drop_duplicates(["group", "run"])
    return runs.merge(table, on=["group", "run"], validate="one_to_one")


# ---------------------------------------------------------------- text


def to_markdown(frame: pd.DataFrame, digits: int = 3) -> str:
    """Write a frame as a Markdown table: floats to ``digits`` places, NaN as an empty cell.

    The index is the first column, unless it is the plain 0, 1, 2, ... of an unindexed frame.
    """
    if not isinstance(frame.index, pd.RangeIndex) or frame.index.name is not None:
        corner = frame.index.name or ""
        frame = frame.rename_axis(columns=None).reset_index(names=str(corner))
    numeric = [pd.api.types.is_numeric_dtype(dtype) for dtype in frame.dtypes]
    rows = [[_cell_text(value, digits) for value in row] for row in frame.itertuples(index=False)]
    lines = [
        [str(column).replace("|", "\\|") for column in frame.columns],
        ["--:" if is_number else "---" for is_number in numeric],
        *rows,
    ]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"


def _cell_text(value: object, digits: int) -> str:
    if pd.isna(value):  # type: ignore[call-overload]
        return ""
    if isinstance(value, (float, np.floating)):
        text = f"{value:.{digits}f}"
        return text.lstrip("-") if float(text) == 0 else text  # never "-0.000"
    return str(value).replace("|", "\\|").replace("\n", " ")


# ---------------------------------------------------------------- shared with figures.py


def describing_columns(frame: pd.DataFrame) -> list[str]:
    """Columns of a tidy frame that describe a run, those added with ``config=`` included."""
    return [column for column in frame.columns if column not in RESULT_COLUMNS]


def configuration_columns(frame: pd.DataFrame) -> list[str]:
    """Describing columns that tell configurations apart: all but run, state, seeds and tests."""
    hidden = ("run", "state", *SEED_COLUMNS, "tests")
    return [c for c in describing_columns(frame) if c not in hidden]


def configuration_labels(rows: pd.DataFrame, keys: Sequence[str]) -> pd.Series:
    """Name each row's configuration by what varies among them; a single one needs no name."""
    varying = [key for key in keys if rows[key].nunique(dropna=False) > 1]
    last = [key.split(".")[-1] for key in varying]
    # module.rank is called rank, unless another key that varies ends alike
    short = {
        key: end if last.count(end) == 1 else key for key, end in zip(varying, last, strict=True)
    }
    parts = [
        rows[key].map(lambda value, key=key: _named(key, short[key], value)) for key in varying
    ]
    if not parts:
        return pd.Series("", index=rows.index, dtype="str")
    texts = [", ".join(filter(None, row)) for row in zip(*parts, strict=True)]
    return pd.Series(texts, index=rows.index, dtype="str")


def _named(key: str, shown: str, value: object) -> str:
    """``ridge`` for a name, ``rank 8`` for a number; nothing for what a configuration lacks."""
    if pd.isna(value):  # type: ignore[call-overload]
        return ""
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # a column of whole numbers with gaps
    if key.endswith(".name") or (isinstance(value, str) and "." not in key):
        return str(value)
    return f"{shown} {value}"


def refuse_hidden_differences(runs: pd.DataFrame, keys: Sequence[str]) -> None:
    """Raise if runs that are about to be averaged over seeds differ in something else.

    Args:
        runs: One row per run.
        keys: Columns that tell configurations apart.

    Raises:
        DataError: Two runs agree in ``keys`` and in all three seeds.
    """
    same = [*keys, *(seed for seed in SEED_COLUMNS if seed not in keys)]
    twins = runs[runs.duplicated(same, keep=False)]
    if len(twins):
        names = ", ".join(sorted(twins["run"].unique())[:4])
        raise DataError(
            "These runs would be averaged as seeds of one configuration, but their seeds are "
            f"equal, so something else differs: {names}.\n"
            "  Add what differs as a column, as in load_runs(folder, config=['module.rank']), or "
            "load a single group."
        )


def _one_run(run: pd.DataFrame | str | Path) -> pd.DataFrame:
    frame = run if isinstance(run, pd.DataFrame) else load_runs(run)
    names = frame[["group", "run"]].drop_duplicates()
    if len(names) != 1:
        listed = ", ".join(sorted(names["run"].astype(str))[:4]) or "none with results"
        raise DataError(
            f"Expected one run, found {len(names)} ({listed}).\n"
            "  Select one: frame[frame['run'] == name]."
        )
    return frame


def _final_rows(frame: pd.DataFrame) -> pd.DataFrame:
    """Rows over all tasks seen after each run's latest task, with the name of their column."""
    overall = frame[frame["eval_task"].isna()]
    latest = overall.groupby(["group", "run"])["after_task"].transform("max")
    final = overall[overall["after_task"] == latest]
    suffix = ("_" + final["routing"]).where(final["routing"] != "none", "")
    return final.assign(column=final["metric"] + suffix)


def _reading_order(column: str) -> tuple[int, str]:
    """Accuracy first, then routing, then forgetting and transfer, sizes last."""
    rank = next(
        (i for i, start in enumerate(READING_ORDER) if column.startswith(start)), len(READING_ORDER)
    )
    return (rank, column)
