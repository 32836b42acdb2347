"""The story of a run, in one function.

A stream delivers tasks, a learner grows modules, a router chooses among them, everything is
measured and lands in the run folder.
"""

from __future__ import annotations

import io
import json
import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from safetensors.torch import save
from torch import Tensor

from cl_peft import loading, presentation
from cl_peft.backbones.base import Backbone, choose_device
from cl_peft.backbones.features import Features
from cl_peft.config import Seeds, build, run_id, split_stream
from cl_peft.console import Bar, Console
from cl_peft.errors import DataError
from cl_peft.evaluation import Evaluator
from cl_peft.learners.base import Learner
from cl_peft.routers.base import Router
from cl_peft.runs import RunFolder
from cl_peft.store import ContentStore
from cl_peft.streams.base import Progress, Stream, Task
from cl_peft.streams.protocol import make_stream
from cl_peft.tracking import Tracker

log = logging.getLogger(__name__)


def run_experiment(config: Mapping[str, Any], folder: RunFolder, console: Console) -> float:
    """Run, or go on with, one configuration.

    Args:
        config: As returned by :func:`cl_peft.config.validate`.
        folder: An opened run folder whose lock is held.
        console: Where progress is shown.

    Returns:
        Final routed average accuracy.

    Raises:
        UserError: Something the user can fix; the folder can be resumed.
    """
    stream = load_stream(config, console)
    if not folder.done:
        folder.begin(config, describe(stream))
    folder.set_status("running", len(stream.tasks))
    world = World.build(config, stream, console)
    folder.provenance(world.facts())
    tracker = world.learner.tools.tracker
    tracker.start(run_id(config), config["group"], dict(config), folder.path)
    try:
        world.resume(folder)
        world.prefetch()
        for task in _counted(stream, folder.done, console):
            started = time.perf_counter()
            world.learner.learn(task)
            learned = time.perf_counter()
            world.fit_router(task)
            fitted = time.perf_counter()
            results = world.evaluator.after(task, world.costs())
            evaluated = time.perf_counter()
            timing = {
                "task": task.index + 1,
                "learn": round(learned - started, 3),
                "route": round(fitted - learned, 3),
                "evaluate": round(evaluated - fitted, 3),
                "passes": results.passes,
                **world.training(),
            }
            folder.commit(
                task.index,
                {
                    **world.tensors(task),
                    "results.parquet": _parquet(results.rows),
                    "predictions.parquet": _parquet(results.predictions),
                    "memo.parquet": _parquet(results.memo),
                    "timing.json": json.dumps(timing).encode(),
                },
                len(stream.tasks),
            )
            log.info("task %d/%d finished: %s", task.index + 1, len(stream.tasks), timing)
            tracker.log_task(task.index + 1, _records(results.rows))
            presentation.task_line(console, results.rows, len(stream.tasks), learned - started)
        world.check_backbone()
        finish(folder, stream)
    except BaseException:
        tracker.finish("failed", {}, {}, {})
        raise
    final = presentation.write(folder.path)
    tracker.finish("finished", final.summary, final.figures, final.tables)
    return final.score


def _counted(stream: Stream, done: int, console: Console) -> Iterator[Task]:
    """The tasks that remain, under a progress bar."""
    with console.bar(f"stream {stream.name}", total=len(stream.tasks)) as bar:
        bar.advance(done)
        for task in stream.after(done):
            yield task
            bar.advance()


def load_stream(config: Mapping[str, Any], console: Console) -> Stream:
    """Read the source and cut it into tasks; before any model is fetched."""
    protocol, source = split_stream(config["stream"])
    seed = Seeds(**config["seed"])
    with downloading(console, "data") as download:
        raw = build({**source, "name": protocol.name}).load(cache_folder(config), download)
    stream = make_stream(raw, protocol, order_seed=seed.order, data_seed=seed.data)
    unheld = [task.name for task in stream.tasks if not len(task.validation)]
    if unheld and config["trainer"].get("patience") is not None:
        raise DataError(
            f"trainer.patience stops on validation accuracy, but {unheld[0]} of stream="
            f"{protocol.name} has no validation example. Raise stream.validation_share or "
            "stream.shots, or set trainer.patience=null."
        )
    sizes = [sum(len(getattr(t, s)) for t in stream.tasks) for s in ("train", "validation", "test")]
    console.message(
        f"stream {stream.name}: {len(stream.tasks)} tasks, {len(stream.class_names)} classes, "
        f"{sizes[0]} training, {sizes[1]} validation and {sizes[2]} test examples"
    )
    return stream


