import io
import os
import pty
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from fake_run import config, write_run

from cl_peft.console import Console, ResultView
from cl_peft.errors import DamagedRunError
from cl_peft.group import sweep_status
from cl_peft.view import duration, percent, size


class Terminal(io.StringIO):
    def isatty(self):
        return True


def screen(view, width=None, terminal=False) -> str:
    out = Terminal() if terminal else io.StringIO()
    Console(stdout=out, stderr=io.StringIO(), width=width).result(view)
    return out.getvalue()


def test_view_reads_what_the_run_stored(tmp_path):
    view = ResultView.from_folder(write_run(tmp_path / "run", tasks=4))
    routed = view.matrix("routed")
    assert routed.shape == (4, 4)
    assert np.isnan(routed[np.triu_indices(4, 1)]).all()
    assert not np.isnan(routed[np.tril_indices(4)]).any()
    assert view.value("average_accuracy", "routed") == pytest.approx(routed[-1].mean())
    assert view.value("average_accuracy", "routed", after_task=2) == pytest.approx(
        routed[1, :2].mean()
    )
    assert np.isnan(view.value("forgetting", "routed", after_task=1))
    assert np.isnan(view.value("no_such_metric"))
    assert set(view.predictions()["after_task"]) == {4}
    assert (view.state, view.tasks, view.done, view.total_seconds) == ("finished", 4, 4, 123.4)


def test_unfinished_run_shows_the_tasks_of_its_manifest(tmp_path):
    folder = write_run(tmp_path / "run", tasks=5, done=2, state="failed", error="the disk is full")
    whole = ResultView.from_folder(write_run(tmp_path / "whole", tasks=5))
    view = ResultView.from_folder(folder)
    assert view.done == 2
    np.testing.assert_array_equal(view.matrix("oracle"), whole.matrix("oracle")[:2, :2])
    assert len(view.times) == 2
    assert set(view.predictions()["after_task"]) == {2}
    text = screen(view)
    assert "failed, with 2 of 5 tasks done" in text
    assert "the disk is full" in text


def test_run_without_a_finished_task(tmp_path):
    view = ResultView.from_folder(write_run(tmp_path / "run", done=0, state="failed", error="no"))
    text = screen(view)
    assert "failed, with 0 of 5 tasks done" in text
    assert "oracle" not in text


@pytest.mark.parametrize(
    ("name", "content"),
    [("results.parquet", None), ("results.parquet", b"x"), ("status.json", b"{")],
)
def test_damaged_file_is_named(tmp_path, name, content):
    folder = write_run(tmp_path / "run")
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content)
    with pytest.raises(DamagedRunError, match=name):
        ResultView.from_folder(folder)


@pytest.mark.parametrize("width", [80, 100, 140])
def test_matrices_side_by_side(tmp_path, width):
    view = ResultView.from_folder(write_run(tmp_path / "run"))
    lines = screen(view, width).splitlines()
    (last,) = [line for line in lines if line.startswith("after 5")]
    shown = [f"{100 * v:.1f}" for m in ("oracle", "routed") for v in view.matrix(m)[-1]]
    assert last.split() == ["after", "5", *shown[:5], "after", "5", *shown[5:]]
    (first,) = [line for line in lines if line.startswith("after 1")]
    assert len(first.split()) == 6  # cells that do not exist are blank
    assert max(len(line) for line in lines if "/" not in line) <= width


def test_matrices_stacked_where_narrow(tmp_path):
    view = ResultView.from_folder(write_run(tmp_path / "run", tasks=9))
    lines = screen(view, 80).splitlines()
    last = [line.split() for line in lines if line.startswith("after 9")]
    assert [len(line) for line in last] == [11, 11]
    assert lines.index("%, over all seen tasks           oracle  routed") > 20


def test_long_stream_keeps_both_ends(tmp_path):
    view = ResultView.from_folder(write_run(tmp_path / "run", tasks=30))
    text = screen(view, 80)
    lines = [line.rstrip() for line in text.splitlines()]
    assert max(len(line) for line in lines if "/" not in line) <= 80
    (head, _) = [line.split() for line in lines if line.startswith("task")]
    assert head[1] == "1"
    assert head[-1] == "30"
    assert ".." in head
    assert sum(line.startswith("after") for line in lines) < 2 * 30
    assert "report.md has every cell" in text


