"""Sweeps: folders named by what they compute, a status table, finished jobs skipped."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress

import filelock
import pandas as pd
import pytest
from omegaconf import OmegaConf
from running import RIDGE, ROOT, command, digests, environment, folder_of, warm_command

from cl_peft import launch, sweeps

SMOKE = ("debug=smoke", "trainer.epochs=1")
MAIN = str(ROOT / "main.py")
TWO_BY_TWO = ("learner=isolated,sequential", "seed.init=0,1")


def sweep(folder, *args):
    done = warm_command("--multirun", *SMOKE, *args, folder=folder)
    assert "Traceback" not in done.stderr
    return done


@pytest.fixture(scope="module")
def swept(tmp_path_factory, cache):
    """A finished sweep over two learners and two seeds: its folder, its arguments, its output."""
    runs = tmp_path_factory.mktemp("sweep")
    args = (*RIDGE, *TWO_BY_TWO, f"paths.runs={runs}", f"paths.cache={cache}")
    return runs / "smoke", args, sweep(runs, *args)


def tables(group):
    found = {p.name: p / "results.parquet" for p in group.iterdir() if p.is_dir()}
    return {name: path.read_bytes() for name, path in found.items() if path.exists()}


def test_every_job_has_its_folder_and_its_row(swept):
    group, args, done = swept
    assert done.returncode == 0, done.stderr
    expected = {
        folder_of(*SMOKE, *RIDGE, *args[-2:], f"learner={learner}", f"seed.init={seed}").name
        for learner in ("isolated", "sequential")
        for seed in (0, 1)
    }
    assert len(expected) == 4
    assert set(tables(group)) == expected
    table = pd.read_csv(group / "status.csv")
    assert set(table["run"]) == expected
    assert (table["state"] == "finished").all()
    assert table["routed_average_accuracy"].between(0, 1).all()
    assert set(table["settings"].str.split().str[-1]) == {"seed.init=0", "seed.init=1"}
    assert f"status table: {group / 'status.csv'}" in done.stdout
    assert done.stdout.rstrip().splitlines()[-2].count("finished") == 1
    assert all(name.split("-")[1] == "none" for name in expected if "sequential" in name)


def test_same_sweep_again_computes_nothing_and_adds_what_is_new(swept, tmp_path):
    group, args, _ = swept
    before = digests(group, skip=(".lock", "status.csv"))
    more = [a.replace("seed.init=0,1", "seed.init=0,1,2") for a in args]
    again = sweep(tmp_path, *more, "learner=isolated")
    assert again.returncode == 0
    assert again.stderr.count("already finished") == 2
    assert again.stderr.count("task 1/3") == 1
    after = digests(group, skip=(".lock", "status.csv"))
    assert {name: after[name] for name in before} == before
    assert len(pd.read_csv(group / "status.csv")) == 5


def test_parallel_jobs_give_the_same_bytes(swept, tmp_path, cache):
    group, args, _ = swept
    parallel = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "threads=1"]
    places = [f"paths.runs={tmp_path}", f"paths.cache={cache}"]
    done = command("--multirun", *SMOKE, *args[:-2], *places, *parallel)
    assert done.returncode == 0, done.stderr
    serial, side_by_side = tables(group), tables(tmp_path / "smoke")
    assert len(side_by_side) == 4
    assert {name: serial[name] for name in side_by_side} == side_by_side
    assert (pd.read_csv(tmp_path / "smoke" / "status.csv")["state"] == "finished").all()


def test_failed_and_refused_jobs_stop_no_other(tmp_path, cache):
    args = (
        *("optimizer.lr=1e30,5e-3", "router=none,oracle", "learner=isolated"),
        *(f"paths.runs={tmp_path}", f"paths.cache={cache}"),
    )
    done = sweep(tmp_path, *args)
    assert done.returncode == 2
    table = pd.read_csv(tmp_path / "smoke" / "status.csv").sort_values("state")
    assert list(table["state"]) == ["failed", "finished", "refused", "refused"]
    assert "diverged" in table["error"].iloc[0]
    assert table["error"].iloc[2:].str.contains("router=none does not fit").all()
    assert "router=none does not fit learner=isolated" in done.stderr  # the first error
    again = sweep(tmp_path, *args)
    assert again.returncode == 2
    assert again.stderr.count("already finished") == 1
    logs = [path.read_text() for path in (tmp_path / "smoke").glob("*/run.log")]
    assert sorted(log.count("Traceback") for log in logs) == [0, 2]  # the failed one was retried


def test_table_of_every_group_that_the_sweep_touched(tmp_path, cache):
    """Without an old, failed run of the same group having a say in how this sweep ends."""
    places = (f"paths.runs={tmp_path}", f"paths.cache={cache}", "router=oracle")
    failed = sweep(tmp_path, *places, "group=a", "stream.order=[x]")
    assert failed.returncode == 2
    assert "there is no class 'x'" in failed.stderr
    done = sweep(tmp_path, *places, "group=a,b")
    assert done.returncode == 0
    assert [done.stdout.count(f" in {tmp_path / group}: ") for group in "ab"] == [1, 1]
    table = pd.read_csv(tmp_path / "a" / "status.csv")
    assert sorted(table["state"]) == ["failed", "finished"]


def waiting(folder, *args):
    """Start a sweep while somebody else runs its first job: what it said until it waits for that.

    The caller gets the process, and holds the job's lock for as long as the block runs.
    """
    env = {**environment(), "TMPDIR": str(folder)}
    begun = [sys.executable, MAIN, "--multirun", *args, "seed.init=0,1,2"]
    process = subprocess.Popen(begun, stderr=subprocess.PIPE, text=True, env=env)
    said = []
    for line in process.stderr:
        said.append(line)
        if "waiting for it" in line:
            return process, "".join(said)
    process.wait()
    raise AssertionError("it never waited: " + "".join(said))


@pytest.mark.parametrize("cluster", [(), ("cluster=joblib",)])
def test_processes_share_a_sweep(cluster, tmp_path, cache):
    """A job that somebody else is running is left for the end, not waited for."""
    runs, temporary = tmp_path / "runs", tmp_path / "temporary"
    temporary.mkdir()
    args = (*SMOKE, *RIDGE, *cluster, f"paths.runs={runs}", f"paths.cache={cache}")
    folders = [folder_of(*args, f"seed.init={seed}") for seed in (0, 1, 2)]
    folders[0].mkdir(parents=True)
    with filelock.FileLock(folders[0] / ".lock"):
        process, text = waiting(temporary, *args)
        assert [(f / "results.parquet").exists() for f in folders] == [False, True, True]
    _, rest = process.communicate(timeout=120)  # the other one has died, its job undone
    assert process.returncode == 0
    assert text.count("it is looked at again in the end") == 1
    assert (text.count("task 3/3"), rest.count("task 3/3")) == (2, 1)
    table = pd.read_csv(folders[0].parent / "status.csv")
    assert list(table["state"]) == ["finished"] * 3
    assert not list(temporary.glob("cl_peft-left-*"))


@pytest.mark.parametrize("fast", ["true", "false"])
def test_a_job_that_was_left_may_fail(fast, tmp_path, cache):
    """It has a say in how the sweep ends; with fail_fast it does not start after one failed."""
    args = (*SMOKE, *RIDGE, f"fail_fast={fast}", "trainer.diverged_above=1e-9",
            f"paths.runs={tmp_path / 'runs'}", f"paths.cache={cache}")  # fmt: skip
    folder = folder_of(*args, "seed.init=0")
    folder.mkdir(parents=True)
    begun = ["--multirun", *args, "seed.init=0"]
    process = subprocess.Popen([sys.executable, MAIN, *begun], env=environment(),
                               stderr=subprocess.PIPE, text=True)  # fmt: skip
    with filelock.FileLock(folder / ".lock"):
        for line in process.stderr:
            if "looked at again" in line:
                break
        else:
            raise AssertionError("it was not left")
        if fast == "true":  # another one of the sweep fails meanwhile
            other = folder.parent / "other" / "status.json"
            other.parent.mkdir()
            other.write_text('{"state": "failed"}')
    _, rest = process.communicate(timeout=120)
    assert process.returncode == 2
    assert ("not started, since other failed" in rest) == (fast == "true")
    assert ("diverged" in rest) == (fast == "false")


def test_killed_while_it_waits_the_next_one_takes_over(tmp_path, cache):
    args = (*SMOKE, *RIDGE, f"paths.runs={tmp_path}", f"paths.cache={cache}")
    folder = folder_of(*args, "seed.init=0")
    folder.mkdir(parents=True)
    with filelock.FileLock(folder / ".lock"):
        process, _ = waiting(tmp_path, *args)
        process.kill()
        process.communicate()
    done = sweep(tmp_path, *args[2:], "seed.init=0,1,2")
    assert done.returncode == 0
    assert done.stderr.count("already finished") == 2
    assert done.stderr.count("task 3/3") == 1


def test_what_is_left_without_a_file_for_it(tmp_path, monkeypatch):
    """On another machine, or where nothing can be written; and a line that was cut off."""
    monkeypatch.setattr(sweeps, "_sweeps", [(tmp_path, 0.0)])
    path = tmp_path / "left.jsonl"
    monkeypatch.setenv(sweeps.LEFT, str(path))
    assert "the same sweep again" in sweeps.leave({"group": "a"}, 1)
    assert sweeps.left() == []
    path.write_text("")
    monkeypatch.setenv(sweeps.LEFT, str(path))
    assert "in the end" in sweeps.leave({"group": "a"}, 2)
    with path.open("a") as file:
        file.write('[{"group":')
    assert sweeps.left() == [({"group": "a"}, 2)]
    assert not path.exists()


def test_interrupted_it_runs_nothing_that_was_left(tmp_path, monkeypatch):
    path = tmp_path / "left.jsonl"
    monkeypatch.setattr(sweeps, "_sweeps", [(tmp_path, 0.0)])
    monkeypatch.setenv(sweeps.LEFT, str(path))
    monkeypatch.setattr(launch, "_complete", lambda *_: pytest.fail("it ran"))

    def main():
        path.write_text("")
        sweeps.leave({"group": "a"}, 1)
        raise KeyboardInterrupt

    assert launch.launch(main) == launch.INTERRUPTED


def test_a_search_waits_for_its_scores():
    targets = {"hydra._internal.BasicSweeper": True, "hydra_plugins.OptunaSweeper": False}
    for target, expected in targets.items():
        node = OmegaConf.create({"sweeper": {"_target_": target}})
        assert launch._may_leave(node) == expected


@pytest.mark.slow
def test_a_cluster_sweep_on_this_machine(tmp_path, cache):
    """Submitit's local executor; the same sweep again does nothing."""
    args = ("cluster=local", *RIDGE, "seed.init=0,1", f"paths.runs={tmp_path / 'runs'}")
    for expected in (0, 2):
        done = command("--multirun", *SMOKE, *args, f"paths.cache={cache}")
        assert done.returncode == 0, done.stderr
        table = pd.read_csv(tmp_path / "runs" / "smoke" / "status.csv")
        assert (table["state"] == "finished").all()
        assert len(table) == 2
        logs = list((tmp_path / "runs" / ".submitit").rglob("*_log.err"))
        assert sum("already finished" in log.read_text() for log in logs) == expected


