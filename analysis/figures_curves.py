"""Figures of curves and bars: accuracy as tasks arrive, forgetting per task, abstention."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from analysis.directions import spoken
from analysis.figures_bounds import STYLE, draw_bound, known_bounds
from analysis.figures_style import (
    GREY,
    INK,
    LINE_STYLE,
    PAIR,
    SMALL,
    legend_beside,
    legend_width,
    look,
    new_axes,
    percent_ticks,
    style_axes,
)
from analysis.samples import abstention_curve
from analysis.statistics import bootstrap_interval
from analysis.tables import (
    configuration_columns,
    configuration_labels,
    describing_columns,
    forgetting_per_task,
    refuse_hidden_differences,
)
from cl_peft.errors import DataError


def anytime_curve(
    frame: pd.DataFrame,
    *,
    metric: str = "average_accuracy",
    by: Sequence[str] | None = None,
    band: str = "interval",
    upper: str | None = None,
    lower: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw a metric over all tasks seen against the number of tasks learned.

    One colour and marker per configuration, the mean over its seeds; routed solid, oracle dashed.

    Args:
        frame: From :func:`analysis.load_runs`.
        metric: A metric stored per after_task for both routings.
        by: Columns that tell configurations apart; None is every describing column but the run,
            its state and its seeds.
        band: "interval" shades the 95 % bootstrap interval over seeds, "std" one standard deviation
            each side, "none" nothing.
        upper: A learner drawn as a bound in grey (such as "joint"), a line per configuration. One
            that was evaluated only after the last task is a horizontal line.
        lower: Another, such as "sequential" or "frozen".
        ax: Where to draw; None is a new figure.

    Warns:
        Incomplete: A bound has no run, or none for some of the others' settings and seeds; what
            there is is drawn.

    Raises:
        DataError: The frame has no such rows; or runs that differ in more than their seeds would be
            averaged.
    """
    if band not in ("interval", "std", "none"):
        raise DataError(f'band is {band!r}; allowed: "interval", "std", "none"')
    rows = frame[
        (frame["metric"] == metric)
        & frame["eval_task"].isna()
        & frame["routing"].isin(list(LINE_STYLE))
        & frame["value"].notna()
    ]
    if rows.empty:
        raise DataError(f"No run has {metric!r} over all tasks, oracle or routed.")
    bounds = known_bounds(rows, {"upper": upper, "lower": lower})
    keys = list(by) if by is not None else configuration_columns(frame)
    main = rows[~rows["learner"].isin(list(bounds.values()))]
    refuse_hidden_differences(
        main[describing_columns(frame)].drop_duplicates(["group", "run"]), keys
    )
    points = _over_seeds(main, keys, band)
    points["label"] = configuration_labels(points, keys)
    labels = list(dict.fromkeys(points["label"]))

    named = [*labels, "oracle routing", *(f"{name} (upper bound)" for name in bounds.values())]
    drawn = new_axes(ax, 5.0 + legend_width(named), 4.0)
    last = int(rows["after_task"].max())
    for kind, name in bounds.items():
        compared = rows["learner"].eq(name) | ~rows["learner"].isin(list(bounds.values()))
        part = rows[compared & rows["routing"].eq("routed")]
        draw_bound(drawn, part, kind, name, keys, last)
    for k, (_, curve) in enumerate(points.groupby("label", sort=False)):
        for routing, line in curve.groupby("routing"):
            _curve(drawn, line.sort_values("after_task"), str(routing), k)
    shown = main if len(main) else rows
    seeds = sorted(set(shown.groupby([*keys, "routing", "after_task"], dropna=False).size()))
    style_axes(drawn, "tasks learned", f"{spoken(metric)} over tasks seen (%)")
    percent_ticks(drawn)
    drawn.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    if seeds[-1] > 1 and band != "none":
        count = str(seeds[-1]) if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
        what = "95 % bootstrap interval" if band == "interval" else "± one standard deviation"
        drawn.set_title(f"mean and {what} of {count} runs", fontsize=SMALL, color=GREY)
    legend_beside(drawn, _anytime_legend(labels, bounds))
    return drawn


