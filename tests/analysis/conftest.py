"""Synthetic run folders, laid out as real runs lay them out; numbers come from simulated answers.

No ``__init__.py`` here: a package of this name would hide the package under test.
"""

import hashlib
import json
from dataclasses import asdict

import numpy as np
import pandas as pd
import pytest
import yaml

from cl_peft import metrics

PER_MATRIX = {
    "average_accuracy": metrics.average_accuracy,
    "average_incremental_accuracy": metrics.average_incremental_accuracy,
    "forgetting": metrics.forgetting,
    "forgetting_nonnegative": metrics.forgetting_nonnegative,
    "forgetting_first_last": metrics.forgetting_first_last,
    "forgetting_one_step": metrics.forgetting_one_step,
    "backward_transfer": metrics.backward_transfer,
    "learning_accuracy": metrics.learning_accuracy,
}
#: Learners that train one module on and on, so that nothing else is stored.
SINGLE_MODULE = ("sequential", "joint")


@pytest.fixture
def write_run():
    """``write_run(folder, ...)`` writes one run folder and returns its path."""
    return _write_run


@pytest.fixture
def sweep(tmp_path):
    """Two learners by three seeds, all finished, in one group."""
    root = tmp_path / "runs"
    for learner in ("isolated", "sequential"):
        for seed in range(3):
            _write_run(root / "spine" / f"{learner}-{seed}", learner=learner, seed=seed)
    return root


@pytest.fixture(scope="session")
def grid(tmp_path_factory):
    """Two learners, two routers, two ranks, five seeds: forty runs in one group; only to read."""
    root = tmp_path_factory.mktemp("grid") / "runs"
    for learner in ("isolated", "sequential"):
        for router in ("ridge", "prototype"):
            for rank in (4, 16):
                for seed in range(5):
                    name = f"{learner}-{router}-{rank}-{seed}"
                    options = {"learner": learner, "router": router, "rank": rank}
                    _write_run(root / "grid" / name, seed=seed, **options)
    return root


@pytest.fixture(scope="session")
def streams(tmp_path_factory):
    """Two routers by three streams by two seeds, of which one stream is hard for both."""
    root = tmp_path_factory.mktemp("streams")
    for k, stream in enumerate(("easy", "middle", "hard")):
        for router in ("ridge", "prototype"):
            for seed in range(2):
                name = f"{stream}-{router}-{seed}"
                learner = "sequential" if stream == "hard" else "isolated"
                options = {"router": router, "seed": 7 * k + seed, "stream": stream}
                run = _write_run(root / "g" / name, learner=learner, **options)
                config = yaml.safe_load((run / "config.yaml").read_text())
                config["learner"] = {"name": "isolated"}
                config["seed"] = dict.fromkeys(config["seed"], seed)  # the same seeds everywhere
                (run / "config.yaml").write_text(yaml.safe_dump(config))
    return root


def _write_run(
    folder,
    *,
    learner="isolated",
    router="ridge",
    seed=0,
    tasks=4,
    done=None,
    state="finished",
    rank=8,
    only_last=False,
    stream="newsgroups",
    digests=True,
):
    """Write one run.

    Args:
        folder: The run folder; its name is the run's name, its parent's the group.
        learner: "isolated" never forgets under the oracle; any other name does.
        router: Any name; "prototype" errs twice as often as any other.
        seed: Decides all answers, and is written as all three seeds.
        tasks: T.
        done: Tasks committed; None is all.
        state: Goes into status.json; only "finished" has the final files.
        rank: module.rank in the configuration; below 8 some more answers are wrong.
        only_last: Evaluate after the last task only, as the joint learner may.
        stream: Its name; equal names have equal test examples.
        digests: Whether stream.json holds those of the test examples; older runs' did not.
    """
    done = tasks if done is None else done
    predictions = _answers(learner, router, rank, seed, tasks, done)
    if only_last:
        predictions = predictions[predictions["after_task"] == tasks]
    results = _results(folder.name, predictions, done, learner, rank)
    folder.mkdir(parents=True)
    config = {
        "group": folder.parent.name,
        "stream": {"name": stream, "tasks": tasks},
        "backbone": {"name": "minilm"},
        "module": {"name": "lora", "rank": rank, "sites": ["query", "value"]},
        "router": {"name": router, "alpha": None},
        "learner": {"name": learner},
        "seed": {"order": seed, "init": seed, "data": seed},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "provenance.json").write_text(json.dumps({"git": "0" * 40, "dirty": False}))
    _write_json(
        folder / "stream.json",
        {
            "name": stream,
            "scenario": "class",
            "class_names": [f"topic {c}" for c in range(2 * tasks)],
            "fingerprint": hashlib.sha256(stream.encode()).hexdigest(),
            "tasks": [
                {"task": t, "name": f"task {t}", "classes": [2 * t - 2, 2 * t - 1]}
                | {"train": 64, "validation": 8, "test": 40}
                | ({"test_digest": _test_digest(stream, t)} if digests else {})
                for t in range(1, tasks + 1)
            ],
        },
    )
    _write_json(
        folder / "status.json",
        {"state": state, "tasks_done": done, "tasks": tasks, "error": None, "seconds": 1.5}
        | {"started": "2026-11-24T08:00:00+00:00", "updated": "2026-11-24T08:00:02+00:00"},
    )
    committed = []
    for task in range(1, done + 1):
        inside = folder / "tasks" / f"{task:03d}"
        inside.mkdir(parents=True)
        files = {}
        for name, frame in (("results", results), ("predictions", predictions)):
            part = frame[frame["after_task"] == task].reset_index(drop=True)
            path = inside / f"{name}.parquet"
            part.to_parquet(path)
            files[path.relative_to(folder).as_posix()] = _record(path)
        committed.append({"task": task, "files": files})
    final = None
    if state == "finished":
        results.reset_index(drop=True).to_parquet(folder / "results.parquet")
        predictions.reset_index(drop=True).to_parquet(folder / "predictions.parquet")
        names = ("results.parquet", "predictions.parquet")
        final = {name: _record(folder / name) for name in names}
    if done:
        _write_json(folder / "manifest.json", {"format": 1, "tasks": committed, "final": final})
    # what a tracker leaves behind must not be taken for a run
    (folder / "wandb" / "offline").mkdir(parents=True)
    for name in ("config.yaml", "status.json"):
        (folder / "wandb" / "offline" / name).write_text("{}")
    return folder