def test_numbers_of_the_screen(tmp_path):
    view = ResultView.from_folder(write_run(tmp_path / "run"))
    text = " ".join(screen(view).split())
    oracle, routed = (view.value("average_accuracy_micro", r) for r in ("oracle", "routed"))
    lost, luck = view.value("routing_loss"), view.value("misroute_luck")
    assert (
        f"oracle {100 * oracle:.1f} - lost by routing {100 * lost:.1f} + gained by it "
        f"{100 * luck:.1f} = routed {100 * routed:.1f}"
    ) in text
    drift = 100 * view.value("forgetting", "routed")
    assert f"routed forgetting {drift:.1f} = module drift 0.0 + routing drift {drift:.1f}" in text
    assert "size per task 442,368 module + 1,540 head parameters" in text
    assert "stored 16.9 MB: modules and heads 8.9 MB, router 8.1 MB" in text
    assert "learn 86.2 s, route 2.5 s, evaluate 10.0 s; in total 2 min 03 s" in text
    assert f"folder {view.folder}" in text
    assert f"figure {view.folder}/accuracy_matrix.png" in text
    assert "report.md" not in text  # not written yet


def test_a_repeated_stream_says_what_a_miss_is(tmp_path):
    again = config()
    again["stream"]["repetitions"] = 2
    view = ResultView.from_folder(write_run(tmp_path / "run", cfg=again))
    assert "another visit of the same classes counts as a miss" in " ".join(screen(view).split())
    once = ResultView.from_folder(write_run(tmp_path / "once"))
    assert "visit" not in screen(once)


def test_undefined_says_why(tmp_path):
    text = screen(ResultView.from_folder(write_run(tmp_path / "run", tasks=1)))
    for name in ("forgetting", "backward transfer"):
        (line,) = [line for line in text.splitlines() if line.startswith(name)]
        assert line.split(maxsplit=len(name.split()))[-1].count("n/a (first task)") == 2
    assert "nan" not in text.lower()


def test_sum_that_rounding_breaks_says_so(tmp_path):
    view = ResultView.from_folder(write_run(tmp_path / "run"))
    values = {"average_accuracy_micro": 0.80044, "routing_loss": 0.0, "misroute_luck": 0.00044}
    rows = view.results
    for metric, value in values.items():
        rows.loc[rows["metric"] == metric, "value"] = value
    wanted = (rows["metric"] == "average_accuracy_micro") & (rows["routing"] == "routed")
    rows.loc[wanted, "value"] = 0.80088
    assert view.decomposition().endswith("= routed 80.1 (rounded)")


def test_plain_is_ascii_and_terminal_is_not(tmp_path, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    view = ResultView.from_folder(write_run(tmp_path / "run"))
    plain = screen(view)
    assert plain.isascii()
    assert "\x1b" not in plain
    monkeypatch.setenv("TERM", "xterm-256color")
    fancy = screen(view, 100, terminal=True)
    bold = [line for line in fancy.splitlines() if "\x1b[1m" in line and "after 5" in line]
    assert len(bold) == 1
    assert not [line for line in fancy.splitlines() if "\x1b[1m" in line and "after 4" in line]


def test_text_is_never_markup(tmp_path):
    err = io.StringIO()
    console = Console(stderr=err)
    console.message("label [0-76] :smile: [/bold]")
    console.error("a" * 200 + " [red]")
    assert err.getvalue() == f"label [0-76] :smile: [/bold]\nerror: {'a' * 200} [red]\n"


def test_name_that_the_pipe_cannot_take(tmp_path):
    raw = io.BytesIO()
    console = Console(stderr=io.TextIOWrapper(raw, encoding="ascii", write_through=True))
    console.message("Größe")
    assert raw.getvalue() == b"Gr\\xf6\\xdfe\n"


def test_bars_are_silent_without_a_terminal():
    out, err = io.StringIO(), io.StringIO()
    console = Console(stdout=out, stderr=err)
    with console.bar("task 1/5", total=2) as bar:
        bar.advance(loss=0.5)
        bar.describe("x")
        console.task_done(1, 5, 14.21, 0.913, 0.84, float("nan"))
    assert out.getvalue() == ""
    assert err.getvalue() == "task 1/5  learned 14.2 s  oracle 91.3  routed 84.0  router n/a\n"


BARS = """
    import sys
    from cl_peft.console import Console
    console = Console(bars=None if len(sys.argv) < 2 else False)
    with console.bar("tasks", total=5) as tasks:
        for epoch in (1, 2):
            with console.bar(f"epoch {epoch}/2", total=7) as steps:
                steps.advance(3, loss=0.25)
                console._progress and console._progress.refresh()
        print("printed by a library")
        with console.bar("download", total=38e6, unit="bytes") as bar:
            bar.advance(19e6)
            console._progress and console._progress.refresh()
        console.message("said")
        tasks.advance()
    assert console._progress is None
    try:
        with console.bar("broken"):
            raise KeyError
    except KeyError:
        assert console._progress is None
    print("RESULT")
"""


def at_a_terminal(*arguments: str) -> tuple[str, str]:
    """Stdout through a pipe, and what appears on stderr at a terminal."""
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(BARS), *arguments],
        stdout=subprocess.PIPE,
        stderr=follower,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "100"},
    )
    os.close(follower)
    out, _ = process.communicate(timeout=30)
    seen = os.read(leader, 1 << 16).decode() if process.returncode == 0 else ""
    os.close(leader)
    assert process.returncode == 0
    return out.decode(), seen