def forgetting_bars(
    frame: pd.DataFrame, *, title: str | None = None, ax: Axes | None = None
) -> Axes:
    """Draw what each task lost by the end, split into module drift and routing drift.

    Stacked bars of the mean over seeds (negative parts below zero); the mark is the sum, the routed
    forgetting of the task, with its 95 % bootstrap interval over seeds.

    Args:
        frame: From :func:`analysis.load_runs`: finished runs of one configuration.
        title: Written above; None says how many runs.
        ax: Where to draw; None is a new figure.

    Raises:
        DataError: Runs of several configurations, or none with two tasks.
    """
    about = frame[describing_columns(frame)].drop_duplicates(["group", "run"])
    keys = configuration_columns(frame)
    if len(about[keys].drop_duplicates()) > 1:
        differs = [key for key in keys if about[key].nunique(dropna=False) > 1]
        raise DataError(
            f"Forgetting per task is of one configuration; these runs differ in "
            f"{', '.join(differs)}. Select one, and draw others with ax=."
        )
    refuse_hidden_differences(about, keys)
    runs = frame[frame["state"] == "finished"].groupby(["group", "run"], sort=False)
    tables = [forgetting_per_task(run) for _, run in runs]
    if not tables or not len(tables[0]):
        raise DataError("No finished run has two tasks, so nothing can have been forgotten.")
    stacked = np.stack([table.to_numpy() for table in tables])  # runs, tasks, causes
    tasks, mean = tables[0].index.to_numpy(), stacked.mean(axis=0)
    drawn = new_axes(ax, max(5.4, 2.2 + 0.5 * len(tasks)), 3.6)
    above, below = np.zeros(len(tasks)), np.zeros(len(tasks))
    for k, (colour, hatch) in enumerate(PAIR):
        height = mean[:, k]
        start = np.where(height >= 0, above, below)
        drawn.bar(
            tasks, height, 0.66, bottom=start, color=colour, hatch=hatch,
            edgecolor=INK, linewidth=0.6,
        )  # fmt: skip
        above, below = above + np.maximum(height, 0), below + np.minimum(height, 0)
    ends = [bootstrap_interval(stacked[:, i, 2]) for i in range(len(tasks))]
    centre = np.array([end.estimate for end in ends])
    whiskers = np.array([[e.estimate - e.low, e.high - e.estimate] for e in ends]).T
    drawn.errorbar(
        tasks, centre, yerr=None if np.isnan(whiskers).any() else np.maximum(whiskers, 0),
        fmt="D", color=INK, markersize=4.5, markerfacecolor="white", capsize=3, linewidth=1.1,
    )  # fmt: skip
    drawn.axhline(0, color=INK, linewidth=0.8)
    runs_text = "1 run" if len(tables) == 1 else f"mean of {len(tables)} runs, 95 % interval"
    style_axes(drawn, "task", "forgotten by the end (points)", title=title or runs_text)
    percent_ticks(drawn)
    drawn.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    names = ("module drift", "routing drift")
    legend_beside(
        drawn,
        [
            *(
                Patch(facecolor=colour, hatch=hatch, edgecolor=INK, linewidth=0.6, label=name)
                for (colour, hatch), name in zip(PAIR, names, strict=True)
            ),
            Line2D([], [], color=INK, marker="D", markerfacecolor="white", markersize=4.5,
                   linestyle="", label="sum: routed forgetting"),
        ],
    )  # fmt: skip
    return drawn


