"""Figures. Each function returns a :class:`matplotlib.figure.Figure`; nothing global is touched.

No pyplot: figures are drawn on their own Agg canvas, with every style set on the figure itself, so
they are safe in threads, in a tracker and on machines without a display. Colours are safe for
colour-blind readers, and what a colour says is also said by lightness, marker or line style.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike

from analysis.tables import configuration_columns, describing_columns, refuse_hidden_differences
from cl_peft.errors import DataError

#: Okabe and Ito's palette, dark enough for lines on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#333333")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
INK = "#222222"
FAINT = "#DDDDDD"
LINE_STYLE = {"routed": "-", "oracle": (0, (4, 2))}
#: Beyond this many tasks, numbers in the cells would be too small to read.
MOST_ANNOTATED = 20


def accuracy_matrices(
    oracle: ArrayLike | pd.DataFrame,
    routed: ArrayLike | pd.DataFrame,
    *,
    title: str | None = None,
    limits: tuple[float, float] = (0.0, 1.0),
) -> Figure:
    """Draw both accuracy matrices of a run side by side, with one colour scale.

    Cells are annotated in percent; cells that do not exist stay blank.

    Args:
        oracle: ``(T, T)`` accuracies under the true task's module.
        routed: ``(T, T)`` accuracies under the router's choice.
        title: Written above both, such as the run's name.
        limits: Ends of the colour scale; the whole range by default, so that figures compare.

    Raises:
        DataError: The matrices are not square or differ in shape.
    """
    panels = [np.asarray(oracle, dtype=np.float64), np.asarray(routed, dtype=np.float64)]
    shape = panels[0].shape
    if len(shape) != 2 or shape[0] != shape[1] or shape != panels[1].shape:
        raise DataError(
            f"Accuracy matrices must both be (T, T); oracle is {shape}, routed {panels[1].shape}."
        )
    side = float(np.clip(0.32 * shape[0] + 0.9, 2.8, 7.5))
    figure = _figure(2 * side + 1.6, side + (1.1 if title else 0.8))
    axes = figure.subplots(1, 2, sharey=True)
    for ax, matrix, name in zip(axes, panels, ("Oracle routing", "Routed"), strict=True):
        image = _heatmap(ax, matrix, limits)
        final = matrix[-1].mean()
        ax.set_title(
            name if np.isnan(final) else f"{name}: {100 * final:.1f} % on average at the end",
            fontsize=10,
            color=INK,
        )
        ax.set_xlabel("accuracy on task", fontsize=9, color=INK)
    axes[0].set_ylabel("after learning task", fontsize=9, color=INK)
    bar = figure.colorbar(image, ax=axes, fraction=0.05, pad=0.02, aspect=25)
    bar.set_label("accuracy (%)", fontsize=9, color=INK)
    bar.ax.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f}")
    bar.ax.tick_params(labelsize=8, length=2, color=INK)
    bar.outline.set_visible(False)
    if title:
        figure.suptitle(title, fontsize=11, color=INK)
    return figure


def anytime_curve(
    frame: pd.DataFrame,
    *,
    metric: str = "average_accuracy",
    by: Sequence[str] | None = None,
) -> Figure:
    """Draw a metric over all tasks seen against the number of tasks learned.

    One colour and marker per configuration, the mean over its seeds; routed solid, oracle dashed;
    the band is one standard deviation over seeds each side.

    Args:
        frame: From :func:`analysis.load_runs`.
        metric: A metric stored per after_task for both routings.
        by: Columns that tell configurations apart; None is every describing column but the run,
            its state and its seeds.

    Raises:
        DataError: The frame has no such rows; or runs that differ in more than their seeds would be
            averaged.
    """
    rows = frame[
        (frame["metric"] == metric)
        & frame["eval_task"].isna()
        & frame["routing"].isin(list(LINE_STYLE))
        & frame["value"].notna()
    ]
    if rows.empty:
        raise DataError(f"No run has {metric!r} over all tasks, oracle or routed.")
    keys = list(by) if by is not None else configuration_columns(frame)
    runs = rows[describing_columns(frame)].drop_duplicates(["group", "run"])
    refuse_hidden_differences(runs, keys)
    groups = rows.groupby([*keys, "routing", "after_task"], sort=False, dropna=False)["value"]
    points = groups.agg(["mean", "std", "count"]).reset_index()
    points["label"] = _labels(points, keys)
    labels = list(dict.fromkeys(points["label"]))

    figure = _figure(6.4 if len(labels) == 1 else 8.4, 4.0)
    ax = figure.subplots()
    for k, (_, curve) in enumerate(points.groupby("label", sort=False)):
        for routing, line in curve.groupby("routing"):
            _curve(ax, line.sort_values("after_task"), str(routing), k)
    seeds = sorted(set(points["count"]))
    _frame_axes(ax, metric, seeds)
    figure.legend(
        handles=list(_legend(labels)),
        loc="outside right upper",
        frameon=False,
        fontsize=9,
        labelcolor=INK,
        handlelength=2.6,
    )
    return figure


def png(figure: Figure, dpi: int = 150) -> bytes:
    """Render a figure as PNG; equal figures give equal bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
    return buffer.getvalue()


