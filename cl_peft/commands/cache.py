"""``cl-peft cache``: what is computed and kept, and how to get rid of it."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from cl_peft.config import Paths
from cl_peft.eviction import KINDS, entries, remove
from cl_peft.view import size


def add(commands: Any) -> None:  # noqa: ANN401 (argparse names no public type for it)
    """Add the subcommand to the parser's."""
    cache = commands.add_parser(
        "cache",
        help="size of what is computed and kept; --clear removes it",
        description="Tokens, frozen features and modules that runs share. All of it can be "
        "computed again; paths.cache_gb bounds it. Downloaded data and models are left alone.",
    )
    cache.add_argument(
        "folder", type=Path, nargs="?", help="the cache; default CL_PEFT_CACHE or ~/.cache/cl_peft"
    )
    cache.add_argument(
        "--clear",
        nargs="?",
        const="all",
        choices=["all", *KINDS],
        metavar="KIND",
        help=f"remove {', '.join(KINDS)}, or all if none is named; runs going on keep what they "
        "are making",
    )
    cache.set_defaults(run=_cache)


def _cache(options: argparse.Namespace) -> int:
    chosen = options.folder or Path(os.environ.get("CL_PEFT_CACHE", Paths().cache))
    folder = chosen.expanduser()
    print(folder)
    if options.clear is not None:
        kinds = KINDS if options.clear == "all" else (options.clear,)
        gone = [entry for entry in entries(folder, kinds) if remove(entry)]
        freed = size(sum(entry.bytes for entry in gone))
        print(f"removed {len(gone):,} entries, {freed}")
    found = list(entries(folder))
    for kind in KINDS:
        own = [entry.bytes for entry in found if entry.kind == kind]
        print(f"{kind:<10} {len(own):>8,} entries {size(sum(own)):>10}")
    print(f"{'together':<10} {len(found):>8,} entries {size(sum(e.bytes for e in found)):>10}")
    return 0
