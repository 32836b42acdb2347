"""Files that are whole or absent, and words for a disk that is full. Imports no torch."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from pathlib import Path

from cl_peft.errors import UserError


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file so that it is either whole or absent, and survives a power cut.

    Raises:
        UserError: The disk is full or the folder cannot be written.
    """
    temporary: str | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except OSError as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        raise disk_error(error, path, len(data)) from error


def disk_error(error: OSError, path: Path, size: int) -> UserError:
    """Say in words why ``path`` could not be written."""
    folder = next(p for p in (path, *path.parents) if p.is_dir())
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        free = shutil.disk_usage(folder).free
        needs = f"{path.name} needs {_kib(size)}, " if size else ""
        return UserError(
            f"no space left on the disk of {folder}: {needs}{_kib(free)} are free. Make room and "
            "start the same command again (it goes on from the last finished task), or move "
            "folders with paths.runs=... and paths.cache=..."
        )
    return UserError(
        f"cannot write {path}: {error.strerror}. Check the folder's permissions, or choose another "
        "with paths.runs=... or paths.cache=..."
    )


def _kib(size: int) -> str:
    return f"{-(-size // 1024):,} KiB"  # rounded up