@dataclass
class World:
    """Everything that one run is made of, wired together."""

    config: Mapping[str, Any]
    stream: Stream
    backbone: Backbone
    features: Features
    router: Router
    learner: Learner
    evaluator: Evaluator

    @staticmethod
    def build(config: Mapping[str, Any], stream: Stream, console: Console) -> World:
        """Load the backbone and build every axis from its configuration node."""
        device = set_device(config)
        seed = Seeds(**config["seed"])
        cache = cache_folder(config)
        backbone: Backbone = build(config["backbone"])
        with downloading(console, "model") as download:
            backbone.load(cache, device, seed.init, download)
        batch_size = build(config["trainer"]).eval_batch_size

        def progress(batches: Sequence[np.ndarray], total: int) -> Iterator[np.ndarray]:
            with console.bar("frozen features", total=total) as bar:
                for batch in batches:
                    yield batch
                    bar.advance()

        features = Features(backbone, ContentStore(cache), batch_size, progress)
        tracker: Tracker = build(config["tracker"])
        sizes = len(stream.class_names), len(stream.tasks)
        learner, router = loading.wire(config, features, sizes, console, tracker)
        evaluator = Evaluator(run_id(config), stream, learner, router, features)
        return World(config, stream, backbone, features, router, learner, evaluator)

    def facts(self) -> dict[str, Any]:
        """What provenance.json records besides the environment."""
        return {
            "run": run_id(self.config),
            "stream_fingerprint": self.stream.fingerprint,
            **self.backbone.facts(),
            "preprocessing": self.backbone.preprocessing(),
            "device": str(self.backbone.device),
            "threads": torch.get_num_threads(),
            "seeds": dict(self.config["seed"]),
        }

    def resume(self, folder: RunFolder) -> None:
        """Come back to the state after the last finished task; a fresh run stays as it is."""
        if not folder.done:
            return
        seen = self.stream.tasks[: folder.done]
        loading.Stored.read(folder, self.learner.keeps).put(self.learner, self.router, seen)
        results = [
            pd.read_parquet(folder.read(f"tasks/{t.index + 1:03d}/results.parquet")) for t in seen
        ]
        memos = [
            pd.read_parquet(folder.read(f"tasks/{t.index + 1:03d}/memo.parquet")) for t in seen
        ]
        self.evaluator.restore(pd.concat(results, ignore_index=True), memos)
        timings = [_timing(folder, t.index) for t in seen]
        self.learner.steps = sum(int(t.get("steps", 0)) for t in timings)

    def fit_router(self, task: Task) -> None:
        """Let the router learn the task from frozen features."""
        if not self.learner.uses_router:
            return
        labels = torch.from_numpy(task.train.labels)
        if self.router.needs_features:
            features = self.features.features(task.train.inputs)
        else:
            features = torch.zeros(len(labels), self.backbone.width)
        self.router.fit(features, labels, task.index)

    def prefetch(self) -> None:
        """Compute the frozen features that the run will need, before anything asks for some."""
        if self.learner.needs_features:
            self.features.prefetch(self.stream, ("train", "test", "validation"))
        elif self.learner.uses_router and self.router.needs_features:
            self.features.prefetch(self.stream, ("train", "test"))

    def tensors(self, task: Task) -> dict[str, bytes]:
        """What a resumed run, or a server, needs of this task."""
        files: dict[str, dict[str, Tensor]] = {"module.safetensors": self.learner.snapshot()}
        if self.learner.uses_router:
            files["router.safetensors"] = self.router.state()
        # one entry: safetensors writes several in random order, and equal runs have equal files
        note = {"about": f"task {task.index + 1}, module {self.config['module']['name']}"}
        return {
            name: save({k: t.detach().cpu().contiguous() for k, t in tensors.items()}, note)
            for name, tensors in files.items()
            if tensors
        }

    def costs(self) -> dict[str, float]:
        """What the task just learned added, and what the router keeps."""
        tensors = self.learner.snapshot()
        head = sum(t.numel() for n, t in tensors.items() if n in ("head.weight", "head.bias"))
        own = [t for n, t in tensors.items() if not n.startswith("head.")]
        state = self.router.state_bytes() if self.learner.uses_router else 0
        return {
            "module_parameters": float(sum(t.numel() for t in own)),
            "head_parameters": float(head),
            "module_bytes": float(sum(t.numel() * t.element_size() for t in own)),
            "router_state_bytes": float(state),
            "bank_modules": float(self.learner.tools.bank.count),
        }

    def training(self) -> dict[str, float]:
        """What the last fit reported, for timing.json."""
        report = self.learner.report
        if report is None:
            return {"steps": 0}
        return {
            "steps": report.steps,
            "epochs": report.epochs,
            "loss": round(report.loss, 6),
            "padding_share": round(report.padding, 4),
        }

    def check_backbone(self) -> None:
        """The backbone's weights must be those that were loaded."""
        if self.backbone.weights_fingerprint() != self.backbone.fingerprint:
            raise RuntimeError("the frozen backbone changed during the run; its results are void")


