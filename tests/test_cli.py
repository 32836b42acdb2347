"""The cl-peft command on a finished run."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from cl_peft.cli import main
from cl_peft.loading import load_run
from cl_peft.modules.bank import Route, flatten
from cl_peft.modules.huggingface import head_of, read_module, same_kind


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


def test_export_writes_the_head_beside(done_run, tmp_path):
    main(["export", str(done_run), str(tmp_path), "--task", "2"])
    run = load_run(done_run)
    head, names = head_of(tmp_path / "task_002", run.backbone.device)
    assert torch.equal(head.weight, run.heads[2].weight)
    assert names == {c: run.class_names[c] for c in run.heads[2].classes}
    about = json.loads((tmp_path / "task_002" / "cl_peft.json").read_text())
    assert (about["pooling"], about["task"], about["run"]) == ("mean", 2, done_run.name)


def test_import_says_what_it_found(done_run, tmp_path, capsys):
    main(["export", str(done_run), str(tmp_path), "--task", "1"])
    adapter, run_folder = str(tmp_path / "task_001"), ["--run-folder", str(done_run)]
    capsys.readouterr()
    assert main(["import", adapter, *run_folder]) == 0  # without target: nothing is written
    assert "can join the run's own bank" in capsys.readouterr().out
    assert [p.name for p in tmp_path.iterdir()] == ["task_001"]
    path = tmp_path / "task_001" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "lora_alpha": 3}))
    assert main(["import", adapter, *run_folder]) == 0
    assert "needs a bank of its own" in capsys.readouterr().out


def test_import_for_a_backbone_without_a_run(done_run, tmp_path, capsys):
    main(["export", str(done_run), str(tmp_path / "out"), "--task", "1"])
    run = load_run(done_run)
    run.backbone.model.save_pretrained(tmp_path / "model")
    target = tmp_path / "m.safetensors"
    arguments = [str(tmp_path / "out" / "task_001"), str(target)]
    assert main(["import", *arguments, "--backbone", str(tmp_path / "model")]) == 0
    assert f"{target}: LoRA on 12 layers" in capsys.readouterr().out
    run.bank.close()
    bank, module = read_module(target, run.backbone.model)
    assert same_kind(bank, run.bank)
    stored = flatten(run.bank.get(run.rows[1]))
    assert all(torch.equal(tensor, stored[name]) for name, tensor in flatten(module).items())


def test_card_prints_where_it_is(done_run, tmp_path, capsys):
    target = tmp_path / "card"
    assert main(["card", str(done_run), str(target)]) == 0
    assert capsys.readouterr().out == f"{target}\n"
    assert (target / "README.md").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["export", "nowhere", "out"], "is no run folder"),
        (["export", "{run}", "out", "--task", "9"], "has modules of task 1, 2, 3"),
        (["export", "{run}", "out", "--classifier"], "the head cannot go inside the adapter"),
        (["card", "nowhere", "out"], "is no run folder"),
        (["import", "nowhere", "out", "--backbone", "."], "could not be loaded"),
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


def test_status_of_what_is_not_all_done(done_run, tmp_path):
    group = shutil.copytree(done_run.parent, tmp_path / "group")
    path = group / done_run.name / "status.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "state": "failed"}))
    assert main(["status", str(group)]) == 1


@pytest.mark.parametrize("command", ["", "export", "import", "card", "status"])
def test_help_needs_no_torch(command):
    arguments = [command, "--help"] if command else ["--help"]
    code = (
        f"import sys; from cl_peft.cli import main\ntry: main({arguments})\n"
        "except SystemExit: pass\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code + "sys.exit('torch' in sys.modules)"],
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0
    assert f"cl-peft {command}".encode() in done.stdout
