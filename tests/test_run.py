"""What a finished run leaves behind, and that its numbers follow from its predictions."""

import hashlib
import json
import runpy
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from running import RIDGE, ROOT, config, folder_of, rows_of, run, write_csv
from safetensors.numpy import load_file
from wandb_file import WandbFile

import analysis
from cl_peft import metrics
from cl_peft.config import run_id, validate

SMOKE = ("debug=smoke", *RIDGE)


def table(folder, name="results"):
    return pd.read_parquet(folder / f"{name}.parquet")


def value(results, metric, routing="none", after=None):
    after = after or results["after_task"].max()
    rows = results[(results["metric"] == metric) & (results["routing"] == routing)]
    rows = rows[(rows["after_task"] == after) & rows["eval_task"].isna()]
    return float(rows["value"].item())


def matrix(results, routing):
    cells = results[(results["metric"] == "accuracy") & (results["routing"] == routing)]
    R = np.full((cells["after_task"].max(),) * 2, np.nan)
    R[cells["after_task"] - 1, cells["eval_task"].astype(int) - 1] = cells["value"]
    return R


# ------------------------------------------------------------------ the folder


def test_layout(smoke_run):
    found = {p.relative_to(smoke_run.folder).as_posix() for p in smoke_run.folder.rglob("*")}
    top = "config.yaml stream.json provenance.json status.json manifest.json timing.json run.log"
    top += " results.parquet predictions.parquet accuracy_matrix.png report.md .lock tasks"
    each = "module.safetensors results.parquet predictions.parquet memo.parquet timing.json"
    expected = set(top.split()) | {"tasks/003/router.safetensors"}
    for task in ("tasks/001", "tasks/002", "tasks/003"):
        expected |= {task, *(f"{task}/{name}" for name in each.split())}
    assert found == expected


