"""cl-peft status: the table of a group's runs at a terminal, live, and in a pipe."""

import io
import json
import shutil
import subprocess
import sys

import filelock
import pandas as pd
import pytest
from fake_run import config, write_group, write_run
from rich.console import Console

from cl_peft.cli import main
from cl_peft.commands import status as status_table


@pytest.fixture
def group(tmp_path):
    return write_group(tmp_path / "runs" / "group")


def set_state(run, state):
    path = run / "status.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "state": state}))


def shown(group):
    """Lines of the table at a terminal."""
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=160, color_system=None)
    status_table.show(group, console)
    return out.getvalue().splitlines()


def test_status_tells_of_every_run(group):
    lines = shown(group)
    assert lines[0].startswith(f"5 runs in {group}: ")
    assert set(lines[0].split(": ")[1].split(", ")) == {
        *("2 finished", "1 failed", "1 interrupted", "1 refused")
    }
    text = "\n".join(lines)
    for words in (
        ("failed", "learner=sequential", "failed", "1/3", "2 min 03 s", "ValueError: no [bold]"),
        ("killed", "module.rank=4", "interrupted", "2/3", "2 min 03 s"),
        ("refused", "refused", "0/3", "module.rank: must be above 0"),
        ("ridge-1", "seed.init=1", "finished", "3/3"),
    ):
        row = next(line for line in lines[1:] if line.startswith(words[0]))
        assert all(word in row for word in words), row
    assert "Traceback" not in text
    routed = pd.read_parquet(group / "ridge-1" / "results.parquet").query(
        "after_task == 3 and eval_task.isna() and metric == 'average_accuracy' "
        "and routing == 'routed'"
    )["value"].item()  # fmt: skip
    row = next(line for line in lines if line.startswith("ridge-1"))
    assert row.split()[-1] == f"{100 * routed:.1f}"


def piped(group, capsys):
    """What a pipe gets, in fields by run."""
    code = main(["status", str(group)])
    rows = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert all(len(row) == 7 and all(row) for row in rows), rows
    assert code == int(any(row[1] != "finished" for row in rows))
    return {row[0]: row[1:] for row in rows}


def test_status_in_a_pipe_is_a_line_per_run(group, capsys):
    long = "x" * 200
    write_run(group / long, 3, 0, state="failed", error=f"path\t{long}\nmore", cfg=config())
    rows = piped(group, capsys)
    assert list(rows) == ["failed", "killed", "refused", "ridge-0", "ridge-1", long]
    assert rows["killed"][:3] == ["interrupted", "2/3", "123.4"]
    assert rows["killed"][3:] == ["-", "module.rank=4 learner=isolated seed.init=0", "-"]
    assert rows["failed"][0] == "failed"
    assert rows["failed"][-1] == "ValueError: no [bold]such thing"
    assert rows[long][-1] == f"path {long}"
    assert 0 < float(rows["ridge-1"][3]) < 100


def test_damaged_and_unknown_folders_are_listed(group, capsys):
    for name, file, content in (
        ("half", "status.json", "{"),
        ("list", "status.json", "[1]"),
        ("empty", "status.json", "{}"),
        ("number", "status.json", '{"state": "failed", "tasks": "many", "error": 3}'),
        ("manifest", "manifest.json", '{"tasks": [{}]}'),
    ):
        write_run(group / name, 3, 0, state="failed", cfg=config(module__rank=16))
        (group / name / file).write_text(content)
    (group / "number" / "stream.json").unlink()
    columns = write_run(group / "columns", 3, cfg=config(module__rank=16))
    pd.DataFrame({"value": [1.0]}).to_parquet(columns / "results.parquet")
    streamless = write_run(group / "streamless", 3, cfg=config(module__rank=16))
    manifest = json.loads((streamless / "manifest.json").read_text())
    (streamless / "manifest.json").write_text(json.dumps(manifest | {"fixed": {"stream.json": {}}}))
    (streamless / "stream.json").unlink()
    (write_run(group / "lost", 3, cfg=config(module__rank=16)) / "status.json").unlink()
    (group / "begun").mkdir()
    (group / "figures").mkdir()  # no run
    (group / ".old" / "x").mkdir(parents=True)
    with filelock.FileLock(group / "begun" / ".lock"):
        assert piped(group, capsys)["begun"][0] == "running"
    rows = piped(group, capsys)
    states = {name: row[0] for name, row in rows.items()}
    assert {n for n, s in states.items() if s == "damaged"} == {
        *("half", "list", "number", "manifest", "columns", "streamless")
    }
    assert {n for n, s in states.items() if s == "unknown"} == {"empty", "lost", "begun"}
    assert len(states) == 5 + 9
    for name in ("half", "list", "number", "columns", "streamless", "lost"):
        assert "module.rank=16" in rows[name][-2]  # what it was can be read all the same
        assert name in rows[name][-1]
    assert sum("damaged" in line for line in shown(group)[1:]) >= 6


