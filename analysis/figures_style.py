"""The one style of all figures: colours, marks, axes, legends, and how a figure becomes a file.

No pyplot: figures are drawn on their own Agg canvas, with every style set on the figure itself, so
they are safe in threads, in a tracker and on machines without a display. Colours are safe for
colour-blind readers, and what a colour says is also said by lightness, marker, hatch or line style.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Colormap
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

#: Okabe and Ito's palette, dark enough for lines on white, ordered so that neighbours also differ
#: in lightness.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#333333")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
#: The two causes of forgetting, and other pairs: a dark and a light colour, and a hatch.
PAIR = (("#0072B2", ""), ("#F0C36D", "////"))
INK = "#222222"
GREY = "#666666"
FAINT = "#DDDDDD"
LINE_STYLE = {"routed": "-", "oracle": (0, (4, 2))}
#: One colour map for shares (from 0 to 1) and one for signed numbers; both grow lighter.
SHARES = "cividis"
#: Beyond this many tasks, numbers in the cells would be too small to read.
MOST_ANNOTATED = 20
SMALL, TEXT, LARGE = 8, 9, 10.5

Drawn = Figure | Axes | Sequence[Axes]


class Incomplete(UserWarning):
    """A figure was drawn without something that it was asked for."""


def look(k: int) -> tuple[str, str]:
    """Colour and marker of the k-th thing drawn; no two of the first 49 look the same."""
    return COLOURS[k % len(COLOURS)], MARKERS[(k + k // len(COLOURS)) % len(MARKERS)]


def new_axes(ax: Axes | None, width: float, height: float) -> Axes:
    """``ax``, or the only axes of a new figure of this size in inches."""
    return new_figure(width, height).subplots() if ax is None else ax


def new_figure(width: float, height: float) -> Figure:
    """An empty figure with its own canvas, in inches."""
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def legend_width(labels: Iterable[object]) -> float:
    """Inches that a legend of these texts takes beside the axes, so that it squeezes nothing."""
    return 0.7 + 0.068 * max((len(str(label)) for label in labels), default=0)


def figure_of(drawn: Drawn) -> Figure:
    """The figure that a function of :mod:`analysis.figures` drew on."""
    if isinstance(drawn, Figure):
        return drawn
    figure = (drawn if isinstance(drawn, Axes) else drawn[0]).get_figure(root=True)
    if figure is None:
        raise ValueError("these axes were removed from their figure")
    return figure


def png(drawn: Drawn, dpi: int = 150) -> bytes:
    """Render as PNG; equal figures give equal bytes.

    Args:
        drawn: What a function of :mod:`analysis.figures` returned: axes, several axes, a figure.
        dpi: Dots per inch.
    """
    return _render(drawn, "png", dpi=dpi, metadata={"Software": None})


def svg(drawn: Drawn) -> bytes:
    """Render as SVG, its text as text; for pages that scale. Equal figures give equal bytes."""
    return _render(drawn, "svg", metadata={"Date": None, "Creator": None})


def save(drawn: Drawn, path: str | Path) -> Path:
    """Write a figure; the ending decides the format (.pdf and .svg for papers, .png).

    Returns:
        The path.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    kind = target.suffix.lower().lstrip(".")
    render = {"png": png, "svg": svg}.get(kind)
    data = render(drawn) if render else _render(drawn, kind, metadata={"CreationDate": None})
    target.write_bytes(data)
    return target


def _render(drawn: Drawn, kind: str, **options: Any) -> bytes:  # noqa: ANN401 (of savefig)
    import matplotlib

    buffer = io.BytesIO()
    # ids of an SVG are random unless salted; its text stays text, for search and screen readers
    with matplotlib.rc_context({"svg.hashsalt": "cl_peft", "svg.fonttype": "none"}):
        figure = figure_of(drawn)
        if figure.get_layout_engine() is not None:
            # laid out once: a second pass would move things a little, and no two files would agree
            figure.draw_without_rendering()
            figure.set_layout_engine("none")
        figure.savefig(buffer, format=kind, **options)
    return buffer.getvalue()


# ---------------------------------------------------------------- parts of axes


def style_axes(
    ax: Axes,
    x: str,
    y: str,
    *,
    title: str | None = None,
    grid: Literal["x", "y", "both", ""] = "y",
) -> None:
    """Labels, a faint grid, and no box."""
    ax.set_xlabel(x, fontsize=TEXT, color=INK)
    ax.set_ylabel(y, fontsize=TEXT, color=INK)
    ax.tick_params(labelsize=SMALL, length=3, color=FAINT, labelcolor=INK)
    if grid:
        ax.grid(axis=grid, color=FAINT, linewidth=0.8)
    ax.set_axisbelow(True)
    for side, spine in ax.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(FAINT)
    if title:
        ax.set_title(title, fontsize=TEXT, color=GREY)


