"""Text encoders (BERT, RoBERTa, MiniLM, ...): mean or CLS pooling."""

from __future__ import annotations

from typing import Literal

from pydantic import PositiveInt
from torch import Tensor

from cl_peft.backbones.base import Batch, TextBackbone


class Encoder(TextBackbone):
    """A bidirectional text encoder.

    Pooled feature of an example with tokens ``h_1..h_L`` (special tokens included):
    ``mean``: ``(1/L) sum_l h_l``, padding excluded (Reimers and Gurevych 2019);
    ``cls``: ``h_1``.

    Args:
        name: Hugging Face model name, local folder, or package address.
        pooling: ``mean`` or ``cls``.
        max_length: Tokens kept of each text.
        revision: Branch, tag or commit on the hub.
        quantize: ``nf4``: 4-bit weights in the transformer's layers (QLoRA, see ``nf4.py``).
    """

    def __init__(
        self,
        name: str,
        pooling: Literal["mean", "cls"] = "mean",
        max_length: PositiveInt = 128,
        revision: str | None = None,
        quantize: Literal["none", "nf4"] = "none",
    ) -> None:
        super().__init__(name, max_length, revision, quantize)
        self.pooling = pooling

    def pool(self, hidden: Tensor, batch: Batch) -> Tensor:
        """Mean over a text's own tokens, or the first."""
        if self.pooling == "cls":
            return hidden[:, 0]
        mask = batch["attention_mask"].unsqueeze(-1).to(hidden.dtype)
        return (hidden * mask).sum(1) / mask.sum(1)
