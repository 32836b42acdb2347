"""The figures of the page, as SVG that can stand inside HTML."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import pandas as pd

from analysis import figures
from analysis.figures_style import Drawn, Incomplete
from analysis.report_data import Sweep, best_configurations
from analysis.seeds import rank_configurations
from cl_peft.errors import DataError

#: Configurations in a figure with a legend, and with a figure of their own.
MOST_LINES, MOST_PANELS = 12, 6
#: Learners that are drawn as bounds where there are others.
UPPER, LOWER = "joint", ("sequential", "frozen")


@dataclass(frozen=True)
class Picture:
    """A figure with what it shows.

    Attributes:
        title: Heading.
        caption: How to read it.
        svg: The element; empty where it could not be drawn.
        why: Why not.
    """

    title: str
    caption: str
    svg: str = ""
    why: str = ""


@dataclass(frozen=True)
class Plan:
    """A figure that is still to be drawn.

    Attributes:
        title: Heading.
        caption: How to read it.
        draw: Draws it; a DataError says why that cannot be.
    """

    title: str
    caption: str
    draw: Callable[[], Drawn]


def pictures(sweep: Sweep) -> Iterator[Picture]:
    """Every figure that the finished runs allow; the others with the reason why not."""
    return (_picture(planned) for planned in plan(sweep))


def plan(sweep: Sweep) -> Iterator[Plan]:
    """Every figure about the finished runs, whether they allow it or not."""
    if sweep.finished.empty:
        return
    shown, count = best_configurations(sweep, MOST_LINES)
    limit = f" The best {MOST_LINES} of {count} configurations." if count > MOST_LINES else ""
    frame = shown.drop(columns="label")
    upper, lower = _bounds(set(sweep.finished["learner"]))
    bounds = sweep.finished[sweep.finished["learner"].isin([upper, lower])]
    # a bound may not be among the best
    curves = pd.concat([frame[~frame["learner"].isin([upper, lower])], bounds])
    yield from [
        Plan(
            "Sweep overview",
            "Final routed accuracy: a dot per run, the mean and its 95 % interval over seeds.",
            lambda: figures.sweep_overview(sweep.finished),
        ),
        Plan(
            "Anytime accuracy",
            "Average accuracy over all tasks seen so far; solid as routed, dashed with the oracle; "
            "the band is the 95 % interval over seeds." + limit,
            lambda: figures.anytime_curve(curves, upper=upper, lower=lower),
        ),
        Plan(
            "Stability and plasticity",
            "Right: new tasks are learned better. Up: old ones are kept better. Diagonals are "
            "equal final accuracy; hollow marks are the oracle." + limit,
            lambda: figures.stability_plasticity(frame),
        ),
        Plan(
            "Accuracy against parameters",
            "Trained per task (left) and stored in the end (right)." + limit,
            lambda: figures.accuracy_against_parameters(frame),
        ),
        Plan(
            "Critical difference",
            "Average ranks over streams, or over the seeds of the only one; what a bar joins, the "
            "Nemenyi test does not tell apart.",
            lambda: figures.critical_difference_diagram(rank_configurations(sweep.finished)),
        ),
    ]
    limit = f" The best {MOST_PANELS} of {count} configurations." if count > MOST_PANELS else ""
    labels = list(dict.fromkeys(shown["label"]))
    for label in labels[:MOST_PANELS]:
        part = frame[shown["label"] == label]
        yield Plan(
            f"Forgetting per task: {label}",
            "What each task lost by the end, split into modules that changed and routes that moved."
            + limit,
            partial(figures.forgetting_bars, part),
        )


def inline_svg(data: bytes, name: str, alt: str) -> str:
    """An SVG file as an element of a page.

    Args:
        data: As :func:`analysis.figures.svg` gives it.
        name: Put before every id, so that figures on one page do not share any.
        alt: Plain text for screen readers.
    """
    text = data.decode()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<style.*?</style>", "", text, flags=re.DOTALL)  # it would rule the whole page
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'href="#', f'href="#{name}-', text)
    text = text.replace("url(#", f"url(#{name}-")
    alt = alt.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
    wide = re.search(r'width="([\d.]+)pt"', text)
    style = "stroke-linejoin:round;stroke-linecap:butt"
    if wide is not None:
        style += f";--wide:{float(wide[1]) * 4 / 3:.0f}px"
    text = re.sub(r' (width|height)="[\d.]+pt"', "", text, count=2)
    return text.replace("<svg", f'<svg role="img" aria-label="{alt}" style="{style}"', 1).strip()


def _picture(planned: Plan) -> Picture:
    title, caption = planned.title, planned.caption
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("ignore", RuntimeWarning)  # means of nothing, which are gaps
            warnings.simplefilter("always", Incomplete)
            data = figures.svg(planned.draw())
    except DataError as error:
        return Picture(title, caption, why=str(error))
    lacking = [str(w.message) for w in caught if issubclass(w.category, Incomplete)]
    for w in caught:
        if not issubclass(w.category, Incomplete):
            warnings.warn_explicit(w.message, w.category, w.filename, w.lineno)
    caption += "".join(f" {text[0].upper()}{text[1:]}." for text in lacking)
    name = re.sub(r"\W+", "-", title.lower()).strip("-")
    return Picture(title, caption, inline_svg(data, name, title))


def _bounds(learners: set[str]) -> tuple[str | None, str | None]:
    """Which learners are drawn as upper and lower bound of the others, if there are others."""
    upper = UPPER if UPPER in learners else None
    lower = next((name for name in LOWER if name in learners), None)
    return (upper, lower) if learners - {upper, lower} else (None, None)
