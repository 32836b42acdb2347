import json

import numpy as np
import pandas as pd
import pytest
import scipy.stats
import yaml

import analysis
from cl_peft.errors import DataError


@pytest.fixture
def two(tmp_path, write_run):
    a = write_run(tmp_path / "g" / "first", router="prototype", rank=4)
    b = write_run(tmp_path / "g" / "second", router="ridge", rank=8)
    return a, b


def last(run):
    rows = pd.read_parquet(run / "predictions.parquet")
    return rows[rows["after_task"] == 4].set_index(["eval_task", "row"])


def test_configuration_difference(two):
    found = analysis.compare_runs(*two, resamples=10).configuration
    assert found.to_dict("index") == {
        "module.rank": {"a": 4, "b": 8},
        "router.name": {"a": "prototype", "b": "ridge"},
    }
    config = yaml.safe_load((two[1] / "config.yaml").read_text())
    config["module"]["dropout"] = 0.1
    config["paths"] = {"runs": "elsewhere"}  # changes nothing that is computed
    (two[1] / "config.yaml").write_text(yaml.safe_dump(config))
    more = analysis.compare_runs(*two, resamples=10).configuration
    assert set(more.index) == {"module.rank", "router.name", "module.dropout"}
    assert more.loc["module.dropout"].tolist() == [None, 0.1]


def test_numbers_are_those_of_the_run_folders(two):
    result = analysis.compare_runs(*two, resamples=10)
    table = result.metrics.set_index("metric")
    for side, run in zip("ab", two, strict=True):
        stored = pd.read_parquet(run / "results.parquet")
        final = stored[(stored["after_task"] == 4) & stored["eval_task"].isna()]
        for metric, row in table.iterrows():
            name, _, routing = metric.rpartition("_")
            if routing not in ("oracle", "routed"):
                name, routing = metric, "none"
            chosen = final[(final["metric"] == name) & (final["routing"] == routing)]
            assert row[side] == pytest.approx(chosen["value"].item()), metric
    np.testing.assert_allclose(table["difference"], table["b"] - table["a"])


def test_intervals_pair_the_examples(two):
    result = analysis.compare_runs(*two, resamples=4000)
    a, b = (last(run) for run in two)
    right_a, right_b = (x["routed_prediction"] == x["label"] for x in (a, b))
    d = right_b.astype(float) - right_a.astype(float)
    row = result.metrics.set_index("metric").loc["average_accuracy_micro_routed"]
    assert row["difference"] == pytest.approx(d.mean())
    # within tasks of equal size, all resampled apart
    per_task = [d.loc[task].to_numpy() for task in (1, 2, 3, 4)]
    rng = np.random.default_rng(5)
    draws = np.mean([rng.choice(x, (4000, 40)).mean(axis=1) for x in per_task], axis=0)
    assert (row["low"], row["high"]) == pytest.approx(np.quantile(draws, [0.025, 0.975]), abs=0.012)
    # paired: far narrower than if the two runs had been drawn apart
    apart = 1.96 * np.sqrt((right_a.var() + right_b.var()) / 160)
    assert row["high"] - row["low"] < 1.7 * apart
    # tasks of equal size: the macro average is the micro average, in every draw
    macro = result.metrics.set_index("metric").loc["average_accuracy_routed"]
    assert macro[["low", "high"]].tolist() == pytest.approx(row[["low", "high"]].tolist())
    drift = result.metrics.set_index("metric").loc["forgetting_routed"]
    assert drift["low"] <= drift["difference"] <= drift["high"]
    task = result.tasks.loc[3]
    assert task["difference"] == pytest.approx(per_task[2].mean())
    theirs = scipy.stats.bootstrap(
        (per_task[2],), np.mean, method="percentile", rng=np.random.default_rng(0)
    ).confidence_interval
    assert (task["low"], task["high"]) == pytest.approx((theirs.low, theirs.high), abs=0.03)


