"""A run's bank as a hub folder: what it says is what the run measured, and it works on its own."""

import json
import shutil

import huggingface_hub
import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from peft import PeftModel
from running import ROOT, run

from cl_peft.card import check_repository, push, write_card
from cl_peft.cli import main
from cl_peft.config import public
from cl_peft.errors import ConfigError, DownloadError
from cl_peft.loading import load_run
from cl_peft.modules.bank import Route
from cl_peft.view import ResultView, percent

TEXTS = ["a text", "another, longer text", "b"]


@pytest.fixture(scope="module")
def hub(smoke_run, tmp_path_factory):
    return write_card(load_run(smoke_run.folder), tmp_path_factory.mktemp("hub") / "card")


def test_the_card_says_what_was_measured(hub, smoke_run):
    card = ModelCard.load(hub / "README.md")
    view = ResultView.from_folder(smoke_run.folder)
    assert card.data.library_name == "peft"
    assert card.data.pipeline_tag == "text-classification"
    assert {"cl_peft", "continual-learning", "lora"} <= set(card.data.tags)
    assert card.data.base_model is None  # 'tiny' is nothing on the hub
    values = {r.metric_name: r.metric_value for r in card.data.eval_results}
    for routing in ("oracle", "routed"):
        value = view.value("average_accuracy", routing)
        assert values[f"average accuracy, {routing}"] == pytest.approx(value, abs=1e-4)
        assert f" {percent(value)} " in card.content
    assert all(f"`adapters/task_00{t}`" in card.content for t in (1, 2, 3))
    assert (hub / "accuracy_matrix.png").exists()


def test_its_adapters_are_peft_s_and_its_run_predicts(hub, smoke_run):
    here, there = load_run(smoke_run.folder), load_run(hub / "run")
    ours, theirs = here.predict(TEXTS), there.predict(TEXTS)
    assert ours.names == theirs.names
    np.testing.assert_array_equal(ours.tasks, theirs.tasks)
    np.testing.assert_array_equal(ours.confidence, theirs.confidence)
    batch = here.backbone.collate(here.backbone.encode(TEXTS))
    with here.bank.use(Route.to(here.rows[3], 3)):
        states = here.backbone.model(**batch).last_hidden_state
    there.bank.close()
    peft = PeftModel.from_pretrained(there.backbone.model, hub, subfolder="adapters/task_003")
    torch.testing.assert_close(peft.eval()(**batch).last_hidden_state, states, atol=1e-5, rtol=1e-5)


def test_nothing_of_this_machine_is_in_it(hub, smoke_run):
    texts = [p.read_text() for p in hub.rglob("*") if p.suffix in (".md", ".json", ".yaml")]
    whole = "\n".join(texts)
    assert not (hub / "run" / "status.json").exists()  # process number, times
    for word in (str(smoke_run.folder.parent), str(ROOT), "main.py", "tracker"):
        assert word not in whole
    private = {
        "stream": {"train": "/home/me/a.csv", "order": ["x/y", "~/z"], "name": "s"},
        "backbone": {"name": "/models/bert"},
        "paths": {"cache": "/scratch/me"},
    }
    cleaned = public(private)
    assert cleaned["stream"] == {"train": "a.csv", "order": ["x/y", "z"], "name": "s"}
    assert cleaned["backbone"] == {"name": "bert"}
    assert "paths" not in cleaned


@pytest.mark.parametrize("options", [("learner=sequential",), ("module=ia3",), ("learner=frozen",)])
def test_other_runs(options, places, tmp_path):
    run_ = load_run(run("debug=smoke", *options, *places))
    card = write_card(run_, tmp_path / "card")
    peft = options == ("learner=sequential",)
    assert ModelCard.load(card / "README.md").data.library_name == ("peft" if peft else "cl_peft")
    found = sorted(p.name for p in card.glob("adapters/*"))
    assert found == (["task_003"] if peft else [])  # a single module: the last one
    assert load_run(card / "run").predict(TEXTS).names == run_.predict(TEXTS).names


def test_an_unfinished_run_says_so(smoke_run, tmp_path):
    folder = shutil.copytree(smoke_run.folder, tmp_path / "run")
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    state = manifest["tasks"][2]["files"]["tasks/003/router.safetensors"]
    name = "tasks/{}/router.safetensors".format
    shutil.copyfile(folder / name("003"), folder / name("002"))
    manifest["tasks"][1]["files"][name("002")] = state
    manifest.update(tasks=manifest["tasks"][:2], final=None)
    path.write_text(json.dumps(manifest))
    shutil.rmtree(folder / "tasks" / "003")
    status = json.loads((folder / "status.json").read_text())
    (folder / "status.json").write_text(json.dumps({**status, "state": "failed"}))
    card = write_card(load_run(folder), tmp_path / "card")
    assert "2 of 3 tasks" in (card / "README.md").read_text()
    assert sorted(p.name for p in card.glob("adapters/*")) == ["task_001", "task_002"]


def test_a_folder_that_holds_something_is_left_alone(smoke_run, tmp_path, capsys):
    (tmp_path / "README.md").write_text("mine")
    assert main(["card", str(smoke_run.folder), str(tmp_path)]) == 2
    assert "not empty" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["README.md"]


# ------------------------------------------------------------------ the hub, which is not called


def test_the_upload(hub, monkeypatch):
    calls = []
    for name in ("create_repo", "upload_folder"):

        def call(self, *args, _name=name, **options):
            calls.append((_name, args, options))
            return "address"

        monkeypatch.setattr(huggingface_hub.HfApi, name, call)
    assert push(hub, "me/bank") == "address"
    (created, repository, options), (uploaded, _, what) = calls
    assert (created, uploaded) == ("create_repo", "upload_folder")
    assert repository == ("me/bank",)
    assert options == {"private": True, "exist_ok": True}
    assert (what["repo_id"], what["folder_path"]) == ("me/bank", hub)


def test_a_hub_that_refuses(hub, monkeypatch):
    def refuse(self, *args, **options):
        raise OSError("no token\nand more")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", refuse)
    with pytest.raises(DownloadError, match="could not be uploaded to me/bank: no token\n"):
        push(hub, "me/bank")


def test_a_wrong_repository_is_refused_before_anything_is_written(smoke_run, tmp_path, capsys):
    target = tmp_path / "card"
    assert main(["card", str(smoke_run.folder), str(target), "--push-to", "bank"]) == 2
    assert "give OWNER/NAME" in capsys.readouterr().err
    assert not target.exists()
    for name in ("a/b/c", "/b", "a/", "a b/c", "../x"):
        with pytest.raises(ConfigError):
            check_repository(name)
    check_repository("owner-1/name.v2")


def test_a_model_of_the_hub_is_named_as_base(hub, smoke_run, tmp_path):
    run_ = load_run(smoke_run.folder)
    run_.config["backbone"]["name"] = "org/model"
    card = write_card(run_, tmp_path / "card")
    front = yaml.safe_load((card / "README.md").read_text().split("---")[1])
    assert front["base_model"] == "org/model"
    adapter = json.loads((card / "adapters/task_001/adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == "org/model"
