"""What resident modules cost: latency with one routed, adding one, memory; peft's beside it.

    python benchmarks/bank_size.py [--repeats 15] [--threads 1] [--quick]

LoRA of rank 8 on query and value of all-MiniLM-L6-v2 (295 kB a module). The forward pass is one
text of 16 tokens, where an overhead per module would show most.
"""

from __future__ import annotations

import copy
import gc
import os
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from measure import Row, arguments, clock, compared, interleaved, minilm, plain, tokens, write
from peft import LoraConfig, get_peft_model

from cl_peft.backbones.base import Backbone, Batch
from cl_peft.modules.bank import Bank, Route
from cl_peft.modules.lora import LoRA

QV = ["query", "value"]


def resident() -> int:
    """Bytes of this process that lie in memory."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def of_bank(
    backbone: Backbone, batch: Batch, count: int
) -> tuple[Callable[[], None], list[float], float]:
    """Forward pass through the middle module, seconds of each addition, resident over own bytes."""
    own = copy.copy(backbone)
    own.model = copy.deepcopy(backbone.model)
    bank = Bank(LoRA(sites=QV), own.model, "cpu")
    fresh = bank.fresh(torch.Generator().manual_seed(0))
    adding, before = [], resident()
    for _ in range(count):
        started = clock()
        bank.add(fresh)
        adding.append(clock() - started)
    held = resident() - before
    one = sum(t.numel() * t.element_size() for p in bank.get(0).values() for t in p.values())

    def forward() -> None:
        with torch.no_grad(), bank.use(Route.to(count // 2, 1)):
            own(batch)

    return forward, adding, held / (count * one)


def of_peft(
    backbone: Backbone, batch: Batch, count: int
) -> tuple[Callable[[], None], Callable[[], None], list[float]]:
    """Forward by ``set_adapter``, forward by ``adapter_names``, seconds of each addition."""
    config = LoraConfig(r=8, lora_alpha=16, target_modules=QV)
    model = get_peft_model(copy.deepcopy(backbone.model), config, adapter_name="0").eval()
    adding = []
    for index in range(1, count):
        started = clock()
        model.add_adapter(str(index), config)
        adding.append(clock() - started)
    name = str(count // 2)

    def switched() -> None:
        with torch.no_grad():
            model.set_adapter(name)
            model(**batch)

    def named() -> None:
        with torch.no_grad():
            model(**batch, adapter_names=[name])

    return switched, named, adding


def main() -> None:
    chosen = arguments(__doc__, repeats=15)
    backbone, batch = minilm(), tokens(1, 16)
    sizes = [1, 10, 100] if chosen.quick else [1, 10, 100, 1000]
    actions: dict[str, Callable[[], None]] = {}
    rows: list[Row] = []
    largest = sizes[-1]
    for count in sizes:
        forward, adding, memory = of_bank(backbone, batch, count)
        actions[f"forward, {count} resident"] = forward
        last = [1e3 * s for s in adding[-100:]]
        rows.append(plain(f"adding one to {count - 1}", last, "ms", "< 20"))
        if count == largest:
            every = [1e3 * s for s in adding]
            rows.append(plain(f"slowest of {count} additions", [max(every)], "ms", "< 20"))
            mean = statistics.mean(every)
            rows.append(plain(f"mean of {count} additions", [mean], "ms", "< 20"))
        if count >= 100:  # fewer drown in what else the process does
            rows.append(plain(f"memory of {count} over their bytes", [memory], "x", "<= 1.1"))
    for count in (2, 10, 100):
        switched, named, adding = of_peft(backbone, batch, count)
        actions[f"peft set_adapter and forward, {count} resident"] = switched
        actions[f"peft adapter_names forward, {count} resident"] = named
        last = [1e3 * s for s in adding[-10:]]
        rows.append(plain(f"peft: adding one to {count - 1}", last, "ms"))
    seconds = interleaved(actions, chosen.repeats)
    first = "forward, 1 resident"
    timed = [compared(n, first, seconds, "<= 1.1") for n in actions if n.startswith("forward")]
    timed += [compared(n, first, seconds) for n in actions if n.startswith("peft")]
    about = "all-MiniLM-L6-v2, LoRA of rank 8 on query and value, one text of 16 tokens"
    write("bank_size", "A thousand modules", about, [*timed, *rows])


if __name__ == "__main__":
    main()