def test_a_run_against_itself(two):
    result = analysis.compare_runs(two[0], two[0], resamples=50)
    assert result.configuration.empty
    assert result.changed.empty
    assert (result.metrics[["difference", "low", "high"]] == 0).all(axis=None)
    assert result.mcnemar_p == 1.0
    assert "No difference." in result.to_text()
    assert "0 gained, 0 lost" in result.to_text()


def test_changed_examples(two):
    result = analysis.compare_runs(*two, resamples=0)
    a, b = (last(run) for run in two)
    right_a, right_b = (x["routed_prediction"] == x["label"] for x in (a, b))
    changed = result.changed.set_index(["eval_task", "row"])
    assert set(changed.index) == set(a.index[right_a != right_b])
    gained = changed[changed["outcome"] == "gained"]
    assert set(gained.index) == set(a.index[~right_a & right_b])
    names = json.loads((two[0] / "stream.json").read_text())["class_names"]
    for key, row in changed.iterrows():
        assert row["label"] == names[a.loc[key, "label"]]
        assert row["prediction_a"] == names[a.loc[key, "routed_prediction"]]
        assert row["prediction_b"] == names[b.loc[key, "routed_prediction"]]
        assert row["routed_task_b"] == b.loc[key, "routed_task"]
    lost = len(changed) - len(gained)
    p = scipy.stats.binomtest(lost, len(changed)).pvalue
    assert result.mcnemar_p == pytest.approx(p)
    assert result.metrics["low"].isna().all()  # no resamples, no interval
    text = result.to_text(most=2)
    assert f"{len(gained)} gained, {lost} lost (McNemar p {p:.2g})." in text
    assert f"... and {len(changed) - 2} more." in text
    assert text.startswith("# g/first (a) and g/second (b), after task 4")


def test_runs_of_different_length_are_compared_where_both_are(tmp_path, write_run):
    a = write_run(tmp_path / "g" / "a")
    b = write_run(tmp_path / "g" / "b", done=2, state="failed", router="prototype")
    result = analysis.compare_runs(a, b, resamples=10)
    assert result.after_task == 2
    assert "a has 4 tasks, b 2; compared at 2." in result.notes
    stored = pd.read_parquet(b / "tasks" / "002" / "results.parquet")
    routed = stored[stored["eval_task"].isna() & stored["routing"].eq("routed")]
    forgetting = routed[routed["metric"] == "forgetting"]["value"].item()
    assert result.metrics.set_index("metric").loc["forgetting_routed", "b"] == forgetting
    with pytest.raises(DataError, match="no evaluation after task 3 in both"):
        analysis.compare_runs(a, b, after_task=3)
    empty = write_run(tmp_path / "g" / "c", done=0, state="refused")
    with pytest.raises(DataError, match="g/c has 0"):
        analysis.compare_runs(a, empty)


def test_another_order_is_matched_by_class_and_row(two):
    """The second run learned the same classes under other numbers and in other tasks."""
    stream = json.loads((two[1] / "stream.json").read_text())
    stream["class_names"] = stream["class_names"][::-1]
    (two[1] / "stream.json").write_text(json.dumps(stream))
    result = analysis.compare_runs(*two)
    assert "Other tasks: " in result.notes[0]
    assert result.tasks.empty
    assert result.metrics["low"].isna().all()
    a, b = (last(run).reset_index() for run in two)
    names = [f"topic {c}" for c in range(8)]
    a["name"] = a["label"].map(dict(enumerate(names)))
    b["name"] = b["label"].map(dict(enumerate(names[::-1])))
    shared = a.merge(b, on=["name", "row"])
    assert f"{len(shared)} of 160 and 160" in result.notes[0]


def test_a_learner_that_was_evaluated_once(tmp_path, write_run):
    a = write_run(tmp_path / "g" / "joint", learner="joint", router="none", only_last=True)
    b = write_run(tmp_path / "g" / "isolated")
    table = analysis.compare_runs(a, b, resamples=20).metrics.set_index("metric")
    assert np.isnan(table.loc["forgetting_routed", ["a", "difference", "low"]].astype(float)).all()
    assert table.loc["average_accuracy_routed", ["difference", "low", "high"]].notna().all()
