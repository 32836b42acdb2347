"""Configurations over their seeds: intervals, paired tests, ranks, pairs of runs.

All start from the tidy frame of :func:`analysis.load_runs` and use finished runs only: one that
stopped half-way has numbers over fewer tasks.

Tests and ranks never pool streams. Runs are paired within a stream, by their seeds; over several
streams each is one number, the mean over its shared seeds (Demsar 2006: seeds are no data sets).
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from analysis import ranks as ranking
from analysis.directions import required_direction
from analysis.folders import open_run
from analysis.listing import in_order
from analysis.load import SEED_COLUMNS, load_predictions, load_run_table
from analysis.pairing import changed_data, in_same_tasks, most_alike, refuse_other_tests
from analysis.statistics import Statistic, bootstrap_interval, holm, paired_permutation
from analysis.tables import (
    configuration_columns,
    configuration_labels,
    costs,
    describing_columns,
    refuse_hidden_differences,
    summary,
)
from cl_peft.errors import DataError, did_you_mean

COSTS = ("trainable_parameters", "stored_parameters", "router_parameters")


def as_seed(frame: pd.DataFrame, key: str) -> pd.DataFrame:
    """Count a key as a part of the data's seed: its values are replicates, paired as seeds are.

    For the samples of a benchmark, say. The column goes, and ``seed_data`` numbers what was
    different in it or in the seed before.

    Args:
        frame: From :func:`analysis.load_runs`, with the key as a column.
        key: Such as ``stream.sample``.

    Raises:
        DataError: No such column.
    """
    known = configuration_columns(frame)
    if key not in known:
        raise DataError(
            f"The runs do not differ in a key {key}.{did_you_mean(key, known)}\n"
            f"  they differ in: {', '.join(known)}"
        )
    pairs = frame["seed_data"].astype(str) + "/" + frame[key].astype(str)
    numbers = pd.factorize(pairs, sort=True)[0]
    return frame.drop(columns=key).assign(seed_data=pd.array(numbers, dtype="Int64"))


def final_numbers(frame: pd.DataFrame, metric: Sequence[str]) -> pd.DataFrame:
    """One row per finished run: describing columns and the wanted columns of its final numbers.

    Args:
        frame: From :func:`analysis.load_runs`.
        metric: Columns of :func:`analysis.summary` or :func:`analysis.costs`.

    Raises:
        DataError: No finished run, or an unknown column.
    """
    finished = frame[frame["state"] == "finished"]
    if finished.empty:
        raise DataError("No run is finished, so there are no final numbers.")
    runs = summary(finished)
    if any(name in COSTS for name in metric):
        runs = runs.merge(costs(finished)[["group", "run", *COSTS]], on=["group", "run"])
    about = describing_columns(frame)
    known = [column for column in runs.columns if column not in about]
    for name in metric:
        if name not in known:
            raise DataError(
                f"No number is called {name!r}.{did_you_mean(name, known)}\n"
                f"  there are: {', '.join(known)}"
            )
    return runs[[*about, *dict.fromkeys(metric)]]


def intervals(
    frame: pd.DataFrame,
    *,
    metric: Sequence[str] = ("average_accuracy_routed",),
    by: Sequence[str] | None = None,
    strata: str | None = None,
    statistic: str | Statistic = "mean",
    level: float = 0.95,
    seed: int = 0,
) -> pd.DataFrame:
    """Mean (or interquartile mean) over seeds with its stratified bootstrap interval.

    Args:
        frame: From :func:`analysis.load_runs`.
        metric: Columns of :func:`analysis.summary` or :func:`analysis.costs`.
        by: Columns that tell configurations apart; None is all but the run, its state, its seeds
            and ``strata``.
        strata: Column whose values are resampled apart, such as "stream".
        statistic: "mean", "iqm" or a function; see :func:`analysis.bootstrap_interval`.
        level: Nominal coverage.
        seed: Of the resampling.

    Returns:
        One row per configuration (in natural order of the columns of ``by``) and metric: these
        columns, metric, estimate, low, high,
        half_width, n (runs with a number).

    Raises:
        DataError: No finished run, an unknown metric, or runs that differ in more than their seeds.
    """
    runs = final_numbers(frame, metric)
    keys = _keys(frame, by, strata)
    refuse_hidden_differences(runs, [*keys, *([strata] if strata else [])])
    rows = []
    for values, part in _groups(runs, keys):
        for name in metric:
            known = part.dropna(subset=[name])
            about = dict(zip(keys, values, strict=True)) | {"metric": name}
            if known.empty:
                nan = float("nan")
                rows.append(about | dict.fromkeys(("estimate", "low", "high", "half_width"), nan))
                rows[-1]["n"] = 0
                continue
            found = bootstrap_interval(
                known[name],
                None if strata is None else known[strata].astype(str),
                statistic=statistic,
                level=level,
                seed=seed,
            )
            ends = {"estimate": found.estimate, "low": found.low, "high": found.high}
            rows.append(about | ends | {"half_width": found.half_width, "n": found.n})
    return pd.DataFrame(rows)


def paired_tests(
    frame: pd.DataFrame,
    *,
    metric: str = "average_accuracy_routed",
    by: Sequence[str] | None = None,
    reference: str | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """Paired tests between configurations, Holm corrected.

    Runs of one stream: the permutation test over the seeds that two configurations share; it speaks
    of seeds only. Of several: Wilcoxon's signed-rank test over streams, each one pair of means over
    shared seeds (:func:`analysis.wilcoxon`).

    Args:
        frame: From :func:`analysis.load_runs`.
        metric: A column of :func:`analysis.summary`.
        by: Columns that tell configurations apart; None is all but run, state and seeds. The stream
            never does, nor does a group that is one stream's.
            Runs are paired that agree in all other describing columns (stream, seeds, ...).
        reference: Label of the configuration to test all others against, as in column a and b; None
            tests every pair.
        seed: Of the random sign patterns (more than 16 pairs).

    Returns:
        One row per comparison: a, b (labels), difference (a - b), p, p_holm (over all rows), n
        (pairs), smallest_p (what n pairs can give at best), unit (of a pair: "seed" or "stream").
        NaN and n = 0 where two configurations share no seeds of a stream.

    Raises:
        DataError: No finished run, unknown names, runs that differ in more than their seeds, or
            runs of a pair that were tested on other examples (:mod:`analysis.pairing`).
    """
    return compare_columns(score_table(frame, metric=metric, by=by), reference, seed)


def compare_columns(scores: pd.DataFrame, reference: str | None, seed: int = 0) -> pd.DataFrame:
    """:func:`paired_tests` of the columns of a :func:`score_table`."""
    labels = list(scores.columns)
    if reference is not None and reference not in labels:
        raise DataError(
            f"No configuration is called {reference!r}.{did_you_mean(reference, labels)}\n"
            f"  there are: {'; '.join(labels)}"
        )
    unit = _unit(scores)
    firsts = labels if reference is None else [reference]
    rows = []
    for i, a in enumerate(firsts):
        for b in labels[i + 1 :] if reference is None else labels:
            if a == b:
                continue
            both = _blocks(scores[[a, b]].dropna(), unit)
            row: dict[str, Any] = {"a": a, "b": b, "n": len(both)}
            if len(both):
                paired = ranking.wilcoxon if unit == "stream" else paired_permutation
                test = paired(both[a], both[b], seed=seed)
                row |= {"difference": test.difference, "p": test.p, "smallest_p": test.smallest_p}
            rows.append(row)
    columns = ["a", "b", "difference", "p", "n", "smallest_p"]
    table = pd.DataFrame(rows, columns=columns)
    table.insert(4, "p_holm", holm(table["p"].astype("float64")))
    return table.assign(unit=unit)


def rank_configurations(
    frame: pd.DataFrame,
    *,
    metric: str = "average_accuracy_routed",
    by: Sequence[str] | None = None,
    alpha: float = 0.05,
) -> ranking.CriticalDifference:
    """Ranks of configurations over streams, of means over the seeds that all of them have.

    With runs of a single stream, over its seeds, which then says nothing of other streams.

    Args:
        frame: From :func:`analysis.load_runs`.
        metric: A column of :func:`analysis.summary` that has a direction.
        by: As in :func:`paired_tests`.
        alpha: Level of the Nemenyi test.

    Raises:
        DataError: As :func:`paired_tests`; a metric without a direction; or fewer than two
            configurations, or streams (seeds of the only stream) that all of them have.
    """
    higher = required_direction(metric) > 0
    return rank_columns(score_table(frame, metric=metric, by=by), higher, alpha)


def rank_columns(
    scores: pd.DataFrame, higher_is_better: bool, alpha: float = 0.05
) -> ranking.CriticalDifference:
    """:func:`rank_configurations` of the columns of a :func:`score_table`."""
    unit, whole = _unit(scores), scores.dropna()
    if whole.empty and scores.shape[1] > 1:
        raise DataError(
            f"No {unit} has runs of all {scores.shape[1]} methods"
            + (" with the same seeds." if unit == "stream" else ".")
        )
    return ranking.critical_difference(
        _blocks(whole, unit), alpha=alpha, higher_is_better=higher_is_better, unit=unit
    )


def score_table(
    frame: pd.DataFrame,
    *,
    metric: str,
    by: Sequence[str] | None = None,
    leave_out: bool = False,
) -> pd.DataFrame:
    """Final numbers with one row per stream and seed and one column per configuration.

    Args:
        frame: From :func:`analysis.load_runs`.
        metric: A column of :func:`analysis.summary` or :func:`analysis.costs`.
        by: As in :func:`paired_tests`.
        leave_out: Leave out runs that were tested on other examples than most, instead of refusing.

    Returns:
        Index (stream, block); block names the seeds and whatever else pairs runs.

    Raises:
        DataError: As :func:`paired_tests`.
    """
    runs = final_numbers(frame, [metric])
    keys = method_keys(runs, configuration_columns(frame) if by is None else by)
    on = paired_by(frame, keys)
    refuse_hidden_differences(runs, list(dict.fromkeys([*keys, *on])))
    if not leave_out:
        refuse_other_tests(runs, on)
    runs = in_order(runs, keys)
    runs = runs.assign(label=configuration_labels(runs, keys))
    if not (runs["label"] != "").any():
        runs["label"] = "all runs"
    labels = list(dict.fromkeys(runs["label"]))
    runs = most_alike(runs, on) if leave_out else runs
    # blocks as text: a configuration key that some runs lack would drop them from the pivot
    rest = [column for column in on if column != "stream"]
    blocks = runs[rest].astype("str").fillna("none").agg(", ".join, axis=1)
    wide = runs.assign(block=blocks).pivot(
        index=["stream", "block"], columns="label", values=metric
    )
    return wide.reindex(columns=labels).rename_axis(columns=None)


def paired_by(frame: pd.DataFrame, keys: Sequence[str]) -> list[str]:
    """Columns in which runs agree that are paired, where ``keys`` tell methods apart."""
    about = ("run", "state", "group", "tests")
    return [c for c in describing_columns(frame) if c not in (*keys, *about)]


def method_keys(runs: pd.DataFrame, keys: Sequence[str]) -> list[str]:
    """Those of ``keys`` that tell methods apart: not the stream, nor groups of one stream each."""
    pairs = runs[["group", "stream"]].drop_duplicates()
    single = len(pairs) > 1 and pairs["group"].is_unique and pairs["stream"].is_unique
    return [key for key in keys if key != "stream" and not (single and key == "group")]


def example_pairs(
    folder: str | Path, a: Mapping[str, Any], b: Mapping[str, Any]
) -> list[tuple[pd.DataFrame, pd.DataFrame]]:
    """Final predictions of two configurations, paired by seeds, for ``compare_examples``.

    Args:
        folder: Folder of runs.
        a: What selects the runs of the first, by columns of :func:`analysis.load_run_table`:
            ``{"router": "ridge"}``.
        b: What selects those of the second.

    Warns:
        UserWarning: Two of them were trained on other data (:func:`analysis.pairing.changed_data`).

    Raises:
        DataError: An unknown column, no seeds in common, several runs with the same seeds, or two
            runs of a pair that were not tested on the same examples in the same tasks.
    """
    chosen = []
    for what in (a, b):
        runs = load_run_table(folder, where=what)
        runs = runs[runs["finished"]]
        seeds = ["stream", *SEED_COLUMNS]
        if runs.duplicated(seeds).any():
            twins = ", ".join(runs[runs.duplicated(seeds, keep=False)]["run"].head(4))
            raise DataError(
                f"{dict(what)} selects several runs with the same seeds: {twins}. Name more keys."
            )
        chosen.append(runs.set_index(seeds)["folder"])
    both = pd.concat(chosen, axis=1, keys=["a", "b"], join="inner")
    if both.empty:
        raise DataError(f"{dict(a)} and {dict(b)} have no finished runs with the same seeds.")
    folders = list(both.itertuples(index=False, name=None))
    for x, y in folders:
        in_same_tasks(x, y)
    if text := changed_data([open_run(path) for pair in folders for path in pair]):
        warnings.warn(text, stacklevel=2)
    return [
        (load_predictions(x, after_task=-1), load_predictions(y, after_task=-1)) for x, y in folders
    ]


# ---------------------------------------------------------------- parts


def _unit(scores: pd.DataFrame) -> str:
    return "stream" if scores.index.get_level_values("stream").nunique() > 1 else "seed"


def _blocks(scores: pd.DataFrame, unit: str) -> pd.DataFrame:
    """One row per pair or block: a seed of the only stream, or a stream's mean over seeds."""
    return scores.groupby(level="stream").mean() if unit == "stream" else scores


def _keys(frame: pd.DataFrame, by: Sequence[str] | None, strata: str | None) -> list[str]:
    if by is not None:
        return list(by)
    return [column for column in configuration_columns(frame) if column != strata]


def _groups(runs: pd.DataFrame, keys: Sequence[str]) -> list[tuple[tuple[Any, ...], pd.DataFrame]]:
    if not keys:
        return [((), runs)]
    groups = in_order(runs, keys).groupby(list(keys), sort=False, dropna=False)
    return [(values, part) for values, part in groups]
