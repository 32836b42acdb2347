"""cl-peft on many runs: report, compare, status and its live table."""

import io
import json
import shutil
import subprocess
import sys

import filelock
import pandas as pd
import pytest
from fake_run import config, write_run
from rich.console import Console

import analysis
from analysis import figures
from analysis.report_figures import Plan
from cl_peft.cli import main
from cl_peft.commands import status as status_table

TRACE = 'Traceback (most recent call last):\n  File "x.py", line 1\nValueError: no [bold]such thing'


@pytest.fixture
def group(tmp_path):
    """Two finished runs, one that failed, one that was killed, one that was refused."""
    root = tmp_path / "runs" / "group"
    for seed in (0, 1):
        write_run(root / f"ridge-{seed}", tasks=3, seed=seed, cfg=config(seed__init=seed))
    write_run(
        *(root / "failed", 3, 1),
        state="failed",
        error=TRACE,
        cfg=config(learner__name="sequential"),
    )
    write_run(root / "killed", 3, 2, state="running", cfg=config(module__rank=4))
    write_run(root / "refused", 3, 0, state="refused", error="module.rank: must be above 0")
    return root


def set_state(run, state):
    path = run / "status.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "state": state}))


# ---------------------------------------------------------------- status


def test_status_tells_of_every_run(group, capsys):
    assert main(["status", str(group)]) == 1
    lines = capsys.readouterr().out.splitlines()
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
    assert out.count("5 runs in") == 1  # no terminal: the last table only
    assert out.isascii()


# ---------------------------------------------------------------- report and compare


def test_report_is_written_into_the_folder(group, capsys):
    assert main(["report", str(group)]) == 0
    assert capsys.readouterr().out == f"{group / 'report.html'}\n"
    first = (group / "report.html").read_text()
    assert "<h1>group</h1>" in first
    assert main(["report", str(group), "-o", str(group / "again.html")]) == 0
    assert (group / "again.html").read_text() == first


def test_report_options(group, tmp_path, capsys):
    target = tmp_path / "deep" / "page.html"
    arguments = ["report", str(group), "-o", str(target), "--examples", "1", "--runs", "4"]
    assert main(arguments) == 0
    text = target.read_text()
    data = json.loads(text.split('id="data">')[1].split("</script>")[0])
    assert [run["run"] for run in data["runs"]] == ["failed", "killed", "refused", "ridge-0"]
    assert [len(run["examples"]["rows"]) for run in data["runs"]][1::2] == [1, 1]
    capsys.readouterr()
    assert main(["report", str(group), "--reference", "nobody"]) == 2
    assert "No configuration is called 'nobody'" in capsys.readouterr().err


