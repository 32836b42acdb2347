"""cl-peft on many runs: report, compare, table, figures, and what they warn of."""

import io
import json
import shutil
import subprocess
import sys
import warnings

import pandas as pd
import pytest
from fake_run import config, write_group, write_run

import analysis
from analysis import figures
from analysis.report_figures import Plan
from cl_peft.cli import main


@pytest.fixture
def group(tmp_path):
    return write_group(tmp_path / "runs" / "group")


# ---------------------------------------------------------------- warnings

UNFINISHED = (
    "warning: 3 of 5 runs are not finished and not in tables and figures of results: "
    "failed (failed), killed (interrupted), refused (refused)"
)


def warned(arguments, capsys):
    """Lines of stderr, all of which are warnings."""
    assert main([str(argument) for argument in arguments]) == 0
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert all(line.startswith("warning: ") for line in lines), captured.err
    assert "warning" not in captured.out
    assert ".py" not in captured.err
    assert len(set(lines)) == len(lines)
    return lines


@pytest.mark.parametrize("command", ["table", "figures", "report"])
def test_what_is_left_out_is_said_in_plain_lines(command, group, tmp_path, capsys):
    output = ("-o", tmp_path / "figures") if command == "figures" else ()
    assert warned([command, group, *output], capsys) == [UNFINISHED]
    for name in ("damaged-0", "damaged-1"):
        write_run(group / name, tasks=3, cfg=config())
        (group / name / "results.parquet").write_bytes(b"no")
    lines = warned([command, group, *output], capsys)
    assert lines[-1] == UNFINISHED.replace("of 5", "of 7")
    for name, line in zip(("damaged-0", "damaged-1"), lines, strict=False):
        assert line.startswith(f"warning: skipped a damaged run: {name}/results.parquet")
    assert len(lines) == 3


def test_too_few_runs_are_said(group, capsys):
    write_run(group / "other", tasks=3, cfg=config(router__name="prototype"))
    write_run(group / "another", tasks=3, cfg=config(router__name="prototype", seed__init=1))
    for form in ("markdown", "csv"):
        *_, last = warned(["table", group, "--format", form], capsys)
        assert last == (
            "warning: too few runs: the smallest p that 2 pairs can give is 0.5, 0.5 after "
            "correction, so nothing here can be significant: that takes 6 pairs"
        )


def test_a_comparison_warns_plainly(group, monkeypatch, capsys):
    def load_stream(path):
        warnings.warn("odd", stacklevel=2)
        return {}

    monkeypatch.setattr("analysis.compare.load_stream", load_stream)
    assert warned(["compare", group / "ridge-0", group / "ridge-1"], capsys) == ["warning: odd"]


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


def test_a_table_over_replicates(tmp_path, capsys):
    """A key that is no seed may count as one: the three samples of a benchmark, say."""
    group = tmp_path / "group"
    for seed, (router, sample) in enumerate((r, s) for r in ("ridge", "klda") for s in "abc"):
        node = config(router__name=router, stream__sample=sample)
        write_run(group / f"{router}-{sample}", tasks=3, seed=seed, cfg=node)
    wanted = ["--metrics", "average_accuracy_routed", "--format", "csv"]
    assert main(["table", str(group), *wanted]) == 0
    each = pd.read_csv(io.StringIO(capsys.readouterr().out))
    assert len(each) == 6
    over = ["--over", "stream.sample"]
    assert main(["table", str(group), *wanted, *over]) == 0
    table = pd.read_csv(io.StringIO(capsys.readouterr().out)).set_index("router")
    means = each.groupby("router")[wanted[1]].mean()
    assert table[wanted[1]].to_dict() == pytest.approx(means.to_dict())
    assert main(["table", str(group), *over]) == 0
    assert "that 3 pairs can give is 0.25" in capsys.readouterr().out  # a pair per sample
    assert main(["figures", str(group), *over, "-o", str(tmp_path / "figures")]) == 0
    drawn = {path.stem for path in (tmp_path / "figures").iterdir()}
    assert drawn >= {"anytime_accuracy", "forgetting_per_task_klda"}
    assert main(["report", str(group), *over, "-o", str(tmp_path / "page.html")]) == 0
    assert "Mean of 3 runs each (6 in all)" in (tmp_path / "page.html").read_text()
    capsys.readouterr()
    assert main(["table", str(group), *wanted, "--over", "stream.sampel"]) == 2
    assert "Did you mean 'stream.sample'?" in capsys.readouterr().err


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
