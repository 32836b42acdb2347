"""Configurations over seeds, and the tables made of them."""

import csv
import io
import re
import shutil

import numpy as np
import pandas as pd
import pytest

import analysis
from analysis.paper import escape_latex
from analysis.paper_notes import pairs_needed
from analysis.seeds import final_numbers
from cl_peft.errors import DataError

ROUTED = "average_accuracy_routed"


@pytest.fixture(scope="session")
def frame(grid):
    return analysis.load_runs(grid, config="varying")


def from_files(grid, learner, router, rank, routing="routed"):
    """Final average accuracy of each seed, from the predictions alone."""
    values = []
    for seed in range(5):
        run = grid / "grid" / f"{learner}-{router}-{rank}-{seed}"
        rows = pd.read_parquet(run / "predictions.parquet")
        last = rows[rows["after_task"] == 4]
        right = last[f"{routing}_prediction"] == last["label"]
        values.append(right.groupby(last["eval_task"]).mean().mean())
    return np.array(values)


def test_intervals_are_those_of_the_run_folders(grid, frame):
    table = analysis.intervals(frame, metric=[ROUTED, "router_accuracy"])
    assert len(table) == 8 * 2
    for _, row in table[table["metric"] == ROUTED].iterrows():
        values = from_files(grid, row["learner"], row["router"], row["module.rank"])
        expected = analysis.bootstrap_interval(values)
        assert row["estimate"] == pytest.approx(values.mean())
        assert (row["low"], row["high"]) == pytest.approx((expected.low, expected.high))
        assert row["n"] == 5


def test_streams_as_strata(tmp_path, write_run):
    for k, stream in enumerate(("easy", "easy", "hard", "hard")):
        run = write_run(tmp_path / "g" / f"{stream}-{k}", seed=k)
        text = (run / "config.yaml").read_text().replace("newsgroups", stream)
        (run / "config.yaml").write_text(text)
    frame = analysis.load_runs(tmp_path)
    runs = analysis.summary(frame)
    row = analysis.intervals(frame, strata="stream").iloc[0]
    expected = analysis.bootstrap_interval(runs[ROUTED], runs["stream"])
    assert (row["estimate"], row["low"], row["high"]) == (
        expected.estimate,
        expected.low,
        expected.high,
    )
    assert len(analysis.intervals(frame)) == 2


def test_missing_numbers_are_not_counted(tmp_path, write_run):
    write_run(tmp_path / "g" / "a", learner="joint", router="none", only_last=True)
    row = analysis.intervals(analysis.load_runs(tmp_path), metric=["forgetting_routed"]).iloc[0]
    assert row["n"] == 0
    assert np.isnan(row["estimate"])


def test_unknown_numbers_and_unfinished_runs(tmp_path, write_run, frame):
    with pytest.raises(DataError, match="Did you mean 'average_accuracy_routed'"):
        analysis.intervals(frame, metric=["average_acuracy_routed"])
    write_run(tmp_path / "g" / "a", done=2, state="failed")
    with pytest.raises(DataError, match="No run is finished"):
        final_numbers(analysis.load_runs(tmp_path), [ROUTED])


def test_paired_tests_pair_by_seed(grid, frame):
    part = frame[(frame["learner"] == "isolated") & (frame["module.rank"] == 16)]
    (row,) = analysis.paired_tests(part).to_dict("records")
    assert (row["a"], row["b"]) == ("prototype", "ridge")
    a, b = (from_files(grid, "isolated", router, 16) for router in ("prototype", "ridge"))
    assert row["difference"] == pytest.approx((a - b).mean())
    assert row["p"] == analysis.paired_permutation(a, b).p == row["smallest_p"] == 0.0625
    assert row["n"] == 5


def test_paired_tests_against_a_reference(frame):
    every = analysis.paired_tests(frame)
    assert len(every) == 28
    np.testing.assert_allclose(every["p_holm"], analysis.holm(every["p"]))
    against = analysis.paired_tests(frame, reference="ridge, isolated, rank 16")
    assert len(against) == 7
    assert set(against["a"]) == {"ridge, isolated, rank 16"}
    with pytest.raises(DataError, match="No configuration is called 'ridge'"):
        analysis.paired_tests(frame, reference="ridge")


