import http.server
import json
import logging
import os
import pty
import shutil
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import matplotlib.image
import numpy as np
import pandas as pd
import pytest
import wandb
from running import RIDGE
from running import run as run_here
from wandb_file import WandbFile

from cl_peft.config import build
from cl_peft.loading import load_run
from cl_peft.tracking import Tracker, WandbTracker, _settings

SECRET = "5ec2e7" * 6 + "abcd"
CONFIG = {
    "module": {"name": "lora", "rank": 8, "targets": ["query", "value"]},
    "learner": {"name": "isolated"},
    "seed": {"order": 0, "init": 1, "data": 2},
}
TABLES = {
    "results": pd.DataFrame(
        {
            "run": ["a", "a"],
            "eval_task": pd.array([1, None], dtype="Int32"),
            "value": [0.5, float("nan")],
        }
    )
}


def row(eval_task, routing, metric, value, after_task=2):
    return {
        "run": "a",
        "after_task": after_task,
        "eval_task": eval_task,
        "routing": routing,
        "metric": metric,
        "value": value,
    }


ROWS = [
    row(1, "oracle", "accuracy", 0.75),
    row(2, "routed", "accuracy", 0.5),
    row(2, "none", "router_accuracy", 0.625),
    row(None, "routed", "average_accuracy", 0.5625),
    row(float("nan"), "none", "routing_loss", 0.125),
    row(pd.NA, "routed", "forgetting", float("nan")),
]


def mirror(folder: Path) -> WandbFile:
    """Read the mirror; W&B's own process writes it a moment after ``finish`` has returned."""
    (path,) = folder.glob("wandb/*/*.wandb")
    for _ in range(100):
        file = WandbFile(path)
        if file.exit_code is not None:
            return file
        time.sleep(0.05)
    raise AssertionError(f"{path} was never closed")


def follow(tracker: Tracker, folder: Path, state="finished", figures=None) -> None:
    """Call everything that a run calls."""
    tracker.start("lora-ridge-isolated-0123456789", "sweep", CONFIG, folder)
    tracker.log_training(1, 10, {"train/loss": 2.5, "train/lr": 1e-3})
    tracker.log_training(2, 20, {"train/loss": 1.25, "train/lr": 5e-4})
    tracker.log_task(2, ROWS)
    tracker.finish(state, {"routed/average_accuracy": 0.5625}, figures or {}, TABLES)


@pytest.fixture
def warnings(caplog):
    caplog.set_level(logging.WARNING, logger="cl_peft")
    return lambda: [r.getMessage() for r in caplog.records if r.name == "cl_peft.tracking"]


