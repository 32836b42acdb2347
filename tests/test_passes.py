"""How often a test example passes the backbone: bounded, whatever the number of tasks, and said."""

import json
import math

import pandas as pd
import pytest
from fake_run import write_run
from running import FIVE, run

from cl_peft.view import ResultView


def moved(folder):
    """Pairs of a test example and another task's module that ever answered it."""
    frame = pd.read_parquet(folder / "predictions.parquet")
    wrong = frame[frame["routed_task"] != frame["eval_task"]]
    return len(wrong[["eval_task", "row", "routed_task"]].drop_duplicates())


def test_an_isolated_run_passes_each_test_example_twice_and_moved_ones_again(places):
    folder = run("debug=smoke", "router=prototype", *FIVE, "stream.noise=0.9", *places)
    view = ResultView.from_folder(folder)
    tests = sum(t["test"] for t in json.loads((folder / "stream.json").read_text())["tasks"])
    assert moved(folder) > 0
    assert view.passes() == pytest.approx(2 + moved(folder) / tests)
    assert (
        f"{view.passes():.2f} through the backbone per test example" in dict(view.facts())["passes"]
    )


def test_without_features_it_is_once(places):
    folder = run("debug=smoke", "router=oracle", *FIVE, *places)
    assert ResultView.from_folder(folder).passes() == 1.0


def test_of_a_run_that_did_not_count_nothing_is_said(tmp_path):
    view = ResultView.from_folder(write_run(tmp_path / "group" / "run"))
    assert math.isnan(view.passes())
    assert "passes" not in view.time()