def test_only_shared_seeds_are_paired(grid):
    frame = analysis.load_runs(grid, where={"learner": "isolated"}, config=["module.rank"])
    frame = frame[frame["module.rank"] == 4]
    missing = (frame["router"] == "ridge") & frame["seed_init"].isin([0, 3])
    (row,) = analysis.paired_tests(frame[~missing]).to_dict("records")
    assert row["n"] == 3
    assert row["smallest_p"] == 0.25
    apart = frame[(frame["router"] == "ridge") == (frame["seed_init"] < 2)]
    (row,) = analysis.paired_tests(apart).to_dict("records")
    assert row["n"] == 0
    assert np.isnan(row["p"])


def test_every_seed_counts_for_pairing(tmp_path, write_run):
    """One order, several initial weights: the runs of a pair agree in all three seeds."""
    for router in ("ridge", "prototype"):
        for init in range(3):
            run = write_run(tmp_path / "g" / f"{router}-{init}", router=router, seed=init)
            text = (run / "config.yaml").read_text().replace(f"order: {init}", "order: 0")
            (run / "config.yaml").write_text(text)
    frame = analysis.load_runs(tmp_path)
    assert set(frame["seed_order"]) == {0}
    (row,) = analysis.paired_tests(frame, by=["router"]).to_dict("records")
    assert row["n"] == 3
    runs = analysis.summary(frame).set_index(["router", "seed_init"])[ROUTED]
    assert row["difference"] == pytest.approx((runs["prototype"] - runs["ridge"]).mean())


def test_ranks_of_configurations(grid, frame):
    result = analysis.rank_configurations(frame)
    table = {
        (learner, router, rank): from_files(grid, learner, router, rank)
        for learner in ("isolated", "sequential")
        for router in ("ridge", "prototype")
        for rank in (4, 16)
    }
    ranks = pd.DataFrame(table).rank(axis=1, ascending=False).mean()
    for (learner, router, rank), expected in ranks.items():
        assert result.ranks[f"{router}, {learner}, rank {rank}"] == pytest.approx(expected)
    assert result.n == 5
    low = analysis.rank_configurations(frame, metric="forgetting_oracle")
    assert "isolated" in low.ranks.index[0]  # forgets nothing


def test_example_pairs_are_runs_of_equal_seeds(grid):
    fixed = {"learner": "isolated", "module.rank": 16}
    pairs = analysis.example_pairs(
        grid, {**fixed, "router": "ridge"}, {**fixed, "router": "prototype"}
    )
    result = analysis.compare_examples(pairs)
    a, b = (from_files(grid, "isolated", router, 16) for router in ("ridge", "prototype"))
    # all tasks have 40 test samples, so micro and macro averages agree
    assert result.difference == pytest.approx((a - b).mean())
    assert result.pairs["accuracy_a"].tolist() == pytest.approx(a.tolist())
    with pytest.raises(DataError, match="several runs with the same seeds"):
        analysis.example_pairs(grid, {"router": "ridge"}, {"router": "prototype"})
    with pytest.raises(DataError, match="no finished runs with the same seeds"):
        analysis.example_pairs(
            grid,
            {**fixed, "router": "ridge", "seed_init": 0},
            {**fixed, "router": "prototype", "seed_init": 1},
        )


# ---------------------------------------------------------------- tables


def markdown_cells(text):
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_markdown_table(grid, frame):
    table = analysis.paper_table(frame, metric=[ROUTED, "forgetting_routed"])
    head, _, *rows = markdown_cells(table.to_markdown())
    assert head == [
        *("router", "learner", "module.rank"),
        *("average accuracy routed (%) ↑", "forgetting routed (%) ↓"),
    ]
    assert len(rows) == 8
    best = next(row for row in rows if row[:3] == ["ridge", "isolated", "16"])
    values = from_files(grid, "isolated", "ridge", 16)
    interval = analysis.bootstrap_interval(values)
    number = f"{100 * values.mean():.1f} ± {100 * interval.half_width:.1f}"
    assert best[3] == f"**{number}**"
    seconds = [row for row in rows if row[3].startswith("<u>")]
    assert [row[:3] for row in seconds] == [["ridge", "isolated", "4"]]
    text = table.to_markdown()
    assert "Mean of 5 runs each (40 in all)." in text
    assert "The smallest p that 5 pairs can give is 0.062" in text
    assert "nothing here can be significant" in text
    assert "†" not in "".join(cell for row in rows for cell in row)


