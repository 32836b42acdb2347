import io
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

import analysis
from analysis import figures
from analysis.figures_style import GREY, Incomplete, look, new_figure
from cl_peft.errors import DataError

NAN = float("nan")
ORACLE = np.array([[0.9, NAN, NAN], [0.8, 0.7, NAN], [0.1, 0.6, 1.0]])
ROUTED = np.array([[0.9, NAN, NAN], [0.5, 0.6, NAN], [0.0, 0.5, 0.9]])


def heatmaps(drawn):
    return [ax for ax in figures.figure_of(drawn).axes if ax.images]


def legend(drawn):
    """Texts of the legend beside the axes."""
    return [text.get_text() for text in figures.figure_of(drawn).legends[0].get_texts()]


def test_matrices_show_each_existing_cell_once():
    left, right = analysis.accuracy_matrices(ORACLE, ROUTED, title="a run")
    figure = figures.figure_of(left)
    assert isinstance(figure, Figure)
    assert heatmaps(left) == [left, right]
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
    assert len(figures.figure_of(low).axes) == 3  # two panels and one colour bar
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
    assert max(figures.figure_of(figure).get_size_inches()) < 20


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


def test_difference_is_oracle_minus_routed_on_its_own_scale():
    panels = analysis.accuracy_matrices(ORACLE, ROUTED, difference=True)
    assert len(panels) == 3
    cost = {text.get_position(): text.get_text() for text in panels[2].texts}
    assert cost == {
        (0, 0): "0.0",
        (0, 1): "30.0",
        (1, 1): "10.0",
        (0, 2): "10.0",
        (1, 2): "10.0",
        (2, 2): "10.0",
    }
    assert panels[2].images[0].get_clim() == pytest.approx((0.0, 0.3))
    assert "10.0 points" in panels[2].get_title()
    lucky = analysis.accuracy_matrices([[0.5]], [[0.7]], difference=True)[2]
    assert [text.get_text() for text in lucky.texts] == ["−20.0"]
    assert lucky.images[0].get_clim()[0] == pytest.approx(-0.2)


def test_anytime_curve_draws_means_and_bands(sweep):
    frame = analysis.load_runs(sweep)
    ax = analysis.anytime_curve(frame)
    assert len(ax.lines) == 4  # two learners by two routings
    assert len(ax.collections) == 4  # a band each
    assert {line.get_linestyle() for line in ax.lines} == {"-", "--"}
    rows = frame[
        (frame["metric"] == "average_accuracy")
        & (frame["learner"] == "sequential")
        & (frame["routing"] == "routed")
    ]
    values = rows.pivot(index="after_task", columns="run", values="value")
    drawn = [list(line.get_ydata()) for line in ax.lines]
    which = next(k for k, line in enumerate(drawn) if np.allclose(line, values.mean(axis=1)))
    assert legend(ax) == ["isolated", "sequential", "oracle routing", "routed"]
    assert "95 % bootstrap interval of 3 runs" in ax.get_title()
    # the band lies within the seeds' extremes and around the mean
    band = ax.collections[which].get_paths()[0].vertices
    at_end = band[band[:, 0] == 4][:, 1]
    assert values.loc[4].min() <= at_end.min() < values.loc[4].mean() < at_end.max()
    assert at_end.max() <= values.loc[4].max()


def test_anytime_band_of_one_standard_deviation(sweep):
    frame = analysis.load_runs(sweep, where={"learner": "sequential"})
    ax = analysis.anytime_curve(frame, metric="forgetting", band="std")
    rows = frame[(frame["metric"] == "forgetting") & (frame["routing"] == "routed")]
    final = rows[rows["after_task"] == 4]["value"]
    band = ax.collections[1].get_paths()[0].vertices
    at_end = band[band[:, 0] == 4][:, 1]
    spread = np.std(final, ddof=1)
    assert at_end.min() == pytest.approx(final.mean() - spread)
    assert at_end.max() == pytest.approx(final.mean() + spread)
    assert not analysis.anytime_curve(frame, band="none").collections
    with pytest.raises(DataError, match="band is 'sd'"):
        analysis.anytime_curve(frame, band="sd")


def test_anytime_bounds(tmp_path, write_run):
    for learner in ("isolated", "sequential", "joint"):
        only_last = learner == "joint"
        router = "none" if only_last else "ridge"
        write_run(tmp_path / "g" / learner, learner=learner, router=router, only_last=only_last)
    frame = analysis.load_runs(tmp_path)
    ax = analysis.anytime_curve(frame, upper="joint", lower="sequential")
    assert legend(ax)[:2] == ["joint (upper bound)", "sequential (lower bound)"]
    flat = ax.lines[0]
    joint = analysis.summary(frame).set_index("run").loc["joint", "average_accuracy_routed"]
    assert list(flat.get_xdata()) == [1, 4]  # known at the end only, so a level
    assert list(flat.get_ydata()) == [joint, joint]
    assert len(ax.lines) == 4  # two bounds; isolated, oracle and routed


