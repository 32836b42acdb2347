"""The story of a run: interrupted and resumed in one process, for every learner."""

import pandas as pd
import pytest
import torch
from running import run

from cl_peft.errors import ConfigError
from cl_peft.learners.base import Learner
from cl_peft.runs import RunFolder
from cl_peft.world import set_device

LEARNERS = ("isolated", "sequential", "joint", "frozen")
SMALL = (
    "debug=smoke",
    "router=ridge",
    "router.projection=48",
    "stream.train_per_class=10",
    "stream.test_per_class=4",
    "trainer.epochs=1",
    "threads=1",
)


class Killed(BaseException):
    """Nothing in the code catches it."""


def kill_after(monkeypatch, task):
    commit = RunFolder.commit

    def spy(self, index, *rest):
        commit(self, index, *rest)
        if index == task:
            raise Killed

    monkeypatch.setattr(RunFolder, "commit", spy)


def places(root, **other):
    return (f"paths.runs={root / 'runs'}", f"paths.cache={other.get('cache', root / 'cache')}")


def contents(folder):
    names = ["results.parquet", "predictions.parquet"]
    names += [str(p.relative_to(folder)) for p in folder.glob("tasks/*/*.safetensors")]
    names += [str(p.relative_to(folder)) for p in folder.glob("tasks/*/memo.parquet")]
    return {name: (folder / name).read_bytes() for name in sorted(names)}


def chunks(root):
    return {p.name for p in (root / "cache").rglob("*.safetensors") if "features" in p.parts}


@pytest.mark.parametrize("learner", LEARNERS)
def test_a_resumed_run_ends_with_the_same_bits(tmp_path, monkeypatch, learner):
    options = (*SMALL, f"learner={learner}")
    whole = run(*options, *places(tmp_path / "whole"))
    for task in (0, 1):
        root = tmp_path / f"killed{task}"
        with monkeypatch.context() as patch:
            kill_after(patch, task)
            with pytest.raises(Killed):
                run(*options, *places(root))
        again = run(*options, *places(root))
        assert contents(again) == contents(whole)
        # nothing was computed a second time, in other batches
        assert chunks(root) == chunks(tmp_path / "whole")


@pytest.mark.parametrize("learner", ["isolated", "frozen"])
def test_another_order_of_tasks_computes_no_feature_again(tmp_path, learner):
    options = (*SMALL, f"learner={learner}")
    first = run(*options, *places(tmp_path))
    before = chunks(tmp_path)
    other = run(*options, "seed.order=1", *places(tmp_path))
    assert other != first
    assert chunks(tmp_path) == before


def test_an_empty_cache_changes_no_bit(tmp_path):
    first = run(*SMALL, *places(tmp_path / "a"))
    warm = run(*SMALL, *places(tmp_path / "b", cache=tmp_path / "a" / "cache"))
    assert contents(first) == contents(warm)


def test_costs_are_those_of_the_task_just_learned(tmp_path):
    folder = run(*SMALL, "learner=sequential", *places(tmp_path))
    rows = pd.read_parquet(folder / "results.parquet")
    rows = rows[rows["eval_task"].isna()].set_index(["metric", "after_task"])["value"]
    per_module = 2 * 8 * (4 * (32 + 32) + 2 * (32 + 128))
    for task in (1, 2, 3):
        assert rows["module_parameters", task] == per_module
        assert rows["module_bytes", task] == 4 * per_module
        assert rows["head_parameters", task] == 2 * task * (32 + 1)
        assert rows["bank_modules", task] == 1
        assert rows["router_state_bytes", task] == 0


def test_a_backbone_that_changed_voids_the_run(tmp_path, monkeypatch):
    snapshot = Learner.snapshot

    def corrupt(self):
        with torch.no_grad():
            next(self.tools.backbone.model.parameters())[0, 0] += 1.0
        return snapshot(self)

    monkeypatch.setattr(Learner, "snapshot", corrupt)
    with pytest.raises(RuntimeError, match="frozen backbone changed"):
        run(*SMALL, *places(tmp_path))


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
def test_a_device_that_is_not_there_is_refused():
    with pytest.raises(ConfigError, match=r"device=cuda:1: no CUDA device.*device=cpu"):
        set_device({"device": "cuda:1", "threads": 1})
    assert set_device({"device": "auto", "threads": 1}) == torch.device("cpu")