@pytest.mark.slow
def test_a_job_whose_time_is_over_goes_on(tmp_path, cache):
    """Submitit's signal, as Slurm sends it, in the second task: queued again, and not from zero."""
    args = ("--multirun", "debug=smoke", *RIDGE, "cluster=local", "trainer.epochs=60", "cache=off",
            f"paths.runs={tmp_path}", f"paths.cache={cache}")  # fmt: skip
    folder = folder_of(*(a for a in args[1:] if not a.startswith("cluster")))
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    begun = [sys.executable, MAIN, *args]
    with subprocess.Popen(begun, cwd=tmp_path, env=environment(), **pipes) as process:
        status = {}
        while status.get("tasks_done") != 1:
            assert process.poll() is None
            time.sleep(0.05)
            with suppress(FileNotFoundError):
                status = json.loads((folder / "status.json").read_text())
        os.kill(status["pid"], signal.SIGUSR2)
        assert process.wait(timeout=200) == 0
    log = "".join(path.read_text() for path in (tmp_path / ".submitit").rglob("*_log.err"))
    assert "Caught signal SIGUSR2" in log
    assert "going on after task 1" in log
    assert "traceback" not in log.lower()
    state = json.loads((folder / "status.json").read_text())
    assert (state["state"], state["tasks_done"]) == ("finished", 3)
    assert state["pid"] != status["pid"]


