import numpy as np
import pandas as pd
import pytest

import analysis
from analysis.tables import configuration_labels
from cl_peft import metrics
from cl_peft.errors import DataError


@pytest.fixture
def frame(sweep):
    return analysis.load_runs(sweep)


@pytest.fixture
def one(frame):
    return frame[frame["run"] == "sequential-1"]


def test_accuracy_matrix(sweep, one):
    matrix = analysis.accuracy_matrix(one, "oracle")
    assert list(matrix.index) == list(matrix.columns) == [1, 2, 3, 4]
    assert np.isnan(matrix.to_numpy()[np.triu_indices(4, 1)]).all()
    predictions = analysis.load_predictions(sweep / "spine" / "sequential-1")
    cell = predictions[(predictions["after_task"] == 3) & (predictions["eval_task"] == 2)]
    assert matrix.loc[3, 2] == (cell["oracle_prediction"] == cell["label"]).mean()
    from_folder = analysis.accuracy_matrix(sweep / "spine" / "sequential-1", "oracle")
    pd.testing.assert_frame_equal(matrix, from_folder)


def test_accuracy_matrix_of_other_metrics_and_of_half_a_run(tmp_path, write_run, one):
    counts = analysis.accuracy_matrix(one, "none", metric="n")
    assert counts.loc[4].tolist() == [40] * 4
    run = write_run(tmp_path / "g" / "half", done=2, state="failed")
    assert analysis.accuracy_matrix(run).shape == (2, 2)


def test_accuracy_matrix_of_a_learner_evaluated_once(tmp_path, write_run):
    run = write_run(tmp_path / "g" / "joint", only_last=True)
    matrix = analysis.accuracy_matrix(run, "routed")
    assert matrix.shape == (4, 4)
    assert matrix.loc[:3].isna().all(axis=None)
    assert matrix.loc[4].notna().all()


def test_one_run_is_asked_for_by_name(frame):
    with pytest.raises(DataError, match=r"found 6 \(isolated-0"):
        analysis.accuracy_matrix(frame)
    with pytest.raises(DataError, match="found 0"):
        analysis.accuracy_matrix(frame.iloc[:0])
    with pytest.raises(DataError, match="no cells of metric 'accuracy' with routing 'none'"):
        analysis.accuracy_matrix(frame[frame["run"] == "isolated-0"], "none")


def test_summary_holds_the_final_numbers(frame, one):
    table = analysis.summary(frame).set_index("run")
    assert len(table) == 6
    row = table.loc["sequential-1"]
    routed = analysis.accuracy_matrix(one, "routed")
    assert row["tasks"] == 4
    assert row["average_accuracy_routed"] == pytest.approx(routed.loc[4].mean())
    assert row["forgetting_routed"] == pytest.approx(metrics.forgetting(routed))
    assert row["average_accuracy_micro_routed"] == pytest.approx(
        row["average_accuracy_micro_oracle"] - row["routing_loss"] + row["misroute_luck"]
    )
    assert (table.loc[table["learner"] == "isolated", "forgetting_oracle"] == 0.0).all()


def test_summary_of_runs_that_stopped(tmp_path, write_run):
    write_run(tmp_path / "g" / "whole")
    write_run(tmp_path / "g" / "first-task", done=1, state="failed", seed=1)
    table = analysis.summary(analysis.load_runs(tmp_path)).set_index("run")
    assert table["tasks"].to_dict() == {"whole": 4, "first-task": 1}
    assert np.isnan(table.loc["first-task", "forgetting_routed"])
    assert table.loc["first-task", "average_accuracy_oracle"] > 0.5


def test_aggregate_over_seeds(frame):
    table = analysis.aggregate(frame, metric=["average_accuracy_routed"])
    assert table["learner"].tolist() == ["isolated", "sequential"]
    runs = analysis.summary(frame)
    values = runs[runs["learner"] == "sequential"]["average_accuracy_routed"]
    row = table.set_index("learner").loc["sequential"]
    assert row["mean"] == pytest.approx(values.mean())
    assert row["std"] == pytest.approx(np.std(values, ddof=1))
    assert row["n"] == 3


