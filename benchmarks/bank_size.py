"""What modules cost: latency with one routed, adding, memory, loading; peft's beside it.

    python benchmarks/bank_size.py [--repeats 15] [--threads 1] [--quick]

LoRA of rank 8 on query and value of all-MiniLM-L6-v2 (295 kB a module). The forward pass is one
text of 16 tokens, where an overhead per module would show most.
"""

from __future__ import annotations

import copy
import gc
import hashlib
import io
import json
import os
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from measure import (
    Row,
    arguments,
    clock,
    compared,
    interleaved,
    minilm,
    plain,
    separate,
    tokens,
    write,
)
from peft import LoraConfig, get_peft_model
from safetensors.torch import save

from cl_peft.backbones.base import Backbone, Batch
from cl_peft.backbones.features import Features
from cl_peft.config import Seeds
from cl_peft.console import Console
from cl_peft.learners.base import Tools
from cl_peft.learners.isolated import Isolated
from cl_peft.loading import Stored
from cl_peft.modules.bank import Bank, Route, flatten
from cl_peft.modules.head import Head
from cl_peft.modules.lora import LoRA
from cl_peft.optim.adamw import AdamW
from cl_peft.runs import FORMAT, RunFolder
from cl_peft.streams.base import Split, Task
from cl_peft.tracking import Tracker
from cl_peft.training import Trainer

QV = ["query", "value"]


def resident() -> int:
    """Bytes of this process that lie in memory."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def of_bank(
    backbone: Backbone, batch: Batch, count: int
) -> tuple[Callable[[], None], list[float], float]:
    """Forward pass through the middle module, seconds of each addition, resident over own bytes."""
    own = separate(backbone)
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


def of_loading(backbone: Backbone, count: int) -> dict[str, tuple[float, float]]:
    """Seconds, and resident over own bytes, of bringing modules back: read at once, or lazily."""
    found = {}
    with tempfile.TemporaryDirectory() as place:
        folder, one = stored(backbone, Path(place), count)
        for name, lazy in (("lazily", True), ("at once", False)):
            own = separate(backbone)
            learner = Isolated()
            learner.start(tools(own, Bank(LoRA(sites=QV), own.model, "cpu"), count))
            before, started = resident(), clock()
            learner.restore(Stored.read(folder, "all", lazy).units, tasks(count))
            seconds = clock() - started
            found[name] = (seconds, (resident() - before) / (count * one))
    return found


def stored(backbone: Backbone, place: Path, count: int) -> tuple[RunFolder, int]:
    """A run folder with so many modules, as a run would leave it, and the bytes of one."""
    own = separate(backbone)
    random = torch.Generator().manual_seed(0)
    module = flatten(Bank(LoRA(sites=QV), own.model, "cpu").fresh(random))
    head = Head.fresh((0, 1), backbone.width, random, torch.device("cpu"))
    data = save({**module, **head.tensors()})
    entry = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    listed = []
    for task in range(1, count + 1):
        name = f"tasks/{task:03d}/module.safetensors"
        (place / name).parent.mkdir(parents=True)
        (place / name).write_bytes(data)
        listed.append({"task": task, "files": {name: entry}})
    manifest = {"format": FORMAT, "fixed": {}, "tasks": listed, "final": None}
    (place / "manifest.json").write_text(json.dumps(manifest))
    folder = RunFolder(place)
    folder.look()
    return folder, sum(t.numel() * t.element_size() for t in module.values())


def tasks(count: int) -> list[Task]:
    """Tasks without examples."""
    none = Split(np.zeros(0, dtype=np.int64), [], np.zeros(0, dtype=np.int64))
    return [Task(t, str(t), (0, 1), none, none, none) for t in range(count)]


def tools(backbone: Backbone, bank: Bank, count: int) -> Tools:
    """What a learner needs that only recalls."""
    trainer = Trainer()
    return Tools(
        backbone=backbone,
        bank=bank,
        features=Features(backbone, None, trainer.eval_batch_size),
        trainer=trainer,
        optimizer=AdamW(),
        seeds=Seeds(),
        class_names=("a", "b"),
        n_tasks=count,
        console=Console(io.StringIO(), io.StringIO()),
        tracker=Tracker(),
    )


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
    actions: dict[str, Callable[[], object]] = {}
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
    for count in sizes[2:]:
        for how, (took, memory) in of_loading(backbone, count).items():
            rows.append(plain(f"loading {count} from a run folder, {how}", [1e3 * took], "ms"))
            rows.append(plain(f"memory of {count} loaded {how} over their bytes", [memory], "x"))
    seconds = interleaved(actions, chosen.repeats)
    first = "forward, 1 resident"
    timed = [compared(n, first, seconds, "<= 1.1") for n in actions if n.startswith("forward")]
    timed += [compared(n, first, seconds) for n in actions if n.startswith("peft")]
    about = "all-MiniLM-L6-v2, LoRA of rank 8 on query and value, one text of 16 tokens"
    write("bank_size", "A thousand modules", about, [*timed, *rows])


if __name__ == "__main__":
    main()
