"""A synthetic run folder, laid out as a run writes it, with numbers that fit one another."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
from omegaconf import OmegaConf

CLASSES = 4  # per task
SAMPLES = 50  # test samples per task
TABLES = ("results.parquet", "predictions.parquet")


#: The error of a run that failed.
TRACE = 'Traceback (most recent call last):\n  File "x.py", line 1\nValueError: no [bold]such thing'


def config(**changes) -> dict:
    """A configuration; ``changes`` by dotted key, with ``__`` for the dot."""
    base = {
        "stream": {"_target_": "cl_peft.streams.x.X", "name": "newsgroups", "tasks": 5},
        "backbone": {"_target_": "cl_peft.backbones.x.X", "name": "minilm", "pooling": "mean"},
        "module": {"_target_": "cl_peft.modules.lora.LoRA", "name": "lora", "rank": 8},
        "router": {"_target_": "cl_peft.routers.ridge.Ridge", "name": "ridge", "width": 2000},
        "learner": {"_target_": "cl_peft.learners.isolated.Isolated", "name": "isolated"},
        "optimizer": {"_target_": "cl_peft.optim.x.X", "name": "adamw", "lr": 0.001},
        "trainer": {"_target_": "cl_peft.training.Trainer", "name": "default", "epochs": 3},
        "seed": {"order": 0, "init": 0, "data": 0},
        "group": "group",
    }
    node = OmegaConf.create(base)
    for key, value in changes.items():
        OmegaConf.update(node, key.replace("__", "."), value)
    return OmegaConf.to_container(node)


def write_run(
    folder: Path, tasks=5, done=None, state="finished", error=None, seed=0, cfg=None
) -> Path:
    """Write a run of ``tasks`` tasks, of which ``done`` are finished."""
    done = tasks if done is None else done
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    predictions, results, times = [], [], []
    for after in range(1, done + 1):
        predictions.append(_predictions(after, tasks, predictions, rng))
        results.append(_results(folder.name, predictions, results))
        times.append({"task": after, "learn": 14.25 + after, "route": 0.5, "evaluate": 2.0})
    OmegaConf.save(OmegaConf.create(cfg or config()), folder / "config.yaml")
    _json(
        folder / "status.json",
        state=state,
        tasks_done=done,
        tasks=tasks,
        error=error,
        started="2026-11-24T08:00:00+00:00",
        updated="2026-11-24T08:02:00+00:00",
        seconds=123.4,
    )
    _json(
        folder / "stream.json",
        name="newsgroups",
        scenario="class",
        class_names=[f"class {c}" for c in range(tasks * CLASSES)],
        fingerprint="f" * 64,
        tasks=[
            {
                "task": t + 1,
                "name": f"task {t + 1}",
                "classes": list(range(t * CLASSES, (t + 1) * CLASSES)),
                "train": 400,
                "validation": 40,
                "test": SAMPLES,
            }
            for t in range(tasks)
        ],
    )
    _json(
        folder / "provenance.json",
        command="python main.py experiment=newsgroups",
        git={"revision": "0123456789abcdef", "dirty": True},
        packages={"torch": "2.13.0", "pandas": "3.1.1"},
        fingerprints={"backbone": "b" * 64, "stream": "f" * 64},
        threads=2,
        platform="Linux x86_64",
    )
    entries = []
    for t, (p, r, time) in enumerate(zip(predictions, results, times, strict=True)):
        part = folder / "tasks" / f"{t + 1:03d}"
        part.mkdir(parents=True)
        p.to_parquet(part / "predictions.parquet", index=False)
        r.to_parquet(part / "results.parquet", index=False)
        _json(part / "timing.json", **time)
        files = {f"tasks/{t + 1:03d}/{name}": _entry(part / name) for name in TABLES}
        entries.append({"task": t + 1, "files": files})
    final = None
    if state == "finished":
        pd.concat(predictions).to_parquet(folder / "predictions.parquet", index=False)
        pd.concat(results).to_parquet(folder / "results.parquet", index=False)
        _json(folder / "timing.json", total_seconds=123.4, tasks=times)
        (folder / "accuracy_matrix.png").write_bytes(b"not a real image")
        final = {name: _entry(folder / name) for name in TABLES}
    _json(folder / "manifest.json", format=1, tasks=entries, final=final)
    return folder


def _json(path: Path, **content) -> None:
    path.write_text(json.dumps(content))


def _entry(path: Path) -> dict:
    data = path.read_bytes()
    return {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}


def _predictions(after, tasks, earlier, rng) -> pd.DataFrame:
    """Predictions on all seen tasks. The oracle's never change: its modules are frozen."""
    parts = []
    for task in range(1, after + 1):
        if task < after:
            old = earlier[-1][earlier[-1]["eval_task"] == task]
            label, oracle = old["label"].to_numpy(), old["oracle_prediction"].to_numpy()
        else:
            label = (task - 1) * CLASSES + rng.integers(0, CLASSES, SAMPLES)
            other = (task - 1) * CLASSES + rng.integers(0, CLASSES, SAMPLES)
            oracle = np.where(rng.random(SAMPLES) < 0.9, label, other)
        wrong = rng.random(SAMPLES) < 0.05 * (after - 1)
        chosen = np.where(wrong, rng.integers(1, after + 1, SAMPLES), task)
        guess = (chosen - 1) * CLASSES + rng.integers(0, CLASSES, SAMPLES)
        parts.append(
            pd.DataFrame(
                {
                    "after_task": np.int16(after),
                    "eval_task": np.int16(task),
                    "row": np.arange(SAMPLES, dtype=np.int32) + SAMPLES * (task - 1),
                    "label": label.astype(np.int32),
                    "oracle_prediction": oracle.astype(np.int32),
                    "routed_prediction": np.where(chosen == task, oracle, guess).astype(np.int32),
                    "routed_task": chosen.astype(np.int16),
                    "margin": rng.random(SAMPLES).astype(np.float32),
                    "confidence": rng.random(SAMPLES).astype(np.float32),
                }
            )
        )
    return pd.concat(parts, ignore_index=True)


