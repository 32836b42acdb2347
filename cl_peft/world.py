"""Everything that one run is made of, wired together."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from safetensors.torch import save
from torch import Tensor

from cl_peft import inputs, loading
from cl_peft.backbones.base import Backbone, choose_device
from cl_peft.backbones.features import Features
from cl_peft.config import Seeds, build, run_id
from cl_peft.console import Bar, Console
from cl_peft.errors import ConfigError
from cl_peft.evaluation import Evaluator
from cl_peft.learners.base import Learner
from cl_peft.memo import Memo, Questions
from cl_peft.routers.base import Router
from cl_peft.runs import RunFolder
from cl_peft.sizes import Sizes
from cl_peft.store import ContentStore
from cl_peft.streams.base import Progress, Split, Stream, Task, content_id
from cl_peft.tracking import Tracker


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
    sizes: Sizes = field(default_factory=Sizes)

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

        limit = int(1e9 * config["paths"]["cache_gb"])
        store = ContentStore(cache, limit) if config["cache"] == "on" else None
        features = Features(backbone, store, batch_size, progress)
        tracker: Tracker = build(config["tracker"])
        names, n_tasks = stream.class_names, len(stream.tasks)
        learner, router = loading.wire(config, features, names, n_tasks, console, tracker)
        evaluator = Evaluator(run_id(config), stream, learner, router, features)
        return World(config, stream, backbone, features, router, learner, evaluator)

    def check_room(self) -> None:
        """Virtual tokens and the longest text must fit the backbone's positions together.

        Raises:
            ConfigError: They do not; says what does.
        """
        virtual = self.learner.tools.bank.method.virtual * self.learner.at_once
        limit = self.backbone.positions
        if not virtual or limit is None or self.backbone.longest + virtual <= limit:
            return  # no text can be too long: nothing to tokenize
        splits = [s for t in self.stream.tasks for s in (t.train, t.validation, t.test) if len(s)]
        longest = max(int(self.features.encoded(s.inputs).lengths.max()) for s in splits)
        if longest + virtual > limit:
            raise ConfigError(
                f"the longest text has {longest} tokens, and a sample has up to {virtual} virtual "
                f"ones (module.tokens, learner={self.config['learner']['name']}): together they "
                f"need {longest + virtual} positions, and the backbone has {limit}. Use "
                f"backbone.max_length={limit - virtual} or less, or a smaller module.tokens."
                if virtual < limit
                else f"a sample has up to {virtual} virtual tokens (module.tokens, learner="
                f"{self.config['learner']['name']}), and the backbone has {limit} positions in "
                "all. Use a smaller module.tokens."
            )

    def facts(self) -> dict[str, Any]:
        """What provenance.json records besides the environment."""
        return {
            "run": run_id(self.config),
            "stream_fingerprint": self.stream.fingerprint,
            "code": inputs.code_digest(self.config),
            **self.backbone.facts(),
            "preprocessing": self.backbone.preprocessing(),
            "device": str(self.backbone.device),
            "threads": torch.get_num_threads(),
            "seeds": dict(self.config["seed"]),
        }

    def learn(self, task: Task) -> bool:
        """Learn a task, or recall what the same learning gave before; True in the second case."""
        store = self.features.store
        if store is None:
            self.learner.learn(task)
            return False
        trained = False

        def train() -> dict[str, Tensor]:
            nonlocal trained
            trained = True
            self.learner.learn(task)
            state = {f"state.{n}": t for n, t in self.learner.state().items()}
            return {**self.learner.snapshot(), **state}

        known = store.get("modules", self._learning(task), train, exclusive=True)
        if not trained:
            self.learner.report = None
            state = {n[6:]: t for n, t in known.items() if n.startswith("state.")}
            unit = {n: t for n, t in known.items() if not n.startswith("state.")}
            self.learner.recall(task, unit)
            self.learner.load_state(state)
        return not trained

    def _learning(self, task: Task) -> str:
        """Name of everything that the result of learning a task depends on."""
        history = self.learner.history == "stream"
        seen = self.stream.seen(task) if history else (task,)
        names = ("learner", "module", "optimizer", "trainer")
        axes = {axis: self.config[axis] for axis in names}
        parts = [
            "learning 5",
            inputs.code_digest(self.config, names, core=()),
            axes,
            dict(self.config["seed"], order=None),
            self.learner.tools.class_names,  # modules may start from them
            self.backbone.key(),  # with its code, and versions of torch and transformers
            self.backbone.device.type,
            self.learner.tools.trainer.in_bf16(self.backbone.device),
            torch.get_num_threads(),  # sums are split among threads, and round differently
            len(self.stream.tasks) if history else None,
            [(t.index, t.classes, _content(t.train), _content(t.validation)) for t in seen],
        ]
        text = json.dumps(parts, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()

    def resume(self, folder: RunFolder) -> None:
        """Come back to the state after the last finished task; a fresh run stays as it is."""
        if not folder.done:
            return
        seen = self.stream.tasks[: folder.done]
        stored = loading.Stored.read(folder, self.learner.keeps)
        stored.put(self.learner, self.router, seen)
        for index, unit in stored.units.items():
            self.sizes.note(index, unit)
        results = [
            pd.read_parquet(folder.read(f"tasks/{t.index + 1:03d}/results.parquet")) for t in seen
        ]
        memos = [
            pd.read_parquet(folder.read(f"tasks/{t.index + 1:03d}/memo.parquet")) for t in seen
        ]
        self.evaluator.restore(pd.concat(results, ignore_index=True), memos)
        timings = [task_timing(folder, t.index) for t in seen]
        self.learner.steps = sum(int(t.get("steps", 0)) for t in timings)

    def fit_router(self, task: Task) -> None:
        """Let the router learn the task from frozen features."""
        if not self.learner.uses_router:
            return
        labels = torch.from_numpy(task.train.labels)
        if self.router.needs_features:
            features = self.features.features(task.train.inputs, self.router.layers)
        else:
            features = torch.zeros(len(labels), self.backbone.width)
        self.router.fit(features, labels, task.index)
        held, n = task.validation, len(task.validation)
        if self.router.combine == "heads" and n:
            own = np.full(n, task.index)
            asked = Questions(
                self.learner, Memo(), self.features, held.inputs, held.rows, own, task.index + 1
            )
            self.router.tune(asked, torch.from_numpy(held.labels))

    def prefetch(self) -> None:
        """Compute the frozen features that the run will need, before anything asks for some."""
        if self.learner.needs_features:
            self.features.prefetch(self.stream, ("train", "test", "validation"))
        elif self.learner.uses_router and self.router.needs_features:
            splits = ["train", "test", *(["validation"] if self.router.combine == "heads" else [])]
            self.features.prefetch(self.stream, splits, self.router.layers)

    def tensors(self, task: Task) -> dict[str, bytes]:
        """What a resumed run, or a server, needs of this task."""
        files: dict[str, dict[str, Tensor]] = {"module.safetensors": self.learner.snapshot()}
        if self.learner.uses_router:
            files["router.safetensors"] = self.router.dump()
        files["learner.safetensors"] = self.learner.state()
        # one entry: safetensors writes several in random order, and equal runs have equal files
        note = {"about": f"task {task.index + 1}, module {self.config['module']['name']}"}
        return {
            name: save({k: t.detach().cpu().contiguous() for k, t in tensors.items()}, note)
            for name, tensors in files.items()
            if tensors
        }

    def costs(self, task: Task) -> dict[str, float]:
        """What the task just learned added, and what is kept; see :class:`~cl_peft.sizes.Sizes`."""
        return self.sizes.after(task, self.learner, self.router)

    def choosing(self) -> dict[str, float]:
        """Microseconds per sample that the router took in this evaluation, features given."""
        seconds, samples = self.router.seconds, self.router.samples
        self.router.seconds, self.router.samples = 0.0, 0
        return {"choose_microseconds": round(1e6 * seconds / samples, 3)} if samples else {}

    def asked_features(self, task: Task) -> int:
        """Test examples of the task whose frozen features an evaluation needs: once, then kept."""
        router = self.learner.uses_router and self.router.needs_features
        return len(task.test) if router or self.learner.needs_features else 0

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


def task_timing(folder: RunFolder, task: int) -> dict[str, Any]:
    """Times of a finished task."""
    path = folder.read(f"tasks/{task + 1:03d}/timing.json")
    return dict(json.loads(path.read_text()))


def _content(split: Split) -> str:
    """Name of a split's inputs and labels, in order."""
    digest = hashlib.sha256(split.labels.tobytes())
    for item in split.inputs:
        digest.update(content_id(item).encode())
    return digest.hexdigest()
