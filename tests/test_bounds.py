"""Baselines by themselves, and where a run stands between them."""

import json
import math
import shutil

import numpy as np
import pandas as pd
import pytest
from running import config, run

from cl_peft import bounds
from cl_peft.config import run_id, validate

SMALL = (
    *("debug=smoke", "stream.train_per_class=10", "stream.test_per_class=4", "trainer.epochs=8"),
    *("threads=1", "tracker=disabled"),
)


@pytest.fixture(scope="module")
def bounded(tmp_path_factory):
    root = tmp_path_factory.mktemp("bounds")
    places = (f"paths.runs={root / 'runs'}", f"paths.cache={root / 'cache'}")
    return run(*SMALL, *places, "experiment=with_bounds"), places


def matrix(folder):
    rows = pd.read_parquet(folder / "results.parquet")
    rows = rows[(rows.metric == "accuracy") & (rows.routing == "routed")].dropna()
    out = np.full((3, 3), np.nan)
    out[rows.after_task - 1, rows.eval_task.astype(int) - 1] = rows.value
    return out


def test_numbers_come_from_the_baselines_folders(bounded):
    folder, _ = bounded
    names = json.loads((folder / "bounds.json").read_text())
    assert set(names) == {"lower", "upper", "frozen"}
    R = {name: matrix(folder.parent / run_name) for name, run_name in names.items()}
    own = matrix(folder)
    found = bounds.read(folder)
    accuracy = {name: m[2].mean() for name, m in R.items()}
    assert found.accuracy == pytest.approx(accuracy)
    share = (own[2].mean() - accuracy["lower"]) / (accuracy["upper"] - accuracy["lower"])
    assert found.share_of_gap == pytest.approx(share)
    assert found.intransigence == pytest.approx(np.diag(R["upper"] - own).mean())
    assert found.gain_over_frozen == pytest.approx(np.diag(own - R["frozen"]).mean())
    assert math.isnan(found.forward_transfer)  # heads come with tasks
    report = (folder / "report.md").read_text()
    assert "share of the gap" in report
    assert f"intransigence {100 * found.intransigence:.1f}" in report


def test_baselines_are_those_learners_and_nothing_else_changes(bounded):
    main = validate(config(*SMALL))
    for name, other in bounds.baselines(main).items():
        assert other["learner"]["name"] == {
            "lower": "sequential", "upper": "joint", "frozen": "frozen"
        }[name]  # fmt: skip
        for axis in ("stream", "backbone", "optimizer", "trainer", "seed"):
            assert other[axis] == main[axis]


def test_a_baseline_that_cannot_stand_beside_a_run_is_left_out(bounded, tmp_path):
    group = shutil.copytree(bounded[0].parent, tmp_path / "group")
    folder = group / bounded[0].name
    names = json.loads((folder / "bounds.json").read_text())
    whole = bounds.read(folder)
    stream = group / names["upper"] / "stream.json"
    content = json.loads(stream.read_text())
    content["fingerprint"] = "0" * 64  # its data have changed since
    stream.write_text(json.dumps(content))
    shutil.rmtree(group / names["lower"])
    found = bounds.read(folder)
    assert found.accuracy == {"frozen": whole.accuracy["frozen"]}
    assert found.gain_over_frozen == whole.gain_over_frozen
    assert math.isnan(found.share_of_gap)
    assert math.isnan(found.intransigence)
    status = group / names["frozen"] / "status.json"
    status.write_text(status.read_text().replace("finished", "failed"))
    assert bounds.read(folder) is None


def test_again_everything_is_recognised(bounded, capsys):
    folder, places = bounded
    before = {p: p.stat().st_mtime_ns for p in folder.parent.glob("*/results.parquet")}
    assert run(*SMALL, *places, "experiment=with_bounds") == folder
    assert {p: p.stat().st_mtime_ns for p in folder.parent.glob("*/results.parquet")} == before
    assert len(before) == 4


def test_a_baseline_is_not_measured_against_itself():
    sequential = validate(config(*SMALL, "learner=sequential"))
    assert set(bounds.baselines(sequential)) == {"upper", "frozen"}
    frozen = validate(config(*SMALL, "learner=frozen"))
    assert set(bounds.baselines(frozen)) == {"frozen"}


def test_bounds_are_no_part_of_a_runs_name():
    with_, without = config(*SMALL, "bounds=on"), config(*SMALL)
    assert run_id(validate(with_)) == run_id(validate(without))
