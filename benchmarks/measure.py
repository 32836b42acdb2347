"""What the benchmarks share: taking turns, medians and quartiles, the machine, one JSON per file.

Everything that is compared runs in one process and takes turns, repeat by repeat, so that a busy
machine slows all alike; a row's ratio is the median of the ratios within a repeat.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
Seconds = dict[str, list[float]]
Row = dict[str, Any]


def arguments(about: str | None, repeats: int) -> argparse.Namespace:
    """``--repeats``, ``--threads`` and ``--quick``; sets the number of threads."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--repeats", type=int, default=repeats)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="smaller sizes, to try it out")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    return chosen


def clock() -> float:
    """CPU seconds of this process with one thread (others' load counts little), else wall clock."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def interleaved(actions: dict[str, Callable[[], object]], repeats: int) -> Seconds:
    """Seconds of every action in every repeat; one unmeasured repeat comes first."""
    seconds: Seconds = {name: [] for name in actions}
    for turn in range(repeats + 1):
        for name, action in actions.items():
            started = clock()
            action()
            if turn:
                seconds[name].append(clock() - started)
    return seconds


def compared(
    what: str, against: str, seconds: Seconds, aim: str = "", scale: tuple[float, str] = (1e3, "ms")
) -> Row:
    """A row: how long ``what`` takes, and how many times as long as ``against``."""
    ratios = [a / b for a, b in zip(seconds[what], seconds[against], strict=True)]
    return {
        "what": what,
        "value": statistics.median(seconds[what]) * scale[0],
        "unit": scale[1],
        "against": against,
        "ratio": statistics.median(ratios),
        "quartiles": quartiles(ratios),
        "repeats": len(ratios),
        "aim": aim,
    }


def plain(what: str, values: Sequence[float], unit: str, aim: str = "") -> Row:
    """A row without a comparison."""
    return {
        "what": what,
        "value": statistics.median(values),
        "unit": unit,
        "spread": quartiles(values),
        "repeats": len(values),
        "aim": aim,
    }


def quartiles(values: Sequence[float]) -> list[float]:
    """First and third."""
    if len(values) == 1:
        return [values[0], values[0]]
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return [first, third]


def write(name: str, about: str, settings: str, rows: list[Row], **more: Any) -> None:
    """Print rows, and keep them in ``benchmarks/results/NAME.json``."""
    for row in rows:
        ratio = f"  x {row['ratio']:.3f} of {row['against']}" if "ratio" in row else ""
        aim = f"  (aim {row['aim']})" if row["aim"] else ""
        print(f"{row['what']:<44} {row['value']:10.3f} {row['unit']}{ratio}{aim}")
    RESULTS.mkdir(exist_ok=True)
    content = {
        "about": about,
        "settings": settings,
        "machine": machine(),
        "rows": [_rounded(row) for row in rows],
        **more,
    }
    (RESULTS / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")
    print(f"wrote benchmarks/results/{name}.json")


def machine() -> dict[str, Any]:
    """Where and when it was measured."""
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": [round(x, 1) for x in os.getloadavg()],
        "platform": platform.platform(),
        "python": platform.python_version(),
        **{package: version(package) for package in ("torch", "transformers", "peft")},
    }


def _rounded(row: Row) -> Row:
    def short(value: Any) -> Any:
        if isinstance(value, list):
            return [short(v) for v in value]
        return float(f"{value:.5g}") if isinstance(value, float) else value

    return {key: short(value) for key, value in row.items()}


# ---------------------------------------------------------------------- the subject


def configuration(*overrides: str) -> dict[str, Any]:
    """A run's configuration, as the command line would make it."""
    from hydra import compose, initialize_config_dir

    from cl_peft.config import validate

    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return validate(compose("config", ["tracker=disabled", *overrides]))


def minilm() -> Any:
    """All-MiniLM-L6-v2, loaded and frozen."""
    from cl_peft.config import build
    from cl_peft.world import cache_folder

    config = configuration("experiment=newsgroups")
    backbone = build(config["backbone"])
    backbone.load(cache_folder(config), torch.device("cpu"), 0)
    return backbone


def separate(backbone: Any) -> Any:
    """The same backbone with a model of its own: hooks of one do not slow the others."""
    own = copy.copy(backbone)
    own.model = copy.deepcopy(backbone.model)
    return own


def gradient_step(own: Any, bank: Any, batch: dict[str, Tensor]) -> Callable[[], None]:
    """Forward and backward of a fresh module of ``bank``; the mean pooled feature is the loss."""
    module = bank.fresh(torch.Generator().manual_seed(0))

    def step() -> None:
        for params in module.values():
            for tensor in params.values():
                tensor.grad = None
        with bank.training(module):
            own(batch).mean().backward()

    return step


def tokens(batch: int, length: int) -> dict[str, Tensor]:
    """A batch of random token ids without padding."""
    ids = torch.randint(1000, 20000, (batch, length), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@contextmanager
def gradient_at_embeddings(model: torch.nn.Module) -> Iterator[None]:
    """The bare backbone's backward pass: activations' gradients down to the embeddings' output."""
    handle = model.embeddings.register_forward_hook(lambda *a: a[-1].requires_grad_(True))  # type: ignore[union-attr,operator]
    try:
        yield
    finally:
        handle.remove()