@pytest.mark.parametrize(("left", "code"), [(["ridge-0", "ridge-1"], 0), (["killed"], 1), ([], 1)])
def test_exit_code_for_scripts(group, left, code):
    for run in group.iterdir():
        if run.name not in left:
            shutil.rmtree(run)
    assert main(["status", str(group)]) == code


def watched(group, **options):
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=160, color_system=None)
    table = status_table.watch(group, every=0.02, console=console, **options)
    return table, out.getvalue()


def test_watch_ends_when_nothing_runs(group):
    table, text = watched(group, patience=0)
    assert sorted(table["state"]) == ["failed", "finished", "finished", "interrupted", "refused"]
    assert "5 runs in" in text


def test_watch_follows_a_run_until_it_ends(group):
    run = group / "killed"
    looks = []
    original = status_table.sweep_status

    def look(folder):
        if len(looks) == 3:
            set_state(run, "failed")
        looks.append(original(folder))
        return looks[-1]

    with filelock.FileLock(run / ".lock"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(status_table, "sweep_status", look)
        table, text = watched(group, patience=0)
    assert len(looks) == 4
    assert (looks[2]["state"] == "running").sum() == 1
    assert (table["state"] == "failed").sum() == 2
    assert "1 running" in text
    assert "2 failed" in text


def test_watch_waits_between_two_jobs(group):
    """A sweep's next job may start a moment after the last one ended."""
    looks = []
    original = status_table.sweep_status

    def look(folder):
        looks.append(original(folder))
        return looks[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(status_table, "sweep_status", look)
        watched(group, patience=0.5)
    assert len(looks) >= 3


def test_watch_can_be_left(group, monkeypatch):
    def interrupt(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(status_table.time, "sleep", interrupt)
    table, _ = watched(group, patience=60)
    assert len(table) == 5


def test_watch_looks_less_often_where_a_look_takes_long(group, monkeypatch):
    slept, clock = [], iter([0.0, 3.0, 3.0, 100.0])

    def sleep(seconds):
        slept.append(seconds)

    monkeypatch.setattr(status_table.time, "sleep", sleep)
    monkeypatch.setattr(status_table.time, "monotonic", lambda: next(clock, 100.0))
    watched(group, patience=10)
    assert slept[0] == pytest.approx(12)  # a look of 3 s, so a fifth of the time


def test_watch_from_the_command_line(group, capsys):
    arguments = ["status", str(group), "--watch", "--every", "0", "--patience", "0"]
    assert main(arguments) == 1
    out = capsys.readouterr().out
    assert len(out.splitlines()) == 5  # no terminal: the last state only


def test_whoever_reads_may_stop(group):
    command = [sys.executable, "-m", "cl_peft.cli", "status", str(group)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait() == 1


def test_a_folder_of_groups_says_what_to_give(group, capsys):
    assert main(["status", str(group.parent)]) == 1
    assert "give a group's folder" in capsys.readouterr().err
