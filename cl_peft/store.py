"""A content-addressed store of tensors on disk, for what is never computed twice.

A key is the sha256 of everything the value depends on; the value is one safetensors file written
atomically. Processes of a sweep share it safely: a file is complete or absent, and two processes
that compute the same value write the same bytes. A corrupt file is reported and computed again.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping
from pathlib import Path

import filelock
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from cl_peft.atomic import write_atomic
from cl_peft.errors import DamagedRunError

log = logging.getLogger(__name__)


class ContentStore:
    """Compute once, keep forever.

    Args:
        folder: Where values live; created on first use.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def get(
        self,
        kind: str,
        key: str,
        compute: Callable[[], dict[str, torch.Tensor]],
        exclusive: bool = False,
    ) -> dict[str, torch.Tensor]:
        """Return the value stored under ``key``, computing and storing it if it is not there.

        Args:
            kind: Subfolder, such as ``"features"``.
            key: Hex digest of everything the value depends on.
            compute: Makes the value; called only when it is absent or its file is damaged.
            exclusive: Let other processes that want the same value wait for it, not compute it too.
        """
        path = self.folder / kind / key[:2] / f"{key}.safetensors"
        known = self._read(path)
        if known is not None:
            return known
        if exclusive:
            path.parent.mkdir(parents=True, exist_ok=True)
            with filelock.FileLock(path.with_suffix(".lock")):  # let go of when its owner dies
                known = self._read(path)
                return known if known is not None else self._make(path, compute)
        return self._make(path, compute)

    def _read(self, path: Path) -> dict[str, torch.Tensor] | None:
        if not path.exists():
            return None
        try:
            return dict(load_file(path))
        except (SafetensorError, OSError) as error:
            log.warning("%s is damaged (%s); it is computed again", path, error)
            return None

    def _make(
        self, path: Path, compute: Callable[[], dict[str, torch.Tensor]]
    ) -> dict[str, torch.Tensor]:
        value = {name: tensor.contiguous().cpu() for name, tensor in compute().items()}
        write_atomic(path, save(value))
        return value


def tensor_fingerprint(tensors: dict[str, torch.Tensor]) -> str:
    """Sha256 over names, dtypes, shapes and bytes, in name order."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}:".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def require(tensors: Mapping[str, torch.Tensor], names: set[str], source: str) -> None:
    """Refuse named tensors that are not exactly ``names``.

    Raises:
        DamagedRunError: Says which are missing and which are unknown.
    """
    if set(tensors) != names:
        missing, extra = sorted(names - set(tensors)), sorted(set(tensors) - names)
        raise DamagedRunError(f"state of {source} does not fit: missing {missing}, unknown {extra}")