def test_bars_at_a_terminal():
    out, seen = at_a_terminal()
    for text in ("tasks", "epoch 1/2", "epoch 2/2", "3/7", "loss 0.25", "19.0/38.0 MB", "said"):
        assert text in seen
    assert out == "printed by a library\nRESULT\n"  # stdout is a pipe, and keeps what is its own


def test_bars_can_be_refused():
    _, seen = at_a_terminal("no bars")
    assert seen.split() == ["said"]


@pytest.mark.parametrize(
    ("value", "text"), [(0.8449, "84.5"), (1.0, "100.0"), (-0.0004, "0.0"), (float("nan"), "n/a")]
)
def test_percent(value, text):
    assert percent(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(9.96, "10.0 s"), (99.96, "1 min 40 s"), (3599.7, "1 h 00 min")]
)
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_size():
    sizes = {12: "12 bytes", 1500: "1.5 kB", 2.5e6: "2.5 MB", 3e9: "3.0 GB", 2e13: "20,000.0 GB"}
    assert {n: size(n) for n in sizes} == sizes


@pytest.fixture
def group(tmp_path):
    folder = tmp_path / "sweep"
    write_run(folder / "a")
    write_run(
        folder / "b",
        cfg=config(learner__name="joint", learner__keep=True, module__rank=4),
        done=2,
        state="failed",
        error="Traceback (most recent call last):\n  File ...\nDivergedError: loss is nan",
    )
    write_run(folder / "c", cfg=config(seed__init=1))
    (folder / "c" / "results.parquet").write_bytes(b"half")
    (folder / ".submitit").mkdir()
    return folder


def test_sweep_status(group):
    status = sweep_status(group).set_index("run")
    assert list(status.index) == ["a", "b", "c"]
    assert list(status["state"]) == ["finished", "failed", "damaged"]
    assert list(status["tasks_done"]) == [5, 2, 0]
    assert status.loc["a", "routed_average_accuracy"] == pytest.approx(
        ResultView.from_folder(group / "a").value("average_accuracy", "routed")
    )
    assert np.isnan(status.loc["b", "routed_average_accuracy"])  # not comparable yet
    assert status.loc["b", "error"] == "DivergedError: loss is nan"
    assert "results.parquet" in status.loc["c", "error"]
    assert status.loc["a", "settings"] == "module.rank=8 learner=isolated seed.init=0"
    assert status.loc["b", "settings"] == "module.rank=4 learner=joint seed.init=0"


def test_empty_group(tmp_path):
    assert sweep_status(tmp_path).empty
    assert "error" in sweep_status(tmp_path)


def test_status_screen(group):
    out = io.StringIO()
    Console(stdout=out, width=120).status(group)
    text = out.getvalue()
    assert text.isascii()
    (line,) = [line for line in text.splitlines() if "joint" in line]
    assert line.split()[3:] == [
        "failed",
        "2/5",
        "2",
        "min",
        "03",
        "s",
        "DivergedError:",
        "loss",
        "is",
        "nan",
    ]


def test_screen_needs_no_torch(tmp_path):
    folder = write_run(tmp_path / "run")
    code = f"""
        import sys
        from pathlib import Path
        from cl_peft.console import Console, ResultView
        assert "pandas" not in sys.modules  # an error message comes at once
        from cl_peft.report import write_report
        write_report(Path({str(folder)!r}))
        Console().result(ResultView.from_folder(Path({str(folder)!r})))
        assert not {{"torch", "transformers", "wandb", "matplotlib"}} & set(sys.modules)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    assert b"report.md" in done.stdout