@pytest.fixture(scope="module")
def tracked(tmp_path_factory):
    """A run folder that a whole run was tracked in, with a key in the environment."""
    folder = tmp_path_factory.mktemp("run")
    figure = folder / "accuracy_matrix.png"
    matplotlib.image.imsave(figure, np.zeros((4, 4, 3)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_API_KEY", SECRET)
        tracker = build(
            {"_target_": "cl_peft.tracking.WandbTracker", "name": "wandb", "tags": ["paper"]}
        )
        follow(tracker, folder, figures={"accuracy_matrix": figure})
    return folder


def test_run_is_described(tracked):
    file = mirror(tracked)
    assert file.config["module"] == CONFIG["module"]
    assert file.config["seed"] == CONFIG["seed"]
    assert file.run.run_group == "sweep"
    assert file.run.job_type == "isolated"
    assert file.run.display_name == "lora-ridge-isolated-0123456789"
    assert file.run.project == "cl_peft"
    assert list(file.run.tags) == ["paper"]
    assert file.exit_code == 0


def test_series_have_their_axes(tracked):
    file = mirror(tracked)
    assert file.axes["train/*"] == "train/step"
    assert file.axes["eval/*"] == "task/idx"
    assert file.series("train/loss", "train/step") == [(10, 2.5), (20, 1.25)]
    assert file.series("eval/oracle/accuracy/task_01", "task/idx") == [(2, 0.75)]
    assert file.series("eval/routed/accuracy/task_02", "task/idx") == [(2, 0.5)]
    assert file.series("eval/router_accuracy/task_02", "task/idx") == [(2, 0.625)]
    assert file.series("eval/routed/average_accuracy", "task/idx") == [(2, 0.5625)]
    assert file.series("eval/routing_loss", "task/idx") == [(2, 0.125)]


def test_undefined_is_left_out(tracked):
    assert not any("eval/routed/forgetting" in row for row in mirror(tracked).history)


def test_summary_figure_and_table(tracked):
    file = mirror(tracked)
    assert file.summary["routed/average_accuracy"] == 0.5625
    files = next(tracked.glob("wandb/*/files"))
    image = file.logged("figures/accuracy_matrix")
    assert image["_type"] == "image-file"
    assert (files / image["path"]).stat().st_size > 0
    table = json.loads((files / file.logged("tables/results")["path"]).read_text())
    assert table["columns"] == ["run", "eval_task", "value"]
    assert table["data"] == [["a", 1, 0.5], ["a", None, None]]


def test_modules_as_one_artifact_that_can_be_loaded(tmp_path):
    folder = run_here(
        *("debug=smoke", *RIDGE, "tracker=wandb", "tracker.log_modules=true", "cache=off"),
        f"paths.runs={tmp_path / 'runs'}",
    )
    (artifact,) = [a for a in mirror(folder).artifacts if a.type == "modules"]
    for entry in artifact.manifest.contents:
        copy = tmp_path / "artifact" / entry.path
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(entry.local_path, copy)
    kept = {p.relative_to(tmp_path / "artifact") for p in (tmp_path / "artifact").rglob("*.*")}
    modules = {p.relative_to(folder) for p in folder.glob("tasks/*/*.safetensors")}
    names = ("config.yaml", "stream.json", "manifest.json", "provenance.json")
    assert kept == modules | {Path(name) for name in names}
    ours, theirs = (load_run(f).predict(["a b", "c"]) for f in (folder, tmp_path / "artifact"))
    np.testing.assert_array_equal(ours.confidence, theirs.confidence)
    facts = json.loads((tmp_path / "artifact/provenance.json").read_text())
    assert facts["backbone_fingerprint"]
    assert not {"command", "git_revision", "platform", "sessions"} & set(facts)


def test_no_secret_and_nothing_of_the_machine(tracked):
    files = [p for p in tracked.rglob("*") if p.is_file()]
    assert any(p.suffix == ".wandb" for p in files)
    assert not [p for p in files if SECRET.encode() in p.read_bytes()]
    assert not list(tracked.rglob("wandb-metadata.json"))
    assert not list(tracked.rglob("requirements.txt"))
    run = mirror(tracked).run
    assert not run.host
    assert not run.git.commit


def test_resumed_run_continues_the_same_mirror(tmp_path):
    ids = []
    for group, run in (("sweep", "a"), ("sweep", "a"), ("sweep", "b"), ("other", "a")):
        folder = tmp_path / str(len(ids))
        folder.mkdir()
        tracker = WandbTracker()
        tracker.start(run, group, CONFIG, folder)
        tracker.finish("finished", {}, {}, {})
        ids.append(mirror(folder).run.run_id)
    assert ids[0] == ids[1]
    assert len(set(ids)) == 3


def test_failed_run_has_exit_code_1(tmp_path):
    follow(WandbTracker(log_tables=False), tmp_path, state="failed")
    file = mirror(tmp_path)
    assert file.exit_code == 1
    assert not any("tables/results" in row for row in file.history)


def test_run_after_one_that_was_never_closed(tmp_path):
    for run in ("crashed", "next"):
        (tmp_path / run).mkdir()
        tracker = WandbTracker()
        tracker.start(run, "sweep", CONFIG, tmp_path / run)
    tracker.finish("finished", {}, {}, {})
    assert mirror(tmp_path / "crashed").run.display_name == "crashed"
    assert mirror(tmp_path / "next").run.display_name == "next"


def test_quiet(tmp_path, capfd):
    follow(WandbTracker(), tmp_path)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("tracker", [Tracker(), WandbTracker(mode="disabled")])
def test_disabled_writes_nothing(tracker, tmp_path):
    follow(tracker, tmp_path)
    assert not list(tmp_path.iterdir())


def broken(*args, **kwargs):
    raise RuntimeError("the disk is gone")


def test_failing_start_warns_once(tmp_path, monkeypatch, warnings):
    monkeypatch.setattr(wandb, "init", broken)
    follow(WandbTracker(), tmp_path)
    (warning,) = warnings()
    assert "the disk is gone" in warning
    assert str(tmp_path) in warning


def test_failing_log_warns_once_and_still_closes(tmp_path, monkeypatch, warnings):
    monkeypatch.setattr(wandb.Run, "log", broken)
    follow(WandbTracker(), tmp_path)
    (warning,) = warnings()
    assert "could not log: the disk is gone" in warning
    assert mirror(tmp_path).exit_code == 0


def test_missing_figure_still_closes(tmp_path, warnings):
    follow(WandbTracker(), tmp_path, figures={"accuracy_matrix": tmp_path / "absent.png"})
    (warning,) = warnings()
    assert "log the results" in warning
    file = mirror(tmp_path)
    assert file.exit_code == 0
    assert file.summary["routed/average_accuracy"] == 0.5625


def test_failing_finish_warns(tmp_path, monkeypatch, warnings):
    with monkeypatch.context() as patch:
        patch.setattr(wandb.Run, "finish", broken)
        follow(WandbTracker(), tmp_path)
    (warning,) = warnings()
    assert "could not finish: the disk is gone" in warning
    wandb.run.finish()  # leave nothing open for the next test


def test_table_that_wandb_would_cut_is_named(tmp_path, monkeypatch, warnings):
    monkeypatch.setattr("cl_peft.tracking.MAX_TABLE_ROWS", 1)
    follow(WandbTracker(), tmp_path)
    (warning,) = warnings()
    assert "table results has 2 rows" in warning


# With the root logger as talkative as Hydra makes it: W&B's own log must stay out of it.
SCRIPT = """
    import logging, sys
    from pathlib import Path
    from cl_peft.tracking import WandbTracker
    logging.basicConfig(level="INFO", format="%(levelname)s %(message)s")
    tracker = WandbTracker(mode=sys.argv[2])
    tracker.start("a", "g", {"learner": {"name": "isolated"}}, Path(sys.argv[1]))
    tracker.log_task(1, [{"eval_task": 1, "routing": "oracle", "metric": "accuracy", "value": .5}])
    tracker.finish("finished", {}, {}, {})
    print("DONE")
"""


def at_a_terminal(tmp_path: Path, mode: str, **env: str) -> str:
    """Track a run in a process of its own, at a terminal where nobody types."""
    home, run = tmp_path / "home", tmp_path / "run"
    home.mkdir()
    run.mkdir()
    clean = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_") and k != "NETRC"}
    clean |= {"HOME": str(home), "WANDB_BASE_URL": "http://127.0.0.1:9", **env}
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(SCRIPT), str(run), mode],
        stdin=follower,
        stdout=follower,
        stderr=follower,
        env=clean,
    )
    os.close(follower)
    try:
        process.wait(timeout=60)
        return os.read(leader, 1 << 16).decode()
    finally:
        process.kill()
        os.close(leader)


