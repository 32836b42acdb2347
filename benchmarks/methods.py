"""Training time of every module relative to LoRA, on the same batches of the same backbone.

    python benchmarks/methods.py [--steps 30] [--threads 1]

A step is forward, backward and optimizer on 32 texts of 16 tokens (a CLINC150 sentence) through
all-MiniLM-L6-v2. Methods take turns step by step, so that a busy machine slows all alike; medians
and quartiles are printed and kept in ``benchmarks/results/methods.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from datetime import UTC, datetime
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from cl_peft.config import build
from cl_peft.modules.bank import Bank
from cl_peft.modules.head import Head

ROOT = Path(__file__).resolve().parent.parent
BATCH, TOKENS, CLASSES = 32, 16, 10
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


def stepper(overrides: list[str], cache: Path):
    """A function that makes one training step of a method."""
    with initialize_config_dir(str(ROOT / "conf"), version_base=None):
        config = OmegaConf.to_container(
            compose("config", ["experiment=clinc150", *overrides]), resolve=False
        )
    backbone = build({**config["backbone"]})
    backbone.load(cache, torch.device("cpu"), 0)
    bank = Bank(build(config["module"]), backbone.model, "cpu")
    generator = torch.Generator().manual_seed(0)
    module = bank.fresh(generator)
    head = Head.fresh(tuple(range(CLASSES)), backbone.width, generator, torch.device("cpu"))
    leaves = [t for params in module.values() for t in params.values()]
    optimizer = build(config["optimizer"]).make(leaves, head.parameters)
    ids = torch.randint(1000, 20000, (BATCH, TOKENS), generator=generator)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    target = torch.randint(0, CLASSES, (BATCH,), generator=generator)

    def step() -> float:
        started = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        with bank.training(module):
            pooled = backbone(batch)
        torch.nn.functional.cross_entropy(head(pooled), target).backward()
        torch.nn.utils.clip_grad_norm_([*leaves, *head.parameters], 1.0)
        optimizer.step()
        return time.perf_counter() - started

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    cache = Path(os.environ.get("CL_PEFT_CACHE", "~/.cache/cl_peft")).expanduser()
    steppers = {name: stepper(overrides, cache) for name, overrides in METHODS.items()}
    seconds: dict[str, list[float]] = {name: [] for name in METHODS}
    for step in steppers.values():  # first steps allocate
        step()
    for _ in range(arguments.steps):
        for name, step in steppers.items():
            seconds[name].append(step())
    lora = seconds["lora"]
    rows = {}
    for name, values in seconds.items():
        ratios = sorted(v / base for v, base in zip(values, lora, strict=True))
        quartiles = statistics.quantiles(ratios, n=4)
        rows[name] = {
            "milliseconds": round(1000 * statistics.median(values), 2),
            "relative_to_lora": round(statistics.median(ratios), 3),
            "quartiles": [round(quartiles[0], 3), round(quartiles[2], 3)],
        }
        print(
            f"{name:<14} {rows[name]['milliseconds']:8.1f} ms   x {rows[name]['relative_to_lora']}"
        )
    result = {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": {"cpus": os.cpu_count(), "platform": platform.platform()},
        "torch": torch.__version__,
        "threads": arguments.threads,
        "steps": arguments.steps,
        "batch": [BATCH, TOKENS],
        "methods": rows,
    }
    path = ROOT / "benchmarks" / "results" / "methods.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"wrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
