"""Nothing is trained twice: modules are looked up by what their training depends on."""

import json

import pandas as pd
import pytest
from running import run

from cl_peft.learners.base import Learner

SMALL = (
    *("debug=smoke", "router=ridge", "router.projection=48", "stream.train_per_class=10"),
    *("stream.test_per_class=4", "trainer.epochs=1", "threads=1", "tracker=disabled"),
)


def reused(folder):
    tasks = json.loads((folder / "timing.json").read_text())["tasks"]
    return [bool(t["reused"]) for t in tasks]


def modules(folder):
    return {p.parent.name: p.read_bytes() for p in folder.glob("tasks/*/module.safetensors")}


def tables(folder):
    frames = [pd.read_parquet(folder / f"{n}.parquet") for n in ("results", "predictions")]
    return [f.drop(columns="run", errors="ignore") for f in frames]


@pytest.fixture
def places(tmp_path):
    return (f"paths.runs={tmp_path / 'runs'}", f"paths.cache={tmp_path / 'cache'}")


def test_another_router_trains_nothing(places):
    first = run(*SMALL, *places)
    small = [o for o in SMALL if not o.startswith("router")]
    other = run(*small, *places, "router=prototype")
    assert reused(first) == [False] * 3
    assert reused(other) == [True] * 3
    assert modules(first) == modules(other)


@pytest.mark.parametrize("learner", ["isolated", "sequential", "joint", "frozen"])
def test_a_run_from_the_cache_equals_one_without(tmp_path, learner):
    options = (*SMALL, f"learner={learner}", f"paths.cache={tmp_path / 'cache'}")
    trained = run(*options, f"paths.runs={tmp_path / 'a'}")
    looked_up = run(*options, f"paths.runs={tmp_path / 'b'}")
    alone = run(*options, "cache=off", f"paths.runs={tmp_path / 'c'}")
    assert [reused(f) for f in (trained, looked_up, alone)] == [
        [False] * 3,
        [True] * 3,
        [False] * 3,
    ]
    for other in (looked_up, alone):
        assert modules(other) == modules(trained)
        for ours, theirs in zip(tables(other), tables(trained), strict=True):
            pd.testing.assert_frame_equal(ours, theirs, check_exact=True)


@pytest.mark.parametrize(
    "change",
    [
        ["module.rank=4"], ["optimizer.lr=0.02"], ["trainer.epochs=2"], ["seed.init=1"],
        ["seed.data=1"], ["seed.order=1"], ["backbone.max_length=9"], ["learner=sequential"],
        ["stream.train_per_class=12"], ["threads=2"],
    ],
    ids=lambda change: change[0],
)  # fmt: skip
def test_what_training_depends_on_is_trained_again(places, change):
    run(*SMALL, *places)
    again = run(*SMALL, *places, *change)
    assert reused(again)[0] is False


def test_an_isolated_module_depends_on_its_own_task_alone(places):
    """With another number of tasks behind it, the first is the same; a chained learner's is not."""
    whole = run(*SMALL, *places, "stream.classes=6", "stream.tasks=3")
    part = run(*SMALL, *places, "stream.classes=6", "stream.tasks=3", "stream.max_classes=6",
               "stream.test_per_class=5")  # fmt: skip
    assert whole != part
    assert reused(part) == [True] * 3


def test_a_damaged_module_is_trained_again(places, tmp_path, caplog):
    first = run(*SMALL, *places)
    for path in (tmp_path / "cache" / "modules").rglob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:100])
    again = run(*SMALL, *places, "fresh=true")
    assert reused(again) == [False] * 3
    assert "damaged" in caplog.text
    assert modules(again).keys() == modules(first).keys()


def test_the_key_covers_the_code_that_learns():
    """Every learner says what its result depends on; a chained one is the careful default."""
    assert Learner.history == "stream"
