"""A run comes back from its folder alone, and answers as its evaluation did."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from core_fixtures import quiet
from running import RIDGE, digests, folder_of, run, write_csv
from safetensors.torch import load_file

from cl_peft.errors import ConfigError, DamagedRunError, DataError
from cl_peft.experiment import load_stream
from cl_peft.learners.isolated import Isolated
from cl_peft.loading import load_run
from cl_peft.modules.bank import flatten
from cl_peft.runs import RunFolder

SMOKE = ("debug=smoke", *RIDGE)
LEARNERS = {
    "sequential": ("learner=sequential",),
    "joint": ("learner=joint",),
    "frozen": ("learner=frozen",),
    "dora": ("module=dora",),
    "prefix": ("module=prefix", "module.tokens=2", "module.hidden=8", *RIDGE),
    "oracle": ("router=oracle",),
    "task": ("router=oracle", "stream.scenario=task"),
}


def evaluated(folder, after=3):
    """What the run's evaluation asked and found, after a task."""
    config = yaml.safe_load((folder / "config.yaml").read_text())
    tasks = load_stream(config, quiet()).tasks[:after]
    frame = pd.read_parquet(folder / "tasks" / f"{after:03d}" / "predictions.parquet")
    inputs = [text for task in tasks for text in task.test.inputs]
    assert frame["row"].tolist() == [row for task in tasks for row in task.test.rows]
    return inputs, frame


def check_routed(loaded, inputs, frame):
    answers = loaded.predict(inputs)
    np.testing.assert_array_equal(answers.labels, frame["routed_prediction"])
    np.testing.assert_array_equal(answers.tasks, frame["routed_task"])
    np.testing.assert_allclose(answers.confidence, frame["confidence"], atol=1e-5)
    np.testing.assert_allclose(answers.margin, frame["margin"], atol=1e-4)
    assert answers.names == [loaded.class_names[c] for c in frame["routed_prediction"]]


def check_oracle(loaded, inputs, frame):
    answers = loaded.predict(inputs, frame["eval_task"].tolist())
    np.testing.assert_array_equal(answers.labels, frame["oracle_prediction"])
    np.testing.assert_array_equal(answers.tasks, frame["eval_task"])


def test_a_finished_run_answers_as_it_did(smoke_run):
    before = digests(smoke_run.folder)
    loaded = load_run(smoke_run.folder)
    inputs, frame = evaluated(smoke_run.folder)
    assert len(frame["routed_task"].unique()) == 3  # the router has something to say
    check_routed(loaded, inputs, frame)
    check_oracle(loaded, inputs, frame)
    assert sorted(loaded.rows) == sorted(loaded.heads) == [1, 2, 3]
    assert digests(smoke_run.folder) == before


def test_an_answer_depends_on_its_own_input_alone(smoke_run):
    loaded = load_run(smoke_run.folder)
    inputs, _ = evaluated(smoke_run.folder)
    together = loaded.predict(inputs)
    alone = [loaded.predict([text]).names[0] for text in inputs[::5]]
    assert alone == together.names[::5]
    none = loaded.predict([])
    assert (none.names, len(none.labels)) == ([], 0)


def test_inputs_are_not_kept(smoke_run):
    loaded = load_run(smoke_run.folder)
    loaded.predict(["one", "two"])
    computed = loaded.learner.tools.features.computed
    loaded.predict(["one", "two"])
    assert loaded.learner.tools.features.computed == computed + 2


@pytest.mark.parametrize("name", LEARNERS)
def test_every_kind_of_run_answers_as_it_did(name, places):
    folder = run("debug=smoke", *LEARNERS[name], *places)
    loaded = load_run(folder)
    inputs, frame = evaluated(folder)
    check_oracle(loaded, inputs, frame)
    if name in ("oracle", "task"):
        with pytest.raises(ConfigError, match="needs the true task"):
            loaded.predict(inputs)
        return
    check_routed(loaded, inputs, frame)
    single = name in ("sequential", "joint")
    assert sorted(loaded.rows) == ([3] if single else [1, 2, 3])
    assert loaded.bank.count == {"frozen": 0}.get(name, 1 if single else 3)


def test_domains_tell_no_task(places, tmp_path):
    rows = [(f"{c} in {d} {i}", c, d) for c in "ab" for d in "xy" for i in range(6)]
    for split in ("train", "test"):
        write_csv(tmp_path / f"{split}.csv", rows, ("text", "label", "domain"))
    paths = [f"stream.{split}={tmp_path / split}.csv" for split in ("train", "test")]
    options = ("stream=files", "stream.scenario=domain", "stream.tasks=2", "stream.domain=domain")
    folder = run(*SMOKE, *options, *paths, "learner=sequential", *places)
    loaded = load_run(folder)
    inputs, frame = evaluated(folder, 2)
    check_routed(loaded, inputs, frame)
    assert set(loaded.predict(inputs).tasks) == {0}


def test_an_unfinished_run_answers_as_after_its_last_task(places, monkeypatch):
    learn = Isolated.learn

    def fail(self, task):
        if task.index == 2:
            raise MemoryError
        learn(self, task)

    monkeypatch.setattr(Isolated, "learn", fail)
    overrides = (*SMOKE, *places, "cache=off")
    with pytest.raises(MemoryError):
        run(*overrides)
    folder = folder_of(*overrides)
    loaded = load_run(folder)
    inputs, frame = evaluated(folder, 2)
    check_routed(loaded, inputs, frame)
    assert len(loaded.tasks) == 2
    with pytest.raises(ConfigError, match="finished tasks 1 to 2"):
        loaded.predict(inputs[:1], [3])


