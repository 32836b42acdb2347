"""The cl-peft command on a finished run."""

import subprocess
import sys

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from cl_peft.cli import main
from cl_peft.loading import load_run
from cl_peft.modules.bank import Route, flatten


@pytest.fixture
def done_run(smoke_run):
    return smoke_run.folder


def test_export_gives_adapters_that_peft_computes_alike(done_run, tmp_path, capsys):
    assert main(["export", str(done_run), str(tmp_path)]) == 0
    assert capsys.readouterr().out.split() == [str(tmp_path / f"task_{t:03d}") for t in (1, 2, 3)]
    run = load_run(done_run)
    batch = run.backbone.collate(run.backbone.encode(["one text", "another text"]))
    with run.bank.use(Route.to(run.rows[2], 2)):
        ours = run.backbone.model(**batch).last_hidden_state
    run.bank.close()
    theirs = PeftModel.from_pretrained(run.backbone.model, tmp_path / "task_002").eval()
    torch.testing.assert_close(theirs(**batch).last_hidden_state, ours, atol=1e-5, rtol=1e-5)


def test_import_is_the_inverse(done_run, tmp_path, capsys):
    main(["export", str(done_run), str(tmp_path), "--task", "3"])
    target = tmp_path / "back.safetensors"
    assert (
        main(["import", str(tmp_path / "task_003"), str(target), "--run-folder", str(done_run)])
        == 0
    )
    assert "LoRA on 12 layers, 9,216 parameters" in capsys.readouterr().out
    run = load_run(done_run)
    stored = flatten(run.bank.get(run.rows[3]))
    back = load_file(target)
    assert set(back) == set(stored)
    assert all(torch.equal(back[n], stored[n]) for n in stored)


def test_loading_gives_what_the_run_had(done_run):
    run = load_run(done_run)
    assert sorted(run.rows) == [1, 2, 3]
    assert [len(run.heads[t].classes) for t in (1, 2, 3)] == [2, 2, 2]
    assert len(run.class_names) == 6


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["export", "nowhere", "out"], "is no run folder"),
        (["export", "{run}", "out", "--task", "9"], "has modules of task 1, 2, 3"),
        (["status", "nowhere"], "There is no folder nowhere"),
        (["import", "nowhere", "out", "--run-folder", "{run}"], "is missing"),
    ],
)
def test_errors_in_words(arguments, words, done_run, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main([a.format(run=done_run) for a in arguments]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_status_says_whether_all_is_done(done_run, capsys):
    assert main(["status", str(done_run.parent)]) == 0
    assert "finished" in capsys.readouterr().out


def test_help_needs_no_torch():
    code = (
        "import sys; from cl_peft.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code + "sys.exit('torch' in sys.modules)"],
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0
    assert b"export" in done.stdout
