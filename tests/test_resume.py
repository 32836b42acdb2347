"""Killed at any moment and started again, a run ends with the same bits."""

import json
import shutil
import signal
import subprocess
import sys
import time

import pandas as pd
import pytest
import torch
import yaml
from running import (
    FIVE,
    MOMENTS,
    RIDGE,
    ROOT,
    command,
    digests,
    environment,
    folder_of,
    in_child,
    rows_of,
    run,
    write_csv,
)
from safetensors.torch import load_file, save_file

import analysis
from cl_peft.config import run_id
from cl_peft.errors import DamagedRunError, DivergedError, UserError
from cl_peft.group import sweep_status
from cl_peft.runs import RunFolder

#: Nothing is looked up: a run that goes on must come to the same bits by computing.
SMOKE = ("debug=smoke", "cache=off", *FIVE)
LEARNERS = {
    "isolated": ("learner=isolated", *RIDGE),
    "sequential": ("learner=sequential",),
    "joint": ("learner=joint",),
    "frozen": ("learner=frozen", *RIDGE),
}
#: Moments after which a learner comes back to what it knew.
CHANGING = (
    *("while task 2 trains", "before task 2 is listed", "while task 3 trains"),
    "while the final files are written",
)
TABLES = ("results.parquet", "predictions.parquet")


@pytest.fixture(scope="session")
def whole(tmp_path_factory, cache):
    """A function: the folder of a learner's uninterrupted run, in a process of its own."""
    done = {}

    def get(learner):
        if learner not in done:
            runs = tmp_path_factory.mktemp(f"whole-{learner}")
            args = (*SMOKE, *LEARNERS[learner], f"paths.runs={runs}", f"paths.cache={cache}")
            assert in_child(None, args) == 0
            done[learner] = folder_of(*args)
        return done[learner]

    return get


@pytest.fixture
def part(tmp_path, cache):
    """A run of the isolated learner that was killed while task 3 trained: folder, overrides."""
    args = (*SMOKE, *LEARNERS["isolated"], f"paths.runs={tmp_path}", f"paths.cache={cache}")
    assert in_child("while task 3 trains", args) == -signal.SIGKILL
    return folder_of(*args), args


def _start(*args, **pipes):
    command = [sys.executable, "main.py", *args]
    return subprocess.Popen(command, cwd=ROOT, env=environment(), text=True, **pipes)


def same_tables(folder, other):
    return all((folder / n).read_bytes() == (other / n).read_bytes() for n in TABLES)


# ------------------------------------------------------------------ killed


@pytest.mark.parametrize("learner", LEARNERS)
def test_killed_at_every_moment_in_turn(learner, whole, tmp_path):
    """One run that dies once at each moment; with a cache of its own."""
    args = (*SMOKE, *LEARNERS[learner], f"paths.runs={tmp_path}", f"paths.cache={tmp_path}/cache")
    folder = folder_of(*args)
    tasks_done = []
    moments = MOMENTS if learner == "isolated" else {m: MOMENTS[m] for m in CHANGING}
    for moment in moments:
        assert in_child(moment, args) == -signal.SIGKILL, moment
        manifest = folder / "manifest.json"
        tasks_done.append(len(json.loads(manifest.read_text())["tasks"]))
    stands = dict(zip(MOMENTS, [0, 1, 1, 1, 2, 2, 4, 5, 5, 5, 5], strict=True))
    assert tasks_done == [stands[moment] for moment in moments]
    assert in_child(None, args) == 0
    assert same_tables(folder, whole(learner))
    assert RunFolder(folder).status()["state"] == "finished"
    assert (folder / "accuracy_matrix.png").exists()
    assert not [p for p in folder.rglob(".*") if p.name != ".lock"]
    listed = json.loads((folder / "manifest.json").read_text())
    expected = json.loads((whole(learner) / "manifest.json").read_text())
    for mine, theirs in zip(listed["tasks"], expected["tasks"], strict=True):
        for name, entry in theirs["files"].items():
            if "timing" not in name:
                assert mine["files"][name] == entry, name