def grey_lines(ax):
    """What bounds are drawn as."""
    return [line for line in ax.lines if line.get_color() == GREY]


def test_anytime_without_a_bound_draws_the_rest(sweep):
    frame = analysis.load_runs(sweep)
    with pytest.warns(Incomplete, match="no lower bound: no run of learner 'frozen'"):
        ax = analysis.anytime_curve(frame, lower="frozen")
    assert len(ax.lines) == 4
    assert "frozen (lower bound)" not in legend(ax)


def test_bounds_of_some_runs_only(tmp_path, write_run):
    """Three seeds by two ranks; the bound lacks one seed of one rank."""
    for seed in range(3):
        for rank in (4, 16):
            write_run(tmp_path / "g" / f"isolated-{rank}-{seed}", seed=seed, rank=rank)
            if (seed, rank) != (2, 4):
                name = f"sequential-{rank}-{seed}"
                write_run(tmp_path / "g" / name, learner="sequential", seed=seed, rank=rank)
    frame = analysis.load_runs(tmp_path, config="varying")
    expected = r"lower bound \(sequential\) lacks runs for 1 of 6 .* others: rank 4 seeds 2.2.2$"
    with pytest.warns(Incomplete, match=expected):
        ax = analysis.anytime_curve(frame, lower="sequential")
    lines = grey_lines(ax)
    assert len(lines) == 2  # a line per rank, not their mean
    runs = analysis.summary(frame)
    assert sorted(text.get_text() for text in ax.texts) == ["rank 16", "rank 4"]
    for text, line in zip(ax.texts, lines, strict=True):
        rank = int(text.get_text().split()[1])
        mine = runs[(runs["learner"] == "sequential") & (runs["module.rank"] == rank)]
        assert line.get_ydata()[-1] == pytest.approx(mine["average_accuracy_routed"].mean())
        assert len(mine) == (2 if rank == 4 else 3)


def test_bounds_evaluated_after_different_tasks(tmp_path, write_run):
    """One joint run was evaluated in the end only: its level must not bend the others' curve."""
    for seed in range(2):
        write_run(tmp_path / "g" / f"isolated-{seed}", seed=seed)
        write_run(tmp_path / "g" / f"joint-{seed}", learner="joint", seed=seed, only_last=seed == 1)
    frame = analysis.load_runs(tmp_path)
    (line,) = grey_lines(analysis.anytime_curve(frame, upper="joint"))
    final = analysis.summary(frame).query("learner == 'joint'")["average_accuracy_routed"].mean()
    assert list(line.get_xdata()) == [1, 4]
    assert list(line.get_ydata()) == pytest.approx([final, final])


def test_an_unfinished_bound_is_no_level(tmp_path, write_run):
    write_run(tmp_path / "g" / "isolated")
    write_run(tmp_path / "g" / "joint", learner="joint", done=1, state="running")
    (line,) = grey_lines(analysis.anytime_curve(analysis.load_runs(tmp_path), upper="joint"))
    assert list(line.get_xdata()) == [1]


def test_anytime_curve_of_one_run_has_no_band(sweep):
    ax = analysis.anytime_curve(analysis.load_runs(sweep / "spine" / "isolated-0"))
    assert not ax.collections
    assert len(ax.lines) == 2
    assert ax.get_title() == ""


def test_anytime_curve_of_other_metrics_skips_what_is_undefined(sweep):
    ax = analysis.anytime_curve(analysis.load_runs(sweep), metric="forgetting")
    assert all(line.get_xdata().min() == 2 for line in ax.lines)
    with pytest.raises(DataError, match="No run has 'router_accuracy'"):
        analysis.anytime_curve(analysis.load_runs(sweep), metric="router_accuracy")


def test_anytime_curve_refuses_hidden_differences(tmp_path, write_run):
    write_run(tmp_path / "g" / "a", rank=4)
    write_run(tmp_path / "g" / "b", rank=8)
    with pytest.raises(DataError, match="something else differs"):
        analysis.anytime_curve(analysis.load_runs(tmp_path))
    ax = analysis.anytime_curve(analysis.load_runs(tmp_path, config=["module.rank"]))
    assert legend(ax)[:2] == ["rank 4", "rank 8"]


def test_no_two_configurations_look_the_same():
    assert len({look(k) for k in range(49)}) == 49


