import pandas as pd
import pytest
from fake_run import SAMPLES, write_run

from cl_peft.errors import UserError
from cl_peft.report import write_report
from cl_peft.view import ResultView


def tables(text: str) -> list[list[list[str]]]:
    """All Markdown tables as rows of cells, without the alignment row."""
    found, rows = [], []
    for line in [*text.splitlines(), ""]:
        if line.startswith("|"):
            rows.append([c.strip() for c in line.replace("\\|", "!").strip("|").split("|")])
        elif rows:
            assert len({len(row) for row in rows}) == 1
            found.append([rows[0], *rows[2:]])
            rows = []
    return found


def section(text: str, title: str) -> str:
    return text.split(f"{title}\n", 1)[1].split("\n#", 1)[0]


def test_report_of_a_finished_run(tmp_path):
    folder = write_run(tmp_path / "group" / "run", tasks=3)
    path = write_report(folder)
    assert path == folder / "report.md"
    text = path.read_text()
    view = ResultView.from_folder(folder)
    assert text.startswith("# group/run\n")
    assert "```\npython main.py experiment=newsgroups\n```" in text
    assert "![accuracy matrices](accuracy_matrix.png)" in text
    assert view.decomposition() in text
    assert view.drift() in text
    for routing in ("oracle", "routed"):
        (table,) = tables(section(text, f"### Accuracy, {routing}, %"))
        cells = view.matrix(routing)
        assert table[0] == ["after task", "1", "2", "3"]
        assert table[-1] == ["3", *(f"{100 * v:.1f}" for v in cells[-1])]
        assert table[1][2:] == ["", ""]
    (configuration,) = tables(section(text, "## Configuration"))
    assert ["module.rank", "`8`"] in configuration
    (provenance,) = tables(section(text, "## Provenance"))
    assert ["git.dirty", "`True`"] in provenance
    assert "command" not in [row[0] for row in provenance]


def test_confusion_counts_every_sample(tmp_path):
    folder = write_run(tmp_path / "run", tasks=3)
    (table,) = tables(
        section(write_report(folder).read_text(), "### Router confusion after task 3")
    )
    assert table[0] == ["true task", "1", "2", "3", "right, %"]
    predictions = pd.read_parquet(folder / "predictions.parquet")
    last = predictions[predictions["after_task"] == 3]
    for row in table[1:]:
        chosen = last[last["eval_task"] == int(row[0])]["routed_task"]
        assert [int(n) for n in row[1:4]] == [(chosen == t).sum() for t in (1, 2, 3)]
        assert sum(int(n) for n in row[1:4]) == SAMPLES
        assert row[4] == f"{100 * (chosen == int(row[0])).mean():.1f}"


def test_nothing_routed_has_no_confusion(tmp_path):
    folder = write_run(tmp_path / "run")
    path = folder / "predictions.parquet"
    rows = pd.read_parquet(path)
    rows["routed_task"] = rows["routed_task"].where(rows["eval_task"] > 1, 0)
    rows.to_parquet(path)
    assert "| true task | none |" in write_report(folder).read_text()
    rows.assign(routed_task=0).to_parquet(path)
    assert "confusion" not in write_report(folder).read_text()


def test_report_of_a_failed_run(tmp_path):
    folder = write_run(tmp_path / "run", done=2, state="failed", error="loss | is nan")
    text = write_report(folder).read_text()
    assert "**failed**, with 2 of 5 tasks done." in text
    assert "loss | is nan" in text
    assert "after task 2" in text
    assert "accuracy_matrix.png" not in text


def test_report_before_the_first_task(tmp_path):
    text = write_report(write_run(tmp_path / "run", done=0, state="failed")).read_text()
    assert "with 0 of 5 tasks done" in text
    assert "## Results" not in text
    assert "module.rank" in text


def test_equal_runs_equal_reports_and_nothing_left_behind(tmp_path):
    folder = write_run(tmp_path / "run")
    before = {p.name for p in folder.iterdir()}
    first = write_report(folder).read_bytes()
    assert write_report(folder).read_bytes() == first
    assert {p.name for p in folder.iterdir()} == before | {"report.md"}


def test_failing_write_keeps_the_old_report(tmp_path, monkeypatch):
    folder = write_run(tmp_path / "run")
    old = write_report(folder).read_bytes()
    files = set(folder.iterdir())

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(UserError, match="no space left on the disk"):
        write_report(folder)
    assert (folder / "report.md").read_bytes() == old
    assert set(folder.iterdir()) == files