def test_online_without_login_goes_on_offline(tmp_path):
    output = at_a_terminal(tmp_path, "online")
    warning, last = output.strip().splitlines()
    assert warning.startswith("WARNING W&B could not go online: no login")
    assert "tracked offline" in warning
    assert last == "DONE"
    assert mirror(tmp_path / "run").series("eval/oracle/accuracy/task_01", "task/idx") == [(1, 0.5)]


def test_online_without_network_goes_on_offline(tmp_path):
    started = time.monotonic()
    output = at_a_terminal(tmp_path, "online", WANDB_API_KEY=SECRET, WANDB_HTTP_TIMEOUT="1")
    warning, last = output.strip().splitlines()
    assert "could not go online" in warning
    assert last == "DONE"
    assert SECRET not in output
    assert time.monotonic() - started < 30
    assert mirror(tmp_path / "run").exit_code == 0


class Listener(http.server.BaseHTTPRequestHandler):
    """Answers everything with an error, and remembers that it was asked."""

    def do_POST(self):
        self.server.asked.append(self.path)
        self.send_error(404)

    do_GET = do_POST  # noqa: N815 (the name that http.server looks for)

    def log_message(self, *args):
        pass


def test_offline_sends_nothing(tmp_path):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Listener) as server:
        server.asked = []
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}"
        output = at_a_terminal(tmp_path, "offline", WANDB_API_KEY=SECRET, WANDB_BASE_URL=url)
        server.shutdown()
    assert output.strip() == "DONE"
    assert server.asked == []


@pytest.mark.parametrize("name", ["init_timeout", "finish_timeout"])
def test_whoever_has_a_slow_network_may_wait(monkeypatch, name):
    assert name in _settings(wandb).model_fields_set
    monkeypatch.setenv(f"WANDB_{name.upper()}", "300")
    assert name not in _settings(wandb).model_fields_set  # left to W&B, which reads the variable
