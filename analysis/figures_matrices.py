"""Figures of matrices: accuracy after each task, who is taken for whom, which tasks are alike."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from numpy.typing import ArrayLike

from analysis.figures_style import (
    INK,
    LARGE,
    TEXT,
    colour_bar,
    heatmap,
    new_axes,
    new_figure,
    side_of,
    signed,
)
from analysis.samples import task_similarity
from cl_peft.errors import DataError


def accuracy_matrices(
    oracle: ArrayLike | pd.DataFrame,
    routed: ArrayLike | pd.DataFrame,
    *,
    difference: bool = False,
    title: str | None = None,
    limits: tuple[float, float] = (0.0, 1.0),
) -> tuple[Axes, ...]:
    """Draw both accuracy matrices of a run side by side, with one colour scale.

    Cells are annotated in percent; cells that do not exist stay blank.

    Args:
        oracle: ``(T, T)`` accuracies under the true task's module.
        routed: ``(T, T)`` accuracies under the router's choice.
        difference: Add a third panel, oracle minus routed: what routing costs, on a scale of its
            own; negative where misrouting was lucky.
        title: Written above, such as the run's name.
        limits: Ends of the colour scale; the whole range by default, so that figures compare.

    Returns:
        The axes of the panels.

    Raises:
        DataError: The matrices are not square or differ in shape.
    """
    panels = [np.asarray(oracle, dtype=np.float64), np.asarray(routed, dtype=np.float64)]
    shape = panels[0].shape
    if len(shape) != 2 or shape[0] != shape[1] or shape != panels[1].shape:
        raise DataError(
            f"Accuracy matrices must both be (T, T); oracle is {shape}, routed {panels[1].shape}."
        )
    count = 3 if difference else 2
    side = side_of(shape[0], 0.26 if difference else 0.32)
    figure = new_figure(count * side + (2.4 if difference else 1.6), side + (1.1 if title else 0.8))
    axes = tuple(figure.subplots(1, count, sharey=True))
    for ax, matrix, name in zip(axes, panels, ("Oracle routing", "Routed"), strict=False):
        image = heatmap(ax, matrix, limits)
        final = matrix[-1].mean()
        text = name if np.isnan(final) else f"{name}: {100 * final:.1f} % on average at the end"
        ax.set_title(text, fontsize=TEXT if difference else LARGE - 0.5, color=INK)
        ax.set_xlabel("accuracy on task", fontsize=TEXT, color=INK)
    axes[0].set_ylabel("after learning task", fontsize=TEXT, color=INK)
    colour_bar(axes[:2], image, "accuracy (%)")
    if difference:
        cost = panels[0] - panels[1]
        known = cost[~np.isnan(cost)]
        low, high = min(0.0, known.min(initial=0.0)), max(0.05, known.max(initial=0.0))
        image = heatmap(axes[2], cost, (low, high), cmap="YlOrBr")
        final = signed(100 * cost[-1].mean(), 1)
        text = "Cost of routing" if final == "nan" else f"Cost of routing: {final} points"
        axes[2].set_title(text, fontsize=TEXT, color=INK)
        axes[2].set_xlabel("accuracy on task", fontsize=TEXT, color=INK)
        colour_bar(axes[2], image, "oracle − routed (points)")
    if title:
        figure.suptitle(title, fontsize=LARGE, color=INK)
    return axes


def router_confusion(
    confusion: pd.DataFrame, *, title: str | None = None, ax: Axes | None = None
) -> Axes:
    """Draw which task the router chose for the samples of each task, in percent of each row.

    Args:
        confusion: From :func:`analysis.routing_confusion`; its column "none" is shown if any
            sample was routed to no task.
        title: Written above; None says the share routed right.
        ax: Where to draw; None is a new figure.

    Raises:
        DataError: There is no sample.
    """
    counts = confusion.to_numpy(dtype=np.float64)
    n_tasks = len(counts)
    if not counts.sum():
        raise DataError("The confusion matrix holds no sample.")
    columns = [str(column) for column in confusion.columns]
    if not counts[:, n_tasks:].sum():
        counts, columns = counts[:, :n_tasks], columns[:n_tasks]
    totals = counts.sum(axis=1, keepdims=True)
    shares = np.divide(counts, totals, out=np.full_like(counts, np.nan), where=totals > 0)
    side = side_of(n_tasks)
    drawn = new_axes(ax, side + 1.4, side + 0.6)
    digits = 1 if n_tasks <= 8 else 0
    # a share that rounds to zero is not the same as no sample at all
    texts = [
        ["0" if not c else signed(100 * s, digits) for c, s in zip(*row, strict=True)]
        for row in zip(counts, shares, strict=True)
    ]
    rows = [str(task) for task in confusion.index]
    image = heatmap(drawn, shares, (0.0, 1.0), texts=texts, labels=(rows, columns))
    drawn.set_ylabel("true task", fontsize=TEXT, color=INK)
    drawn.set_xlabel("routed to task", fontsize=TEXT, color=INK)
    right = np.trace(counts[:, :n_tasks]) / counts.sum()
    text = title or f"{100 * right:.1f} % of {int(counts.sum()):,} samples routed right"
    drawn.set_title(text, fontsize=TEXT, color=INK)
    colour_bar(drawn, image, "share of the true task's samples (%)")
    return drawn


def similarity_map(
    means: ArrayLike | pd.DataFrame,
    *,
    names: list[str] | None = None,
    title: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw how alike tasks are to the frozen backbone: cosine between their mean features.

    Pairs of tasks with a high cosine are those a router is likely to confuse.

    Args:
        means: ``(T, D)`` mean feature of each task, or the result of
            :func:`analysis.task_similarity`.
        names: Of the tasks; None is 1, 2, 3, ...
        title: Written above.
        ax: Where to draw; None is a new figure.
    """
    given = isinstance(means, pd.DataFrame) and means.columns.name == "other_task"
    cosine = means.to_numpy() if given else task_similarity(means).to_numpy()  # type: ignore[union-attr]
    n_tasks = len(cosine)
    labels = names or [str(i + 1) for i in range(n_tasks)]
    side = side_of(n_tasks, 0.4)
    drawn = new_axes(ax, side + 1.4, side + 0.6)
    texts = [[signed(float(value), 2) for value in row] for row in cosine]
    if n_tasks > 8:
        texts = [[signed(float(value), 1) for value in row] for row in cosine]
    image = heatmap(drawn, cosine, (-1.0, 1.0), texts=texts, labels=(labels, labels))
    if names is not None and max(map(len, names)) > 3:
        drawn.tick_params(axis="x", rotation=45)
        for label in drawn.get_xticklabels():
            label.set_horizontalalignment("right")
    drawn.set_title(title or "Similarity of tasks (frozen features)", fontsize=TEXT, color=INK)
    drawn.set_xlabel("task", fontsize=TEXT, color=INK)
    drawn.set_ylabel("task", fontsize=TEXT, color=INK)
    colour_bar(drawn, image, "cosine of centred mean features", percent=False)
    return drawn
