"""cl-peft sync: finds offline W&B runs in nested folders and gives them to wandb sync."""

import subprocess
import sys

import filelock
import pytest

from cl_peft import sync
from cl_peft.cli import main


def offline(run, stamp="20261124_104128", id="aaaa1111", size=1000, synced=False, empty=False):
    """One offline run as wandb leaves it in a run folder."""
    folder = run / "wandb" / f"offline-run-{stamp}-{id}"
    (folder / "files").mkdir(parents=True)
    if not empty:
        (folder / f"run-{id}.wandb").write_bytes(b"x" * size)
    if synced:
        (folder / f"run-{id}.wandb.synced").touch()
    return folder


@pytest.fixture
def runs(tmp_path):
    """Runs of two groups, one of them nested deeper."""
    root = tmp_path / "runs"
    offline(root / "g1" / "a", id="aaaa1111")
    offline(root / "g1" / "b", "20261124_090000", id="bbbb2222", synced=True)
    offline(root / "g1" / "b", "20261124_100000", id="bbbb2222", size=500)  # resumed
    offline(root / "deep" / "er" / "c", id="cccc3333")
    offline(root / "g1" / "d", id="dddd4444", synced=True)
    offline(root / "g1" / "e", id="eeee5555", empty=True)
    offline(root / "g1" / ".old" / "a-1", id="ffff6666")  # set aside by fresh=true
    (root / "g1" / "a" / "wandb" / "run-20261124_1-online").mkdir()
    return root


def test_dry_run_lists_what_would_be_uploaded(runs, capsys, monkeypatch):
    monkeypatch.setattr(subprocess, "call", lambda *_: pytest.fail("something was uploaded"))
    assert main(["sync", str(runs), "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    found = {line.split()[-1].split("-")[-1] + str(k): line for k, line in enumerate(lines[:-1])}
    states = [(name[:4], line[:16].strip()) for name, line in found.items()]
    assert sorted(states) == [
        ("aaaa", "to upload"),
        ("bbbb", "to upload"),
        ("bbbb", "uploaded before"),
        ("cccc", "to upload"),
        ("dddd", "uploaded before"),
        ("eeee", "nothing inside"),
    ]
    assert lines[-1] == "3 of 6 to upload, as 3 W&B runs: 2.5 kB"
    assert str(runs / "deep" / "er" / "c" / "wandb") in "\n".join(lines)


def test_each_run_goes_to_wandb_sync_once(runs):
    calls = []
    assert sync.upload(sync.find(runs), call=lambda c: calls.append(c) or 0) == 0
    begin = [sys.executable, "-m", "wandb", "sync"]
    b = runs / "g1" / "b" / "wandb"
    assert calls == [
        [*begin, str(runs / "g1" / "a" / "wandb" / "offline-run-20261124_104128-aaaa1111")],
        # both parts, the earlier first, although it was uploaded before
        [
            *begin,
            "--include-synced",
            str(b / "offline-run-20261124_090000-bbbb2222"),
            str(b / "offline-run-20261124_100000-bbbb2222"),
        ],
        [*begin, str(runs / "deep/er/c/wandb/offline-run-20261124_104128-cccc3333")],
    ]


def test_one_that_fails_does_not_stop_the_others(runs, capsys):
    calls = []

    def call(command):
        calls.append(command)
        return int("aaaa1111" in command[-1])

    assert sync.upload(sync.find(runs), call=call) == 1
    assert len(calls) == 3
    err = capsys.readouterr().err
    assert f"not uploaded: {runs / 'g1' / 'a'}" in err
    assert "1 failed" in err
    assert "wandb login" in err


def test_command_line_passes_entity_and_project(runs, monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(sync.subprocess, "call", lambda c: calls.append(c) or 0)
    arguments = ["sync", str(runs / "deep"), "--entity", "team", "--project", "p"]
    assert main(arguments) == 0
    assert [c[3:8] for c in calls] == [["sync", "--entity", "team", "--project", "p"]]
    assert "1 of 1 to upload, as 1 W&B run: 1.0 kB" in capsys.readouterr().out


def test_a_run_going_on_is_left_alone(runs):
    with filelock.FileLock(runs / "g1" / "a" / ".lock"):
        states = {run.id: run.state for run in sync.find(runs)}
        assert states["aaaa1111"] == "running"
        calls = []
        sync.upload(sync.find(runs), call=lambda c: calls.append(c) or 0)
    assert not any("aaaa1111" in c[-1] for c in calls)
    assert {run.id: run.state for run in sync.find(runs)}["aaaa1111"] == "offline"


def test_a_run_folder_itself(runs, capsys):
    assert main(["sync", str(runs / "g1" / "d"), "--dry-run"]) == 0
    assert "0 of 1 to upload" in capsys.readouterr().out


def test_nothing_to_find(tmp_path, capsys):
    assert main(["sync", str(tmp_path)]) == 0
    assert "There is no offline W&B run below" in capsys.readouterr().out


def test_wandb_understands_the_command(tmp_path):
    """A real offline run, given to the installed wandb, which only says what it would do."""
    code = (
        "import sys, wandb\n"
        "settings = wandb.Settings(silent=True, x_disable_stats=True, console='off')\n"
        "run = wandb.init(mode='offline', dir=sys.argv[1], project='p', id='abcd1234', "
        "settings=settings)\n"
        "run.log({'x': 1}); run.finish()\n"
    )
    run = tmp_path / "g" / "run"
    run.mkdir(parents=True)
    subprocess.run([sys.executable, "-c", code, str(run)], check=True, capture_output=True)
    (found,) = sync.find(tmp_path)
    assert (found.id, found.state, found.run_folder) == ("abcd1234", "offline", run)
    assert found.bytes > 100
    said = []

    def call(command):
        done = subprocess.run(
            [*command, "--dry-run"], capture_output=True, text=True, check=False, cwd=tmp_path
        )
        said.append(done.stdout + done.stderr)
        return done.returncode

    assert sync.upload([found], project="other", call=call) == 0
    assert "Would sync" in said[0]
    assert f"run-{found.id}.wandb" in said[0]
