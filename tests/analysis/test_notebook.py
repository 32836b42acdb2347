import runpy
from pathlib import Path

import jupytext
import pytest

import analysis

NOTEBOOK = Path(analysis.__file__).parent / "notebooks" / "first_look.py"


def run_notebook(monkeypatch, runs, figures=None):
    monkeypatch.setenv("CL_PEFT_RUNS", str(runs))
    monkeypatch.delenv("CL_PEFT_FIGURES", raising=False)
    if figures:
        monkeypatch.setenv("CL_PEFT_FIGURES", str(figures))
    return runpy.run_path(str(NOTEBOOK))


def test_runs_from_top_to_bottom(sweep, tmp_path, monkeypatch, capsys):
    names = run_notebook(monkeypatch, sweep, tmp_path / "figures")
    printed = capsys.readouterr().out
    assert "6 runs" in printed
    assert sorted(path.name for path in (tmp_path / "figures").iterdir()) == [
        "anytime.png",
        "matrices.png",
    ]
    final = names["runs"].set_index("run").loc["isolated-0", "average_accuracy_routed"]
    assert f"{final:.3f}" in printed
    split = names["analysis"].forgetting_split(names["one"])
    assert f"{split.loc[4, 'module_drift']:.3f}" in printed
    assert f"{len(names['mistakes'])} samples went to another task's module" in printed
    assert "topic " in printed  # samples are shown with the names of their classes


def test_runs_on_unfinished_and_mixed_runs(tmp_path, write_run, monkeypatch, capsys):
    write_run(tmp_path / "g" / "a", rank=4)
    write_run(tmp_path / "g" / "b", rank=8)
    write_run(tmp_path / "h" / "c", done=1, state="running")
    run_notebook(monkeypatch, tmp_path)
    printed = capsys.readouterr().out
    assert "something else differs: a, b" in printed
    assert "run c: isolated learner" in printed


def test_says_when_there_is_nothing(tmp_path, monkeypatch):
    with (
        pytest.warns(UserWarning, match="no run folder"),
        pytest.raises(SystemExit, match="holds no results yet"),
    ):
        run_notebook(monkeypatch, tmp_path)


def test_opens_as_a_notebook():
    notebook = jupytext.read(NOTEBOOK)
    kinds = [cell.cell_type for cell in notebook.cells]
    assert kinds.count("code") >= 7
    assert kinds.count("markdown") >= 7
    assert notebook.metadata["kernelspec"]["name"] == "python3"