@pytest.mark.parametrize("moment", ["while task 3 trains", "before task 2 is listed"])
def test_killed_once(moment, whole, tmp_path, cache):
    args = (*SMOKE, *LEARNERS["isolated"], f"paths.runs={tmp_path}", f"paths.cache={cache}")
    assert in_child(moment, args) == -signal.SIGKILL
    assert RunFolder(folder_of(*args)).status()["state"] == "running"
    assert in_child(None, args) == 0
    assert same_tables(folder_of(*args), whole("isolated"))


def test_command_killed_from_outside(whole, tmp_path, cache):
    """The real thing: kill -9 from outside, at whatever moment that is, and the same command."""
    args = (*SMOKE, *LEARNERS["isolated"], "trainer.epochs=20", f"paths.cache={cache}")
    runs, reference = f"paths.runs={tmp_path / 'a'}", f"paths.runs={tmp_path / 'b'}"
    manifest = folder_of(*args, runs) / "manifest.json"
    process = _start(*args, runs, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (manifest.exists() and len(json.loads(manifest.read_text())["tasks"]) >= 2):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.wait()
    again = command(*args, runs)
    assert again.returncode == 0, again.stderr
    assert "going on after task" in again.stderr
    assert in_child(None, (*args, reference)) == 0
    assert same_tables(folder_of(*args, runs), folder_of(*args, reference))


def test_fresh_sets_the_earlier_run_aside(part, whole, capsys):
    folder, args = part
    before = digests(folder)
    run(*args, "fresh=true")
    assert "the earlier run was moved to" in capsys.readouterr().err
    assert same_tables(folder, whole("isolated"))
    (aside,) = (folder.parent / ".old").iterdir()
    assert digests(aside) == before


def test_two_commands_at_once(tmp_path, whole, cache):
    """One computes, the other waits and shows the same."""
    args = (*SMOKE, *LEARNERS["isolated"], f"paths.runs={tmp_path}", f"paths.cache={cache}")
    both = [_start(*args, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(2)]
    (out, err), (other_out, other_err) = (process.communicate(timeout=120) for process in both)
    assert [process.returncode for process in both] == [0, 0]
    assert out == other_out
    assert (err + other_err).count("task 1/5") == 1
    assert (err + other_err).count("another process runs this configuration; waiting") == 1
    assert (err + other_err).count("already finished") == 1
    assert same_tables(folder_of(*args), whole("isolated"))


# ------------------------------------------------------------------ diverged


def test_diverged_loss_stops_the_run(tmp_path, cache):
    args = (*SMOKE, *RIDGE, "optimizer.lr=1e30", f"paths.runs={tmp_path}", f"paths.cache={cache}")
    with pytest.raises(DivergedError, match=r"task 1/5: training diverged .* lower optimizer\.lr"):
        run(*args)
    folder = folder_of(*args)
    status = RunFolder(folder).status()
    assert (status["state"], status["tasks_done"], status["tasks"]) == ("failed", 0, 5)
    assert "diverged" in status["error"]
    log = (folder / "run.log").read_text()
    assert "Traceback (most recent call last)" in log
    assert "DivergedError" in log


def test_run_goes_on_after_it_failed(part, whole, monkeypatch):
    folder, args = part
    from cl_peft.training import Trainer

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_step", lambda *_: (float("nan"), float("nan")))
        with pytest.raises(DivergedError, match="task 3/5"):
            run(*args)
    status = RunFolder(folder).status()
    assert (status["state"], status["tasks_done"]) == ("failed", 2)
    run(*args)
    assert same_tables(folder, whole("isolated"))
    status = RunFolder(folder).status()
    assert (status["state"], status["error"]) == ("finished", None)
    sessions = json.loads((folder / "provenance.json").read_text())["sessions"]
    assert len(sessions) == 3


# ------------------------------------------------------------------ damaged or changed


def truncate(data):
    return data[: len(data) // 2]


def flip(data):
    return data[:-1] + bytes([data[-1] ^ 1])


@pytest.mark.parametrize("damage", [truncate, flip, None], ids=["cut", "flipped", "gone"])
@pytest.mark.parametrize(
    "name",
    [
        *("tasks/001/module.safetensors", "tasks/002/router.safetensors"),
        *("tasks/001/results.parquet", "tasks/002/predictions.parquet", "tasks/001/memo.parquet"),
        *("config.yaml", "stream.json"),
    ],
)
def test_damaged_file_is_named_and_left_alone(name, damage, finished_part):
    folder, args = finished_part
    path = folder / name
    original = path.read_bytes()
    try:
        path.unlink() if damage is None else path.write_bytes(damage(original))
        before = digests(folder)
        with pytest.raises(DamagedRunError, match="fresh=true") as error:
            run(*args)
        assert str(path) in str(error.value)
        assert ("missing" if damage is None else "damaged") in str(error.value)
        assert digests(folder) == before
    finally:
        path.write_bytes(original)


@pytest.fixture(scope="module")
def finished_part(tmp_path_factory, cache):
    """As ``part``, shared by tests that put everything back."""
    runs = tmp_path_factory.mktemp("part")
    args = (*SMOKE, *LEARNERS["isolated"], f"paths.runs={runs}", f"paths.cache={cache}")
    assert in_child("while task 3 trains", args) == -signal.SIGKILL
    return folder_of(*args), args


@pytest.mark.parametrize(
    ("name", "content"),
    [
        *((name, text) for name in ("manifest", "status", "provenance") for text in ("", "{", "7")),
        *(("manifest", text) for text in ("[]", "{}", '{"format": 2}')),
    ],
)
def test_damaged_bookkeeping_is_named(name, content, finished_part):
    folder, args = finished_part
    path = folder / f"{name}.json"
    original = path.read_bytes()
    try:
        path.write_text(content)
        with pytest.raises(DamagedRunError, match="fresh=true") as error:
            run(*args)
        assert str(path) in str(error.value)
        assert path.read_text() == content
    finally:
        path.write_bytes(original)


def test_damaged_run_can_be_started_over(part, whole):
    folder, args = part
    (folder / "manifest.json").write_text("{")
    run(*args, "fresh=true")
    assert same_tables(folder, whole("isolated"))


def test_folder_of_another_configuration_is_refused(part):
    folder, args = part
    other = folder_of(*args, "seed.init=1")
    shutil.copytree(folder, other)
    with pytest.raises(DamagedRunError, match=r"holds the run .*-s0\.0\.0-.*, not .*-s0\.1\.0-"):
        run(*args, "seed.init=1")


@pytest.fixture
def own_files(tmp_path, cache):
    """Overrides of a run on files and a backbone folder that a test may change."""
    from cl_peft.backbones.tiny import Tiny

    backbone = Tiny()
    backbone.load(cache, torch.device("cpu"), seed=0)
    backbone.model.save_pretrained(tmp_path / "model")
    backbone.tokenizer.save_pretrained(tmp_path / "model")
    classes = [f"c{i}" for i in range(8)]
    write_csv(tmp_path / "train.csv", rows_of(classes, 8))
    write_csv(tmp_path / "test.csv", rows_of(classes, 4, "test"))
    return (
        *(
            "debug=smoke",
            "cache=off",
            "stream=files",
            "stream.tasks=4",
            *RIDGE,
            "trainer.batch_size=4",
        ),
        *(f"stream.train={tmp_path}/train.csv", f"stream.test={tmp_path}/test.csv"),
        *("backbone=encoder", f"backbone.name={tmp_path}/model", "backbone.max_length=64"),
        *(f"paths.runs={tmp_path}/runs", f"paths.cache={cache}"),
    )


def change_data(tmp_path):
    path = tmp_path / "test.csv"
    path.write_text(path.read_text().replace("number 3 of c7", "number 5 of c7"))
    return "the data changed since its first 2 tasks"


def change_backbone(tmp_path):
    path = tmp_path / "model" / "model.safetensors"
    weights = load_file(path)
    weights["encoder.layer.0.output.dense.bias"][0] += 1e-3
    save_file(weights, path, {"format": "pt"})
    return "the backbone changed since its first 2 tasks"


@pytest.mark.parametrize("change", [change_data, change_backbone])
def test_what_changed_under_a_run_is_noticed(change, own_files, tmp_path):
    assert in_child("while task 3 trains", own_files) == -signal.SIGKILL
    folder = folder_of(*own_files)
    kept = {n: d for n, d in digests(folder).items() if n.startswith("tasks")}
    message = change(tmp_path)
    with pytest.raises(DamagedRunError, match=message):
        run(*own_files)
    assert {n: d for n, d in digests(folder).items() if n.startswith("tasks")} == kept
    run(*own_files, "fresh=true")


def test_changed_code_is_told_of_when_a_run_goes_on(own_files, capsys):
    assert in_child("while task 3 trains", own_files) == -signal.SIGKILL
    path = folder_of(*own_files) / "provenance.json"
    facts = json.loads(path.read_text())
    facts["sessions"][0]["code"] = "other"
    path.write_text(json.dumps(facts))
    run(*own_files)
    assert "warning: the code of this run's parts changed since it began" in capsys.readouterr().err
    run(*own_files)  # finished: its first tasks are still those of the other code
    assert "warning: the code of this run's parts changed since it was" in capsys.readouterr().err


def test_what_changed_before_anything_was_learned_is_fine(own_files, tmp_path):
    assert in_child("while task 1 trains", own_files) == -signal.SIGKILL
    change_data(tmp_path)
    assert in_child("while task 3 trains", own_files) == -signal.SIGKILL
    run(*own_files)
    folder = folder_of(*own_files)
    facts = json.loads((folder / "provenance.json").read_text())
    assert (
        facts["stream_fingerprint"]
        == json.loads((folder / "stream.json").read_text())["fingerprint"]
    )
    assert len(facts["sessions"]) == 3
    assert set(pd.read_parquet(folder / "results.parquet")["after_task"]) == {1, 2, 3, 4}


# ------------------------------------------------------------------ data that cannot be read


def unreadable(tmp_path):
    """Take the training file away; returns how to bring it back."""
    path = tmp_path / "train.csv"
    path.rename(tmp_path / "elsewhere.csv")
    return lambda: (tmp_path / "elsewhere.csv").rename(path)


def without_column(tmp_path):
    """Give the column of labels another name; returns how to bring it back."""
    path = tmp_path / "train.csv"
    text = path.read_text()
    path.write_text(text.replace("text,label", "text,class", 1))
    return lambda: path.write_text(text)


@pytest.mark.parametrize("spoil", [unreadable, without_column])
def test_a_run_whose_data_cannot_be_read_says_what_it_was(spoil, own_files, tmp_path):
    mend, folder = spoil(tmp_path), folder_of(*own_files)
    with pytest.raises(UserError, match=r"train\.csv"):
        run(*own_files)
    assert {p.name for p in folder.iterdir()} == {"config.yaml", "status.json", "run.log", ".lock"}
    written = yaml.safe_load((folder / "config.yaml").read_text())
    assert run_id(written) == folder.name
    table = sweep_status(folder.parent)
    assert table[["state", "tasks_done"]].to_numpy().tolist() == [["failed", 0]]
    (known,) = analysis.load_run_table(folder.parent).to_dict("records")
    assert (known["state"], known["router"]) == ("failed", "ridge")
    before = (folder / "config.yaml").read_bytes()
    with pytest.raises(UserError):  # the first to write wins
        run(*own_files, "tracker=wandb", "tracker.mode=offline")
    assert (folder / "config.yaml").read_bytes() == before
    mend()
    other = f"{tmp_path}/other"
    run(*own_files, f"paths.cache={other}")
    assert yaml.safe_load((folder / "config.yaml").read_text())["paths"]["cache"] == other
    RunFolder(folder).open(written)  # every file is what its digest says
    assert RunFolder(folder).status()["state"] == "finished"


@pytest.mark.parametrize("moment", ["while task 3 trains", None])
def test_data_that_vanish_change_nothing_of_a_run(moment, own_files, tmp_path):
    assert in_child(moment, own_files) == (-signal.SIGKILL if moment else 0)
    folder = folder_of(*own_files)
    files = RunFolder(folder)
    files.look()
    kept = {name: files.content(name) for name in ("config.yaml", *files.files())}
    manifest = (folder / "manifest.json").read_bytes()
    mend = unreadable(tmp_path)
    if moment:
        with pytest.raises(UserError):
            run(*own_files)
    else:
        before = digests(folder, skip=(".lock", "report.md", "accuracy_matrix.png"))
        run(*own_files)
        assert digests(folder, skip=(".lock", "report.md", "accuracy_matrix.png")) == before
    assert (folder / "manifest.json").read_bytes() == manifest
    assert {name: files.content(name) for name in kept} == kept
    mend()
    run(*own_files)
    assert RunFolder(folder).status()["state"] == "finished"