def test_forgetting_bars_are_the_two_drifts(sweep):
    frame = analysis.load_runs(sweep, where={"learner": "sequential"})
    ax = analysis.forgetting_bars(frame)
    tables = [analysis.forgetting_per_task(part) for _, part in frame.groupby("run")]
    heights = [bar.get_height() for bar in ax.patches]
    for k, column in enumerate(("module_drift", "routing_drift")):
        expected = np.mean([table[column] for table in tables], axis=0)
        np.testing.assert_allclose(heights[3 * k : 3 * k + 3], expected, atol=1e-12)
    assert {bar.get_hatch() for bar in ax.patches[3:]} == {"////"}  # told apart without colour
    total = np.mean([table["forgetting"] for table in tables], axis=0)
    np.testing.assert_allclose(ax.lines[0].get_ydata(), total)
    with pytest.raises(DataError, match="differ in learner"):
        analysis.forgetting_bars(analysis.load_runs(sweep))
    with pytest.raises(DataError, match="nothing can have been forgotten"):
        analysis.forgetting_bars(frame[frame["after_task"] == 1])


def test_negative_drift_is_drawn_below_zero(tmp_path, write_run):
    write_run(tmp_path / "g" / "a", learner="sequential")
    frame = analysis.load_runs(tmp_path)
    better = (
        frame["metric"].eq("accuracy") & frame["after_task"].eq(4) & frame["routing"].eq("routed")
    )
    frame.loc[better, "value"] = 1.0
    ax = analysis.forgetting_bars(frame)
    drifts = [bar for bar in ax.patches if bar.get_height() < 0]
    assert drifts
    assert all(bar.get_y() <= 0 for bar in drifts)
    assert any(bar.get_height() > 0.1 for bar in ax.patches)  # module drift, above zero


def test_stability_plasticity_is_where_the_numbers_are(sweep):
    frame = analysis.load_runs(sweep)
    ax = analysis.stability_plasticity(frame)
    runs = analysis.summary(frame)
    drawn = {(round(x, 9), round(y, 9)) for line in ax.lines for x, y in line.get_xydata()}
    for learner in ("isolated", "sequential"):
        mine = runs[runs["learner"] == learner]
        for routing in ("oracle", "routed"):
            x = mine[f"learning_accuracy_{routing}"].mean()
            y = mine[f"backward_transfer_t_{routing}"].mean()
            assert (round(x, 9), round(y, 9)) in drawn
            # what the diagonals say
            assert x + y == pytest.approx(mine[f"average_accuracy_{routing}"].mean())
    assert legend(ax) == ["isolated", "sequential", "oracle", "routed"]


def test_accuracy_against_parameters(grid):
    frame = analysis.load_runs(grid, config="varying")
    trained, stored = analysis.accuracy_against_parameters(frame)
    marks = [c.lines[0].get_xydata()[0] for c in trained.containers]
    assert sorted({x for x, _ in marks}) == [9216 * 4 + 770, 9216 * 16 + 770]
    sizes = sorted({c.lines[0].get_xdata()[0] for c in stored.containers})
    one, many = 1024, 4  # router state of 4096 bytes; four tasks' modules or a single one
    assert sizes == sorted(n * (9216 * rank + 770) + one for n in (1, many) for rank in (4, 16))
    numbers = analysis.intervals(frame)
    assert sorted(y for _, y in marks) == pytest.approx(sorted(numbers["estimate"]))


def test_router_confusion(sweep):
    predictions = analysis.load_predictions(sweep / "spine" / "isolated-0")
    counts = analysis.routing_confusion(predictions)
    ax = analysis.router_confusion(counts)
    texts = {text.get_position(): text.get_text() for text in ax.texts}
    assert len(texts) == 16  # no column for "none"
    assert texts[0, 0] == f"{100 * counts.loc[1, 1] / 40:.1f}"
    right = np.trace(counts.to_numpy()[:, :4])
    assert f"{100 * right / 160:.1f} % of 160" in ax.get_title()
    nowhere = analysis.routing_confusion(predictions.assign(routed_task=0))
    labels = [text.get_text() for text in analysis.router_confusion(nowhere).get_xticklabels()]
    assert labels[-1] == "none"
    with pytest.raises(DataError, match="holds no sample"):
        analysis.router_confusion(counts * 0)


def test_routing_margins(sweep):
    predictions = analysis.load_predictions(sweep / "spine" / "isolated-0", after_task=-1)
    ax = analysis.routing_margins(predictions)
    wrong = predictions[predictions["routed_task"] != predictions["eval_task"]]
    entry = legend(ax)[1]
    assert entry == f"misrouted: {len(wrong)}, median {wrong['margin'].median():.3g}"
    with pytest.raises(DataError, match="No sample has a margin"):
        analysis.routing_margins(predictions.assign(margin=np.nan))