def test_significance_is_marked_where_the_seeds_allow_it(tmp_path, write_run):
    for learner in ("isolated", "sequential"):
        for seed in range(6):
            write_run(tmp_path / "g" / f"{learner}-{seed}", learner=learner, seed=seed)
    frame = analysis.load_runs(tmp_path)
    table = analysis.paper_table(frame, metric=[ROUTED], interval="range")
    rows = markdown_cells(table.to_markdown())[2:]
    assert re.fullmatch(r"\*\*[\d.]+ \[[\d.]+, [\d.]+\]\*\*", rows[0][1])
    assert rows[1][1].endswith("†")
    cell = table.cells[table.cells["row"] == 1].iloc[0]
    assert cell["p_holm"] == pytest.approx(2 / 2**6)
    assert "is 0.031." in table.to_markdown()
    named = analysis.paper_table(frame, metric=[ROUTED], reference="sequential")
    assert [c["significant"] for _, c in named.cells.iterrows()] == [True, False]
    assert "differs from sequential" in named.to_markdown()
    five = analysis.paper_table(frame[frame["seed_init"] < 5], metric=[ROUTED])
    assert five.cells["p_holm"].tolist()[1] == 0.0625
    assert not five.cells["significant"].any()
    strict = analysis.paper_table(frame, metric=[ROUTED], alpha=0.01)
    assert not strict.cells["significant"].any()
    with pytest.raises(DataError, match="Did you mean 'sequential'"):
        analysis.paper_table(frame, reference="sequentail")


def test_what_prints_alike_is_marked_alike(tmp_path, write_run):
    for name, router in (("a", "x"), ("b", "y"), ("c", "prototype")):
        write_run(tmp_path / "g" / name, router=router)
    frame = analysis.load_runs(tmp_path)
    routed = frame["metric"].eq("average_accuracy") & frame["routing"].eq("routed")
    frame.loc[routed & frame["run"].eq("b"), "value"] += 1e-5
    table = analysis.paper_table(frame, metric=[ROUTED])
    assert table.cells["rank"].tolist() == [2, 1, 1]  # the row of prototype comes first
    assert "±" not in table.to_markdown()  # one run has no interval
    equal = analysis.paper_table(frame, metric=["average_accuracy_oracle"])
    assert equal.cells["rank"].tolist() == [0, 0, 0]


def test_latex_table(frame):
    table = analysis.paper_table(frame, metric=[ROUTED, "stored_parameters"])
    lines = table.to_latex().splitlines()
    assert lines[0] == r"\begin{tabular}{lllrr}"
    assert [line for line in lines if line.endswith("rule")] == [
        *(r"\toprule", r"\midrule", r"\bottomrule")
    ]
    rows = [line for line in lines if line.endswith(r"\\")]
    assert len(rows) == 9
    assert all(line.count(" & ") == 4 for line in rows)
    assert r"average accuracy routed (\%) $\uparrow$" in rows[0]
    assert sum(r"\textbf{" in line for line in rows) == 1  # sizes are neither best nor worst
    assert r"\underline{" in table.to_latex()
    assert rows[0].endswith(r"& stored parameters \\")
    assert r"$\pm$" in rows[1]
    whole = table.to_latex(caption="50% of R&D_1", label="tab:a")
    assert r"\caption{50\% of R\&D\_1}" in whole
    assert whole.count(r"\begin{") == whole.count(r"\end{") == 2
    assert whole.count("{") == whole.count("}")
    # a bare percent sign would comment out the rest of its row
    body = whole.split("\n", 1)[1]
    assert not re.search(r"(?<!\\)%", body)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a_b", r"a\_b"),
        ("100%", r"100\%"),
        ("R&D #1 $x", r"R\&D \#1 \$x"),
        ("{a}~b^c", r"\{a\}\textasciitilde{}b\textasciicircum{}c"),
        ("back\\slash", r"back\textbackslash{}slash"),
        ("1.0 ± 0.2†", r"1.0 $\pm$ 0.2$^{\dagger}$"),
        ("−3 < x | y", r"$-$3 \textless{} x \textbar{} y"),
        ("[1] * [2, 3]", "{[}1{]} {*} {[}2, 3{]}"),
        ("a → b ≥ c ≤ d × 2", r"a $\rightarrow$ b $\geq$ c $\leq$ d $\times$ 2"),
        ("one\n \n\ntwo\r\nthree", "one two three"),
    ],
)
def test_escaping(text, expected):
    assert escape_latex(text) == expected


