"""32 samples, each through a LoRA of its own, in one pass; against the bare backbone and peft.

    python benchmarks/mixed_batch.py [--repeats 15] [--threads 1] [--quick]

64 tokens each, all-MiniLM-L6-v2, rank 8. Forward alone without gradients, and forward with backward
for all modules. peft's way is ``adapter_names``, which it allows outside training mode only.

What is compared with the bare backbone takes turns with it alone; then peft joins. Its backward
pass leaves memory so scattered that whatever comes next takes up to a fifth longer.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from measure import (
    arguments,
    compared,
    gradient_at_embeddings,
    interleaved,
    minilm,
    separate,
    tokens,
    write,
)
from peft import LoraConfig, get_peft_model

from cl_peft.backbones.base import Backbone, Batch
from cl_peft.modules.bank import Active, Bank, Route
from cl_peft.modules.lora import LoRA

COUNT, TOKENS = 32, 64
SITES = {"query and value": ["query", "value"], "all linears": ["all"]}


def both(
    run: Callable[[], torch.Tensor], clear: Callable[[], None]
) -> tuple[Callable[[], None], Callable[[], None]]:
    """The forward pass alone, and with its backward pass."""

    def forward() -> None:
        with torch.no_grad():
            run()

    def step() -> None:
        clear()
        run().mean().backward()

    return forward, step


def of_bank(backbone: Backbone, batch: Batch, sites: list[str]) -> list[Callable[[], None]]:
    """Ours: single module, mixed forward; mixed forward and backward."""
    own = separate(backbone)
    bank = Bank(LoRA(sites=sites), own.model, "cpu")
    for seed in range(COUNT):
        bank.add(bank.fresh(torch.Generator().manual_seed(seed)))
    modules = [bank.get(row) for row in range(COUNT)]
    ones = torch.ones(COUNT, 1)
    given = {  # what a learner trains: one leaf per parameter, a module per sample
        site.name: Active(
            {
                n: torch.stack([m[site.name][n] for m in modules]).unsqueeze(1).requires_grad_(True)
                for n in ("A", "B")
            },
            ones,
        )
        for site in bank.sites
    }

    def single() -> None:
        with torch.no_grad(), bank.use(Route.to(0, COUNT)):
            own(batch)

    def forward() -> None:
        with torch.no_grad(), bank.use(Route.each(torch.arange(COUNT))):
            own(batch)

    def step() -> None:
        for active in given.values():
            for tensor in active.params.values():
                tensor.grad = None
        with bank.give(given, training=True):
            own(batch).mean().backward()

    return [single, forward, step]


def of_peft(backbone: Backbone, batch: Batch, sites: list[str]) -> tuple[Callable[[], None], ...]:
    targets = [s.name for s in LoRA(sites=sites).sites(backbone.model)]
    config = LoraConfig(r=8, lora_alpha=16, target_modules=targets)
    model = get_peft_model(copy.deepcopy(backbone.model), config, adapter_name="0")
    for index in range(1, COUNT):
        model.add_adapter(str(index), config)
    model.eval()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    names = [str(i) for i in range(COUNT)]

    def run() -> torch.Tensor:
        return backbone.pool(model(**batch, adapter_names=names).last_hidden_state, batch)

    return both(run, lambda: model.zero_grad(set_to_none=True))


def main() -> None:
    chosen = arguments(__doc__, repeats=15)
    backbone = minilm()
    batch = tokens(COUNT, 16 if chosen.quick else TOKENS)
    bare = separate(backbone)

    def limit() -> None:
        with gradient_at_embeddings(bare.model):
            bare(batch).mean().backward()

    def base() -> None:
        with torch.no_grad():
            bare(batch)

    actions = {"bare forward": base, "bare forward and backward": limit}
    for label, sites in SITES.items():
        single, forward, step = of_bank(backbone, batch, sites)
        actions[f"one module, {label}, forward"] = single
        actions[f"32 modules, {label}, forward"] = forward
        actions[f"32 modules, {label}, forward and backward"] = step
    seconds = interleaved(actions, chosen.repeats)
    for label, sites in SITES.items():
        forward, step = of_peft(backbone, batch, sites)
        actions[f"peft 32 modules, {label}, forward"] = forward
        actions[f"peft 32 modules, {label}, forward and backward"] = step
    beside = interleaved(actions, max(1, chosen.repeats // 3))
    rows = []
    for label in SITES:
        rows.append(compared(f"one module, {label}, forward", "bare forward", seconds))
        for part in ("forward", "forward and backward"):
            name = f"32 modules, {label}, {part}"
            rows.append(compared(name, f"bare {part}", seconds, "<= 1.15"))
            rows.append(compared(f"peft {name}", f"bare {part}", beside))
            rows.append(compared(name, f"peft {name}", beside, "< 1"))
    length = batch["input_ids"].shape[1]
    about = f"all-MiniLM-L6-v2, 32 samples of {length} tokens, 32 LoRAs of rank 8"
    write("mixed_batch", "Mixed batches", about, rows)


if __name__ == "__main__":
    main()
