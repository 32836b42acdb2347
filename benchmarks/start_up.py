"""How long a person waits for an answer: help, a configuration error, the smoke run, a result.

    python benchmarks/start_up.py [--repeats 5]

Every command is a fresh process; they take turns. Wall clock, with all cores.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time

from measure import ROOT, plain, write

#: Arguments of python, the exit code, and the aim in seconds.
COMMANDS: dict[str, tuple[list[str], int, str]] = {
    "bare python": (["-c", "pass"], 0, ""),
    "--help": (["main.py", "--help"], 0, "< 1"),
    "--cfg job": (["main.py", "--cfg", "job"], 0, ""),
    "misspelt key": (["main.py", "module.rnak=4"], 2, "< 1"),
    "misspelt key with +": (["main.py", "+module.rnak=4"], 2, "< 1"),
    "finished run recognised": (["main.py", "debug=smoke"], 0, "< 2"),
    "debug=smoke, computed": (["main.py", "debug=smoke", "fresh=true", "cache=off"], 0, "< 10"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    seconds: dict[str, list[float]] = {name: [] for name in COMMANDS}
    with tempfile.TemporaryDirectory() as folder:
        paths = [f"paths.runs={folder}/runs", f"paths.cache={folder}/cache"]
        waited(["main.py", "debug=smoke", *paths], 0)  # warms the disk, leaves a finished run
        for _ in range(repeats):
            for name, (command, code, _aim) in COMMANDS.items():
                extra = paths if "debug=smoke" in command else []
                seconds[name].append(waited([*command, *extra], code))
    rows = [plain(name, seconds[name], "s", aim) for name, (_, _, aim) in COMMANDS.items()]
    write("start_up", "Start-up", "Wall-clock seconds until a fresh process has answered", rows)


def waited(arguments: list[str], code: int) -> float:
    """Seconds that a command takes, which must end with this exit code."""
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, check=False, text=True
    )
    seconds = time.perf_counter() - started
    if done.returncode != code:
        raise SystemExit(f"{arguments} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return seconds


if __name__ == "__main__":
    main()
