"""Vision transformers: images in, CLS or mean of the patches out. Needs no torchvision."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from cl_peft.backbones.base import Backbone, Batch, Encoded, load_model, pretrained
from cl_peft.errors import DataError
from cl_peft.streams.base import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Vision(Backbone):
    """A vision transformer (ViT, DeiT, ...).

    An image is an array ``(height, width)`` or ``(height, width, channels)``, 0-255. It is resized
    bilinearly to the model's size, scaled to [0, 1] and normalised by ``(x - mean) / std``.

    Args:
        name: Hugging Face model name, local folder, or package address.
        pooling: ``cls``: the first token; ``mean``: the mean of the patch tokens.
        mean: Per-channel mean; ViT's own is 0.5.
        std: Per-channel standard deviation.
        revision: Branch, tag or commit on the hub.
    """

    modality: ClassVar[Literal["text", "image"]] = "image"

    def __init__(
        self,
        name: str,
        pooling: Literal["cls", "mean"] = "cls",
        mean: float = 0.5,
        std: float = 0.5,
        revision: str | None = None,
    ) -> None:
        self.name, self.pooling, self.mean, self.std = name, pooling, mean, std
        self.revision = revision

    def _load(self, cache: Path, seed: int, progress: Progress | None) -> PreTrainedModel:
        with pretrained(self.name, self.revision, cache, progress) as (where, options):
            model = load_model(where, options)
        self.width = int(model.config.hidden_size)
        self.size, self.channels = int(model.config.image_size), int(model.config.num_channels)
        self.patches = (self.size // int(model.config.patch_size)) ** 2
        return model

    def preprocessing(self) -> dict[str, Any]:
        """Size, normalisation, pooling."""
        return {"size": self.size, "mean": self.mean, "std": self.std, "pooling": self.pooling}

    def encode(self, inputs: Sequence[Any]) -> Encoded:
        """Resize and normalise: ``(N, C, S, S)`` float32."""
        pixels = [self._pixels(np.asarray(image)) for image in inputs]
        shape = (0, self.channels, self.size, self.size)
        values = torch.cat(pixels) if pixels else torch.zeros(shape)
        return Encoded(values, np.ones(len(pixels), dtype=np.int64))

    def _pixels(self, image: np.ndarray) -> Tensor:
        if image.ndim == 2:
            image = np.repeat(image[..., None], self.channels, axis=2)
        if image.ndim != 3 or image.shape[2] != self.channels:
            raise DataError(
                f"an image has shape {image.shape}; expected (height, width) or "
                f"(height, width, {self.channels})."
            )
        x = torch.from_numpy(np.ascontiguousarray(image)).float().permute(2, 0, 1)[None] / 255
        size = (self.size, self.size)
        x = nn.functional.interpolate(x, size, mode="bilinear", align_corners=False, antialias=True)
        return (x - self.mean) / self.std

    def collate(self, encoded: Encoded) -> Batch:
        """Images need no padding."""
        return {"pixel_values": encoded.values.to(self.device)}

    def pool(self, hidden: Tensor, batch: Batch) -> Tensor:
        """CLS, or the mean over patches."""
        # patches come last, after CLS and what else a model has (DeiT's distillation token, ...)
        return hidden[:, 0] if self.pooling == "cls" else hidden[:, -self.patches :].mean(1)
