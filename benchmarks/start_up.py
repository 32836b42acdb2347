"""How long a person waits for an answer: help, a configuration error, the smoke run, a result.

    python benchmarks/start_up.py [--runs 5]

Every command is a fresh process; the four are interleaved, and medians are printed with the range
and kept in ``benchmarks/results/start_up.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

COMMANDS = {
    "bare python": ["-c", "pass"],
    "--help": ["main.py", "--help"],
    "--cfg job": ["main.py", "--cfg", "job"],
    "misspelt key": ["main.py", "module.rnak=4"],
    "misspelt key with +": ["main.py", "+module.rnak=4"],
    "finished run recognised": ["main.py", "debug=smoke"],
    "debug=smoke, computed": ["main.py", "debug=smoke", "fresh=true"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    runs = parser.parse_args().runs
    seconds: dict[str, list[float]] = {name: [] for name in COMMANDS}
    with tempfile.TemporaryDirectory() as folder:
        paths = [f"paths.runs={folder}/runs", f"paths.cache={folder}/cache"]
        _run(["main.py", "debug=smoke", *paths])  # warms the disk, leaves a finished run
        for _ in range(runs):
            for name, command in COMMANDS.items():
                extra = paths if "debug=smoke" in command else []
                seconds[name].append(_run([*command, *extra]))
    rows = {
        name: {"median": statistics.median(s), "min": min(s), "max": max(s), "runs": runs}
        for name, s in seconds.items()
    }
    for name, row in rows.items():
        print(f"{name:<26} {row['median']:6.2f} s  ({row['min']:.2f} to {row['max']:.2f})")
    result = {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": {"cpus": os.cpu_count(), "platform": platform.platform()},
        "python": platform.python_version(),
        "seconds": rows,
    }
    target = ROOT / "benchmarks" / "results" / "start_up.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(result, indent=1) + "\n")


def _run(arguments: list[str]) -> float:
    started = time.perf_counter()
    subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, check=False)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
