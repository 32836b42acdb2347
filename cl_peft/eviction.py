"""The part of the cache that is computed, and may be computed again: its size, its bound.

Downloads (``archives/``, ``hub/``, ``packages/``) lie beside it and are never touched. Imports no
torch. Several processes may use, evict and clear one cache at the same time: an entry that is gone
is a miss, and whoever holds an entry's lock keeps it.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

import filelock

from cl_peft.view import size

log = logging.getLogger(__name__)

#: Subfolders of the cache with what is computed.
KINDS = ("tokens", "features", "modules")
#: Seconds since an entry was written or read, below which it is not evicted.
FRESH = 60.0
#: Seconds after which a hidden file is no longer being written: its process was killed.
ABANDONED = 3600.0
#: Share of the bound that a process writes between two looks at the disk.
STEP = 0.05


@dataclass(frozen=True)
class Entry:
    """One file of the cache.

    Attributes:
        path: Where it lies.
        kind: One of :data:`KINDS`.
        bytes: Its size.
        used: When it was last written or read, in seconds since the epoch.
    """

    path: Path
    kind: str
    bytes: int
    used: float

    @property
    def half(self) -> bool:
        """Whether it is, or was, in the middle of being written."""
        return self.path.name.startswith(".")


def entries(folder: Path, kinds: Iterable[str] = KINDS) -> Iterator[Entry]:
    """All entries of a cache, finished or half; those that vanish meanwhile are left out.

    Files that no store has written are none, whatever folder somebody takes for a cache.
    """
    for kind in kinds:
        for path in (folder / kind).glob("??/*.safetensors*"):
            if path.name.removeprefix(".").startswith(path.parent.name):
                with suppress(FileNotFoundError):  # evicted by another process
                    found = path.stat()
                    yield Entry(path, kind, found.st_size, found.st_mtime)


def remove(entry: Entry) -> bool:
    """Remove an entry and its lock, unless it is being made or written; True if it is gone."""
    if entry.half and time.time() - entry.used < ABANDONED:
        return False
    lock = entry.path.with_suffix(".lock")
    try:
        with filelock.FileLock(lock, timeout=0) if lock.exists() else nullcontext():
            entry.path.unlink(missing_ok=True)
            lock.unlink(missing_ok=True)
    except OSError:  # held, or open on a system that then removes nothing
        return False
    return True


class Bound:
    """Keeps what is computed below a size; the least recently used goes first.

    The disk is looked at after the first write of a process, and again whenever it wrote
    :data:`STEP` of the bound. Room for the next two steps is made each time, so a process alone
    stays below the bound, and each other one beside it exceeds it by a step at most; beyond that
    by what was used within :data:`FRESH`, and by one value that is larger than a step.

    Args:
        folder: The cache.
        limit: The bound in bytes.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit
        self._unseen: float = float("inf")  # written since the last look

    def wrote(self, size: int) -> None:
        """Take note of a write; evict where it is time to."""
        self._unseen += size
        if self._unseen >= STEP * self.limit:
            self._unseen = 0
            self._evict()

    def _evict(self) -> None:
        found = sorted(entries(self.folder), key=lambda entry: (entry.used, entry.path))
        held = sum(entry.bytes for entry in found)
        if held <= (1 - STEP) * self.limit:
            return
        now, gone, freed = time.time(), 0, 0
        for entry in found:
            if held - freed <= (1 - 2 * STEP) * self.limit or now - entry.used < FRESH:
                break
            if remove(entry):
                gone, freed = gone + 1, freed + entry.bytes
        if gone:
            log.info(
                "%s: evicted the %d least recently used of %d entries, %s of %s; "
                "paths.cache_gb=%g",
                self.folder, gone, len(found), size(freed), size(held), self.limit / 1e9,
            )  # fmt: skip


def touch(path: Path) -> None:
    """Say that an entry was used now, wherever the file system does not note it."""
    with suppress(OSError):  # just evicted, or the cache belongs to somebody else
        os.utime(path)
