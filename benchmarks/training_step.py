"""One training step against its limit, the bare frozen backbone, with peft's beside it.

    python benchmarks/training_step.py [--repeats 15] [--threads 1] [--quick]

The limit is one forward pass and one backward pass for activations alone. A step is forward and
backward of 32 texts of 64 tokens through all-MiniLM-L6-v2, the mean of the pooled features as loss;
rank 8; gradients of all module tensors. Optimizers are left out: they cost all the same. *masks
given* is dropout whose masks cost nothing to draw: what is left of it is applying them. Ours take
turns with the bare backbone first; then peft's join, which leave memory scattered.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from measure import (
    arguments,
    compared,
    gradient_at_embeddings,
    gradient_step,
    interleaved,
    minilm,
    separate,
    tokens,
    write,
)
from peft import LoraConfig, get_peft_model

from cl_peft.backbones.base import Backbone, Batch
from cl_peft.modules import dropping
from cl_peft.modules.bank import Bank
from cl_peft.modules.base import Method
from cl_peft.modules.dora import DoRA
from cl_peft.modules.lora import LoRA

QV = ["query", "value"]


def ours(backbone: Backbone, batch: Batch, method: Method) -> Callable[[], None]:
    own = separate(backbone)
    bank = Bank(method, own.model, "cpu")
    return gradient_step(own, bank, batch)


def theirs(backbone: Backbone, batch: Batch, **options: object) -> Callable[[], None]:
    config = LoraConfig(r=8, lora_alpha=16, **options)  # type: ignore[arg-type]
    model = get_peft_model(copy.deepcopy(backbone.model), config)
    model.train()
    for module in model.modules():  # the backbone's own dropout is off in ours, too
        if type(module).__name__ == "Dropout" and module.p != options.get("lora_dropout", 0.0):
            module.p = 0.0

    def step() -> None:
        model.zero_grad(set_to_none=True)
        backbone.pool(model(**batch).last_hidden_state, batch).mean().backward()

    return step


def masks_given(step: Callable[[], None]) -> Callable[[], None]:
    """The same step with masks that were drawn before, one for all layers of a shape."""
    masks: dict[torch.Size, tuple[torch.Tensor, float]] = {}
    drawn = dropping.kept

    def kept(x: torch.Tensor, p: float) -> tuple[torch.Tensor, float]:
        if x.shape not in masks:
            masks[x.shape] = drawn(x, p)
        return masks[x.shape]

    def run() -> None:
        dropping.kept = kept
        try:
            step()
        finally:
            dropping.kept = drawn

    return run


def main() -> None:
    chosen = arguments(__doc__, repeats=15)
    backbone = minilm()
    batch = tokens(8 if chosen.quick else 32, 64)
    every = [s.name for s in LoRA().sites(backbone.model)]
    bare = separate(backbone)

    def limit() -> None:
        with gradient_at_embeddings(bare.model):
            bare(batch).mean().backward()

    actions = {
        "bare backbone": limit,
        "LoRA, query and value": ours(backbone, batch, LoRA(sites=QV)),
        "LoRA, all linears": ours(backbone, batch, LoRA()),
        "LoRA, all linears, dropout 0.1": ours(backbone, batch, LoRA(dropout=0.1)),
        "LoRA, all linears, masks given": masks_given(ours(backbone, batch, LoRA(dropout=0.1))),
        "DoRA, all linears": ours(backbone, batch, DoRA()),
    }
    seconds = interleaved(actions, chosen.repeats)
    linears = {"target_modules": every}
    actions |= {
        "peft LoRA, query and value": theirs(backbone, batch, target_modules=QV),
        "peft LoRA, all linears": theirs(backbone, batch, **linears),
        "peft LoRA, all linears, dropout 0.1": theirs(backbone, batch, lora_dropout=0.1, **linears),
        "peft DoRA, all linears": theirs(backbone, batch, use_dora=True, **linears),
    }
    beside = interleaved(actions, max(1, chosen.repeats // 2))
    lora = "LoRA, all linears"
    rows = [
        compared("LoRA, query and value", "bare backbone", seconds, "<= 1.03"),
        compared(lora, "bare backbone", seconds, "<= 1.15"),
        compared("DoRA, all linears", lora, seconds, "<= 1.12"),
        compared(f"{lora}, dropout 0.1", lora, seconds, "<= 1.05"),
        compared(f"{lora}, masks given", lora, seconds),
        compared("peft LoRA, query and value", "bare backbone", beside),
        compared(f"peft {lora}", "bare backbone", beside),
        compared("peft DoRA, all linears", f"peft {lora}", beside),
        compared(f"peft {lora}, dropout 0.1", f"peft {lora}", beside),
        compared("DoRA, all linears", "peft DoRA, all linears", beside),
        compared(f"{lora}, dropout 0.1", f"peft {lora}, dropout 0.1", beside),
    ]
    size = "x".join(str(n) for n in batch["input_ids"].shape)
    write("training_step", "Training step", f"all-MiniLM-L6-v2, batch {size} tokens, rank 8", rows)


if __name__ == "__main__":
    main()