def test_names_are_escaped(tmp_path, write_run):
    write_run(tmp_path / "g" / "a", router="top_k & soft|100%")
    write_run(tmp_path / "g" / "b", router="ridge")
    table = analysis.paper_table(analysis.load_runs(tmp_path), metric=[ROUTED])
    assert r"top\_k \& soft\textbar{}100\%" in table.to_latex()
    assert r"| top_k & soft\|100% |" in table.to_markdown()


def test_latex_of_names_that_begin_like_an_option(tmp_path, write_run):
    for name, router in (("a", "[1]"), ("b", "*")):
        write_run(tmp_path / "g" / name, router=router)
    text = analysis.paper_table(analysis.load_runs(tmp_path)).to_latex(caption="Of\n\nlayers")
    assert not re.search(r"(\\\\|rule)\s*[\[*]", text)
    assert "\n{[}1{]} & " in text
    assert r"\caption{Of layers}" in text


def test_csv_holds_all_digits(grid, frame):
    table = analysis.paper_table(frame, metric=[ROUTED])
    rows = list(csv.DictReader(io.StringIO(table.to_csv())))
    assert len(rows) == 8
    for row in rows:
        values = from_files(grid, row["learner"], row["router"], row["module.rank"])
        assert float(row[ROUTED]) == pytest.approx(values.mean(), abs=1e-15)
        assert float(row[f"{ROUTED}_high"]) == analysis.bootstrap_interval(values).high
        assert row[f"{ROUTED}_n"] == "5"


# ---------------------------------------------------------------- several streams


def means(frame):
    """Accuracy of each router (columns) on each stream, the mean over seeds."""
    runs = analysis.summary(frame)
    return runs.pivot_table(index="stream", columns="router", values=ROUTED)


def test_best_and_tests_are_within_each_stream(streams):
    frame = analysis.load_runs(streams)
    table = analysis.paper_table(frame, metric=[ROUTED], interval="none")
    assert list(table.rows.columns) == ["router", "stream"]
    cells = table.cells.assign(**{c: table.rows[c].to_numpy() for c in table.rows})
    for stream, expected in means(frame).iterrows():
        mine = cells[cells["stream"] == stream].set_index("router")
        assert mine["estimate"].to_dict() == pytest.approx(expected.to_dict())
        assert mine["rank"].to_dict() == {expected.idxmax(): 1, expected.idxmin(): 2}
        values = [
            frame[(frame["stream"] == stream) & (frame["router"] == router)]
            for router in ("ridge", "prototype")
        ]
        p = analysis.paired_permutation(*(analysis.summary(v)[ROUTED] for v in values)).p
        # Holm over the comparisons of all three streams
        assert mine.loc[expected.idxmin(), "p_holm"] == min(1.0, 3 * p)
    text = " ".join(table.notes)
    assert "Bold: best of each stream" in text
    assert "so it speaks of seeds only; Holm over 3 comparisons" in text
    assert "The smallest p that 2 pairs can give is 0.5, 1 after correction" in text
    assert "that takes 7 pairs" in text  # 3 * 2 / 2^7 = 0.047
    ranks = means(frame).rank(axis=1, ascending=False).mean()
    assert "over 3 streams, means over shared seeds ranked within each (Demšar 2006): " in text
    for router, rank in ranks.items():
        assert f"{router} {rank:.2f}" in text
    named = analysis.paper_table(frame, metric=[ROUTED], reference="prototype")
    assert "differs from prototype" in " ".join(named.notes)


