"""Causal text decoders (Llama, GPT-2, ...): the last token's state is the feature."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pydantic import PositiveInt
from torch import Tensor

from cl_peft.backbones.base import Batch, TextBackbone


class Decoder(TextBackbone):
    """A causal decoder, padded on the right.

    Pooled feature: ``h_L``, the state of the last token that is not padding; with a causal mask
    right padding cannot reach it.

    Args:
        name: Hugging Face model name, local folder, or package address.
        max_length: Tokens kept of each text.
        revision: Branch, tag or commit on the hub.
        quantize: ``nf4``: 4-bit weights in the transformer's layers (QLoRA, see ``nf4.py``).
    """

    pooling = "last"
    options: ClassVar[dict[str, Any]] = {"use_cache": False}

    def __init__(
        self,
        name: str,
        max_length: PositiveInt = 128,
        revision: str | None = None,
        quantize: Literal["none", "nf4"] = "none",
    ) -> None:
        super().__init__(name, max_length, revision, quantize)

    def pool(self, hidden: Tensor, batch: Batch) -> Tensor:
        """The last token's state."""
        last = batch["attention_mask"].sum(1) - 1
        return hidden[torch.arange(len(last), device=hidden.device), last]