# ------------------------------------------------------------------ while it runs


@pytest.fixture
def copied(smoke_run, tmp_path):
    return shutil.copytree(smoke_run.folder, tmp_path / smoke_run.folder.name)


def test_what_a_live_run_is_writing_stays(copied):
    half = copied / "tasks" / ".004.writing"
    half.mkdir()
    (half / "module.safetensors").write_bytes(b"half")
    before = digests(copied)
    load_run(copied)
    assert digests(copied) == before


def test_a_run_that_goes_on_while_it_is_read(copied, monkeypatch):
    """Task 3 ends after the manifest was read, and takes the router's older state away."""
    path = copied / "manifest.json"
    newer = path.read_text()
    older = json.loads(newer)
    older.update(tasks=older["tasks"][:2], final=None)
    older["tasks"][1]["files"]["tasks/002/router.safetensors"] = {"sha256": "0" * 64, "bytes": 1}
    path.write_text(json.dumps(older))
    content = RunFolder.content

    def goes_on(self, name):
        if name == "tasks/002/router.safetensors":
            path.write_text(newer)
        return content(self, name)

    monkeypatch.setattr(RunFolder, "content", goes_on)
    loaded = load_run(copied)
    assert len(loaded.tasks) == 3
    check_routed(loaded, *evaluated(copied))


# ------------------------------------------------------------------ what cannot be loaded


def test_a_damaged_module_is_named(copied):
    """When it is first needed, or at once for those who ask."""
    module = copied / "tasks" / "002" / "module.safetensors"
    whole = module.read_bytes()
    middle = len(whole) // 2
    module.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
    with pytest.raises(DamagedRunError, match=r"002/module\.safetensors is damaged"):
        load_run(copied, lazy=False)
    loaded = load_run(copied)
    loaded.predict(["a"], [1])
    for _ in range(2):
        with pytest.raises(DamagedRunError, match=r"002/module\.safetensors is damaged"):
            loaded.predict(["a", "b"], [1, 2])
    module.write_bytes(whole)
    assert loaded.predict(["a", "b"], [1, 2]).tasks.tolist() == [1, 2]


@pytest.mark.parametrize("lazy", [True, False])
def test_a_module_that_cannot_be_opened_is_named_at_once(copied, lazy):
    module = copied / "tasks" / "002" / "module.safetensors"
    for data in (module.read_bytes()[:-1], b"", b"<html>"):
        module.write_bytes(data)
        with pytest.raises(DamagedRunError, match=r"002/module\.safetensors is damaged"):
            load_run(copied, lazy=lazy)
    module.unlink()
    with pytest.raises(DamagedRunError, match=r"002/module\.safetensors is missing"):
        load_run(copied, lazy=lazy)


def test_a_damaged_head_answers_nothing(copied):
    """Heads are read at once, and compared with the digest before they first answer."""
    module = copied / "tasks" / "002" / "module.safetensors"
    whole, weight = module.read_bytes(), load_file(module)["head.weight"].numpy().tobytes()
    where = whole.index(weight)
    module.write_bytes(whole[:where] + bytes(len(weight)) + whole[where + len(weight) :])
    loaded = load_run(copied)
    module.write_bytes(whole)  # the file is right again, but not what was read of it
    with pytest.raises(DamagedRunError, match=r"002/module\.safetensors: its head changed"):
        loaded.predict(["a"], [2])


# ------------------------------------------------------------------ what is read, and when


def test_modules_are_read_when_a_sample_is_first_routed_to_them(smoke_run, monkeypatch):
    content, read = RunFolder.content, []

    def noted(self, name):
        if name.endswith("module.safetensors"):
            read.append(name)
        return content(self, name)

    monkeypatch.setattr(RunFolder, "content", noted)
    loaded = load_run(smoke_run.folder)
    assert (read, loaded.bank.count, sorted(loaded.heads)) == ([], 3, [1, 2, 3])
    loaded.predict(["a", "b"], [2, 2])
    assert read == ["tasks/002/module.safetensors"]
    loaded.predict(["a", "b", "c"], [2, 1, 2])
    assert read == [f"tasks/{t:03d}/module.safetensors" for t in (2, 1)]
    load_run(smoke_run.folder, lazy=False)
    assert len(read) == 5


def test_read_at_once_or_later_the_answers_are_the_same_bits(smoke_run, copied):
    inputs, frame = evaluated(smoke_run.folder)
    eager, lazy = load_run(copied, lazy=False), load_run(smoke_run.folder)
    shutil.rmtree(copied)  # all of it is in memory
    for tasks in (None, frame["eval_task"].tolist()):
        ours, theirs = lazy.predict(inputs, tasks), eager.predict(inputs, tasks)
        for name in ("labels", "tasks", "confidence", "margin"):
            np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name))
    for row in range(3):
        mine, other = flatten(lazy.bank.get(row)), flatten(eager.bank.get(row))
        assert all(torch.equal(t, other[n]) for n, t in mine.items())


def test_another_backbone_is_refused(copied):
    path = copied / "provenance.json"
    stored = json.loads(path.read_text())
    path.write_text(json.dumps({**stored, "backbone_fingerprint": "f" * 64}))
    with pytest.raises(DamagedRunError, match="fingerprint ffffffffffff, but"):
        load_run(copied)


def test_nothing_to_load(copied, tmp_path):
    with pytest.raises(DataError, match="is no run folder"):
        load_run(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()
    path = copied / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "tasks": [], "final": None}))
    with pytest.raises(DataError, match="no task has stored a module"):
        load_run(copied)
    with pytest.raises(ConfigError, match="device=cuda"):
        load_run(copied, device="cuda:7")
