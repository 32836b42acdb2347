"""A whole stream against a plain loop with Hugging Face peft, for more and more tasks.

    python benchmarks/stream.py [--tasks 5 10 20 50] [--repeats 2] [--threads 1] [--quick]

Both train one LoRA (rank 8, all linears) and one head per task on the same batches of the same
made-up texts, two classes a task, test sets a third of the training sets; both evaluate after every
task on all tasks seen, once with the true task (oracle) and once routed by the same ridge router on
frozen features. Nothing is read from a cache on disk. Both go through one stream side by side, task
by task in turns; what they had spent after 5, 10, ... tasks is what a stream of that length costs.
All of it is repeated up to 20 tasks; longer streams run once.

The loop is what one writes first: after every task, every seen test set goes through its adapter;
then through the router's frozen features; then, grouped by the router's answer, through the chosen
adapters. *remembering features* is the same loop given its test features for nothing.
"""

from __future__ import annotations

import argparse
import io
import json
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median
from typing import Any

import numpy as np
import torch
from measure import Row, clock, configuration, minilm, plain, write
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from cl_peft.backbones.base import Backbone
from cl_peft.batching import bucketed, by_length
from cl_peft.config import build
from cl_peft.console import Console
from cl_peft.experiment import load_stream
from cl_peft.streams.base import Split, Stream, Task
from cl_peft.world import World

#: What was found after some tasks, by name.
Point = dict[str, float]
PARTS = ("learn", "router", "evaluate")


@dataclass
class Measured:
    """Seconds by part, examples that passed the backbone in evaluations, final accuracies."""

    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))
    features: float = 0.0  # of evaluate: frozen features of test examples
    passes: int = 0
    accuracy: dict[str, float] = field(default_factory=dict)

    def total(self) -> float:
        return sum(self.seconds.values())


class Ours:
    """This platform's way."""

    def __init__(self, config: dict[str, Any], stream: Stream, console: Console) -> None:
        self.world = World.build(config, stream, console)
        self.out = Measured()

    def step(self, task: Task) -> None:
        world, out = self.world, self.out
        started = clock()
        world.features.features(task.train.inputs)
        out.seconds["router"] += clock() - started
        before, started = world.features.computed, clock()
        world.features.features(task.test.inputs)
        spent = clock() - started
        out.features += spent
        out.seconds["evaluate"] += spent
        out.passes += world.features.computed - before
        marks = [clock()]
        for part in (world.learn, world.fit_router):
            part(task)
            marks.append(clock())
        results = world.evaluator.after(task, world.costs(task))
        marks.append(clock())
        for name, (a, b) in zip(PARTS, pairwise(marks), strict=True):
            out.seconds[name] += b - a
        out.passes += results.passes
        rows = results.rows[results.rows["metric"] == "average_accuracy_micro"]
        out.accuracy = dict(zip(rows["routing"], rows["value"], strict=True))