@pytest.mark.slow
def test_a_search_is_told_the_score(tmp_path, cache):
    args = ("search=optuna", *RIDGE, "hydra.sweeper.n_trials=3", "module.rank=choice(2,4)",
            "optimizer.lr=interval(0.001,0.02)", f"paths.runs={tmp_path / 'runs'}")  # fmt: skip
    done = command("--multirun", *SMOKE, *args, f"paths.cache={cache}", cwd=tmp_path, main=MAIN)
    assert done.returncode == 0, done.stderr
    table = pd.read_csv(tmp_path / "runs" / "smoke" / "status.csv")
    found = (tmp_path / "runs" / ".hydra" / "optimization_results.yaml").read_text()
    best = float(found.split("best_value:")[1].split()[0])
    assert best == pytest.approx(table["routed_average_accuracy"].max())


def test_fail_fast_starts_no_job_after_one_failed(tmp_path, cache):
    args = (*RIDGE, "trainer.diverged_above=1e-9,1000", f"paths.runs={tmp_path}")
    states = {}
    for fast in ("false", "true"):
        group = f"group=fast-{fast}"
        done = sweep(tmp_path, *args, group, f"fail_fast={fast}", f"paths.cache={cache}")
        assert done.returncode == 2
        table = pd.read_csv(tmp_path / f"fast-{fast}" / "status.csv")
        states[fast] = sorted(table["state"])
    assert states["false"] == ["failed", "finished"]
    assert "finished" not in states["true"]
