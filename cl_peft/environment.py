"""Where a run was made: code, packages, machine. Imports no torch."""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

#: Packages whose versions can change numbers.
PACKAGES = ("cl_peft", "torch", "transformers", "tokenizers", "datasets", "numpy", "pandas",
            "safetensors", "hydra-core", "wandb")  # fmt: skip


def environment() -> dict[str, Any]:
    """Revision of the code, versions of packages, the machine, the command."""
    root = Path(__file__).resolve().parent.parent

    def git(*args: str) -> str | None:
        try:
            done = subprocess.run(  # noqa: S603 (fixed arguments)
                ["git", "-C", str(root), *args],  # noqa: S607
                capture_output=True, text=True, timeout=10, check=True,
            )  # fmt: skip
        except (OSError, subprocess.SubprocessError):
            return None  # not a checkout, or no git: an installed package
        return done.stdout.strip()

    versions = {}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    changes = git("status", "--porcelain", "--untracked-files=no")
    return {
        "command": " ".join(["python", *sys.argv]),
        "git_revision": git("rev-parse", "HEAD"),
        "git_dirty": None if changes is None else bool(changes),
        "packages": versions,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": available_cores(),
    }


def available_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
