"""Sweeps: folders named by what they compute, a status table, finished jobs skipped."""

import os
import signal
import subprocess
import sys

import filelock
import pandas as pd
import pytest
from running import RIDGE, ROOT, command, digests, environment, folder_of, warm_command

from cl_peft import sweeps

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


@pytest.mark.parametrize("cluster", [(), ("cluster=joblib",)])
def test_processes_share_a_sweep(cluster, tmp_path, cache):
    """A job that somebody else is running is left for the end, not waited for."""
    args = (*SMOKE, *RIDGE, *cluster, f"paths.runs={tmp_path}", f"paths.cache={cache}")
    folders = [folder_of(*args, f"seed.init={seed}") for seed in (0, 1, 2)]
    folders[0].mkdir(parents=True)
    begun = [sys.executable, MAIN, "--multirun", *args, "seed.init=0,1,2"]
    pipe = {"stderr": subprocess.PIPE, "text": True, "env": environment()}
    with filelock.FileLock(folders[0] / ".lock"), subprocess.Popen(begun, **pipe) as process:
        said = []
        try:
            for line in process.stderr:  # somebody else runs the first
                said.append(line)
                if "waiting for it" in line:
                    break
            assert [(f / "results.parquet").exists() for f in folders] == [False, True, True]
        finally:  # it waits for the lock that is held here
            os.kill(process.pid, signal.SIGKILL)
    text = "".join(said)
    assert text.count("it is looked at again in the end") == 1
    assert text.count("task 3/3") == 2
    done = command(*begun[2:])  # the other process has died
    assert done.returncode == 0
    assert done.stderr.count("already finished") == 2
    assert done.stderr.count("task 3/3") == 1
    table = pd.read_csv(folders[0].parent / "status.csv")
    assert list(table["state"]) == ["finished"] * 3


def test_a_job_on_another_machine_does_not_wait(tmp_path, cache, monkeypatch):
    """There the file of what is left does not exist; nobody computes it twice."""
    monkeypatch.setenv(sweeps.LEFT, str(tmp_path / "elsewhere"))
    said = sweeps.leave({"group": "a"}, 1)
    assert "the same sweep again" in said
    assert list(sweeps.left()) == []
    assert not list(tmp_path.iterdir())


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