def test_aggregate_counts_finished_runs_only(tmp_path, write_run):
    write_run(tmp_path / "g" / "a", seed=0)
    write_run(tmp_path / "g" / "b", seed=1, done=2, state="failed")
    frame = analysis.load_runs(tmp_path)
    row = analysis.aggregate(frame, metric=["average_accuracy_oracle"]).iloc[0]
    assert row["n"] == 1
    assert np.isnan(row["std"])
    both = analysis.aggregate(frame, states=["finished", "failed"])
    assert both["n"].max() == 2
    with pytest.raises(DataError, match=r"No run is refused \(found: failed, finished\)"):
        analysis.aggregate(frame, states=["refused"])


def test_aggregate_refuses_to_average_what_is_not_a_seed(tmp_path, write_run):
    write_run(tmp_path / "g" / "a", rank=4)
    write_run(tmp_path / "g" / "b", rank=8)
    with pytest.raises(DataError, match=r"something else differs: a, b"):
        analysis.aggregate(analysis.load_runs(tmp_path))
    told_apart = analysis.load_runs(tmp_path, config=["module.rank"])
    table = analysis.aggregate(told_apart, metric=["average_accuracy_routed"])
    assert table["module.rank"].tolist() == [4, 8]


def test_error_decomposition(sweep, one):
    table = analysis.error_decomposition(one)
    assert list(table.index) == [1, 2, 3, 4, "all"]
    routed = analysis.accuracy_matrix(one, "routed")
    np.testing.assert_allclose(table["accuracy"].iloc[:4], routed.loc[4])
    np.testing.assert_allclose(
        table["accuracy"],
        table["oracle_accuracy"] - table["routing_loss"] + table["misroute_luck"],
        atol=1e-12,
    )
    assert table.loc["all", "n"] == 160
    assert (table.iloc[:4].sum()["n_lucky"]) == table.loc["all", "n_lucky"]
    assert list(analysis.error_decomposition(one, after_task=2).index) == [1, 2, "all"]
    with pytest.raises(DataError, match="no counts after task 9"):
        analysis.error_decomposition(one, after_task=9)
    with pytest.raises(DataError, match=r"lacks n_routed_right_oracle_right, .* metric filter"):
        analysis.error_decomposition(one[one["metric"] == "n"])


def test_forgetting_split_agrees_with_what_the_run_stored(one):
    table = analysis.forgetting_split(one)
    for column, metric in (
        ("module_drift", "forgetting_module_drift"),
        ("routing_drift", "forgetting_routing_drift"),
    ):
        stored = one[(one["metric"] == metric) & one["eval_task"].isna()]
        np.testing.assert_allclose(table[column], stored["value"])
    assert table.loc[1].isna().all()
    assert table.loc[4, "module_drift"] > 0.1


def test_misrouted_and_confusion_agree(sweep):
    predictions = analysis.load_predictions(sweep / "spine" / "isolated-0")
    wrong = analysis.misrouted(predictions)
    confusion = analysis.routing_confusion(predictions)
    assert confusion.to_numpy().sum() == 160
    assert len(wrong) == 160 - np.trace(confusion.to_numpy()[:, :4]) > 0
    assert (wrong["routed_task"] != wrong["eval_task"]).all()
    assert wrong["margin"].is_monotonic_decreasing
    assert (wrong["routed_right"] == (wrong["routed_prediction"] == wrong["label"])).all()
    assert analysis.misrouted(predictions, after_task=1).empty


def test_no_task_is_not_a_misroute(sweep):
    predictions = analysis.load_predictions(sweep / "spine" / "isolated-0")
    nowhere = predictions.assign(routed_task=0)
    assert analysis.misrouted(nowhere).empty
    assert analysis.routing_confusion(nowhere)["none"].tolist() == [40] * 4


def test_forgetting_per_task_averages_to_the_split(frame):
    for _, one in frame.groupby("run"):
        table = analysis.forgetting_per_task(one)
        assert list(table.index) == [1, 2, 3]
        split = analysis.forgetting_split(one).loc[4]
        for column in table.columns:
            assert table[column].mean() == pytest.approx(split[column], abs=1e-12)
        oracle = analysis.accuracy_matrix(one, "oracle")
        routed = analysis.accuracy_matrix(one, "routed")
        best = routed.loc[2:3, 2].idxmax()
        assert table.loc[2, "module_drift"] == pytest.approx(oracle.loc[best, 2] - oracle.loc[4, 2])
        assert table.loc[2, "forgetting"] == pytest.approx(
            routed.loc[2:3, 2].max() - routed.loc[4, 2]
        )