class PlainLoop:
    """The same with peft, as one writes it first."""

    def __init__(
        self, config: dict[str, Any], stream: Stream, backbone: Backbone, seed: int
    ) -> None:
        torch.manual_seed(seed)  # its modules and heads; ours have generators of their own
        self.stream, self.backbone = stream, backbone
        self.trainer = build(config["trainer"])
        self.lr = config["optimizer"]["lr"]
        self.router = build(config["router"])
        self.router.start(backbone.width, 0)
        module = config["module"]
        targets = [s.name for s in build(module).sites(backbone.model)]
        self.lora = LoraConfig(r=module["rank"], lora_alpha=module["alpha"], target_modules=targets)
        self.model = get_peft_model(backbone.model, self.lora, adapter_name="0").eval()
        self.heads: list[nn.Linear] = []
        self.out = Measured()

    def step(self, task: Task) -> None:
        index, marks = task.index, [clock()]
        self.learn(index, task.train)
        marks.append(clock())
        with torch.no_grad(), self.model.disable_adapter():
            features = self.pooled(task.train)
        self.router.fit(features, torch.from_numpy(task.train.labels), index)
        marks.append(clock())
        self.evaluate(index)
        marks.append(clock())
        for name, (a, b) in zip(PARTS, pairwise(marks), strict=True):
            self.out.seconds[name] += b - a

    def learn(self, index: int, train: Split) -> None:
        if index:
            self.model.add_adapter(str(index), self.lora)
        self.model.set_adapter(str(index))
        classes = self.stream.tasks[index].classes
        head = nn.Linear(self.backbone.width, len(classes))
        self.heads.append(head)
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        parameters += list(head.parameters())
        optimizer = torch.optim.AdamW(parameters, lr=self.lr, weight_decay=0.0)
        local = torch.tensor([classes.index(int(c)) for c in train.labels])
        encoded = self.backbone.encode(train.inputs)
        epochs, size = self.trainer.epochs, self.trainer.batch_size
        order = [
            rows
            for epoch in range(epochs)
            for rows in bucketed(
                encoded.lengths, size, np.random.default_rng([0, 11, index, epoch])
            )
        ]
        for step, rows in enumerate(order):
            optimizer.param_groups[0]["lr"] = self.lr * self.trainer.rate(step, len(order))
            logits = head(self.feature(encoded.take(rows)))
            optimizer.zero_grad(set_to_none=True)
            nn.functional.cross_entropy(logits, local[torch.from_numpy(rows)]).backward()
            nn.utils.clip_grad_norm_(parameters, self.trainer.clip)
            optimizer.step()

    def feature(self, encoded: Any) -> Tensor:
        batch = self.backbone.collate(encoded)
        return self.backbone.pool(self.model(**batch).last_hidden_state, batch)

    def pooled(self, split: Split, rows: np.ndarray | None = None) -> Tensor:
        """Pooled features of a split under whatever adapter is active."""
        inputs = split.inputs if rows is None else [split.inputs[r] for r in rows]
        encoded = self.backbone.encode(inputs)
        out = torch.empty(len(inputs), self.backbone.width)
        for part in by_length(encoded.lengths, self.trainer.eval_batch_size):
            out[torch.from_numpy(part)] = self.feature(encoded.take(part))
        return out

    @torch.no_grad()
    def evaluate(self, index: int) -> None:
        seen = self.stream.tasks[: index + 1]
        counts = {"oracle": 0, "routed": 0}
        n = sum(len(t.test) for t in seen)
        for t, task in enumerate(seen):
            self.model.set_adapter(str(t))
            answer = self.heads[t](self.pooled(task.test)).argmax(1)
            counts["oracle"] += self.right(answer, t, task.test.labels)
        for task in seen:
            started = clock()
            with self.model.disable_adapter():
                features = self.pooled(task.test)
            self.out.features += clock() - started
            chosen = self.router.choose(features).tasks.numpy()
            for t in np.unique(chosen):
                rows = np.flatnonzero(chosen == t)
                self.model.set_adapter(str(t))
                answer = self.heads[t](self.pooled(task.test, rows)).argmax(1)
                counts["routed"] += self.right(answer, int(t), task.test.labels[rows])
        self.out.passes += 3 * n
        self.out.accuracy = {name: right / n for name, right in counts.items()}

    def right(self, answer: Tensor, task: int, labels: np.ndarray) -> int:
        classes = np.array(self.stream.tasks[task].classes)
        return int((classes[answer.numpy()] == labels).sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", type=int, nargs="+", default=[5, 10, 20, 50])
    parser.add_argument("--repeats", type=int, default=2, help="of the first 20 tasks")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="smaller sizes, to try it out")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    lengths = [2, 3] if chosen.quick else sorted(chosen.tasks)
    config = configuration(
        "stream=synthetic",
        f"stream.tasks={lengths[-1]}",
        f"stream.classes={2 * lengths[-1]}",
        "stream.train_per_class=24",
        "stream.test_per_class=8",
        "trainer.epochs=3",
        "router.projection=500",
        "cache=off",
        f"threads={chosen.threads}",
    )
    console = Console(stdout=io.StringIO(), stderr=io.StringIO())
    stream = load_stream(config, console)
    found: dict[int, list[Point]] = {n: [] for n in lengths}
    for repeat in range(chosen.repeats):
        ends = lengths if repeat == 0 else [n for n in lengths if n <= 20]
        mine = Ours(config, stream, console)
        theirs = PlainLoop(config, stream, minilm(), repeat)
        tests = 0
        for task in stream.tasks[: max(ends, default=0)]:
            mine.step(task)
            theirs.step(task)
            tests += len(task.test)
            if task.index + 1 in ends:
                point = compared(mine.out, theirs.out, tests)
                found[task.index + 1].append(point)
                print(task.index + 1, json.dumps(point), flush=True)
    rows = [row for n, points in found.items() for row in summed_up(n, points)]
    series = [{"tasks": n, **typical(points)} for n, points in found.items()]
    about = "all-MiniLM-L6-v2, 48 training and 16 test texts per task, 3 epochs"
    write("stream", "Whole stream", about, rows, series=series)


def compared(mine: Measured, theirs: Measured, tests: int) -> Point:
    """Ratios and passes of a stream so far."""
    return {
        "evaluation": theirs.seconds["evaluate"] / mine.seconds["evaluate"],
        "evaluation, known": (theirs.seconds["evaluate"] - theirs.features)
        / mine.seconds["evaluate"],
        "whole": theirs.total() / mine.total(),
        "whole, known": (theirs.total() - theirs.features) / mine.total(),
        "learn": theirs.seconds["learn"] / mine.seconds["learn"],
        "passes, ours": mine.passes / tests,
        "passes, loop": theirs.passes / tests,
        "routed accuracy, ours": mine.accuracy["routed"],
        "routed accuracy, loop": theirs.accuracy["routed"],
        **{f"{part} seconds, ours": mine.seconds[part] for part in PARTS},
        **{f"{part} seconds, loop": theirs.seconds[part] for part in PARTS},
    }


def typical(points: list[Point]) -> Point:
    """The median of everything."""
    return {name: float(f"{median([p[name] for p in points]):.4g}") for name in points[0]}


def summed_up(tasks: int, points: list[Point]) -> list[Row]:
    """Rows for streams of so many tasks."""
    goals = {"evaluation": ">= 8", "whole": ">= 2"} if tasks == 20 else {}
    told = {
        "evaluation": ("evaluation, peft loop over ours", "x"),
        "evaluation, known": ("the same, remembering features", "x"),
        "whole": ("whole stream, peft loop over ours", "x"),
        "whole, known": ("the same, remembering features", "x"),
        "learn": ("training alone, peft loop over ours", "x"),
        "passes, ours": ("passes per test example, ours", "passes"),
        "passes, loop": ("passes per test example, loop", "passes"),
        "routed accuracy, ours": ("routed accuracy, ours", ""),
        "routed accuracy, loop": ("routed accuracy, loop", ""),
    }
    return [
        plain(f"{tasks} tasks: {what}", [p[name] for p in points], unit, goals.get(name, ""))
        for name, (what, unit) in told.items()
    ]


if __name__ == "__main__":
    main()
