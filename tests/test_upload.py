"""Uploads to W&B as the real client makes them, to a stand-in for the service on this machine."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from running import RIDGE, ROOT, command, environment
from wandb_service import serving

from cl_peft.loading import load_run

USER = "grace-hopper"
SMOKE = ("debug=smoke", *RIDGE, "tracker=wandb", "trainer.epochs=1")


@pytest.fixture
def service():
    with serving() as service:
        yield service


def login(service, home):
    """Patient: what is tested here is not how long a busy machine may take."""
    patience = {"WANDB_HTTP_TIMEOUT": "90", "WANDB_INIT_TIMEOUT": "180",
                "WANDB_FINISH_TIMEOUT": "240"}  # fmt: skip
    return {**patience, "WANDB_BASE_URL": service.url, "WANDB_API_KEY": "5ec2e7" * 6 + "abcd",
            "WANDB_MODE": "online", "HOME": str(home), "USER": USER, "LOGNAME": USER}  # fmt: skip


def expected(folder):
    """What the run folder says: values of the results by the name and task they are drawn at."""
    results = pd.read_parquet(folder / "results.parquet")
    single = results[results.eval_task.isna() & (results.routing != "none") & results.value.notna()]
    return {(f"eval/{r.routing}/{r.metric}", r.after_task): r.value for r in single.itertuples()}


def uploaded(run):
    return {
        (name, line["task/idx"]): value
        for line in run["history"]
        if "task/idx" in line
        for name, value in line.items()
        if name.split("/")[:1] == ["eval"] and len(name.split("/")) == 3 and "task_" not in name
    }


def same(run, folder):
    want, have = expected(folder), uploaded(run)
    assert {k: v for k, v in have.items() if k in want} == pytest.approx(want)
    assert len(want) > 10


def test_a_run_online(service, tmp_path):
    args = (*SMOKE, "tracker.mode=online", "tracker.log_modules=true")
    env = login(service, tmp_path)
    done = command("--multirun", *args, f"paths.runs={tmp_path / 'runs'}", "cache=off", env=env)
    assert done.returncode == 0, done.stderr
    assert "W&B" not in done.stderr  # no warning
    assert set(service.unknown) <= {"OrganizationCoreWeaveOrganizationID"}
    (folder,) = (tmp_path / "runs/smoke").glob("lora-*")
    (run,) = service.runs.values()
    assert (run["group"], run["name"], run["job"]) == ("smoke", folder.name, "isolated")
    assert run["config"]["module"]["name"] == "lora"
    assert run["exit_code"] == 0
    same(run, folder)
    steps = [line["train/step"] for line in run["history"] if "train/step" in line]
    assert steps == list(range(1, len(steps) + 1))

    # what went up as an artifact is a run that can be loaded
    kinds = {a["type"]: (i, a["state"]) for i, a in enumerate(service.artifacts)}
    assert {state for _, state in kinds.values()} == {"COMMITTED"}
    own = f"artifact/{kinds['modules'][0]}/"
    for name, data in service.files.items():
        if name.startswith(own):
            copy = tmp_path / "copy" / name.removeprefix(own)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(data)
    ours, theirs = (load_run(f).predict(["a b", "c"]) for f in (folder, tmp_path / "copy"))
    np.testing.assert_array_equal(ours.confidence, theirs.confidence)

    # and nothing of this machine, but for where W&B had put what its manifests list
    (upserts,) = [r["sent"] for r in service.runs.values()]
    assert {sent[key] for sent in upserts for key in ("host", "repo", "commit")} == {None}
    assert {Path(sent["program"] or "main.py") for sent in upserts} == {Path("main.py")}
    manifests = [data for name, data in service.files.items() if name.startswith("manifest/")]
    sent = [body for body in service.bodies if body not in manifests]
    assert b"backbone_fingerprint" in b"".join(sent)
    for word in (str(tmp_path), str(ROOT), str(Path.home()), USER, "5ec2e7", "sessions", "git_rev"):
        assert not [body[:200] for body in sent if word.encode() in body], word


def test_a_resumed_run_goes_on_in_its_own(service, tmp_path):
    """Killed in its second task; all that it had committed is there in the end, under one id."""
    env = login(service, tmp_path)
    slow = ("trainer.epochs=60", "cache=off")  # tasks of seconds: it is killed in time
    args = (*SMOKE, "tracker.mode=online", *slow, f"paths.runs={tmp_path / 'runs'}")
    begun = [sys.executable, str(ROOT / "main.py"), *args]
    pipe = {"stderr": subprocess.PIPE, "text": True, "env": {**environment(), **env}}
    said = []
    with subprocess.Popen(begun, **pipe) as process:
        for line in process.stderr:
            said.append(line)
            if line.startswith("task 1/3"):
                process.kill()
                break
    assert "W&B" not in "".join(said)  # it was online
    done = command(*args, env=env)
    assert done.returncode == 0, done.stderr
    assert "going on after task" in done.stderr
    assert "W&B" not in done.stderr
    (folder,) = (tmp_path / "runs/smoke").glob("lora-*")
    (run,) = service.runs.values()
    assert run["resumed"] == 1
    same(run, folder)


def test_offline_runs_are_uploaded_later(service, tmp_path):
    runs = tmp_path / "runs"
    env = login(service, tmp_path)
    swept = command("--multirun", *SMOKE, "seed.init=0,1", f"paths.runs={runs}", "group=deep",
                    "cache=off", env={**env, "WANDB_API_KEY": ""})  # fmt: skip
    assert swept.returncode == 0, swept.stderr
    assert service.bodies == []
    folders = sorted((runs / "deep").glob("lora-*"))
    sync = [sys.executable, "-m", "cl_peft.cli", "sync", str(runs)]
    options = {"capture_output": True, "text": True, "env": {**environment(), **env}, "cwd": ROOT}
    done = subprocess.run(sync, check=False, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    by_name = {run["name"]: run for run in service.runs.values()}
    assert sorted(by_name) == [f.name for f in folders]
    for folder in folders:
        same(by_name[folder.name], folder)
    tables = [n for n in service.files if n.endswith("results.table.json")]
    rows = [json.loads(service.files[name])["data"] for name in tables]
    assert {row[0] for table in rows for row in table} == {folder.name for folder in folders}
    sent = len(service.bodies)
    again = subprocess.run(sync, check=False, **options)
    assert again.returncode == 0
    assert "0 of 2 to upload" in again.stdout
    assert len(service.bodies) == sent
