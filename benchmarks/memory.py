"""Peak memory of a training step, for every kind of module and both ways to need less of it.

    python benchmarks/memory.py [--threads 1]

Counted is what torch's allocator was asked for and has not got back (torch.profiler: every
allocation and every release), above what lay there before the step. So the numbers are the same in
every run. Resident memory is not: it holds pages that were given back long ago, and in a process's
first step grows by about twice as much. Not counted: workspaces inside MKL, and the backbone's
weights, which are there in any case. A step is the trainer's own: forward, backward, clipping and
optimizer, whose state exists already.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial

import numpy as np
import torch
from measure import (
    arguments,
    compared,
    configuration,
    gradient_at_embeddings,
    interleaved,
    minilm,
    plain,
    tokens,
    write,
)
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.profiler import ProfilerActivity, profile

from cl_peft.backbones import nf4
from cl_peft.backbones.base import Backbone
from cl_peft.backbones.checkpointing import checkpointed
from cl_peft.config import build
from cl_peft.modules.bank import Bank
from cl_peft.modules.head import Head
from cl_peft.training import Job, Trainer
from cl_peft.world import cache_folder

BATCH, TOKENS, CLASSES = 32, 64, 10
MODULES = ("lora", "dora", "adapter", "prompt", "prefix", "ia3", "bitfit", "vera", "full")
#: Trainers by what the table calls them.
TRAINERS = {
    "plain": Trainer(),
    "checkpointing": Trainer(checkpointing="on"),
    "accumulate=4": Trainer(accumulate=4),
    "both": Trainer(checkpointing="on", accumulate=4),
}
COLUMNS = (
    "module",
    "held between steps: module, head, optimizer",
    "step",
    "of forward",
    "of forward and backward",
    *list(TRAINERS)[1:],
)


def peak(action: Callable[[], object]) -> float:
    """The most bytes, in MB, that an action had allocated at one moment."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        action()
    events = seen.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    return float(np.cumsum([size for _, size in changes]).max()) / 1e6


def size(tensors: Iterable[object]) -> float:
    """MB of tensors."""
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor)) / 1e6


class Subject:
    """One module on the backbone, and its training step.

    Args:
        backbone: All-MiniLM.
        overrides: What the command line would say.
    """

    def __init__(self, backbone: Backbone, *overrides: str) -> None:
        config = configuration("experiment=newsgroups", *overrides)
        self.backbone = backbone
        self.bank = Bank(build(config["module"]), backbone.model, "cpu")
        random = torch.Generator().manual_seed(0)
        self.module = self.bank.fresh(random)
        head = Head.fresh(tuple(range(CLASSES)), backbone.width, random, torch.device("cpu"))
        batch = tokens(BATCH, TOKENS)
        target = torch.randint(0, CLASSES, (BATCH,), generator=random)

        def loss(rows: np.ndarray) -> Tensor:
            index = torch.from_numpy(rows)
            with self.bank.training(self.module):
                pooled = backbone({name: tensor[index] for name, tensor in batch.items()})
            return cross_entropy(head(pooled), target[index])

        leaves = [t for params in self.module.values() for t in params.values()]
        lengths = np.full(BATCH, TOKENS)
        self.job = Job(0, "", leaves, head.parameters, lengths, loss, (0, 0))
        self.tensors = leaves + head.parameters
        self.optimizer = build(config["optimizer"]).make(leaves, head.parameters)

    def step(self, trainer: Trainer) -> None:
        """One step of the trainer."""
        again = trainer.checkpointing == "on"
        with checkpointed(self.backbone.model, self.bank) if again else nullcontext():
            trainer._step(
                self.job, np.arange(BATCH), self.optimizer, self.tensors, torch.device("cpu")
            )

    def peak(self, trainer: Trainer) -> float:
        """MB of a step, gradients included."""
        self.optimizer.zero_grad(set_to_none=True)
        return peak(lambda: self.step(trainer))

    def state(self) -> float:
        """MB that the optimizer keeps, after a step at least."""
        return size(t for kept in self.optimizer.state.values() for t in kept.values())


def quantized() -> Backbone:
    """All-MiniLM in 4 bits."""
    config = configuration("experiment=newsgroups", "backbone.quantize=nf4")
    backbone: Backbone = build(config["backbone"])
    backbone.load(cache_folder(config), torch.device("cpu"), 0)
    return backbone


@contextmanager
def subject(backbone: Backbone, *overrides: str) -> Iterator[Subject]:
    """A subject whose hooks are taken off in the end."""
    made = Subject(backbone, *overrides)
    try:
        yield made
    finally:
        made.bank.close()


def main() -> None:
    """Measure, and write the results."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    chosen = arguments(__doc__, repeats=3)
    backbone, batch = minilm(), tokens(BATCH, TOKENS)

    def forward() -> None:
        with torch.no_grad():
            backbone(batch)

    def both_ways() -> None:
        with gradient_at_embeddings(backbone.model):
            backbone(batch).sum().backward()

    bare = {"forward": peak(forward), "forward and backward": peak(both_ways)}
    rows = [plain(f"bare backbone, {what}", [value], "MB") for what, value in bare.items()]
    table, states = [], {}

    def measure(label: str, model: Backbone, *overrides: str) -> None:
        with subject(model, *overrides) as made:
            made.step(TRAINERS["plain"])
            peaks = [made.peak(trainer) for trainer in TRAINERS.values()]
            states[label] = made.state()
            held = size(made.tensors) + states[label]
        first, *others = (f"{value:.1f} MB" for value in peaks)
        ratios = [f"{peaks[0] / value:.2f}" for value in bare.values()]
        table.append([label, f"{held:.1f} MB", first, *ratios, *others])
        print(" | ".join(table[-1]), flush=True)

    for name in MODULES[:1] if chosen.quick else MODULES:
        measure(name, backbone, f"module={name}")
    with subject(backbone, "module=lora") as made:
        actions = {f"step with lora, {name}": partial(made.step, trainer)
                   for name, trainer in TRAINERS.items()}  # fmt: skip
        seconds = interleaved(actions, chosen.repeats)
    first, *others = actions
    rows += [compared(name, first, seconds) for name in others]
    if not chosen.quick:
        measure("full, galore", backbone, "module=full", "optimizer=galore")
        small = quantized()
        measure("lora on nf4", small, "module=lora")
        adamw, galore = (f"optimizer state of module=full, {name}" for name in ("adamw", "galore"))
        sizes = {adamw: [states["full"]], galore: [states["full, galore"]]}
        rows += [plain(adamw, sizes[adamw], "MB"), compared(galore, adamw, sizes, "", (1, "MB"))]
        bits = nf4.quantized_bits_per_parameter(small.model)
        rows.append(plain("weights of linear layers, nf4", [bits], "bits each"))
    settings = (
        f"All-MiniLM-L6-v2, float32, {BATCH} x {TOKENS} tokens; bytes that torch has allocated at "
        "the worst moment of a step, beyond those before it"
    )
    write("memory", "Memory", settings, rows, tables=[{"columns": COLUMNS, "rows": table}])


if __name__ == "__main__":
    main()
