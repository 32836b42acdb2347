"""Unpack part of a wheel or source archive, all or nothing, with a receipt of what is whole.

No code of the archive is executed. Used by :mod:`cl_peft.archives`.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

from cl_peft.errors import ConfigError, DownloadError, did_you_mean

RECEIPT = ".complete.json"
PARTIAL = ".partial"  # what is being unpacked, until one rename puts it in place
_CHUNK = 1 << 20


@dataclass(frozen=True)
class _Member:
    """A file inside an archive; ``open`` is None for links and other irregular entries."""

    path: str
    size: int
    open: Callable[[], IO[bytes] | None] | None


@contextmanager
def _members(archive: Path) -> Iterator[list[_Member]]:
    """The files of a wheel or source archive, paths relative to its content's root.

    Raises:
        DownloadError: It is no such archive, or a path would leave the folder.
    """
    filename = archive.name.removesuffix(".part")
    wrapped = not filename.endswith(".whl")  # a source archive has one folder around everything

    def inside(raw: str) -> str:
        parts = PurePosixPath(raw).parts
        if raw.startswith("/") or ".." in parts or "\\" in raw:
            raise DownloadError(
                f"{archive} has a member '{raw}' that would land outside its folder. Refused."
            )
        return "/".join(parts[1:] if wrapped else parts)

    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as zip_file:
                yield [
                    _Member(
                        inside(info.filename),
                        info.file_size,
                        # the upper half of external_attr holds the Unix mode: 0o12 is a link
                        None if info.external_attr >> 28 == 0o12 else _opener(zip_file, info),
                    )
                    for info in zip_file.infolist()
                    if not info.is_dir()
                ]
        else:
            with tarfile.open(archive, "r:gz") as tar_file:
                yield [
                    _Member(
                        inside(entry.name),
                        entry.size,
                        _extractor(tar_file, entry) if entry.isreg() else None,
                    )
                    for entry in tar_file.getmembers()
                    if not entry.isdir()
                ]
    except (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError) as error:
        raise DownloadError(f"{archive} cannot be unpacked: {error}") from error


def _opener(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Callable[[], IO[bytes]]:
    return lambda: archive.open(info)


def _extractor(archive: tarfile.TarFile, entry: tarfile.TarInfo) -> Callable[[], IO[bytes] | None]:
    return lambda: archive.extractfile(entry)


def unpack(archive: Path, inner: str, root: Path) -> None:
    """Put ``inner`` (a file, or a folder with all below it) at ``root / inner``.

    It appears by one rename, then :data:`RECEIPT` says that it is whole. Call it from one process
    at a time per ``root``.

    Raises:
        ConfigError: The archive has no such path.
        DownloadError: The archive is damaged or unsafe, or the disk is full.
    """
    temporary = root / PARTIAL
    if temporary.exists():
        shutil.rmtree(temporary)  # left by a killed process; the lock says nobody is at work
    with _members(archive) as members:
        chosen = [m for m in members if m.path == inner or _below(m.path, inner)]
        if not chosen:
            known = {str(p) for m in members for p in (m.path, *PurePosixPath(m.path).parents)}
            top = sorted({m.path.split("/")[0] for m in members})
            raise ConfigError(
                f"{archive.name.removesuffix('.part')} holds no '{inner}'."
                f"{did_you_mean(inner, known)} At its top: {', '.join(top[:12])}"
            )
        records: dict[str, dict[str, Any]] = {}
        try:
            with disk_errors(root, sum(member.size for member in chosen)):
                for member in chosen:
                    source = member.open() if member.open is not None else None
                    if source is None:
                        raise DownloadError(
                            f"{archive}: '{member.path}' is a link or a device. Refused."
                        )
                    with source:
                        records[member.path] = _write(source, temporary / member.path)
                target = root / inner
                if target.is_dir():
                    shutil.rmtree(target)
                target.parent.mkdir(parents=True, exist_ok=True)
                (temporary / inner).replace(target)
                _note(root, inner, records)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _write(source: IO[bytes], path: Path) -> dict[str, Any]:
    path.parent.mkdir(parents=True, exist_ok=True)
    digest, size = hashlib.sha256(), 0
    with path.open("wb") as file:
        while chunk := source.read(_CHUNK):
            file.write(chunk)
            digest.update(chunk)
            size += len(chunk)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": size, "sha256": digest.hexdigest()}


def _note(root: Path, inner: str, records: dict[str, dict[str, Any]]) -> None:
    """Add ``inner`` and its members to the receipt, atomically."""
    try:
        receipt = json.loads((root / RECEIPT).read_bytes())
        paths = [path for path in receipt["paths"] if path != inner and not _below(path, inner)]
        kept = {path: record for path, record in receipt["members"].items() if path not in records}
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        paths, kept = [], {}  # the first one, or unreadable: what it said is fetched again
    text = json.dumps({"paths": [*paths, inner], "members": kept | records}, indent=1)
    temporary = root / f"{RECEIPT}.tmp"
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(root / RECEIPT)


def incomplete(root: Path, inner: str) -> str | None:
    """None if ``inner`` is whole, judged by sizes; else why not ("" if it was never unpacked)."""
    receipt_file = root / RECEIPT
    if not receipt_file.exists():
        return ""
    try:
        receipt = json.loads(receipt_file.read_bytes())
        if not any(path == inner or _below(inner, path) for path in receipt["paths"]):
            return ""
        sizes = {path: int(record["bytes"]) for path, record in receipt["members"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{receipt_file.name} is not readable"
    wanted = {path: n for path, n in sizes.items() if path == inner or _below(path, inner)}
    for path, size in wanted.items():
        file = root / path
        if not file.is_file():
            return f"{path} is missing"
        if file.stat().st_size != size:
            return f"{path} has {file.stat().st_size} bytes instead of {size}"
    return None if wanted else ""


def _below(path: str, folder: str) -> bool:
    return path.startswith(folder + "/")


@contextmanager
def disk_errors(folder: Path, need: int = 0) -> Iterator[None]:
    """Refuse to start where ``need`` bytes do not fit; explain what the disk refuses later."""
    from requests import RequestException

    where = folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if need > shutil.disk_usage(folder).free:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        yield
    except RequestException:
        raise  # an OSError by inheritance, but the network's
    except OSError as error:
        while not where.exists():
            where = where.parent
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            free = shutil.disk_usage(where).free
            needed = f"{need:,} bytes needed, " if need else ""
            problem = f"No disk space left in {folder}: {needed}{free:,} bytes free."
        else:
            problem = f"Cannot read or write in {folder}: {error.strerror or error}."
        raise DownloadError(
            f"{problem}\n"
            "Free some space, or move the cache: set the environment variable "
            "CL_PEFT_CACHE=/another/folder, or paths.cache=/another/folder on the command line."
        ) from error