def finish(folder: RunFolder, stream: Stream) -> None:
    """Join the tasks' tables into the run's."""
    names = [f"tasks/{task.index + 1:03d}" for task in stream.tasks]
    tables = {
        name: _parquet(
            pd.concat(
                [pd.read_parquet(folder.read(f"{n}/{name}")) for n in names], ignore_index=True
            )
        )
        for name in ("results.parquet", "predictions.parquet")
    }
    timings = [_timing(folder, task.index) for task in stream.tasks]
    total = sum(t["learn"] + t["route"] + t["evaluate"] for t in timings)
    timing = {"total_seconds": round(total, 3), "tasks": timings}
    tables["timing.json"] = (json.dumps(timing, indent=1) + "\n").encode()
    folder.finish(tables, len(stream.tasks))


def describe(stream: Stream) -> dict[str, Any]:
    """The stream as stream.json has it: enough to name predictions without the data."""
    tasks = [
        {
            "task": t.index + 1,
            "name": t.name,
            "classes": list(t.classes),
            "train": len(t.train),
            "validation": len(t.validation),
            "test": len(t.test),
        }
        for t in stream.tasks
    ]
    return {
        "name": stream.name,
        "scenario": stream.scenario,
        "class_names": list(stream.class_names),
        "fingerprint": stream.fingerprint,
        "tasks": tasks,
    }


@contextmanager
def downloading(console: Console, what: str) -> Iterator[Progress]:
    """A progress bar that appears only if something is downloaded."""
    with ExitStack() as stack:
        bars: list[Bar] = []
        done = 0

        def progress(so_far: int, total: int) -> None:
            nonlocal done
            if not bars:
                bars.append(stack.enter_context(console.bar(f"download {what}", total, "bytes")))
            bars[0].advance(so_far - done)
            done = so_far

        yield progress


def cache_folder(config: Mapping[str, Any]) -> Path:
    """Where downloads, tokens and features are kept."""
    return Path(config["paths"]["cache"]).expanduser()


def set_device(config: Mapping[str, Any]) -> torch.device:
    """Choose the device, fix the number of threads, ask for deterministic kernels.

    Raises:
        ConfigError: The device is not there.
    """
    device = choose_device(config["device"])
    if config["threads"] != "auto":
        torch.set_num_threads(int(config["threads"]))
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    return device


def _timing(folder: RunFolder, task: int) -> dict[str, Any]:
    path = folder.read(f"tasks/{task + 1:03d}/timing.json")
    return dict(json.loads(path.read_text()))


def _records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    return [{str(k): v for k, v in row.items()} for row in frame.to_dict("records")]


def _parquet(frame: pd.DataFrame) -> bytes:
    buffer = io.BytesIO()
    frame.to_parquet(buffer, index=False)
    return buffer.getvalue()
