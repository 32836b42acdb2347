"""A content-addressed store of tensors on disk, for what is never computed twice.

A key is the sha256 of everything the value depends on; the value is one safetensors file written
atomically. Processes of a sweep share it safely: a file is complete or absent, and two processes
that compute the same value write the same bytes. A corrupt file is reported and computed again; one
that was evicted (:mod:`cl_peft.eviction`) is computed again too.
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
from cl_peft.eviction import KINDS, Bound, touch

log = logging.getLogger(__name__)


class ContentStore:
    """Compute once, keep while there is room.

    Args:
        folder: Where values live; created on first use.
        limit: Bytes that it may take; None: any.
    """

    def __init__(self, folder: Path, limit: int | None = None) -> None:
        self.folder = folder
        self._bound = None if limit is None else Bound(folder, limit)

    def get(
        self,
        kind: str,
        key: str,
        compute: Callable[[], dict[str, torch.Tensor]],
        exclusive: bool = False,
    ) -> dict[str, torch.Tensor]:
        """Return the value stored under ``key``, computing and storing it if it is not there.

        Args:
            kind: Subfolder, one of :data:`cl_peft.eviction.KINDS`.
            key: Hex digest of everything the value depends on.
            compute: Makes the value; called only when it is absent or its file is damaged.
            exclusive: Let other processes that want the same value wait for it, not compute it too.
        """
        if kind not in KINDS:  # it would be neither bounded nor cleared
            raise ValueError(f"kind {kind!r} is not in cl_peft.eviction.KINDS")
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
        try:
            value = dict(load_file(path))
        except FileNotFoundError:
            return None
        except (SafetensorError, OSError) as error:
            log.warning("%s is damaged (%s); it is computed again", path, error)
            return None
        touch(path)
        return value

    def _make(
        self, path: Path, compute: Callable[[], dict[str, torch.Tensor]]
    ) -> dict[str, torch.Tensor]:
        value = {name: tensor.contiguous().cpu() for name, tensor in compute().items()}
        data = save(value)
        write_atomic(path, data)
        if self._bound is not None:
            self._bound.wrote(len(data))
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