def test_abstention_draws_the_curve(sweep):
    one = analysis.load_predictions(sweep / "spine" / "isolated-0")
    ax = analysis.abstention({"a": one, "b": one})
    curve = analysis.abstention_curve(one)
    drawn = ax.lines[0].get_xydata()
    assert drawn[-1] == pytest.approx([0, curve["accuracy"].iloc[-1]])
    assert len(drawn) == (curve["answered"] >= 16).sum()
    assert legend(ax) == ["a", "b", "best possible ranking"]


def test_similarity_map():
    means = np.array([[1.0, 0.0], [1.0, 0.2], [-1.0, 0.0]])
    ax = analysis.similarity_map(means, names=["sea", "lake", "desert"])
    cosine = analysis.task_similarity(means)
    assert ax.texts[1].get_text() == f"{cosine.loc[1, 2]:.2f}"
    assert [t.get_text() for t in ax.get_yticklabels()] == ["sea", "lake", "desert"]
    given = analysis.similarity_map(cosine)
    np.testing.assert_allclose(given.images[0].get_array(), cosine.to_numpy())


def test_sweep_overview_lists_the_best_first(grid):
    frame = analysis.load_runs(grid, config="varying")
    ax = analysis.sweep_overview(frame)
    numbers = analysis.intervals(frame).sort_values("estimate", ascending=False)
    means = [line.get_xdata()[0] for line in ax.lines if line.get_marker() == "|"]
    assert means == pytest.approx(numbers["estimate"].tolist())
    dots = [line for line in ax.lines if line.get_marker() == "o"]
    assert sum(len(line.get_xdata()) for line in dots) == 40
    texts = [text.get_text() for text in ax.texts]
    assert texts.count("prototype") == 4
    assert {"router", "learner", "rank"} <= set(texts)
    few = analysis.sweep_overview(frame, most=3)
    assert "best 3 of 8" in figures.figure_of(few).get_suptitle()
    worst = analysis.sweep_overview(frame, metric="forgetting_routed")
    lowest = analysis.intervals(frame, metric=["forgetting_routed"])["estimate"].min()
    assert worst.lines[2].get_xdata()[0] == pytest.approx(lowest)


def test_critical_difference_diagram(grid):
    result = analysis.rank_configurations(analysis.load_runs(grid, config="varying"))
    ax = analysis.critical_difference_diagram(result)
    texts = [text.get_text() for text in ax.texts]
    assert f"CD {result.cd:.2f}" in texts
    for name, rank in result.ranks.items():
        assert any(name in text and f"{rank:.2f}" in text for text in texts)
    bars = [line for line in ax.lines if line.get_linewidth() == 3.5]
    assert len(bars) == len(result.cliques)
    assert "the smallest they can give" in ax.get_title().replace("\n", " ")
    # every name lies within the picture
    figure = figures.figure_of(ax)
    figure.draw_without_rendering()
    box = figure.bbox
    for text in ax.texts:
        extent = text.get_window_extent()
        assert box.x0 <= extent.x0
        assert extent.x1 <= box.x1


@pytest.mark.parametrize("unit", ["seed", "stream"])
def test_the_note_above_a_narrow_diagram_is_not_cut_off(unit):
    values = np.random.default_rng(0).normal(size=(5, 3))
    scores = pd.DataFrame(values, columns=["a", "b", "c"])
    ax = analysis.critical_difference_diagram(analysis.critical_difference(scores, unit=unit))
    figure = figures.figure_of(ax)
    figure.draw_without_rendering()
    extent, box = ax.title.get_window_extent(), figure.bbox
    assert box.x0 <= extent.x0
    assert extent.x1 <= box.x1
    assert extent.y1 <= box.y1


def test_single_panels_draw_where_they_are_told(sweep):
    frame = analysis.load_runs(sweep)
    figure = new_figure(10, 8)
    axes = figure.subplots(2, 2)
    assert analysis.anytime_curve(frame, ax=axes[0, 0]) is axes[0, 0]
    assert analysis.stability_plasticity(frame, ax=axes[0, 1]) is axes[0, 1]
    assert analysis.sweep_overview(frame, ax=axes[1, 0]) is axes[1, 0]
    predictions = analysis.load_predictions(sweep / "spine" / "isolated-0")
    assert analysis.abstention(predictions, ax=axes[1, 1]) is axes[1, 1]
    assert not figure.legends  # each in its own corner
    assert figures.png(axes[0]) == figures.png(figure)


def test_files_by_their_ending(tmp_path):
    drawn = analysis.accuracy_matrices(ORACLE, ROUTED)
    starts = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}
    for kind, start in starts.items():
        path = figures.save(drawn, tmp_path / "deep" / f"a.{kind}")
        assert path.read_bytes().startswith(start)
        assert figures.save(drawn, tmp_path / f"b.{kind}").read_bytes() == path.read_bytes()
    assert b">56.7 %" in figures.svg(drawn) or b"56.7 % on average" in figures.svg(drawn)


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
