"""Figures of many configurations: stability, cost, overview of a sweep, critical differences."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from analysis.directions import direction, required_direction, spoken
from analysis.figures_style import (
    COLOURS,
    FAINT,
    GREY,
    INK,
    SMALL,
    TEXT,
    figure_of,
    legend_beside,
    legend_width,
    look,
    new_axes,
    new_figure,
    percent_ticks,
    style_axes,
)
from analysis.ranks import CriticalDifference
from analysis.seeds import final_numbers, intervals
from analysis.tables import configuration_columns, configuration_labels

#: Inches that a letter of the SMALL size takes, on average.
LETTER = 0.065


def stability_plasticity(
    frame: pd.DataFrame, *, by: Sequence[str] | None = None, ax: Axes | None = None
) -> Axes:
    """Draw how well new tasks are learned against what old ones keep.

    Right: plasticity, the accuracy on each task when it was new (learning accuracy). Up: stability,
    the backward transfer divided by T. Their sum is the final average accuracy exactly,
    ``A_T = LA + BWT_T``, so each diagonal is one final accuracy. Filled marks are routed, hollow
    ones the oracle's; the line between them is what routing does. Small marks are single runs.

    Args:
        frame: From :func:`analysis.load_runs`; finished runs are drawn.
        by: Columns that tell configurations apart; None is all but run, state and seeds.
        ax: Where to draw; None is a new figure.

    Raises:
        DataError: No finished run.
    """
    names = [
        f"{name}_{r}"
        for r in ("oracle", "routed")
        for name in ("learning_accuracy", "backward_transfer_t")
    ]
    runs = final_numbers(frame, names).dropna(subset=names)
    keys = list(by) if by is not None else configuration_columns(frame)
    runs = runs.assign(label=configuration_labels(runs, keys))
    drawn = new_axes(ax, 5.2 + legend_width(runs["label"]), 4.6)
    handles = []
    for k, (label, part) in enumerate(runs.groupby("label", sort=False)):
        colour, marker = look(k)
        centres = []
        for routing, face in (("oracle", "white"), ("routed", colour)):
            x = part[f"learning_accuracy_{routing}"].to_numpy()
            y = part[f"backward_transfer_t_{routing}"].to_numpy()
            if len(part) > 1:
                drawn.plot(
                    x, y, linestyle="", marker=marker, markersize=3, color=colour, alpha=0.35
                )
            centres.append((x.mean(), y.mean(), face))
        drawn.plot(*zip(*[c[:2] for c in centres], strict=True), color=colour, linewidth=1.0)
        for x0, y0, face in centres:
            drawn.plot(x0, y0, marker=marker, markersize=8, color=colour, markerfacecolor=face)
        name = str(label) or "all runs"
        handles.append(_mark(colour, marker, name))
    handles += [_mark(GREY, "o", "oracle", face="white"), _mark(GREY, "o", "routed")]
    style_axes(
        drawn,
        "plasticity: accuracy on new tasks (%)",
        "stability: change of old tasks, BWT / T (points)",
        grid="",
    )
    drawn.axhline(0, color=INK, linewidth=0.8, zorder=0)
    _accuracy_diagonals(drawn)
    percent_ticks(drawn)
    percent_ticks(drawn, "x")
    legend_beside(drawn, handles)
    return drawn


def accuracy_against_parameters(
    frame: pd.DataFrame,
    *,
    metric: str = "average_accuracy_routed",
    by: Sequence[str] | None = None,
) -> tuple[Axes, Axes]:
    """Draw final accuracy against what is trained per task and what is stored in the end.

    Left: parameters trained for one task (module and head). Right: all modules and heads kept, plus
    the router's state in units of 4 bytes. Means over seeds with their 95 % bootstrap interval; the
    stepped line is the best accuracy that so many parameters have bought.

    Args:
        frame: From :func:`analysis.load_runs`; finished runs are drawn.
        metric: A column of :func:`analysis.summary`.
        by: Columns that tell configurations apart; None is all but run, state and seeds.

    Returns:
        The axes of both panels.

    Raises:
        DataError: No finished run, an unknown metric or one without a direction, or runs that
            differ in more than their seeds.
    """
    way = required_direction(metric)
    keys = list(by) if by is not None else configuration_columns(frame)
    columns = [metric, "trainable_parameters", "stored_parameters", "router_parameters"]
    table = intervals(frame, metric=columns, by=keys)
    size = table.assign(position=_position(table, keys))
    size = size.pivot(index="position", columns="metric", values="estimate")
    first = table[table["metric"] == metric].reset_index(drop=True)
    labels = configuration_labels(first, keys)
    figure = new_figure(7.2 + legend_width(labels), 4.0)
    axes = figure.subplots(1, 2, sharey=True)
    stored = size["stored_parameters"] + size["router_parameters"]
    panels = (
        (size["trainable_parameters"], "parameters trained per task"),
        (stored, "parameters stored, with the router"),
    )
    for ax, (sizes, name) in zip(axes, panels, strict=True):
        log = bool((sizes > 0).all()) and sizes.max() / sizes.min() > 20
        for k, (_, cell) in enumerate(first.iterrows()):
            low, high = cell["low"], cell["high"]
            error = None
            if not np.isnan(low):
                error = [[max(0, cell["estimate"] - low)], [max(0, high - cell["estimate"])]]
            ax.errorbar(
                sizes.iloc[k], cell["estimate"], yerr=error, capsize=3, linewidth=1.1, markersize=7,
                color=look(k)[0], marker=look(k)[1],
            )  # fmt: skip
        _frontier(ax, sizes.to_numpy(), first["estimate"].to_numpy(), way < 0)
        style_axes(ax, name, f"{spoken(metric)} (%)" if ax is axes[0] else "")
        percent_ticks(ax)
        if log:
            ax.set_xscale("log")
            ax.tick_params(which="minor", color=FAINT, labelbottom=False)
        ax.xaxis.set_major_formatter(lambda value, _: _short_count(value))
        ax.margins(x=0.15)
    handles = [_mark(*look(k), str(label) or "all runs") for k, label in enumerate(labels)]
    figure.legend(
        handles=handles, loc="outside right upper", frameon=False, fontsize=SMALL, labelcolor=INK
    )
    return axes[0], axes[1]


def sweep_overview(
    frame: pd.DataFrame,
    *,
    metric: str = "average_accuracy_routed",
    by: Sequence[str] | None = None,
    most: int = 40,
    ax: Axes | None = None,
) -> Axes:
    """Draw every configuration of a sweep as one line of dots, best on top.

    A small dot per run, the mean as a mark, the 95 % bootstrap interval as a bar; the values of the
    keys that vary stand in columns beside it.

    Args:
        frame: From :func:`analysis.load_runs`, best with ``config="varying"``.
        metric: A column of :func:`analysis.summary`.
        by: Columns that tell configurations apart; None is all but run, state and seeds.
        most: Configurations to draw; the title says how many there are.
        ax: Where to draw; None is a new figure.

    Raises:
        DataError: No finished run, an unknown metric, or runs that differ in more than their seeds.
    """
    keys = list(by) if by is not None else configuration_columns(frame)
    table = intervals(frame, metric=[metric], by=keys)
    low_first = direction(metric) <= 0
    table = table.sort_values("estimate", ascending=low_first, kind="stable").reset_index(drop=True)
    total, table = len(table), table.head(most)
    shown = [key for key in keys if table[key].nunique(dropna=False) > 1]
    runs = final_numbers(frame, [metric])
    drawn = new_axes(ax, 5.2 + 0.95 * max(1, len(shown)), 1.3 + 0.24 * len(table))
    for y, (_, cell) in enumerate(table.iterrows()):
        same = np.ones(len(runs), dtype=bool)
        for key in keys:
            missing = runs[key].isna() & pd.isna(cell[key])
            same &= ((runs[key] == cell[key]).fillna(False) | missing).to_numpy(dtype=bool)
        values = runs.loc[same, metric].to_numpy()
        drawn.plot(values, np.full(len(values), y), linestyle="", marker="o", markersize=3.5,
                   color=COLOURS[5], markeredgecolor=COLOURS[0], markeredgewidth=0.5)  # fmt: skip
        if not np.isnan(cell["low"]):
            drawn.plot([cell["low"], cell["high"]], [y, y], color=INK, linewidth=1.4)
        drawn.plot(cell["estimate"], y, marker="|", markersize=11, markeredgewidth=2.2, color=INK)
    name = spoken(metric)
    style_axes(drawn, f"{name} (%)", "", grid="x")
    percent_ticks(drawn, "x")
    drawn.set_ylim(len(table) - 0.4, -0.6)
    _key_columns(drawn, table, shown)
    some = f"best {len(table)} of {total}" if total > len(table) else f"{total}"
    n = sorted(set(table["n"]))
    each = f"{n[0]}" if len(n) == 1 else f"{n[0]} to {n[-1]}"
    text = f"{some} configurations, {each} run{'s' if n[-1] != 1 else ''} each: "
    text += "dots: runs; mark: mean; line: 95 % interval" if n[-1] > 1 else "one dot each"
    figure = drawn.get_figure()
    if ax is None and figure is not None:
        figure.suptitle(text, fontsize=SMALL, color=GREY)
    else:
        drawn.set_title(text, fontsize=SMALL, color=GREY)
    return drawn


def critical_difference_diagram(
    result: CriticalDifference, *, title: str | None = None, ax: Axes | None = None
) -> Axes:
    """Draw average ranks on a line; bars join what the Nemenyi test does not tell apart.

    Args:
        result: From :func:`analysis.critical_difference` or :func:`analysis.rank_configurations`.
        title: Written above; None is the result's note.
        ax: Where to draw; None is a new figure.
    """
    ranks = result.ranks
    k = len(ranks)
    half = -(-k // 2)
    # room for the names on both sides, in inches, of which the rank line gets the rest
    room = 0.068 * (max(len(str(name)) for name in ranks.index) + 6) + 0.4
    drawn = new_axes(ax, 2 * room + 3.2, 1.7 + 0.26 * half + 0.16 * len(result.cliques))
    inches = 2 * room + 3.2 if ax is None else ax.get_window_extent().width / figure_of(ax).dpi
    drawn.set_axis_off()
    depth = 0.45 * len(result.cliques) + 0.7
    reach = (k - 1) * room / max(1.0, inches - 2 * room)
    drawn.set_xlim(1 - reach, k + reach)
    drawn.set_ylim(-(depth + 0.75 * half), 2.0)
    drawn.plot([1, k], [0, 0], color=INK, linewidth=1.2)
    for tick in range(1, k + 1):
        drawn.plot([tick, tick], [0, 0.15], color=INK, linewidth=1.0)
        drawn.text(tick, 0.3, str(tick), ha="center", va="bottom", fontsize=SMALL, color=INK)
    drawn.text(k + 0.06 * (k - 1), 0, "average rank", fontsize=SMALL, color=GREY, va="center")
    start = 1.0
    drawn.plot([start, start + result.cd], [1.35, 1.35], color=INK, linewidth=1.2)
    for end in (start, start + result.cd):
        drawn.plot([end, end], [1.25, 1.45], color=INK, linewidth=1.2)
    drawn.text(
        start + result.cd / 2, 1.5, f"CD {result.cd:.2f}", ha="center", va="bottom",
        fontsize=SMALL, color=INK,
    )  # fmt: skip
    for i, (name, rank) in enumerate(ranks.items()):
        left = i < half
        y = -(depth + 0.75 * (i if left else k - 1 - i))
        edge = 1 - 0.06 * (k - 1) if left else k + 0.06 * (k - 1)
        drawn.plot([rank, rank, edge], [0, y, y], color=GREY, linewidth=0.9)
        drawn.plot(rank, 0, marker="o", markersize=4, color=INK)
        text = f"{name}  {rank:.2f}" if left else f"{rank:.2f}  {name}"
        drawn.text(
            edge - 0.02 * (k - 1) if left else edge + 0.02 * (k - 1), y, text,
            ha="right" if left else "left", va="center", fontsize=TEXT, color=INK,
        )  # fmt: skip
    for level, clique in enumerate(result.cliques):
        y = -0.4 - 0.45 * level
        ends = ranks[clique[0]] - 0.02 * (k - 1), ranks[clique[-1]] + 0.02 * (k - 1)
        drawn.plot(ends, [y, y], color=INK, linewidth=3.5, solid_capstyle="butt")
    # as wide as the axes at most: beyond the figure's edge it would be cut off
    letters = max(20, int(inches / LETTER))
    lines = textwrap.wrap(title or result.note(), letters, break_on_hyphens=False)
    drawn.set_title("\n".join(lines), fontsize=SMALL, color=GREY)
    return drawn


# ---------------------------------------------------------------- parts


def _mark(colour: str, marker: str, label: str, face: str | None = None) -> Line2D:
    return Line2D(
        [], [], linestyle="", color=colour, marker=marker, markersize=6,
        markerfacecolor=face or colour, label=label,
    )  # fmt: skip


def _accuracy_diagonals(ax: Axes) -> None:
    """Faint lines of equal final accuracy, named where they leave the axes."""
    (x0, x1), (y0, y1) = ax.get_xlim(), ax.get_ylim()
    step = next(s for s in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5) if (x1 + y1 - x0 - y0) / s <= 8)
    named_at = -np.inf
    for total in np.arange(np.ceil((x0 + y0) / step), (x1 + y1) / step) * step:
        ax.plot([x0, x1], [total - x0, total - x1], color=FAINT, linewidth=0.9, zorder=0)
        x = min(x1, total - y0)
        inside = x > x0 + 0.16 * (x1 - x0) and total - x < y1 - 0.06 * (y1 - y0)
        if inside and (x == x1 or x > named_at + 0.18 * (x1 - x0)):
            named_at = x
            ax.annotate(
                f"{100 * total:.3g} % final", (x, total - x), xytext=(-3, 3),
                textcoords="offset points", ha="right", va="bottom", fontsize=7, color=GREY,
            )  # fmt: skip
    ax.set_xlim(x0, x1)
    ax.set_ylim(y0, y1)


def _position(table: pd.DataFrame, keys: Sequence[str]) -> pd.Series:
    """Number of the configuration of each row, in order of appearance."""
    codes: dict[Any, int] = {}
    rows = table[list(keys)].astype("object").where(table[list(keys)].notna(), None)
    return pd.Series(
        [codes.setdefault(row, len(codes)) for row in rows.itertuples(index=False, name=None)],
        index=table.index,
        name="position",
    )


def _frontier(ax: Axes, sizes: np.ndarray, scores: np.ndarray, lower: bool) -> None:
    order = np.lexsort((scores if lower else -scores, sizes))  # the best of equal sizes first
    known = order[~np.isnan(sizes[order]) & ~np.isnan(scores[order])]
    if len(known) < 2:
        return
    best = np.minimum.accumulate if lower else np.maximum.accumulate
    ax.step(
        sizes[known], best(scores[known]), where="post", color=GREY, linewidth=1.0,
        linestyle=(0, (1, 1.5)), zorder=0,
    )  # fmt: skip


def _short_count(value: float) -> str:
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:g}{unit}"
    return f"{value:g}"


def _key_columns(ax: Axes, table: pd.DataFrame, keys: Sequence[str]) -> None:
    """The varying keys' values as columns of text left of the axes, instead of tick labels."""
    if not keys:
        ax.set_yticks([])
        return
    ax.set_yticks(range(len(table)), [""] * len(table))
    ax.tick_params(axis="y", length=0)
    texts = {key: [_value(value) for value in table[key]] for key in keys}
    # characters to points: a column is as wide as its longest text
    x = -6.0
    for key in reversed(keys):
        head = key.split(".")[-1] if key.count(".") else key
        width = 5.2 * max(len(head), *map(len, texts[key])) + 10
        options: dict[str, Any] = {"textcoords": "offset points", "ha": "left", "va": "center"}
        ax.annotate(
            head, (0, 1), xytext=(x - width, 7), xycoords="axes fraction", fontsize=SMALL,
            color=GREY, **options,
        )  # fmt: skip
        for y, text in enumerate(texts[key]):
            ax.annotate(
                text, (0, y), xytext=(x - width, 0), xycoords=("axes fraction", "data"),
                fontsize=SMALL, color=INK, **options,
            )  # fmt: skip
        x -= width


def _value(value: object) -> str:
    if pd.isna(value):  # type: ignore[call-overload]
        return "–"
    return f"{value:g}" if isinstance(value, float) else str(value)
