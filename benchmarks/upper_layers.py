"""One training step with LoRA in all layers, the upper half or the upper third.

    python benchmarks/upper_layers.py [--repeats 11] [--threads 1] [--quick]

Forward and backward of 32 texts of 64 tokens through all-MiniLM-L6-v2, as in training_step.py. The
backward pass stops at the lowest module by itself. With the kept trunk, a step starts there, too:
the frozen layers below gave their hidden states once; looking these up and padding them is part of
the step.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from measure import (
    arguments,
    compared,
    gradient_at_embeddings,
    gradient_step,
    interleaved,
    minilm,
    plain,
    separate,
    write,
)

from cl_peft.backbones.base import Backbone
from cl_peft.backbones.features import Features
from cl_peft.backbones.trunk import trunk_of
from cl_peft.modules.bank import Bank
from cl_peft.modules.lora import LoRA

PARTS = {"upper half": "upper_half", "upper third": "upper_third"}
KEPT = ", trunk kept"


def texts(backbone: Backbone, count: int) -> list[str]:
    """Texts of random words, each as long as the backbone takes."""
    tokenizer = backbone.tokenizer  # type: ignore[attr-defined]
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(2000, 20000, (count, backbone.longest), generator=random)
    return [" ".join(tokenizer.convert_ids_to_tokens(row.tolist())) for row in ids]


def steps(
    backbone: Backbone, inputs: list[str], layers: str | None
) -> tuple[Callable[[], None], Callable[[], None], Callable[[], int]]:
    """A step the whole way, one that starts above the trunk, and filling it (returns its bytes)."""
    own = separate(backbone)
    features = Features(own, None, 64)
    bank = Bank(LoRA(layers=layers), own.model, "cpu")  # type: ignore[arg-type]
    batch = own.collate(features.encoded(inputs))

    def fill() -> int:
        trunk = trunk_of(features, bank.sites, inputs, 1e9, "benchmark")
        return 0 if trunk is None else trunk.bytes

    step = gradient_step(own, bank, batch)
    trunk = trunk_of(features, bank.sites, inputs, 1e9, "benchmark")

    def kept() -> None:
        assert trunk is not None
        with trunk.given(inputs):
            step()

    return step, kept, fill


def main() -> None:
    chosen = arguments(__doc__, repeats=11)
    backbone = minilm()
    backbone.max_length = 64
    inputs = texts(backbone, 8 if chosen.quick else 32)
    bare = separate(backbone)
    batch = bare.collate(bare.encode(inputs))

    def limit() -> None:
        with gradient_at_embeddings(bare.model):
            bare(batch).mean().backward()

    actions: dict[str, Callable[[], object]] = {
        "bare backbone": limit,
        "LoRA, all layers": steps(backbone, inputs, None)[0],
    }
    memory = {}
    for name, layers in PARTS.items():
        step, kept, fill = steps(backbone, inputs, layers)
        actions |= {f"LoRA, {name}": step, f"LoRA, {name}{KEPT}": kept, f"keeping, {name}": fill}
        memory[name] = fill() / len(inputs) / backbone.longest
    seconds = interleaved(actions, chosen.repeats)
    rows = [compared("LoRA, all layers", "bare backbone", seconds)]
    for name in PARTS:
        rows += [
            compared(f"LoRA, {name}", "bare backbone", seconds),
            compared(f"LoRA, {name}{KEPT}", "bare backbone", seconds),
            compared(f"LoRA, {name}", "LoRA, all layers", seconds),
            compared(f"LoRA, {name}{KEPT}", "LoRA, all layers", seconds),
            compared(f"keeping, {name}", f"LoRA, {name}", seconds),
        ]
    rows.append(plain("memory of a kept token", list(memory.values()), "bytes"))
    size = "x".join(str(n) for n in batch["input_ids"].shape)
    about = f"all-MiniLM-L6-v2, batch {size} tokens, LoRA of rank 8 on all linears of these layers"
    write("upper_layers", "Modules in upper layers alone", about, rows)


if __name__ == "__main__":
    main()
