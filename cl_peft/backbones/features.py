"""Tokens and frozen pooled features: computed once per example, kept on disk by content.

The unit of computation is a list of examples (all training rows of a stream, say) in a fixed
order, cut into chunks. A chunk's key covers the backbone's weights, the preprocessing, the pooling
and the content of its examples; its batches depend on nothing else. So a cached and an uncached
run see the same bits, whatever the order of tasks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cl_peft.backbones.base import Backbone, Encoded
from cl_peft.batching import by_length
from cl_peft.store import ContentStore
from cl_peft.streams.base import Stream, content_id

#: Examples per stored file; also what a killed process can lose.
CHUNK = 1024

Progress = Callable[[Sequence[np.ndarray], int], Iterable[np.ndarray]]


def no_progress(items: Sequence[np.ndarray], total: int) -> Iterable[np.ndarray]:
    """Show nothing."""
    return items


class Features:
    """Encoded inputs and frozen features of examples, by content.

    Args:
        backbone: A loaded backbone.
        store: Where they are kept; None keeps them in memory only.
        batch_size: Examples per forward pass.
        progress: Wraps the batches of a computation.
    """

    def __init__(
        self,
        backbone: Backbone,
        store: ContentStore | None,
        batch_size: int,
        progress: Progress = no_progress,
    ) -> None:
        self.backbone = backbone
        self.store = store
        self.batch_size = batch_size
        self.progress = progress
        self.computed = 0  # examples that went through the backbone here
        self._encoded: dict[str, Encoded] = {}
        self._features: dict[tuple[str, tuple[int, ...] | None], Tensor] = {}

    def encoded(self, inputs: Sequence[Any]) -> Encoded:
        """Model-ready inputs, tokenized once per example."""
        ids = [content_id(item) for item in inputs]
        missing = {i: item for i, item in zip(ids, inputs, strict=True) if i not in self._encoded}
        for names, items in _chunks(missing):
            key = _key("tokens", [self.backbone.made_by(), self.backbone.preprocessing()], names)
            value = self._get("tokens", key, partial(self._encode, items))
            chunk = Encoded(value["values"], value["lengths"].numpy())
            for row, name in enumerate(names):
                self._encoded[name] = chunk.take(np.array([row]))
        return Encoded.concatenate([self._encoded[i] for i in ids]) if ids else self._empty()

    def width(self, layers: Sequence[int] | None = None) -> int:
        """Size of a feature."""
        return self.backbone.width * (1 if layers is None else len(layers))

    def features(self, inputs: Sequence[Any], layers: Sequence[int] | None = None) -> Tensor:
        """Frozen pooled features ``(N, H)`` float32 on the CPU, computed once per example.

        Args:
            inputs: Raw inputs.
            layers: Pool these layers, side by side, instead of the backbone's output.
        """
        which = None if layers is None else tuple(layers)
        ids = [(content_id(item), which) for item in inputs]
        missing = {
            i: item
            for (i, _), item in zip(ids, inputs, strict=True)
            if (i, which) not in self._features
        }
        device = self.backbone.device.type  # other kinds of device round differently
        for names, items in _chunks(missing):
            parts = [
                self.backbone.key(),
                self.batch_size,
                device,
                *([] if which is None else [which]),
            ]
            key = _key("features", parts, names)
            value = self._get("features", key, partial(self._forward, items, which))
            for name, row in zip(names, value["features"], strict=True):
                self._features[name, which] = row
        if not ids:
            return torch.zeros(0, self.width(layers))
        return torch.stack([self._features[i] for i in ids])

    def forget(self) -> None:
        """Drop what is held in memory."""
        self._encoded.clear()
        self._features.clear()

    def prefetch(
        self, stream: Stream, splits: Sequence[str], layers: Sequence[int] | None = None
    ) -> None:
        """Compute features of a whole stream's splits in the source's own order.

        So they are the same to the bit, and found in the store, whatever the order of tasks and
        wherever a resumed run goes on.
        """
        for split in splits:
            parts = [getattr(task, split) for task in stream.tasks]
            order = np.argsort(np.concatenate([p.rows for p in parts]), kind="stable")
            inputs = [item for p in parts for item in p.inputs]
            self.features([inputs[i] for i in order], layers)

    def _get(
        self, kind: str, key: str, compute: Callable[[], dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        return compute() if self.store is None else self.store.get(kind, key, compute)

    def _empty(self) -> Encoded:
        return self.backbone.encode([])

    def _encode(self, items: list[Any]) -> dict[str, Tensor]:
        encoded = self.backbone.encode(items)
        return {"values": encoded.values, "lengths": torch.from_numpy(encoded.lengths)}

    @torch.no_grad()
    def _forward(self, items: list[Any], layers: tuple[int, ...] | None) -> dict[str, Tensor]:
        encoded = self.encoded(items)
        out = torch.empty(len(items), self.width(layers))
        batches = list(by_length(encoded.lengths, self.batch_size))
        for rows in self.progress(batches, len(batches)):
            batch = self.backbone.collate(encoded.take(rows))
            pooled = (
                self.backbone(batch)
                if layers is None
                else self.backbone.pooled_layers(batch, layers)
            )
            out[torch.from_numpy(rows)] = pooled.float().cpu()
        self.computed += len(items)
        return {"features": out}


def _chunks(missing: dict[str, Any]) -> Iterable[tuple[list[str], list[Any]]]:
    names, items = list(missing), list(missing.values())
    for start in range(0, len(names), CHUNK):
        yield names[start : start + CHUNK], items[start : start + CHUNK]


def _key(kind: str, parts: Any, names: list[str]) -> str:  # noqa: ANN401 (anything with a repr)
    return hashlib.sha256(repr((kind, parts, names)).encode()).hexdigest()