def test_manifest_lists_every_file_of_the_run_with_its_digest(smoke_run):
    manifest = json.loads((smoke_run.folder / "manifest.json").read_text())
    listed = manifest["fixed"] | manifest["final"]
    assert [task["task"] for task in manifest["tasks"]] == [1, 2, 3]
    for task in manifest["tasks"]:
        listed |= task["files"]
    for name, entry in listed.items():
        data = (smoke_run.folder / name).read_bytes()
        assert entry == {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    inside = {
        p.relative_to(smoke_run.folder).as_posix() for p in smoke_run.folder.glob("tasks/*/*")
    }
    final = {"results.parquet", "predictions.parquet", "timing.json"}
    assert set(listed) == inside | final | {"config.yaml", "stream.json"}


def test_provenance(smoke_run):
    facts = json.loads((smoke_run.folder / "provenance.json").read_text())
    stream = json.loads((smoke_run.folder / "stream.json").read_text())
    git = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    revision = subprocess.run(git, capture_output=True, text=True).stdout.strip() or None
    assert facts["git_revision"] == revision
    assert facts["git_dirty"] in ((True, False) if revision else (None,))
    assert facts["stream_fingerprint"] == stream["fingerprint"]
    assert all(len(task["test_digest"]) == 16 for task in stream["tasks"])
    assert len(facts["backbone_fingerprint"]) == 64
    assert facts["packages"]["torch"].startswith("2.")
    assert {"transformers", "numpy", "pandas", "safetensors"} <= set(facts["packages"])
    assert (facts["seeds"], facts["threads"]) == ({"order": 0, "init": 0, "data": 0}, 1)
    assert facts["run"] == smoke_run.folder.name
    assert "debug=smoke" in facts["command"]


def test_stored_configuration_is_the_whole_and_names_the_folder(smoke_run):
    stored = yaml.safe_load((smoke_run.folder / "config.yaml").read_text())
    assert stored == validate(config(*smoke_run.args))
    assert run_id(stored) == smoke_run.folder.name


def test_screen_shows_the_stored_numbers(smoke_run):
    results = table(smoke_run.folder)
    for routing in ("oracle", "routed"):
        for row in matrix(results, routing):
            for cell in row[~np.isnan(row)]:
                assert f" {100 * cell:.1f}" in smoke_run.stdout
    accuracy = [100 * value(results, "average_accuracy", r) for r in ("oracle", "routed")]
    assert "average accuracy (over tasks) {:>9.1f} {:>7.1f}".format(*accuracy) in smoke_run.stdout
    assert "\x1b" not in smoke_run.stdout + smoke_run.stderr
    assert [line.split()[:2] for line in smoke_run.stderr.splitlines()[1:]] == [
        ["task", f"{t}/3"] for t in (1, 2, 3)
    ]


# ------------------------------------------------------------------ the numbers


def test_results_follow_from_predictions(smoke_run):
    results, predictions = table(smoke_run.folder), table(smoke_run.folder, "predictions")
    assert list(predictions.groupby("after_task").size()) == [16, 32, 48]
    R = {name: np.full((3, 3), np.nan) for name in ("oracle", "routed")}
    counts = [16, 16, 16]
    for (t, i), cell in predictions.groupby(["after_task", "eval_task"]):
        right = {name: cell[f"{name}_prediction"] == cell["label"] for name in R}
        routed_right = cell["routed_task"] == cell["eval_task"]
        for name in R:
            R[name][t - 1, i - 1] = right[name].mean()
        part = metrics.decompose(right["oracle"], right["routed"], routed_right)
        stored = results[(results["after_task"] == t) & (results["eval_task"] == i)]
        stored = stored[stored["routing"] == "none"].set_index("metric")["value"]
        assert stored["router_accuracy"] == routed_right.mean()
        for name in ("n", "n_lost_by_routing", "n_lucky", "n_misrouted_oracle_right"):
            assert stored[name] == getattr(part, name)
    for name, cells in R.items():
        np.testing.assert_array_equal(matrix(results, name), cells)
        for t in (1, 2, 3):
            block = cells[:t, :t]
            expected = {
                "average_accuracy": metrics.average_accuracy(block),
                "average_accuracy_micro": metrics.average_accuracy_micro(block, counts[:t]),
                "average_incremental_accuracy": metrics.average_incremental_accuracy(block),
                "forgetting": metrics.forgetting(block),
                "backward_transfer": metrics.backward_transfer(block),
                "learning_accuracy": metrics.learning_accuracy(block),
            }
            for metric, number in expected.items():
                np.testing.assert_equal(value(results, metric, name, after=t), number)
    micro = {name: value(results, "average_accuracy_micro", name) for name in R}
    lost, luck = value(results, "routing_loss"), value(results, "misroute_luck")
    assert micro["routed"] == pytest.approx(micro["oracle"] - lost + luck, abs=1e-12)
    drift = value(results, "forgetting_module_drift"), value(results, "forgetting_routing_drift")
    assert sum(drift) == pytest.approx(value(results, "forgetting", "routed"), abs=1e-12)


def test_what_does_not_exist_is_nan(smoke_run):
    results = table(smoke_run.folder)
    first = results[results["after_task"] == 1].set_index("metric")["value"]
    assert first[["forgetting", "backward_transfer"]].isna().all()
    cells = results[results["metric"] == "accuracy"]
    assert (cells["eval_task"] <= cells["after_task"]).all()


def test_isolated_modules_never_forget(smoke_run):
    results, predictions = table(smoke_run.folder), table(smoke_run.folder, "predictions")
    assert value(results, "forgetting", "oracle") == 0.0
    for task, cells in predictions.groupby("eval_task"):
        by_time = cells.pivot(index="row", columns="after_task", values="oracle_prediction")
        assert by_time.nunique(axis=1).eq(1).all(), task
    R = matrix(results, "oracle")
    for i in range(3):
        assert set(R[i:, i]) == {R[i, i]}


def test_stored_sizes_are_those_of_the_files(smoke_run):
    results = table(smoke_run.folder)
    for task in (1, 2, 3):
        tensors = load_file(smoke_run.folder / f"tasks/{task:03d}/module.safetensors")
        own = [t for name, t in tensors.items() if not name.startswith("head.")]
        assert value(results, "module_parameters", after=task) == sum(t.size for t in own)
        assert value(results, "module_bytes", after=task) == sum(t.nbytes for t in own)
        assert value(results, "bank_modules", after=task) == task


def test_sequential_forgets_and_the_bounds_are_in_order(places):
    easy = ("stream.noise=0.2", "trainer.epochs=8", "optimizer.lr=1e-2", *places)
    scores = {
        learner: table(run(*SMOKE, *easy, f"learner={learner}"))
        for learner in ("isolated", "sequential", "joint")
    }
    final = {name: value(r, "average_accuracy", "routed") for name, r in scores.items()}
    assert value(scores["sequential"], "forgetting", "routed") > 0.5
    assert value(scores["isolated"], "forgetting", "oracle") == 0.0
    assert min(final["isolated"], final["joint"]) > final["sequential"] + 0.3
    assert value(scores["isolated"], "average_accuracy", "oracle") > 0.9


# ------------------------------------------------------------------ seeds


def test_each_seed_decides_its_own(places):
    base = ("debug=smoke", "router=oracle", "trainer.epochs=1", "stream.shots=12", *places)
    folders = {
        name: run(*base, *extra)
        for name, extra in {
            "base": (),
            "order": ("seed.order=1",),
            "init": ("seed.init=1",),
            "data": ("seed.data=1",),
        }.items()
    }
    streams = {n: json.loads((f / "stream.json").read_text()) for n, f in folders.items()}
    classes = {n: [t["classes"] for t in s["tasks"]] for n, s in streams.items()}
    prints = {n: s["fingerprint"] for n, s in streams.items()}
    assert classes["init"] == classes["data"] == classes["base"] != classes["order"]
    assert prints["init"] == prints["base"]
    assert len({prints["base"], prints["order"], prints["data"]}) == 3
    backbones = {
        n: json.loads((f / "provenance.json").read_text())["backbone_fingerprint"]
        for n, f in folders.items()
    }
    assert backbones["order"] == backbones["data"] == backbones["base"] != backbones["init"]
    tested = {n: set(table(f, "predictions")["row"]) for n, f in folders.items()}
    assert tested["order"] == tested["init"] == tested["data"] == tested["base"]


def test_same_configuration_in_another_folder_gives_the_same_bytes(smoke_run, tmp_path):
    """With an empty cache, in another process."""
    other = run(*SMOKE, f"paths.runs={tmp_path / 'runs'}", f"paths.cache={tmp_path / 'cache'}")
    assert other.name == smoke_run.folder.name
    for name in ("results.parquet", "predictions.parquet"):
        assert (other / name).read_bytes() == (smoke_run.folder / name).read_bytes()


# ------------------------------------------------------------------ sources and backbones


def write(kind, path, rows):
    frame = pd.DataFrame(rows, columns=["text", "label"])
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "csv":
        write_csv(path, rows)
    elif kind == "jsonl":
        frame.to_json(path, orient="records", lines=True)
    else:
        frame.to_parquet(path)


def test_own_files_in_every_format_give_the_same_run(places, tmp_path):
    found = {}
    for kind in ("csv", "jsonl", "parquet"):
        paths = {split: tmp_path / f"{split}.{kind}" for split in ("train", "test")}
        for split, path in paths.items():
            write(kind, path, rows_of([f"class {i}" for i in range(4)], 12, split))
        folder = run(
            *("stream=files", *(f"stream.{s}={p}" for s, p in paths.items()), "stream.tasks=2"),
            *("backbone=tiny", "router=oracle", "tracker=disabled", "threads=1", *places),
        )
        assert folder.parent.name == "files"
        found[kind] = table(folder).drop(columns="run")
    pd.testing.assert_frame_equal(found["csv"], found["jsonl"])
    pd.testing.assert_frame_equal(found["csv"], found["parquet"])


def test_hub_data_set_saved_to_disk_and_backbone_folder(places, tmp_path, cache):
    from transformers import BertConfig, BertModel

    from cl_peft.backbones.tiny import byte_tokenizer

    names = ["joy", "anger", "fear", "love"]
    features = Features({"sentence": Value("string"), "mood": ClassLabel(names=names)})
    splits = {}
    for split, each in (("train", 12), ("validation", 3), ("test", 5)):
        texts, labels = zip(*rows_of(names, each, split), strict=True)
        numbers = [names.index(label) for label in labels]
        splits[split] = Dataset.from_dict({"sentence": texts, "mood": numbers}, features=features)
    DatasetDict(splits).save_to_disk(tmp_path / "data")
    tokenizer = byte_tokenizer()
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = BertModel(BertConfig(vocab_size=len(tokenizer), intermediate_size=32, **size))
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    args = (
        *("stream=hub", f"stream.path={tmp_path / 'data'}", "stream.text=sentence"),
        *("stream.label=mood", "stream.tasks=2", f"backbone.name={tmp_path / 'model'}"),
        *("trainer.epochs=1", "tracker=disabled", "threads=1", *RIDGE, *places),
    )
    folder = run(*args)
    stream = json.loads((folder / "stream.json").read_text())
    assert sorted(stream["class_names"]) == sorted(names)
    assert [(t["train"], t["validation"], t["test"]) for t in stream["tasks"]] == [(24, 6, 10)] * 2
    assert folder.parent.name == "hub"


# ------------------------------------------------------------------ readers and mirrors


def test_analysis_reads_it(smoke_run):
    frame = analysis.load_runs(smoke_run.folder.parent.parent)
    assert set(frame["run"]) == {smoke_run.folder.name}
    first = frame.iloc[0]
    assert [first[c] for c in ("module", "router", "learner", "stream", "state", "group")] == [
        *("lora", "ridge", "isolated", "synthetic", "finished", "smoke")
    ]
    results = table(smoke_run.folder)
    assert frame["value"].equals(results["value"])


def test_notebook_runs_on_it(smoke_run, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("CL_PEFT_RUNS", str(smoke_run.folder.parent.parent))
    monkeypatch.setenv("CL_PEFT_FIGURES", str(tmp_path))
    runpy.run_path(str(Path(analysis.__file__).parent / "notebooks" / "first_look.py"))
    accuracy = value(table(smoke_run.folder), "average_accuracy", "routed")
    assert f"{accuracy:.3f}" in capsys.readouterr().out
    assert len(list(tmp_path.glob("*.png"))) == 2


def test_wandb_mirror_has_the_final_numbers_and_the_figure(places):
    folder = run(*SMOKE, "tracker=wandb", "seed.init=8", "trainer.epochs=1", *places)
    (path,) = folder.rglob("*.wandb")
    mirror = WandbFile(path)
    results = table(folder)
    assert (mirror.run.run_group, mirror.run.display_name) == ("smoke", folder.name)
    assert mirror.config["module"]["rank"] == 8
    for metric, routing in (("average_accuracy", "routed"), ("forgetting", "oracle")):
        assert mirror.summary[f"{routing}/{metric}"] == value(results, metric, routing)
    assert mirror.summary["router_accuracy"] == value(results, "router_accuracy")
    curve = mirror.series("eval/routed/average_accuracy", "task/idx")
    assert curve == [(t, value(results, "average_accuracy", "routed", t)) for t in (1, 2, 3)]
    assert len(mirror.series("train/loss", "train/step")) == 9
    figure = folder / "accuracy_matrix.png"
    stored = mirror.logged("figures/accuracy_matrix")["sha256"]
    assert stored == hashlib.sha256(figure.read_bytes()).hexdigest()
    assert mirror.exit_code == 0


def test_failing_tracker_fails_no_run(smoke_run, places, monkeypatch, capsys):
    import wandb

    def broken(**_):
        raise OSError("no space for W&B")

    monkeypatch.setattr(wandb, "init", broken)
    folder = run(*SMOKE, "tracker=wandb", *places)
    assert "no space for W&B. The run goes on, not tracked" in capsys.readouterr().err
    assert (folder / "results.parquet").read_bytes() == (
        smoke_run.folder / "results.parquet"
    ).read_bytes()


def test_figure_and_report_are_made_again(smoke_run, tmp_path):
    folder = tmp_path / "runs" / "smoke" / smoke_run.folder.name
    shutil.copytree(smoke_run.folder, folder)
    for name in ("accuracy_matrix.png", "report.md"):
        (folder / name).unlink()
    assert run(*SMOKE, f"paths.runs={tmp_path / 'runs'}") == folder
    for name in ("accuracy_matrix.png", "report.md"):
        assert (folder / name).exists()
    assert folder_of(*SMOKE, f"paths.runs={tmp_path / 'runs'}") == folder