# ---------------------------------------------------------------- parts


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _heatmap(ax: Axes, matrix: np.ndarray, limits: tuple[float, float]) -> Any:  # noqa: ANN401
    n_tasks = len(matrix)
    image = ax.imshow(
        np.ma.masked_invalid(matrix), cmap="cividis", vmin=limits[0], vmax=limits[1], aspect="equal"
    )
    if n_tasks <= MOST_ANNOTATED:
        for (t, i), value in np.ndenumerate(matrix):
            if not np.isnan(value):
                red, green, blue, _ = image.cmap(image.norm(value))
                light = 0.2126 * red + 0.7152 * green + 0.0722 * blue
                ax.text(
                    i,
                    t,
                    f"{100 * value:.1f}" if n_tasks <= 8 else f"{100 * value:.0f}",
                    ha="center",
                    va="center",
                    fontsize=8 if n_tasks <= 12 else 7,
                    color="white" if light < 0.5 else "black",
                )
    step = max(1, -(-n_tasks // MOST_ANNOTATED))
    ticks = np.arange(0, n_tasks, step)
    ax.set_xticks(ticks, ticks + 1)
    ax.set_yticks(ticks, ticks + 1)
    ax.tick_params(labelsize=8, length=0, colors=INK, labelleft=True)
    # white seams keep neighbours of equal colour apart
    ax.set_xticks(np.arange(n_tasks + 1) - 0.5, minor=True)
    ax.set_yticks(np.arange(n_tasks + 1) - 0.5, minor=True)
    ax.grid(which="minor", color="white", linewidth=1.0 if n_tasks <= MOST_ANNOTATED else 0.3)
    ax.tick_params(which="minor", length=0)
    for spine in ax.spines.values():
        spine.set_visible(False)
    return image


def _curve(ax: Axes, line: pd.DataFrame, routing: str, k: int) -> None:
    colour, marker = COLOURS[k % len(COLOURS)], MARKERS[k % len(MARKERS)]
    x, mean = line["after_task"].to_numpy(), line["mean"].to_numpy()
    spread = line["std"].fillna(0.0).to_numpy()
    if spread.any():
        top = np.minimum(mean + spread, np.maximum(mean, 1.0))  # no accuracy lies above 1
        ax.fill_between(x, mean - spread, top, color=colour, alpha=0.15, linewidth=0)
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


def _frame_axes(ax: Axes, metric: str, seeds: list[int]) -> None:
    ax.set_xlabel("tasks learned", fontsize=10, color=INK)
    ax.set_ylabel(f"{metric.replace('_', ' ')} over tasks seen", fontsize=10, color=INK)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    ax.tick_params(labelsize=9, length=3, color=FAINT, labelcolor=INK)
    ax.grid(axis="y", color=FAINT, linewidth=0.8)
    ax.set_axisbelow(True)
    for side, spine in ax.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(FAINT)
    if seeds[-1] > 1:
        count = str(seeds[-1]) if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
        ax.set_title(f"mean ± one standard deviation of {count} runs", fontsize=9, color="#666666")


def _labels(points: pd.DataFrame, keys: Sequence[str]) -> pd.Series:
    """Name each configuration by what varies between them; a single one needs no name."""
    varying = [key for key in keys if points[key].nunique(dropna=False) > 1]
    parts = [
        points[key].map(lambda value, key=key: f"{key} {value}" if "." in key else str(value))
        for key in varying
    ]
    if not parts:
        return pd.Series("", index=points.index)
    return pd.concat(parts, axis=1).agg(", ".join, axis=1)


def _legend(labels: Sequence[str]) -> Iterator[Line2D]:
    for k, label in enumerate(labels):
        if label:
            colour, marker = COLOURS[k % len(COLOURS)], MARKERS[k % len(MARKERS)]
            yield Line2D([], [], color=colour, marker=marker, markersize=4.5, label=label)
    for routing, face in (("oracle", "white"), ("routed", "#666666")):
        yield Line2D(
            [],
            [],
            color="#666666",
            linestyle=LINE_STYLE[routing],
            marker="o",
            markersize=4.5,
            markerfacecolor=face,
            label=f"{routing} routing" if routing == "oracle" else routing,
        )
