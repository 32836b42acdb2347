"""Training time of every module relative to LoRA, on the same batches of the same backbone.

    python benchmarks/methods.py [--repeats 16] [--threads 1] [--quick]

A step is forward, backward and optimizer on 32 texts of 16 tokens (a CLINC150 sentence) through
all-MiniLM-L6-v2.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from measure import arguments, compared, configuration, interleaved, tokens, write

from cl_peft.config import build
from cl_peft.modules.bank import Bank
from cl_peft.modules.head import Head
from cl_peft.world import cache_folder

CLASSES = 10
METHODS = {
    "lora": [],
    "dora": ["module=dora"],
    "adapter": ["module=adapter"],
    "prompt": ["module=prompt"],
    "prefix": ["module=prefix"],
    "ia3": ["module=ia3"],
    "bitfit": ["module=bitfit"],
    "vera": ["module=vera"],
    "full": ["module=full"],
    "full, galore": ["module=full", "optimizer=galore"],
    "lora on nf4": ["backbone.quantize=nf4"],
}


def stepper(overrides: list[str], batch: dict[str, torch.Tensor]) -> Callable[[], None]:
    """One training step of a method."""
    config = configuration("experiment=clinc150", *overrides)
    backbone = build(config["backbone"])
    backbone.load(cache_folder(config), torch.device("cpu"), 0)
    bank = Bank(build(config["module"]), backbone.model, "cpu")
    generator = torch.Generator().manual_seed(0)
    module = bank.fresh(generator)
    head = Head.fresh(tuple(range(CLASSES)), backbone.width, generator, torch.device("cpu"))
    leaves = [t for params in module.values() for t in params.values()]
    optimizer = build(config["optimizer"]).make(leaves, head.parameters)
    target = torch.randint(0, CLASSES, (len(batch["input_ids"]),), generator=generator)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with bank.training(module):
            pooled = backbone(batch)
        torch.nn.functional.cross_entropy(head(pooled), target).backward()
        torch.nn.utils.clip_grad_norm_([*leaves, *head.parameters], 1.0)
        optimizer.step()

    return step


def main() -> None:
    chosen = arguments(__doc__, repeats=16)
    batch = tokens(8 if chosen.quick else 32, 16)
    seconds = interleaved({n: stepper(o, batch) for n, o in METHODS.items()}, chosen.repeats)
    rows = [compared(name, "lora", seconds) for name in METHODS]
    size = "x".join(str(n) for n in batch["input_ids"].shape)
    about = f"all-MiniLM-L6-v2, batch {size} tokens, with optimizer"
    write("methods", "Training step of every module", about, rows)


if __name__ == "__main__":
    main()