def routing_margins(
    predictions: pd.DataFrame,
    *,
    score: str = "margin",
    after_task: int | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw how sure the router was where it was right, and where it was wrong.

    Two histograms over common bins, each as a share of its own samples, so that few mistakes are
    seen next to many right routes.

    Args:
        predictions: From :func:`analysis.load_predictions`.
        score: "margin" or "confidence".
        after_task: 1-based; None is the latest task.
        ax: Where to draw; None is a new figure.

    Raises:
        DataError: No sample has that score.
    """
    at = predictions["after_task"].max() if after_task is None else after_task
    rows = predictions[(predictions["after_task"] == at) & predictions[score].notna()]
    rows = rows[rows["routed_task"] > 0]
    if rows.empty:
        raise DataError(f"No sample has a {score}: without a router there is none.")
    values = rows[score].to_numpy(dtype=np.float64)
    right = (rows["routed_task"] == rows["eval_task"]).to_numpy()
    drawn = new_axes(ax, 6.6, 3.4)
    spread = values.max() - values.min()
    bins = np.linspace(values.min(), values.min() + (spread or 1.0), 31)
    handles = []
    styles = (("routed right", right, PAIR[0]), ("misrouted", ~right, PAIR[1]))
    for name, chosen, (colour, hatch) in styles:
        if not chosen.any():
            continue
        counts, _ = np.histogram(values[chosen], bins)
        heights = counts / chosen.sum()
        options: dict[str, Any] = {
            "facecolor": colour,
            "hatch": hatch,
            "edgecolor": INK,
            "linewidth": 0.8,
        }
        drawn.stairs(heights, bins, fill=True, alpha=0.75, **options)
        drawn.stairs(heights, bins, color=INK, linewidth=0.8)
        label = f"{name}: {int(chosen.sum()):,}, median {np.median(values[chosen]):.3g}"
        handles.append(Patch(alpha=0.75, label=label, **options))
    style_axes(drawn, f"{score} of the {'router' if score == 'margin' else 'head'}", "share (%)")
    percent_ticks(drawn)
    drawn.set_ylim(bottom=0)
    legend_beside(drawn, handles)
    return drawn


def abstention(
    predictions: pd.DataFrame | Mapping[str, pd.DataFrame],
    *,
    score: str = "margin",
    after_task: int | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw accuracy on the samples answered against the share handed on, least certain first.

    A curve that rises says that the score knows where the model errs. The dotted line is the best
    that any score could do: handing on the wrong answers first.

    Args:
        predictions: From :func:`analysis.load_predictions`, or several by name.
        score: "margin" or "confidence".
        after_task: 1-based; None is the latest task.
        ax: Where to draw; None is a new figure.

    Raises:
        DataError: The samples have no such score.
    """
    several = predictions if isinstance(predictions, Mapping) else {"": predictions}
    drawn = new_axes(ax, 4.8 + legend_width([*several, "best possible ranking"]), 3.8)
    handles = []
    for k, (name, rows) in enumerate(several.items()):
        curve = abstention_curve(rows, score=score, after_task=after_task)
        colour, marker = look(k)
        handed_on, accuracy = 1 - curve["coverage"].to_numpy(), curve["accuracy"].to_numpy()
        # where few are answered, single samples make the curve jump
        total = int(curve["answered"].iloc[-1])
        shown = curve["answered"].to_numpy() >= min(30, total / 10)
        handed_on, accuracy = handed_on[shown], accuracy[shown]
        marks = [int(np.argmin(np.abs(handed_on - x))) for x in np.arange(0, 0.95, 0.1)]
        drawn.plot(
            handed_on, accuracy, color=colour, linewidth=1.7,
            marker=marker, markersize=4.5, markevery=sorted(set(marks)),
        )  # fmt: skip
        final = float(curve["accuracy"].iloc[-1])
        x = np.linspace(0, 0.98, 99)
        best = np.minimum(1.0, final / (1 - x))
        drawn.plot(x, best, color=colour, linewidth=1.0, linestyle=(0, (1, 1.5)))
        label = name or "routed accuracy"
        handles.append(Line2D([], [], color=colour, marker=marker, markersize=4.5, label=label))
    handles.append(
        Line2D([], [], color=GREY, linestyle=(0, (1, 1.5)), label="best possible ranking")
    )
    style_axes(
        drawn,
        f"samples handed on, lowest {score} first (%)",
        "accuracy on the rest (%)",
        title=None,
    )
    percent_ticks(drawn)
    percent_ticks(drawn, "x")
    drawn.set_xlim(0, 1)
    legend_beside(drawn, handles)
    return drawn


# ---------------------------------------------------------------- parts


def _over_seeds(rows: pd.DataFrame, keys: Sequence[str], band: str) -> pd.DataFrame:
    found = []
    groups = [*keys, "routing", "after_task"]
    for values, part in rows.groupby(groups, sort=False, dropna=False)["value"]:
        mean, low, high = part.mean(), np.nan, np.nan
        if band == "interval" and part.nunique() > 1:
            interval = bootstrap_interval(part.to_numpy(), resamples=2000)
            low, high = interval.low, interval.high
        elif band == "std" and part.nunique() > 1:
            # no accuracy lies above 1
            low, high = mean - part.std(), min(mean + part.std(), max(mean, 1.0))
        found.append((*values, mean, low, high))
    return pd.DataFrame(found, columns=[*groups, "mean", "low", "high"])


def _curve(ax: Axes, line: pd.DataFrame, routing: str, k: int) -> None:
    colour, marker = look(k)
    x, mean = line["after_task"].to_numpy(), line["mean"].to_numpy()
    if line["low"].notna().any():
        low = line["low"].fillna(line["mean"]).to_numpy()
        high = line["high"].fillna(line["mean"]).to_numpy()
        ax.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
    ax.plot(
        x,
        mean,
        linestyle=LINE_STYLE[routing],
        color=colour,
        marker=marker,
        markersize=4.5,
        markerfacecolor=colour if routing == "routed" else "white",
        linewidth=1.7,
    )


def _anytime_legend(labels: Sequence[str], bounds: Mapping[str, str]) -> Iterator[Line2D]:
    for k, label in enumerate(labels):
        if label:
            colour, marker = look(k)
            yield Line2D([], [], color=colour, marker=marker, markersize=4.5, label=label)
    for kind, name in bounds.items():
        text = f"{name} ({kind} bound)"
        yield Line2D([], [], color=GREY, linestyle=STYLE[kind], linewidth=1.6, label=text)
    for routing, face in (("oracle", "white"), ("routed", GREY)):
        yield Line2D(
            [],
            [],
            color=GREY,
            linestyle=LINE_STYLE[routing],
            marker="o",
            markersize=4.5,
            markerfacecolor=face,
            label=f"{routing} routing" if routing == "oracle" else routing,
        )
