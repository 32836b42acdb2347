"""What stands below a paper's table: what marks and intervals mean, and what tests can show."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import pandas as pd

from analysis.directions import direction, spoken
from analysis.listing import count, natural
from analysis.seeds import rank_columns
from analysis.statistics import MOST_EXACT, smallest_p
from cl_peft.errors import DataError, some

#: Configurations whose average rank is named.
MOST_RANKED = 10
#: Runs, or streams, that a note names.
NAMED = 3
#: The test of a column and what it speaks of, by what a pair is.
TESTS = {
    "seed": "paired permutation test over the seeds of one stream, so it speaks of seeds only",
    "stream": "Wilcoxon's signed-rank test over streams, a stream's mean over shared seeds each",
}


def notes_on(
    cells: pd.DataFrame,
    runs: pd.DataFrame,
    tests: pd.DataFrame,
    *,
    reference: str | None,
    interval: str,
    statistic: str,
    level: float,
    alpha: float,
    streams: int,
    unbalanced: bool,
) -> list[str]:
    """The notes, a sentence or two each.

    Args:
        cells: Of :class:`analysis.paper.PaperTable`.
        runs: One row per run.
        tests: Of all columns, as :func:`analysis.paired_tests` gives them, and ``metric``.
        reference: As in :func:`analysis.paper_table`, as are interval, statistic, level and alpha.
        interval: See there.
        statistic: See there.
        level: See there.
        alpha: See there.
        streams: How many have rows of their own.
        unbalanced: Whether a configuration has more runs of some of the streams that it is averaged
            over than of others.
    """
    counts = sorted({int(n) for n in cells["n"] if n})
    what = "Interquartile mean" if statistic == "iqm" else "Mean"
    notes = [f"{what} of {count(_range(counts), 'run')} each ({len(runs)} in all)."]
    if unbalanced:
        notes.append("Runs per stream differ, so a stream with more of them weighs more.")
    if interval != "none" and cells["low"].notna().any():
        shape = "± is half the width of the" if interval == "half" else "In brackets, the"
        notes.append(f"{shape} {100 * level:g} % bootstrap interval.")
    if (cells["rank"] > 0).any():
        within = " of each stream" if streams > 1 else ""
        notes.append(f"Bold: best{within}; underlined: second.")
    tested = tests[tests["n"].astype("float64") > 0]
    if len(tested):
        notes.append(_test_note(tested, reference, alpha))
    return notes


def unmarked_note(streams: Sequence[str], metrics: Sequence[str]) -> list[str]:
    """Where nothing is bold or underlined although there is a best, and why.

    Args:
        streams: Those whose rows were tested on other examples; "" where all rows are one group.
        metrics: The columns of the table.
    """
    if not streams or not any(map(direction, metrics)):
        return []
    where = f" of {some(streams, NAMED)}" if all(streams) else ""
    return [
        f"No best or second{where}: the rows were not all tested on the same examples, or it is "
        "unknown on which."
    ]


def left_out_note(runs: pd.DataFrame) -> list[str]:
    """Which runs the tests left out, if any."""
    if runs.empty:
        return []
    names = [f"{group}/{run}" for group, run in zip(runs["group"], runs["run"], strict=True)]
    return [
        f"Tests leave out {count(len(names), 'run')} not known to be tested on the same examples "
        f"as most: {some(sorted(names, key=natural), NAMED)}."
    ]


def ranks_note(scores: pd.DataFrame, metric: str, way: int) -> str:
    """Average ranks over streams, in a sentence.

    Args:
        scores: From :func:`analysis.score_table`, of several streams.
        metric: Whose scores they are.
        way: Its direction, 1 or -1.
    """
    name = spoken(metric)
    try:
        found = rank_columns(scores.dropna(axis=1, how="all"), way > 0)
    except DataError as error:
        return f"No ranks of {name} over streams: {error}"
    ranks = [f"{label} {rank:.2f}" for label, rank in found.ranks.items()]
    return (
        f"Average rank of {name} over {found.n} streams, means over shared seeds ranked within "
        f"each (Demšar 2006): {some(ranks, MOST_RANKED)}; Friedman p {found.p:.2g}, "
        f"the smallest they can give is {found.smallest_p:.2g}."
    )


def pairs_needed(alpha: float, family: int) -> int:
    """The fewest pairs whose smallest p, times ``family`` (Holm's first step), is below alpha."""
    few = max(1, math.ceil(1 + math.log2(family / alpha)))
    return few if few > MOST_EXACT or smallest_p(few) * family < alpha else few + 1


def _test_note(tested: pd.DataFrame, reference: str | None, alpha: float) -> str:
    smallest = float(tested["smallest_p"].min())
    family = int(tested.groupby("metric").size().min())
    against = reference or "the best"
    pairs = _range(sorted(set(tested["n"].astype(int))))
    comparisons = count(family, "comparison")
    least = f"the smallest p that {count(pairs, 'pair')} can give is {smallest:.2g}"
    corrected = min(1.0, smallest * family)
    if corrected >= alpha:
        least += (
            f", {corrected:.2g} after correction, so nothing here can be significant: that takes "
            + count(pairs_needed(alpha, family), "pair")
        )
        warnings.warn(f"too few runs: {least}", stacklevel=4)
    return (
        f"†: differs from {against} ({TESTS[tested['unit'].iloc[0]]}; Holm over {comparisons}, "
        f"{alpha:g}). {least[0].upper()}{least[1:]}."
    )


def _range(counts: Sequence[int]) -> str:
    if not counts:
        return "0"
    return str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
