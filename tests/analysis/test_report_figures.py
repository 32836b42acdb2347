"""What is drawn for a sweep, and what is said where something is missing."""

import pytest

from analysis.figures_style import GREY
from analysis.report_data import gather
from analysis.report_figures import MOST_LINES, _picture, plan


@pytest.fixture
def anytime(tmp_path, write_run):
    """The anytime curve of more configurations than a figure holds, and worse bounds."""
    for rank in range(8, 8 + MOST_LINES + 1):
        write_run(tmp_path / "g" / f"isolated-{rank}", rank=rank, router="none")
    write_run(tmp_path / "g" / "sequential", learner="sequential", router="prototype", seed=1)
    return next(p for p in plan(gather(tmp_path / "g")) if p.title == "Anytime accuracy")


def test_a_bound_is_drawn_though_it_is_not_among_the_best(anytime):
    with pytest.warns(UserWarning, match="lower bound"):
        drawn = anytime.draw()
    assert any(line.get_color() == GREY for line in drawn.lines)
    assert len(drawn.lines) == 1 + 2 * MOST_LINES


def test_what_a_figure_lacks_is_said_below_it(anytime):
    picture = _picture(anytime)
    assert picture.svg
    assert "The lower bound (sequential) lacks runs for 12 of 12 settings" in picture.caption