def _test_digest(stream, task):
    return hashlib.blake2b(f"{stream} {task}".encode(), digest_size=8).hexdigest()


def _answers(learner, router, rank, seed, tasks, done):
    """Per-sample predictions: the oracle's answers stay the same where nothing is forgotten."""
    rng = np.random.default_rng(seed)
    base = 0.05 if rank >= 8 else 0.09
    error = {"prototype": 0.06, "none": 0.0}.get(router, 0.03)
    frames = []
    quality = rng.uniform(size=(tasks, 40))
    for t in range(1, done + 1):
        for i in range(1, t + 1):
            hard = base if learner in ("isolated", "joint") else min(base + 0.22 * (t - i), 0.7)
            label = 2 * i - 2 + np.arange(40) % 2
            oracle = np.where(quality[i - 1] >= hard, label, label ^ 1)
            moved = rng.uniform(size=40) < min(error * (t - 1), 0.3)
            other = rng.integers(1, t, size=40) if t > 1 else np.full(40, i)
            sure = rng.uniform(size=40)
            routed_task = np.where(moved, np.where(other >= i, other + 1, other), i)
            routed = np.where(routed_task == i, oracle, 2 * routed_task - 2)
            frames.append(
                pd.DataFrame(
                    {
                        "after_task": np.int16(t),
                        "eval_task": np.int16(i),
                        "row": np.arange(40, dtype=np.int32) + 1000 * i,
                        "label": label.astype(np.int32),
                        "oracle_prediction": oracle.astype(np.int32),
                        "routed_prediction": routed.astype(np.int32),
                        "routed_task": routed_task.astype(np.int16),
                        # a router is less sure where it errs, but not always
                        "margin": np.where(moved, 0.5 * sure, sure).astype(np.float32),
                        "confidence": rng.uniform(0.5, 1, size=40).astype(np.float32),
                    }
                )
            )
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame({"after_task": []})


def _results(run, predictions, done, learner, rank):
    matrices = {name: np.full((done, done), np.nan) for name in ("oracle", "routed")}
    rows = []
    for t in range(1, done + 1):
        if not (predictions["after_task"] == t).any():
            continue
        parts = []
        for i in range(1, t + 1):
            at = (predictions["after_task"] == t) & (predictions["eval_task"] == i)
            cell = predictions[at]
            part = metrics.decompose(
                cell["oracle_prediction"] == cell["label"],
                cell["routed_prediction"] == cell["label"],
                cell["routed_task"] == cell["eval_task"],
            )
            parts.append(part)
            matrices["oracle"][t - 1, i - 1] = part.oracle_accuracy
            matrices["routed"][t - 1, i - 1] = part.accuracy
            rows.append((t, i, "oracle", "accuracy", part.oracle_accuracy))
            rows.append((t, i, "routed", "accuracy", part.accuracy))
            rows.append((t, i, "none", "router_accuracy", part.router_accuracy))
            rows += [(t, i, "none", name, float(count)) for name, count in asdict(part).items()]
        for routing, R in matrices.items():
            block = R[:t, :t]
            rows += [(t, None, routing, name, f(block)) for name, f in PER_MATRIX.items()]
            micro = metrics.average_accuracy_micro(block, [40] * t)
            rows.append((t, None, routing, "average_accuracy_micro", micro))
            late = metrics.backward_transfer(block, "T")
            rows.append((t, None, routing, "backward_transfer_t", late))
        pooled = metrics.Decomposition.pool(parts)
        split = metrics.forgetting_split(*(R[:t, :t] for R in matrices.values()))
        overall = {
            "router_accuracy": pooled.router_accuracy,
            "routing_loss": pooled.routing_loss,
            "misroute_luck": pooled.misroute_luck,
            "forgetting_module_drift": split.module_drift,
            "forgetting_routing_drift": split.routing_drift,
            "module_parameters": 9216.0 * rank,
            "head_parameters": 770.0,
            "module_bytes": 4 * 9216.0 * rank,
            "router_state_bytes": 4096.0,
            "bank_modules": 1.0 if learner in SINGLE_MODULE else float(t),
        }
        rows += [(t, None, "none", name, value) for name, value in overall.items()]
    frame = pd.DataFrame(rows, columns=["after_task", "eval_task", "routing", "metric", "value"])
    frame.insert(0, "run", run)
    kinds = {"after_task": "int32", "eval_task": "Int32", "value": "float64"}
    return frame.astype(kinds | {"run": "str"})


def _record(path):
    data = path.read_bytes()
    return {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}


def _write_json(path, content):
    path.write_text(json.dumps(content))
