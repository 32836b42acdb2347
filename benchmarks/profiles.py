"""Where time goes, before and after, for the three largest costs of a stream of isolated modules.

    python benchmarks/profiles.py [--repeats 5] [--threads 1] [--quick]

*Before* is the plain way, kept as the naive twin that tests compare with; *after* is what runs do.

* training step: the formula as it is written (:meth:`Method.one`), against the fused one;
* evaluation: all seen tasks anew after every task, against remembered answers;
* frozen features: computed whenever somebody asks, against once per example.

Every row lists the operators with the largest own share of CPU time, from torch.profiler.
"""

from __future__ import annotations

import io
from collections.abc import Callable

import torch
from measure import (
    Row,
    arguments,
    compared,
    configuration,
    gradient_step,
    interleaved,
    minilm,
    separate,
    tokens,
    write,
)
from torch.profiler import ProfilerActivity, profile

from cl_peft.backbones.base import Backbone, Batch
from cl_peft.console import Console
from cl_peft.experiment import load_stream
from cl_peft.memo import Memo
from cl_peft.modules.bank import Bank
from cl_peft.modules.lora import LoRA
from cl_peft.world import World

SHOWN = 4


class PlainLoRA(LoRA):
    """LoRA without its fused step."""

    fused = LoRA.one


def step(backbone: Backbone, batch: Batch, method: LoRA) -> Callable[[], None]:
    own = separate(backbone)
    bank = Bank(method, own.model, "cpu")
    return gradient_step(own, bank, batch)


def learned(tasks: int) -> World:
    """A made-up stream whose modules are there, untrained, and whose router knows all tasks."""
    config = configuration(
        "stream=synthetic",
        f"stream.tasks={tasks}",
        f"stream.classes={2 * tasks}",
        "trainer.epochs=1",
        "optimizer.lr=1e-9",
        "router.projection=500",
        "cache=off",
        f"threads={torch.get_num_threads()}",
    )
    console = Console(stdout=io.StringIO(), stderr=io.StringIO())
    world = World.build(config, load_stream(config, console), console)
    world.prefetch()
    for task in world.stream.tasks:
        world.learn(task)
        world.fit_router(task)
    return world


def evaluations(world: World, remember: bool) -> Callable[[], None]:
    """An evaluation after every task; the router knows all tasks from the start."""

    def run() -> None:
        world.evaluator.memo = Memo()
        for task in world.stream.tasks:
            if not remember:
                world.evaluator.memo = Memo()
            world.evaluator.after(task, {})

    return run


def asked(world: World, remember: bool) -> Callable[[], None]:
    """What asks for frozen features: the router's fit, and every evaluation for all tests seen."""

    def run() -> None:
        features = world.features
        features.forget()
        for task in world.stream.tasks:
            for split in (task.train, *(t.test for t in world.stream.seen(task))):
                if not remember:
                    features.forget()
                features.features(split.inputs)

    return run


def largest(run: Callable[[], None]) -> list[str]:
    """Operators by their own share of CPU time, and how often they ran, of one call."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        run()
    averages = sorted(profiler.key_averages(), key=lambda e: -e.self_cpu_time_total)
    whole = sum(e.self_cpu_time_total for e in averages)
    return [
        f"{e.key.removeprefix('aten::')} {e.self_cpu_time_total / whole:.0%} ({e.count})"
        for e in averages[:SHOWN]
    ]


def main() -> None:
    chosen = arguments(__doc__, repeats=5)
    backbone, batch = minilm(), tokens(8 if chosen.quick else 32, 64)
    world = learned(3 if chosen.quick else 10)
    pairs = {
        "training step": (step(backbone, batch, PlainLoRA()), step(backbone, batch, LoRA())),
        "evaluation": (evaluations(world, False), evaluations(world, True)),
        "frozen features": (asked(world, False), asked(world, True)),
    }
    rows: list[Row] = []
    operators: list[list[str]] = []
    for name, (before, after) in pairs.items():
        actions = {f"{name}, before": before, f"{name}, after": after}
        seconds = interleaved(actions, chosen.repeats)
        for what, run in actions.items():
            rows.append(compared(what, f"{name}, before", seconds))
            operators.append([what, *largest(run)])
    about = (
        f"LoRA on all linears, batch of 32x64 tokens; a stream of {len(world.stream.tasks)} tasks"
    )
    columns = ["what", *(f"operator {i + 1}: share (calls)" for i in range(SHOWN))]
    tables = [{"columns": columns, "rows": operators}]
    write("profiles", "Profiles, before and after", about, rows, tables=tables)


if __name__ == "__main__":
    main()
