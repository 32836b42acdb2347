import json
import runpy
from pathlib import Path

import jupytext
import pytest

import analysis

NOTEBOOKS = Path(analysis.__file__).parent / "notebooks"
NAMES = ("first_look", "routers_compared", "stability_plasticity", "sweep_to_paper")


def run_notebook(monkeypatch, runs, figures=None, name="first_look"):
    monkeypatch.setenv("CL_PEFT_RUNS", str(runs))
    monkeypatch.delenv("CL_PEFT_FIGURES", raising=False)
    if figures:
        monkeypatch.setenv("CL_PEFT_FIGURES", str(figures))
    return runpy.run_path(str(NOTEBOOKS / f"{name}.py"))


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


@pytest.mark.parametrize("name", NAMES)
def test_says_when_there_is_nothing(tmp_path, monkeypatch, name):
    with (
        pytest.warns(UserWarning, match="no run folder"),
        pytest.raises(SystemExit, match="holds no"),
    ):
        run_notebook(monkeypatch, tmp_path, name=name)


def test_every_notebook_is_tested():
    assert sorted(path.stem for path in NOTEBOOKS.glob("*.py")) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_opens_as_a_notebook(name):
    notebook = jupytext.read(NOTEBOOKS / f"{name}.py")
    kinds = [cell.cell_type for cell in notebook.cells]
    assert kinds.count("code") >= 6
    assert kinds.count("markdown") >= 6
    assert notebook.metadata["kernelspec"]["name"] == "python3"


def test_routers_compared(grid, tmp_path, monkeypatch, capsys):
    names = run_notebook(monkeypatch, grid, tmp_path, "routers_compared")
    printed = capsys.readouterr().out
    assert "learner isolated, module.rank 4" in printed
    assert "10 runs of 2 routers" in printed
    result = names["result"]
    assert result.unit == "run"
    assert len(result.pairs) == 5
    assert f"ridge - prototype: {100 * result.difference:.2f} points" in printed
    accuracy = names["runs"].groupby("router")["average_accuracy_routed"].mean()
    assert result.difference == pytest.approx(accuracy["ridge"] - accuracy["prototype"])
    assert "so none can be significant at 0.05" in printed
    pictures = {path.stem for path in tmp_path.glob("*.png")}
    assert pictures == {
        f"routers_{what}" for what in ("anytime", "confusion", "margins", "abstention")
    }


def test_routers_compared_with_one_router(sweep, monkeypatch, capsys):
    run_notebook(monkeypatch, sweep, name="routers_compared")
    assert "Only one router: nothing to compare." in capsys.readouterr().out


def test_stability_plasticity(grid, tmp_path, monkeypatch, capsys):
    names = run_notebook(monkeypatch, grid, tmp_path, "stability_plasticity")
    printed = capsys.readouterr().out
    assert "40 finished runs, grouped by group, router, learner, module.rank" in printed
    numbers = names["numbers"].pivot(
        index=["router", "learner", "module.rank"], columns="metric", values="estimate"
    )
    parts = numbers["learning_accuracy_routed"] + numbers["backward_transfer_t_routed"]
    assert parts.tolist() == pytest.approx(numbers["average_accuracy_routed"].tolist())
    pictures = {path.stem for path in tmp_path.glob("*.png")}
    assert {"stability_plasticity", "stability_anytime", "forgetting_per_task_4"} <= pictures


def test_sweep_to_paper(grid, tmp_path, monkeypatch, capsys):
    names = run_notebook(monkeypatch, grid, tmp_path, "sweep_to_paper")
    printed = capsys.readouterr().out
    assert "varying: learner.name, module.rank, router.name" in printed
    latex = (tmp_path / "table.tex").read_text()
    assert latex in printed
    assert latex == names["paper"].to_latex(
        caption="Final accuracy and forgetting.", label="tab:sweep"
    )
    assert (tmp_path / "table.csv").read_text() == names["paper"].to_csv()
    assert "# grid/isolated-ridge-16-0 (a) and grid/isolated-ridge-4-0 (b)" in printed
    assert {"overview", "critical_difference"} == {path.stem for path in tmp_path.glob("*.png")}


def test_sweep_to_paper_on_a_sweep_that_still_runs(tmp_path, write_run, monkeypatch, capsys):
    write_run(tmp_path / "g" / "a")
    write_run(tmp_path / "g" / "b", router="prototype", done=2, state="running")
    run_notebook(monkeypatch, tmp_path, name="sweep_to_paper")
    printed = capsys.readouterr().out
    assert "| g | b | running | 2 | 4 |" in printed
    assert "Ranks need at least 2 seeds" in printed


def test_sweep_to_paper_over_streams(streams, monkeypatch, capsys):
    names = run_notebook(monkeypatch, streams, name="sweep_to_paper")
    printed = capsys.readouterr().out
    assert "Bold: best of each stream" in printed
    assert "Friedman over 3 streams and 2 methods" in printed
    assert "# g/easy-ridge-0 (a) and g/easy-prototype-0 (b)" in printed
    assert names["best"].tolist() == ["ridge", "prototype"]


@pytest.mark.parametrize("name", ["routers_compared", "sweep_to_paper"])
def test_runs_that_cannot_be_paired_are_said(tmp_path, write_run, monkeypatch, capsys, name):
    run = write_run(tmp_path / "g" / "a")
    write_run(tmp_path / "g" / "b", router="prototype")
    stream = json.loads((run / "stream.json").read_text())
    stream["tasks"][0]["test_digest"] = "0" * 16
    (run / "stream.json").write_text(json.dumps(stream))
    run_notebook(monkeypatch, tmp_path, name=name)
    assert "Runs g/a and g/b cannot be paired" in capsys.readouterr().out
