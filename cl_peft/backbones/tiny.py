"""A tiny BERT with random weights and a byte tokenizer: for smoke tests, needs no download."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from pydantic import PositiveInt

from cl_peft.backbones.encoder import Encoder
from cl_peft.streams.base import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Tiny(Encoder):
    """Random weights, decided by ``seed.init``; one token per byte.

    Args:
        name: A label.
        width: Hidden size ``H``.
        layers: Number of transformer layers.
        heads: Attention heads.
        max_length: Bytes kept of each text.
        quantize: ``nf4``: 4-bit weights; needs a width that is a multiple of 64.
    """

    def __init__(
        self,
        name: str = "tiny",
        width: PositiveInt = 32,
        layers: PositiveInt = 2,
        heads: PositiveInt = 2,
        max_length: PositiveInt = 64,
        quantize: Literal["none", "nf4"] = "none",
    ) -> None:
        super().__init__(name, "mean", max_length, None, quantize)
        self.width, self.layers, self.heads = width, layers, heads

    def _load(self, cache: Path, seed: int, progress: Progress | None) -> PreTrainedModel:
        from transformers import BertConfig, BertModel

        self.tokenizer = byte_tokenizer()
        config = BertConfig(
            vocab_size=len(self.tokenizer),
            hidden_size=self.width,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            intermediate_size=4 * self.width,
            max_position_embeddings=max(160, self.max_length),  # with room for virtual tokens
            pad_token_id=self.tokenizer.pad_token_id,
            initializer_range=0.2,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return BertModel(config, add_pooling_layer=False)


def byte_tokenizer() -> object:
    """A tokenizer whose tokens are the 256 bytes, with [PAD], [CLS] and [SEP]."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["[PAD]", "[CLS]", "[SEP]", "[UNK]"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*special, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="[UNK]"))  # noqa: S106
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",  # noqa: S106
        cls_token="[CLS]",  # noqa: S106
        sep_token="[SEP]",  # noqa: S106
        unk_token="[UNK]",  # noqa: S106
    )