def test_a_stream_is_one_number_however_many_seeds(streams):
    """Six pairs of seeds could reach p = 0.031; three streams cannot."""
    frame = analysis.load_runs(streams)
    (row,) = analysis.paired_tests(frame).to_dict("records")
    assert (row["n"], row["unit"], row["smallest_p"]) == (3, "stream", 0.25)
    each = means(frame)
    assert row["p"] == analysis.wilcoxon(each[row["a"]], each[row["b"]]).p
    assert row["difference"] == pytest.approx((each[row["a"]] - each[row["b"]]).mean())
    result = analysis.rank_configurations(frame)
    assert (result.n, result.unit) == (3, "stream")
    assert result.ranks.to_dict() == pytest.approx(
        each.rank(axis=1, ascending=False).mean().to_dict()
    )
    assert "Friedman over 3 streams" in result.note()
    # seeds that only one of them has do not count, nor a stream without any shared
    alone = (frame["router"] == "ridge") & (
        (frame["stream"] == "hard") | ((frame["stream"] == "easy") & (frame["seed_init"] == 0))
    )
    (few,) = analysis.paired_tests(frame[~alone]).to_dict("records")
    assert (few["n"], few["smallest_p"]) == (2, 0.5)


def test_means_over_streams(streams):
    frame = analysis.load_runs(streams)
    for table in (
        analysis.paper_table(frame, metric=[ROUTED], strata="stream"),
        analysis.paper_table(frame, metric=[ROUTED], by=["router"]),
    ):
        assert len(table.rows) == 2
        assert table.cells["estimate"].tolist() == pytest.approx(
            means(frame).mean()[table.rows["router"]].tolist()
        )
        text = " ".join(table.notes)
        assert "Wilcoxon's signed-rank test over streams" in text
        assert "that takes 6 pairs" in text
        assert "weighs more" not in text
    less = frame[(frame["stream"] != "hard") | (frame["router"] == "ridge")]
    assert "weighs more" in " ".join(analysis.paper_table(less, strata="stream").notes)


def test_groups_of_one_stream_each(streams):
    """Each stream in a group of its own, as runs lie by default."""
    frame = analysis.load_runs(streams)
    frame["group"] = frame["stream"]
    (row,) = analysis.paired_tests(frame).to_dict("records")
    assert (row["n"], row["a"], row["b"]) == (3, "prototype", "ridge")


def test_one_stream_speaks_of_seeds_only(frame):
    assert set(analysis.paired_tests(frame)["unit"]) == {"seed"}
    assert "Friedman over 5 seeds of one stream (so about its seeds only)" in (
        analysis.rank_configurations(frame).note()
    )
    table = analysis.paper_table(frame, metric=[ROUTED])
    assert "over the seeds of one stream, so it speaks of seeds only" in " ".join(table.notes)


def test_a_table_of_runs_that_cannot_be_paired(tmp_path, write_run):
    """Three routers over six seeds, one of them tested on other examples."""
    for router in ("ridge", "prototype", "other"):
        for seed in range(6):
            run = write_run(tmp_path / "g" / f"{router}-{seed}", router=router, seed=seed)
            if router == "other":
                text = (run / "stream.json").read_text()
                text = re.sub(
                    '"test_digest": "[0-9a-f]+"', '"test_digest": "0123456789abcdef"', text
                )
                (run / "stream.json").write_text(text)
    frame = analysis.load_runs(tmp_path)
    table = analysis.paper_table(frame, metric=[ROUTED], reference="ridge")
    said = "Tests leave out 6 runs not known to be tested on the same examples as most: "
    assert f"{said}g/other-0, g/other-1, g/other-2 and 3 more." in table.notes
    assert any(note.startswith("No best or second: the rows were not all") for note in table.notes)
    assert (table.cells["rank"] == 0).all()
    alone = analysis.paper_table(frame, metric=[ROUTED], reference="other")
    assert "leave out" not in " ".join(alone.notes)  # nothing was tested
    assert table.cells["estimate"].notna().all()
    p = table.cells.set_index(table.rows["router"])["p_holm"]
    whole = analysis.paper_table(frame[frame["router"] != "other"], reference="ridge").cells
    assert p["prototype"] == whole["p_holm"].iloc[2]
    assert p[["ridge", "other"]].isna().all()