def _results(run, predictions, earlier) -> pd.DataFrame:
    after = len(predictions)
    rows = []

    def add(eval_task, routing, metric, value):
        rows.append((run, after, eval_task, routing, metric, float(value)))

    matrices = {r: np.full((after, after), np.nan) for r in ("oracle", "routed")}
    for t, table in enumerate(predictions):
        for i, cell in table.groupby("eval_task"):
            for r in matrices:
                matrices[r][t, i - 1] = (cell[f"{r}_prediction"] == cell["label"]).mean()
    last = predictions[-1]
    oracle = last["oracle_prediction"] == last["label"]
    routed = last["routed_prediction"] == last["label"]
    right = last["routed_task"] == last["eval_task"]
    for i in range(1, after + 1):
        here = last["eval_task"] == i
        for r, matrix in matrices.items():
            add(i, r, "accuracy", matrix[-1, i - 1])
        add(i, "none", "n", here.sum())
        add(i, "none", "router_accuracy", right[here].mean())
        add(i, "none", "n_lost_by_routing", (oracle & ~routed)[here].sum())
        add(i, "none", "n_lucky", (~oracle & routed)[here].sum())
    forgetting = {}
    for r, (matrix, correct) in {
        "oracle": (matrices["oracle"], oracle),
        "routed": (matrices["routed"], routed),
    }.items():
        old = slice(0, after - 1)
        undefined = after == 1
        drops = np.nan if undefined else np.nanmax(matrix[:-1, old], axis=0) - matrix[-1, old]
        forgetting[r] = np.mean(drops)
        add(None, r, "average_accuracy", matrix[-1].mean())
        add(None, r, "average_accuracy_micro", correct.mean())
        means = [np.nanmean(row) for row in matrix]
        add(None, r, "average_incremental_accuracy", np.mean(means))
        add(None, r, "forgetting", forgetting[r])
        moved = np.nan if undefined else matrix[-1, old] - np.diag(matrix)[old]
        add(None, r, "backward_transfer", np.mean(moved))
    add(None, "none", "router_accuracy", right.mean())
    add(None, "none", "routing_loss", (oracle & ~routed).mean())
    add(None, "none", "misroute_luck", (~oracle & routed).mean())
    add(None, "none", "forgetting_module_drift", forgetting["oracle"])
    add(None, "none", "forgetting_routing_drift", forgetting["routed"] - forgetting["oracle"])
    add(None, "none", "module_parameters", 442_368)
    add(None, "none", "head_parameters", 1540)
    add(None, "none", "module_bytes", 1_775_632)
    add(None, "none", "router_state_bytes", 8_064_000)
    add(None, "none", "learner_state_bytes", 0)
    add(None, "none", "stored_bytes", after * 1_775_632 + 8_064_000)
    add(None, "none", "bank_modules", after)
    columns = ["run", "after_task", "eval_task", "routing", "metric", "value"]
    table = pd.DataFrame(rows, columns=columns)
    return table.astype({"after_task": "int32", "eval_task": "Int32", "value": "float64"})


def write_group(root: Path) -> Path:
    """Two finished runs, one that failed, one that was killed, one that was refused."""
    for seed in (0, 1):
        write_run(root / f"ridge-{seed}", tasks=3, seed=seed, cfg=config(seed__init=seed))
    sequential = config(learner__name="sequential")
    write_run(root / "failed", 3, 1, state="failed", error=TRACE, cfg=sequential)
    write_run(root / "killed", 3, 2, state="running", cfg=config(module__rank=4))
    write_run(root / "refused", 3, 0, state="refused", error="module.rank: must be above 0")
    return root


def write_sweep(root: Path, runs: int, tasks=10, group="sweep") -> list[Path]:
    """Write many finished runs quickly: three routers, ranks and orders over seeds.

    The tables of one real-looking run are varied by a little noise of each run's own, so that every
    file differs; there are no predictions, and of the tasks' files only the manifest's entries.
    """
    template = write_run(root / group / "template", tasks=tasks)
    base = pd.read_parquet(template / "results.parquet")
    texts = {n: (template / n).read_text() for n in ("status.json", "stream.json", "manifest.json")}
    manifest = json.loads(texts["manifest.json"])
    shares = base["value"].between(0, 1) & base["metric"].str.contains("accuracy")
    folders = []
    for k in range(runs):
        router, rank = ("ridge", "prototype", "oracle")[k % 3], (4, 8, 16)[k // 3 % 3]
        order, init = k // 9 % 3, k // 27
        settings = config(
            router__name=router,
            module__rank=rank,
            seed__order=order,
            seed__init=init,
            group=group,
        )
        folder = root / group / f"lora-{router}-{rank}-s{order}.{init}.0"
        folder.mkdir()
        noise = np.random.default_rng(k).uniform(-0.02, 0.0, len(base))
        values = np.where(shares, np.clip(base["value"] + noise, 0, 1), base["value"])
        table = base.assign(run=folder.name, value=values)
        table.to_parquet(folder / "results.parquet", index=False)
        (folder / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(settings)))
        for name in ("status.json", "stream.json"):
            (folder / name).write_text(texts[name])
        entry = {"results.parquet": _entry(folder / "results.parquet")}
        _json(folder / "manifest.json", **(manifest | {"final": manifest["final"] | entry}))
        folders.append(folder)
    shutil.rmtree(template)
    return folders