def test_compare_prints_the_comparison(group, capsys):
    from analysis import compare_runs

    a, b = group / "ridge-0", group / "ridge-1"
    assert main(["compare", str(a), str(b)]) == 0
    out = capsys.readouterr().out
    assert out == compare_runs(a, b).to_text()
    assert "| seed.init | 0 | 1 |" in out
    assert main(["compare", str(a), str(b), "--after-task", "2", "--examples", "0"]) == 0
    assert capsys.readouterr().out == compare_runs(a, b, after_task=2).to_text(most=0)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["report", "nowhere"], "There is no folder nowhere"),
        (["report", "."], "no run to report"),
        (["report", "{group}", "-o", "."], "is a folder; give -o a file"),
        (["compare", "nowhere", "{group}/ridge-0"], "nowhere is no run folder"),
        (["compare", "{group}/ridge-0", "{group}"], "is no run folder"),
        (["compare", "{group}/ridge-0", "{group}/refused"], "no evaluation after task 0"),
        (["status", "nowhere", "--watch"], "There is no folder nowhere"),
        (["sync", "nowhere"], "There is no folder nowhere"),
        (["wandb-report", "nowhere", "--entity", "me"], "There is no folder nowhere"),
    ],
)
def test_errors_in_words(arguments, words, group, tmp_path, monkeypatch, capsys):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    assert main([a.format(group=group) for a in arguments]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["status", "x", "--every", "-1"],
        ["status", "x", "--patience", "inf"],
        ["report", "x", "--runs", "-1"],
        ["report", "x", "--examples", "many"],
    ],
)
def test_impossible_numbers_are_refused(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert arguments[2] in capsys.readouterr().err


def test_no_command_on_groups_imports_torch(group):
    code = (
        "import sys; from cl_peft.cli import main\n"
        "for arguments in (['report', g := sys.argv[1]], ['compare', g + '/ridge-0', "
        "g + '/ridge-1'], ['status', g], ['sync', g, '--dry-run']):\n"
        "    main(arguments)\n"
        "sys.exit(bool({'torch', 'transformers', 'wandb'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(group)], capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr.decode()


# ---------------------------------------------------------------- paper


def test_table_in_three_forms(group, tmp_path, capsys):
    wanted = ["--metrics", "average_accuracy_routed", "router_accuracy"]
    assert main(["table", str(group), *wanted]) == 0
    markdown = capsys.readouterr().out
    final = [
        pd.read_parquet(group / f"ridge-{seed}" / "results.parquet").query(
            "after_task == 3 and eval_task.isna() and metric == 'average_accuracy' "
            "and routing == 'routed'"
        )["value"].item()
        for seed in (0, 1)
    ]  # fmt: skip
    assert f"{50 * sum(final):.1f} ±" in markdown
    assert "2 runs" in markdown
    file = tmp_path / "paper" / "table.tex"
    assert main(["table", str(group), *wanted, "--format", "latex", "-o", str(file)]) == 0
    assert capsys.readouterr().out.strip() == str(file)
    assert r"\toprule" in file.read_text()
    assert r"\caption" not in file.read_text()
    caption = ["--format", "latex", "--caption", "50 % of R&D_1"]
    assert main(["table", str(group), *wanted, *caption]) == 0
    latex = capsys.readouterr().out
    assert r"\caption{50 \% of R\&D\_1}" in latex
    assert "Mean of 2 runs" in latex  # the notes are in the environment too
    assert main(["table", str(group), *wanted, "--caption", "x"]) == 2
    assert "--caption is of --format latex" in capsys.readouterr().err
    assert main(["table", str(group), *wanted, "--format", "csv"]) == 0
    assert float(pd.read_csv(io.StringIO(capsys.readouterr().out))[wanted[1]][0]) == pytest.approx(
        sum(final) / 2
    )


def test_figures_as_files(group, tmp_path, capsys):
    target = tmp_path / "figures"
    assert main(["figures", str(group), "-o", str(target), "--format", "svg"]) == 0
    out = capsys.readouterr().out
    files = {path.name for path in target.iterdir()}
    assert {"sweep_overview.svg", "anytime_accuracy.svg"} < files
    assert all(str(target / name) in out for name in files)
    assert "not drawn: Critical difference: " in out  # one configuration has no ranks


def test_figures_of_names_that_are_alike_or_long_do_not_overwrite_each_other(
    group, tmp_path, capsys, monkeypatch
):
    titles = ["Forgetting: x=-1", "Forgetting: x=1", "a" * 300]
    plans = [Plan(title, "", lambda: figures.sweep_overview(final(group))) for title in titles]
    monkeypatch.setattr("analysis.report_figures.plan", lambda _: plans)
    assert main(["figures", str(group), "-o", str(tmp_path / "f"), "--format", "svg"]) == 0
    files = [tmp_path / "f" / line for line in capsys.readouterr().out.splitlines()]
    assert [f.stem for f in files] == ["forgetting_x_1", "forgetting_x_1_1", "a" * 80]
    assert all(f.is_file() for f in files)


def final(group):
    return analysis.load_runs(group).query("state == 'finished'")


def test_what_cannot_be_written_is_said_in_words(group, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    for command, target in (("figures", "file"), ("table", "file/table.md")):
        assert main([command, str(group), "-o", str(tmp_path / target)]) == 2
        assert "error: cannot write" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "mine"


def test_tables_need_a_finished_run(group, tmp_path, capsys):
    assert main(["table", str(tmp_path / "none")]) == 2
    assert "There is no folder" in capsys.readouterr().err
    for run in ("ridge-0", "ridge-1"):
        shutil.rmtree(group / run)
    assert main(["figures", str(group), "-o", str(tmp_path / "f")]) == 2
    assert f"cl-peft status {group} shows them" in capsys.readouterr().err
    assert not (tmp_path / "f").exists()