def retest(run, word):
    """Make a run one of other test examples."""
    text = (run / "stream.json").read_text()
    (run / "stream.json").write_text(re.sub('"test_digest": "...', f'"test_digest": "{word}', text))


@pytest.mark.parametrize(
    ("words", "marked"),
    [
        ({}, True),
        ({"ridge-0": "1", "prototype-0": "1"}, True),  # tests that go by the seed
        ({"ridge-0": "1", "ridge-1": "2", "prototype-1": "2"}, True),  # prototype-0 is missing
        ({"ridge-0": "1", "ridge-1": "1"}, False),
        ({"prototype-1": "1"}, False),
        ({"ridge-0": None, "prototype-0": None}, False),  # unknown
    ],
)
def test_only_rows_of_the_same_tests_are_ranked(tmp_path, write_run, words, marked):
    for router in ("ridge", "prototype"):
        for seed in range(2):
            name = f"{router}-{seed}"
            if "ridge-0" in words and "ridge-1" in words and name == "prototype-0":
                continue
            run = write_run(tmp_path / "g" / name, router=router, seed=seed)
            if name in words and words[name] is None:
                (run / "stream.json").unlink()
            elif name in words:
                retest(run, words[name])
    table = analysis.paper_table(analysis.load_runs(tmp_path), metric=[ROUTED, "module_parameters"])
    assert (table.cells["rank"] > 0).any() == marked
    assert ("No best or second" in " ".join(table.notes)) != marked
    assert ("Bold" in " ".join(table.notes)) == marked
    size = analysis.paper_table(analysis.load_runs(tmp_path), metric=["module_parameters"])
    assert "No best" not in " ".join(size.notes)


def test_streams_of_other_tests_are_named(streams, tmp_path):
    shutil.copytree(streams, tmp_path / "runs")
    retest(tmp_path / "runs" / "g" / "easy-ridge-0", "1")
    table = analysis.paper_table(analysis.load_runs(tmp_path), metric=[ROUTED])
    easy = table.cells[(table.rows["stream"] == "easy").to_numpy()]
    assert (table.cells["rank"] > 0).sum() == 4
    assert (easy["rank"] == 0).all()
    text = " ".join(table.notes)
    assert "No best or second of easy: " in text
    assert "Tests leave out 1 run not known" in text
    few = analysis.load_runs(tmp_path)
    few = few[(few["router"] == "ridge") != (few["stream"] == "easy")]
    text = " ".join(analysis.paper_table(few, metric=[ROUTED]).notes)
    assert "No stream has runs of all 2 methods with the same seeds." in text


def test_a_single_pair(tmp_path, write_run):
    for router in ("ridge", "prototype"):
        write_run(tmp_path / "g" / router, router=router)
    text = analysis.paper_table(analysis.load_runs(tmp_path), metric=[ROUTED]).to_markdown()
    assert "The smallest p that 1 pair can give is 1" in text
    assert analysis.paired_permutation([1.0], [0.0]).note().startswith("1 pair, ")


@pytest.mark.parametrize(("alpha", "family", "pairs"), [(0.05, 1, 6), (0.05, 3, 7), (0.125, 1, 5)])
def test_pairs_needed(alpha, family, pairs):
    assert pairs_needed(alpha, family) == pairs
    assert analysis.smallest_p(pairs) * family < alpha <= analysis.smallest_p(pairs - 1) * family


def test_interquartile_mean_in_a_table(grid, frame):
    table = analysis.paper_table(frame, metric=[ROUTED], statistic="iqm")
    values = from_files(grid, "isolated", "ridge", 16)
    assert f"{100 * analysis.interquartile_mean(values):.1f} ±" in table.to_markdown()
    assert "Interquartile mean of 5 runs" in table.to_markdown()
    with pytest.raises(DataError, match="interval is 'std'"):
        analysis.paper_table(frame, interval="std")
