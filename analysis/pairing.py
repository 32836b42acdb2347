"""Which runs can be paired: those that were tested on the same examples.

Equal names and seeds do not say so: data files change, and keys such as ``stream.test_shots``
decide what is tested. ``stream.json`` holds a digest of each task's test examples; those of all
tasks add up to the same whatever the tasks' order. Runs from before there were digests have the
fingerprint of their whole stream, in which training examples and the order count too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.folders import RunFiles, load_config, load_stream
from cl_peft.errors import DataError

#: In the column ``tests``, where a run says nothing about its stream.
UNKNOWN = "unknown"


def names_of_tests(streams: Sequence[Mapping[str, Any]]) -> list[str]:
    """What each of several runs was tested on, in a word: the same word, the same examples.

    The sum of the tasks' digests; for a run without, that of a run with the same fingerprint, or
    else the fingerprint.

    Args:
        streams: What their stream.json say; empty where there is none.
    """
    totals = [_total(stream) for stream in streams]
    prints = [str(stream.get("fingerprint", ""))[:16] for stream in streams]
    known = {mark: total for mark, total in zip(prints, totals, strict=True) if mark and total}
    words = (f"stream {mark}" if mark else UNKNOWN for mark in prints)
    return [
        total or known.get(mark) or word
        for total, mark, word in zip(totals, prints, words, strict=True)
    ]


def in_same_tasks(a: str | Path, b: str | Path) -> bool:
    """Refuse two runs that were not tested on the same examples.

    Args:
        a: A run folder.
        b: Another.

    Returns:
        Whether the examples are in the same tasks too, so that predictions pair by ``eval_task``,
        ``row`` and ``label``; else they pair by class name and ``row``.

    Raises:
        DataError: Other examples, or nothing says that they are the same; names what differs.
        DamagedRunError: A stream.json or config.yaml cannot be read.
    """
    streams = [load_stream(a), load_stream(b)]
    first, second = streams
    totals = [_total(stream) for stream in streams]
    if None in totals:
        if first.get("fingerprint") and first.get("fingerprint") == second.get("fingerprint"):
            return True
        raise DataError(_refusal(a, b, streams))
    if totals[0] != totals[1]:
        raise DataError(_refusal(a, b, streams))
    named = first.get("class_names") == second.get("class_names")
    return named and _digests(first) == _digests(second)


def refuse_other_tests(runs: pd.DataFrame, paired_by: Sequence[str]) -> None:
    """Raise if runs that are about to be paired were tested on other examples.

    Args:
        runs: One row per run, with the describing columns of :func:`analysis.load_runs`.
        paired_by: Columns in which runs agree that are paired.

    Raises:
        DataError: Names two of them and what differs.
    """
    if "tests" not in runs.columns:
        return
    blocks = runs.groupby(list(paired_by), dropna=False, sort=False) if paired_by else [((), runs)]
    for _, block in blocks:
        other = block[(block["tests"] != block["tests"].iloc[0]) | (block["tests"] == UNKNOWN)]
        if len(block) < 2 or other.empty:
            continue
        one, two = block.iloc[0], other.iloc[-1]
        names = [f"{run['group']}/{run['run']}" for run in (one, two)]
        silent = [n for n, run in zip(names, (one, two), strict=True) if run["tests"] == UNKNOWN]
        if silent:
            raise DataError(
                f"Runs {' and '.join(names)} cannot be paired: it is unknown what examples "
                f"{' and '.join(silent)} was tested on, since there is no stream.json.\n"
                "  Run it again with fresh=true, or leave it out with where=."
            )
        keys = [c for c in runs.columns if c.startswith("stream.") and _differ(one[c], two[c])]
        why = _keys_text({key: (one[key], two[key]) for key in keys})
        raise DataError(
            f"Runs {' and '.join(names)} cannot be paired: "
            f"they were tested on other examples ({one['tests']} and {two['tests']}). "
            + (why or "cl-peft compare says what differs.")
            + "\n  Compare runs of one stream and one state of its data: load them with where=."
        )


def most_alike(runs: pd.DataFrame, paired_by: Sequence[str]) -> pd.DataFrame:
    """Of the runs that would be paired, those tested on what most of them were tested on.

    Args:
        runs: As in :func:`refuse_other_tests`.
        paired_by: As there.
    """
    known = runs[runs["tests"] != UNKNOWN]
    if known.empty or not paired_by:
        return known[known["tests"].isin(known["tests"].mode()[:1])]
    tests = known.groupby(list(paired_by), dropna=False, sort=False)["tests"]
    return known[known["tests"] == tests.transform(lambda found: found.mode()[0])]


def tested_alike(runs: pd.DataFrame, row: pd.Series, paired_by: Sequence[str]) -> bool:
    """Whether the numbers of a table's rows can be ranked: all are of the same test examples.

    Where the test examples go by the seeds, a row that lacks a seed is still alike.

    Args:
        runs: As in :func:`refuse_other_tests`.
        row: Which row each run belongs to.
        paired_by: As there.
    """
    if "tests" not in runs.columns or row.nunique() < 2:
        return True
    each = {frozenset(tests) for _, tests in runs["tests"].groupby(row)}
    if any(UNKNOWN in tests for tests in each):
        return False
    if len(each) == 1 or not paired_by:
        return len(each) == 1
    blocks = runs.assign(row=row).groupby(list(paired_by), dropna=False)[["tests", "row"]].nunique()
    return bool(blocks["tests"].max() == 1 and blocks["row"].max() == row.nunique())


def changed_data(runs: Sequence[RunFiles]) -> str:
    """Say which runs have equal stream settings and seeds but other data; empty if none have.

    Their tests may be equal: then nothing else tells that they were trained on other examples.
    Runs whose stream.json has no fingerprint of its data say nothing.
    """
    alike: dict[str, list[RunFiles]] = {}
    for run in runs:
        if run.stream.get("fingerprint"):
            asked = {key: value for key, value in run.config.items() if _decides_data(key)}
            alike.setdefault(json.dumps(asked, sort_keys=True, default=str), []).append(run)
    pairs = []
    for first, *others in alike.values():
        mark = first.stream["fingerprint"]
        pairs += [(first, run) for run in others if run.stream["fingerprint"] != mark][:1]
    if not pairs:
        return ""
    paths = [run.path.resolve() for run in pairs[0]]
    names = " and ".join(f"{path.parent.name}/{path.name}" for path in paths)
    more = f" (with other settings or seeds: {len(pairs) - 1} more)" if len(pairs) > 1 else ""
    return (
        f"runs {names} have the same stream settings and seeds, but other data: they changed in "
        f"between{more}. Run the older ones again with fresh=true."
    )


# ---------------------------------------------------------------- parts


def _decides_data(key: str) -> bool:
    return key.startswith("stream.") or key in ("seed.order", "seed.data")


def _digests(stream: Mapping[str, Any]) -> list[str | None]:
    return [task.get("test_digest") for task in stream.get("tasks", [])]


def _total(stream: Mapping[str, Any]) -> str | None:
    known = [digest for digest in _digests(stream) if digest]
    if not known or len(known) < len(stream["tasks"]):
        return None
    return f"{sum(int(digest, 16) for digest in known) % 2**64:016x}"


def _refusal(a: str | Path, b: str | Path, streams: Sequence[Mapping[str, Any]]) -> str:
    paths = [Path(folder).resolve() for folder in (a, b)]
    names = [f"{path.parent.name}/{path.name}" for path in paths]
    counts = [sum(task.get("test", 0) for task in stream.get("tasks", [])) for stream in streams]
    what = f"{counts[0]} and {counts[1]}"
    lists = [_digests(stream) for stream in streams]
    old = [name for name, found in zip(names, lists, strict=True) if None in found or not found]
    if not old and len(lists[0]) == len(lists[1]):
        other = [t + 1 for t, pair in enumerate(zip(*lists, strict=True)) if pair[0] != pair[1]]
        what += f"; tasks {', '.join(map(str, other[:8]))}{' ...' if len(other) > 8 else ''}"
    configs = [load_config(path) for path in paths]
    keys = {
        key: (configs[0].get(key), configs[1].get(key))
        for key in {**configs[0], **configs[1]}
        if _decides_data(key)
    }
    why = _keys_text({key: pair for key, pair in keys.items() if _differ(*pair)})
    if old:
        return (
            f"Runs {names[0]} and {names[1]} cannot be paired: an older version wrote "
            f"{' and '.join(old)} without digests of the test examples, and the fingerprints of "
            f"their streams differ. {why}\n  Run them again with fresh=true."
        )
    return (
        f"Runs {names[0]} and {names[1]} cannot be paired: they were tested on other examples "
        f"({what}). "
        + (why or "Their streams are configured alike, so the data have changed in between.")
        + "\n  Run both again on the same data, with the same keys under stream."
    )


def _keys_text(keys: Mapping[str, tuple[Any, Any]]) -> str:
    if not keys:
        return ""
    return f"They differ in {', '.join(f'{k} ({a} and {b})' for k, (a, b) in keys.items())}."


def _differ(a: Any, b: Any) -> bool:  # noqa: ANN401 (values of a configuration)
    return str(a) != str(b)