def legend_beside(ax: Axes, handles: Iterable[Artist]) -> None:
    """A legend right of the axes: beside the figure if it has only these, else in the corner."""
    figure = figure_of(ax)
    options: dict[str, Any] = {
        "frameon": False,
        "fontsize": SMALL,
        "labelcolor": INK,
        "handlelength": 2.6,
    }
    if figure.axes == [ax] and ax.get_figure() is figure:
        figure.legend(handles=list(handles), loc="outside right upper", **options)
    else:
        ax.legend(handles=list(handles), loc="best", **options)


def percent_ticks(ax: Axes, axis: str = "y") -> None:
    """Show shares as percentages."""
    which = ax.yaxis if axis == "y" else ax.xaxis
    which.set_major_formatter(lambda value, _: f"{100 * value:g}".replace("-", "−"))


def heatmap(
    ax: Axes,
    matrix: np.ndarray,
    limits: tuple[float, float],
    *,
    cmap: str = SHARES,
    texts: Sequence[Sequence[str]] | None = None,
    labels: tuple[Sequence[str], Sequence[str]] | None = None,
) -> AxesImage:
    """A matrix as coloured cells, annotated where there is room; NaN stays blank.

    Args:
        ax: Where to draw.
        matrix: ``(R, C)``.
        limits: Ends of the colour scale.
        cmap: A map whose lightness only rises or only falls.
        texts: What the cells say; None is percent.
        labels: Names of rows and columns; None is 1, 2, 3, ...
    """
    rows, columns = matrix.shape
    most = max(rows, columns)
    image = ax.imshow(
        np.ma.masked_invalid(matrix), cmap=cmap, vmin=limits[0], vmax=limits[1], aspect="equal"
    )
    if most <= MOST_ANNOTATED:
        digits = 1 if most <= 8 else 0
        for (t, i), value in np.ndenumerate(matrix):
            if not np.isnan(value):
                text = texts[t][i] if texts is not None else signed(100 * value, digits)
                ax.text(
                    i, t, text, ha="center", va="center",
                    fontsize=8 if most <= 12 else 7,
                    color=_ink_on(image.cmap, image.norm(value)),
                )  # fmt: skip
    names = labels or ([str(i + 1) for i in range(rows)], [str(i + 1) for i in range(columns)])
    step = max(1, -(-most // MOST_ANNOTATED))
    ax.set_yticks(np.arange(0, rows, step), list(names[0])[::step])
    ax.set_xticks(np.arange(0, columns, step), list(names[1])[::step])
    ax.tick_params(labelsize=SMALL, length=0, colors=INK, labelleft=True)
    # white seams keep neighbours of equal colour apart
    ax.set_xticks(np.arange(columns + 1) - 0.5, minor=True)
    ax.set_yticks(np.arange(rows + 1) - 0.5, minor=True)
    ax.grid(which="minor", color="white", linewidth=1.0 if most <= MOST_ANNOTATED else 0.3)
    ax.tick_params(which="minor", length=0)
    for spine in ax.spines.values():
        spine.set_visible(False)
    return image


def colour_bar(
    axes: Axes | Sequence[Axes], image: AxesImage, label: str, *, percent: bool = True
) -> None:
    """The scale of a heatmap, right of it."""
    beside = axes if isinstance(axes, Axes) else list(axes)
    bar = figure_of(axes).colorbar(image, ax=beside, fraction=0.05, pad=0.02, aspect=25)
    bar.set_label(label, fontsize=TEXT, color=INK)
    if percent:
        bar.ax.yaxis.set_major_formatter(lambda value, _: signed(100 * value, 0))
    bar.ax.tick_params(labelsize=SMALL, length=2, color=INK)
    bar.outline.set_visible(False)


def signed(value: float, digits: int) -> str:
    """A number with a real minus sign, and never "-0.0"."""
    text = f"{value:.{digits}f}"
    return (text.lstrip("-") if float(text) == 0 else text).replace("-", "−")


def _ink_on(cmap: Colormap, level: Any) -> str:  # noqa: ANN401 (a number between 0 and 1)
    # black has the higher contrast where the relative luminance (WCAG) is above 0.179
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in
                        cmap(level)[:3])  # fmt: skip
    return "white" if 0.2126 * red + 0.7152 * green + 0.0722 * blue < 0.179 else "black"


def side_of(n: int, per_cell: float = 0.32) -> float:
    """Inches for a square of n by n cells."""
    return float(np.clip(per_cell * n + 0.9, 2.8, 7.5))
