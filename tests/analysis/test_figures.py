import io
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

import analysis
from analysis import figures
from cl_peft.errors import DataError

NAN = float("nan")
ORACLE = np.array([[0.9, NAN, NAN], [0.8, 0.7, NAN], [0.1, 0.6, 1.0]])
ROUTED = np.array([[0.9, NAN, NAN], [0.5, 0.6, NAN], [0.0, 0.5, 0.9]])


def heatmaps(figure):
    return [ax for ax in figure.axes if ax.images]


def test_matrices_show_each_existing_cell_once():
    figure = analysis.accuracy_matrices(ORACLE, ROUTED, title="a run")
    assert isinstance(figure, Figure)
    left, right = heatmaps(figure)
    assert {(t.get_position(), t.get_text()) for t in right.texts} == {
        ((0, 0), "90.0"),
        ((0, 1), "50.0"),
        ((1, 1), "60.0"),
        ((0, 2), "0.0"),
        ((1, 2), "50.0"),
        ((2, 2), "90.0"),
    }
    assert [label.get_text() for label in left.get_xticklabels()] == ["1", "2", "3"]
    assert left.get_title().startswith("Oracle routing")
    assert "56.7 %" in left.get_title()
    assert np.ma.getmaskarray(left.images[0].get_array()).tolist() == np.isnan(ORACLE).tolist()
    assert figure.get_suptitle() == "a run"


def test_matrices_share_one_scale():
    low = analysis.accuracy_matrices(ORACLE * 0.1, ORACLE)
    left, right = heatmaps(low)
    assert left.images[0].get_clim() == right.images[0].get_clim() == (0.0, 1.0)
    assert len(low.axes) == 3  # two panels and one colour bar
    zoomed = analysis.accuracy_matrices(ORACLE, ROUTED, limits=(0.5, 1.0))
    assert heatmaps(zoomed)[1].images[0].get_clim() == (0.5, 1.0)


def test_text_stands_out_from_its_cell():
    left, _ = heatmaps(analysis.accuracy_matrices(ORACLE, ROUTED))
    colours = {text.get_text(): text.get_color() for text in left.texts}
    assert colours["10.0"] == "white"  # on dark blue
    assert colours["100.0"] == "black"  # on yellow


def test_colour_map_reads_in_grey():
    image = heatmaps(analysis.accuracy_matrices(ORACLE, ROUTED))[0].images[0]
    grey = image.cmap(np.linspace(0, 1, 50))[:, :3] @ [0.2126, 0.7152, 0.0722]
    assert (np.diff(grey) > 0).all()


def test_many_tasks_are_not_annotated_and_stay_within_a_page():
    R = np.tril(np.full((60, 60), 0.9))
    R[np.triu_indices(60, 1)] = NAN
    figure = analysis.accuracy_matrices(R, R)
    left, _ = heatmaps(figure)
    assert not left.texts
    assert len(left.get_xticks()) <= 20
    assert max(figure.get_size_inches()) < 20


def test_matrices_of_one_task_and_of_last_row_only():
    one = analysis.accuracy_matrices([[0.5]], [[0.4]])
    assert [len(ax.texts) for ax in heatmaps(one)] == [1, 1]
    last = ORACLE.copy()
    last[:2] = NAN
    assert len(heatmaps(analysis.accuracy_matrices(last, last))[0].texts) == 3


def test_matrices_must_agree():
    with pytest.raises(DataError, match=r"oracle is \(3, 3\), routed \(1, 1\)"):
        analysis.accuracy_matrices(ORACLE, [[0.5]])


def test_matrices_of_a_run(sweep):
    run = sweep / "spine" / "sequential-0"
    oracle, routed = (analysis.accuracy_matrix(run, kind) for kind in ("oracle", "routed"))
    data = figures.png(analysis.accuracy_matrices(oracle, routed))
    picture = imread(io.BytesIO(data))
    assert picture.shape[0] > 400
    assert picture.shape[1] > picture.shape[0]
    assert data == figures.png(analysis.accuracy_matrices(oracle, routed))


def test_anytime_curve_draws_means_and_bands(sweep):
    frame = analysis.load_runs(sweep)
    figure = analysis.anytime_curve(frame)
    (ax,) = figure.axes
    assert len(ax.lines) == 4  # two learners by two routings
    assert len(ax.collections) == 4  # a band each
    styles = {line.get_linestyle() for line in ax.lines}
    assert styles == {"-", "--"}
    rows = frame[
        (frame["metric"] == "average_accuracy")
        & (frame["learner"] == "sequential")
        & (frame["routing"] == "routed")
    ]
    means = rows.groupby("after_task")["value"].mean()
    drawn = [list(line.get_ydata()) for line in ax.lines]
    assert any(np.allclose(line, means) for line in drawn)
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["isolated", "sequential", "oracle routing", "routed"]
    assert "3 runs" in ax.get_title()


def test_anytime_curve_of_one_run_has_no_band(sweep):
    figure = analysis.anytime_curve(analysis.load_runs(sweep / "spine" / "isolated-0"))
    (ax,) = figure.axes
    assert not ax.collections
    assert len(ax.lines) == 2
    assert ax.get_title() == ""


def test_anytime_curve_of_other_metrics_skips_what_is_undefined(sweep):
    figure = analysis.anytime_curve(analysis.load_runs(sweep), metric="forgetting")
    assert all(line.get_xdata().min() == 2 for line in figure.axes[0].lines)
    with pytest.raises(DataError, match="No run has 'router_accuracy'"):
        analysis.anytime_curve(analysis.load_runs(sweep), metric="router_accuracy")


def test_anytime_curve_refuses_hidden_differences(tmp_path, write_run):
    write_run(tmp_path / "g" / "a", rank=4)
    write_run(tmp_path / "g" / "b", rank=8)
    with pytest.raises(DataError, match="something else differs"):
        analysis.anytime_curve(analysis.load_runs(tmp_path))
    figure = analysis.anytime_curve(analysis.load_runs(tmp_path, config=["module.rank"]))
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels[:2] == ["module.rank 4", "module.rank 8"]


def test_figures_are_safe_in_threads():
    def draw(_):
        return figures.png(analysis.accuracy_matrices(ORACLE, ROUTED), dpi=60)

    with ThreadPoolExecutor(4) as pool:
        pictures = list(pool.map(draw, range(8)))
    assert len(set(pictures)) == 1


def test_pyplot_is_never_imported():
    code = (
        "import sys\nfrom analysis import figures\n"
        "figures.png(figures.accuracy_matrices([[0.5]], [[0.5]]))\n"
        "print('matplotlib.pyplot' in sys.modules, 'torch' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
