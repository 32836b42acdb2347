"""Bounds under a curve: lines of learners that others are measured against, as far as there are."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from analysis.figures_style import GREY, SMALL, Incomplete
from analysis.load import SEED_COLUMNS
from analysis.tables import configuration_labels
from cl_peft.errors import some

STYLE = {"upper": (0, (1, 1)), "lower": (0, (6, 2, 1, 2))}
#: Runs without a bound that a warning names.
MOST_NAMED = 4


def known_bounds(rows: pd.DataFrame, bounds: Mapping[str, str | None]) -> dict[str, str]:
    """Those of ``bounds`` (kind -> learner) that some run gives; a warning names the others."""
    learners = set(rows["learner"])
    known = {kind: name for kind, name in bounds.items() if name is not None and name in learners}
    for kind, name in bounds.items():
        if name is not None and kind not in known:
            found = ", ".join(sorted(rows["learner"].unique()))
            _warn(f"no {kind} bound: no run of learner {name!r} is among them (there are: {found})")
    return known


def draw_bound(
    ax: Axes, rows: pd.DataFrame, kind: str, learner: str, keys: Sequence[str], last: int
) -> None:
    """Draw a line per configuration of a bound's learner, named where there are several.

    Over the runs of a line, the mean after each task that all of them were evaluated after; only
    finished runs, where there are any. Evaluated only in the end, it is a level.

    Args:
        ax: Where to draw.
        rows: Routed values of one metric of all runs, the bound's and the others'.
        kind: "upper" or "lower".
        learner: The bound's.
        keys: Columns that tell configurations apart.
        last: Tasks learned where the axes end.

    Warns:
        Incomplete: Runs of others have no run of the bound with their settings and seeds.
    """
    mine = rows[rows["learner"] == learner]
    finished = mine["state"] == "finished"
    mine = mine[finished] if finished.any() else mine
    others = rows[rows["learner"] != learner]
    _warn_of_gaps(others, mine, f"{kind} bound ({learner})", keys)
    about = mine.drop_duplicates(list(keys)) if keys else mine.head(1)
    labels = configuration_labels(about, keys).tolist()
    style: dict[str, Any] = {"color": GREY, "linestyle": STYLE[kind], "linewidth": 1.6}
    lines = mine.groupby(list(keys), sort=False, dropna=False) if keys else [((), mine)]
    for label, (_, line) in zip(labels, lines, strict=True):
        runs = len(line[["group", "run"]].drop_duplicates())
        values = line.groupby("after_task")["value"]
        mean = values.mean()[values.size() == runs]
        if mean.empty:
            _warn(f"no line of the {kind} bound ({learner}) for {label or 'its runs'}: they were "
                  "evaluated after different tasks")  # fmt: skip
            continue
        x, y = mean.index.to_numpy(), mean.to_numpy()
        if len(mean) == 1 and finished.any():
            x, y = np.array([1, last]), np.repeat(y, 2)
        ax.plot(x, y, marker="." if len(x) == 1 else "", **style)
        if label:
            ax.annotate(
                label, (x[-1], y[-1]), xytext=(0, 3), textcoords="offset points", ha="right",
                va="bottom", fontsize=SMALL, color=GREY,
            )  # fmt: skip


def _warn_of_gaps(
    others: pd.DataFrame, bound: pd.DataFrame, name: str, keys: Sequence[str]
) -> None:
    """Say which other runs the bound has no run for, with the same settings and seeds."""
    # what a bound's learner has not: a router, perhaps a module
    apart = ["learner", "router", *(["module"] if set(bound["module"]) == {"none"} else [])]
    shared = [key for key in keys if key.split(".")[0] not in apart]
    on = [*shared, *SEED_COLUMNS]
    wanted = others[on].drop_duplicates().astype("str")
    known = set(bound[on].astype("str").itertuples(index=False, name=None))
    gaps = wanted[[row not in known for row in wanted.itertuples(index=False, name=None)]]
    if gaps.empty:
        return
    names = configuration_labels(wanted, shared).loc[gaps.index]
    seeds = gaps[list(SEED_COLUMNS)].agg(".".join, axis=1)
    said = [f"{label} seeds {seed}".strip() for label, seed in zip(names, seeds, strict=True)]
    _warn(
        f"the {name} lacks runs for {len(gaps)} of {len(wanted)} settings and seeds of the others: "
        f"{some(said, MOST_NAMED, '; ')}"
    )


def _warn(text: str) -> None:
    warnings.warn(Incomplete(text), stacklevel=4)