def test_costs(tmp_path, write_run):
    write_run(tmp_path / "g" / "many", rank=4)
    write_run(tmp_path / "g" / "one", rank=4, learner="sequential")
    write_run(tmp_path / "g" / "young", rank=4, done=1, state="running", seed=1)
    table = analysis.costs(analysis.load_runs(tmp_path)).set_index("run")
    unit = 4 * 9216 + 770
    assert table["trainable_parameters"].tolist() == [unit] * 3
    assert table["stored_parameters"].to_dict() == {"many": 4 * unit, "one": unit, "young": unit}
    assert set(table["router_parameters"]) == {1024}


def test_labels_name_what_varies():
    rows = pd.DataFrame(
        {
            "learner": ["isolated"] * 3,
            "router": ["ridge", "ridge", "oracle"],
            "module.alpha": [8.0, np.nan, 16.5],
            "router.alpha": [1.0, 2.0, 2.0],
            "module.rank": [4, 4, 8],
        }
    )
    keys = list(rows.columns)
    assert configuration_labels(rows, keys).tolist() == [
        "ridge, module.alpha 8, router.alpha 1, rank 4",
        "ridge, router.alpha 2, rank 4",
        "oracle, module.alpha 16.5, router.alpha 2, rank 8",
    ]
    assert configuration_labels(rows.head(1), keys).tolist() == [""]


def test_abstention_curve_counts_what_is_left(sweep):
    predictions = analysis.load_predictions(sweep / "spine" / "sequential-1", after_task=-1)
    curve = analysis.abstention_curve(predictions)
    assert curve["coverage"].iloc[-1] == 1.0
    assert (
        curve["accuracy"].iloc[-1]
        == (predictions["routed_prediction"] == predictions["label"]).mean()
    )
    for row in (0, 20, 100):
        kept = predictions[predictions["margin"] >= curve["threshold"][row]]
        assert curve["answered"][row] == len(kept)
        assert curve["accuracy"][row] == pytest.approx(
            (kept["routed_prediction"] == kept["label"]).mean()
        )
        assert curve["router_accuracy"][row] == pytest.approx(
            (kept["routed_task"] == kept["eval_task"]).mean()
        )
    tied = analysis.abstention_curve(predictions.assign(margin=1.0))
    assert tied["answered"].tolist() == [160]  # equal margins are answered together
    with pytest.raises(DataError, match="no 'margin' for every sample"):
        analysis.abstention_curve(predictions.assign(margin=np.nan))


def test_task_similarity():
    means = np.array([[2.0, 1.0, 0.0], [0.0, 1.0, 4.0], [1.0, 1.0, 1.0]])
    cosine = analysis.task_similarity(means)
    centred = means - means.mean(axis=0)
    for i in range(3):
        for j in range(3):
            expected = (
                centred[i] @ centred[j] / np.sqrt((centred[i] ** 2).sum() * (centred[j] ** 2).sum())
            )
            assert cosine.loc[i + 1, j + 1] == pytest.approx(expected)
    plain = analysis.task_similarity(means, centre=False)
    assert plain.loc[1, 3] == pytest.approx(3 / np.sqrt(15))
    assert np.isnan(analysis.task_similarity([[1.0, 1.0], [1.0, 1.0]])).all(axis=None)
    with pytest.raises(DataError, match="must be"):
        analysis.task_similarity([1.0, 2.0])


def test_markdown():
    frame = pd.DataFrame({"name": ["a|b", "c"], "x": [0.12345, np.nan], "n": [3, 4]})
    assert analysis.to_markdown(frame, digits=2) == (
        "| name | x | n |\n| --- | --: | --: |\n| a\\|b | 0.12 | 3 |\n| c |  | 4 |\n"
    )
    named = pd.DataFrame({"x": [-0.00001]}, index=pd.RangeIndex(1, 2, name="task"))
    assert analysis.to_markdown(named).splitlines()[-1] == "| 1 | 0.000 |"
