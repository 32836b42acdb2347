"""The frozen backbone behind one interface: encode inputs, collate a batch, give pooled features.

A backbone is built cheaply from its configuration and loaded later by :meth:`Backbone.load`. Its
weights never change: :attr:`Backbone.fingerprint` names them, and is compared when a run ends.
"""

from __future__ import annotations

import hashlib
import json
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor

from cl_peft import archives
from cl_peft.errors import ConfigError, DownloadError
from cl_peft.inputs import modules_digest
from cl_peft.store import tensor_fingerprint
from cl_peft.streams.base import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Batch = dict[str, Tensor]
#: Entries of a model's configuration that say where it came from, not what it computes.
_NOT_THE_MODEL = ("_name_or_path", "transformers_version")


@dataclass(frozen=True)
class Encoded:
    """Model-ready inputs of many examples, before padding.

    Attributes:
        values: Flat array of all examples' token ids (text), or ``(N, ...)`` pixels (image).
        lengths: ``(N,)`` tokens per example; all 1 for images.
    """

    values: Tensor
    lengths: np.ndarray

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def starts(self) -> np.ndarray:
        """``(N,)`` offset of each example in :attr:`values`."""
        return np.concatenate([[0], np.cumsum(self.lengths)[:-1]]).astype(np.int64)

    def take(self, rows: np.ndarray) -> Encoded:
        """Examples at ``rows``, in that order."""
        starts = self.starts
        pieces = [self.values[starts[r] : starts[r] + self.lengths[r]] for r in rows]
        empty = self.values[:0]
        return Encoded(torch.cat(pieces) if pieces else empty, self.lengths[rows])

    @staticmethod
    def concatenate(parts: Sequence[Encoded]) -> Encoded:
        """All parts' examples, one after another."""
        return Encoded(
            torch.cat([p.values for p in parts]), np.concatenate([p.lengths for p in parts])
        )


class Backbone(ABC):
    """A frozen pretrained transformer and its tokenizer or image processor.

    Subclasses say how a model is loaded and pooled. After :meth:`load`, :attr:`model` is in
    evaluation mode and no weight asks for a gradient.

    Attributes:
        modality: What it reads.
        quantize: How the layers' weights are kept.
        width: Size of a pooled feature, ``H``.
        model: The transformer.
        device: Where it lives.
    """

    modality: ClassVar[Literal["text", "image"]] = "text"
    quantize: Literal["none", "nf4"] = "none"
    #: Further arguments of the model's forward pass.
    options: ClassVar[dict[str, Any]] = {}
    model: PreTrainedModel
    width: int
    device: torch.device

    def load(
        self, cache: Path, device: torch.device, seed: int, progress: Progress | None = None
    ) -> None:
        """Fetch and load the weights, freeze them, and move them to ``device``.

        Args:
            cache: Folder for downloads.
            device: Where the model shall live.
            seed: For backbones with random weights (smoke tests); others ignore it.
            progress: Called with (bytes so far, all bytes) during a download.

        Raises:
            DownloadError: The model could not be fetched or read.
            ConfigError: The model does not fit this kind of backbone.
        """
        self.device = device
        if self.quantize == "nf4":
            from cl_peft.backbones import nf4  # says what is missing, before a download
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # a pooler that a checkpoint lacks is drawn: always the same one
            model = self._load(cache, seed, progress)
        self.model = model.to(device=device, dtype=torch.float32).eval()
        for parameter in self.model.parameters():
            parameter.requires_grad_(False)
        if self.quantize == "nf4":
            nf4.quantize(self.model)
        self._fingerprint = self.weights_fingerprint()

    @abstractmethod
    def _load(self, cache: Path, seed: int, progress: Progress | None) -> PreTrainedModel:
        """Load model (returned) and processor (kept); set :attr:`width`."""

    @abstractmethod
    def preprocessing(self) -> dict[str, Any]:
        """Everything that :meth:`encode` depends on, for cache keys."""

    @abstractmethod
    def encode(self, inputs: Sequence[Any]) -> Encoded:
        """Turn raw inputs into model-ready ones, without padding."""

    @abstractmethod
    def collate(self, encoded: Encoded) -> Batch:
        """Pad a few examples to a batch on :attr:`device`."""

    @abstractmethod
    def pool(self, hidden: Tensor, batch: Batch) -> Tensor:
        """One feature per example, ``(B, L, H)`` to ``(B, H)``."""

    def __call__(self, batch: Batch) -> Tensor:
        """Pooled features ``(B, H)``; modules act inside if a bank's scope is open."""
        return self.pool(self.model(**batch, **self.options).last_hidden_state, batch)

    @property
    def positions(self) -> int | None:
        """Tokens that the model can take; None where there is no limit to speak of."""
        return None

    @property
    def longest(self) -> int:
        """Tokens that :meth:`encode` gives at most."""
        return 1

    def words(self, names: Sequence[str]) -> list[Tensor]:
        """Token ids of names; empty where the backbone reads no text."""
        return []

    @property
    def depth(self) -> int:
        """Number of layers."""
        return int(self.model.config.num_hidden_layers)

    def pooled_layers(self, batch: Batch, layers: Sequence[int]) -> Tensor:
        """Pooled outputs of some layers side by side, ``(B, len(layers) H)``.

        Args:
            batch: As for calling the backbone.
            layers: Numbers from 1 to :attr:`depth`; the last is the model's output.

        Raises:
            ConfigError: There is no such layer.
        """
        wrong = [n for n in layers if not 1 <= n <= self.depth]
        if wrong:
            raise ConfigError(
                f"router.layers: the backbone has layers 1 to {self.depth}, not {wrong[0]}."
            )
        states = self.model(**batch, **self.options, output_hidden_states=True).hidden_states
        return torch.cat([self.pool(states[n], batch) for n in layers], dim=1)

    @property
    def fingerprint(self) -> str:
        """Name of weights as they were loaded."""
        return self._fingerprint

    def facts(self) -> dict[str, Any]:
        """What provenance.json records of it."""
        facts: dict[str, Any] = {"backbone_fingerprint": self.fingerprint}
        if self.quantize == "nf4":
            from cl_peft.backbones import nf4

            facts["quantized_bits_per_parameter"] = nf4.quantized_bits_per_parameter(self.model)
        return facts

    def weights_fingerprint(self) -> str:
        """Compute the fingerprint of the weights as they are now."""
        return tensor_fingerprint(dict(self.model.state_dict()))

    def made_by(self) -> list[str]:
        """Class, code and libraries that tokens and frozen features come from."""
        code = modules_digest([type(self).__module__, "cl_peft.backbones.features"])
        versions = [metadata.version(name) for name in ("torch", "transformers", "tokenizers")]
        return [type(self).__name__, code, *versions]

    def key(self) -> str:
        """Name everything a frozen feature depends on besides the example itself.

        The model's configuration is part of it: equal weights with another number of heads or
        another activation give other features.
        """
        config = self.model.config.to_dict()
        config = {k: v for k, v in config.items() if k not in _NOT_THE_MODEL}
        parts = [self.made_by(), self.fingerprint, self.preprocessing(), config]
        text = json.dumps(parts, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()


@contextmanager
def pretrained(
    name: str, revision: str | None, cache: Path, progress: Progress | None
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Where a pretrained model lies, and options for ``from_pretrained``; inside, failures speak.

    Args:
        name: A Hugging Face model name, a local folder, or a package address.
        revision: Branch, tag or commit on the hub.
        cache: Folder for downloads.
        progress: Called with (bytes so far, all bytes) during a download from a package.

    Raises:
        DownloadError: The model could not be fetched or read.
    """
    from transformers.utils import logging as transformers_logging

    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
    where = name
    if archives.is_address(name):
        where = str(archives.fetch(name, cache, progress=progress))
    elif (path := Path(name).expanduser()).is_dir():
        where = str(path)
    options: dict[str, Any] = {"cache_dir": str(cache / "hub"), "trust_remote_code": False}
    if revision is not None:
        options["revision"] = revision
    try:
        yield where, options
    except (OSError, ValueError, SafetensorError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DownloadError(
            f"backbone.name={name}: could not be loaded: {first}\n"
            "  Give the name of a Hugging Face model with safetensors weights, or a local folder "
            "that holds config.json, model.safetensors and the tokenizer or image processor. "
            "Without network, fetch it on a connected machine and pass the folder."
        ) from error


def load_model(where: str, options: dict[str, Any]) -> PreTrainedModel:
    """Load a transformer in float32; every weight that matters comes from the checkpoint.

    Raises:
        ValueError: The checkpoint lacks weights (a pooler, which nothing here uses, may lack), or
            has some of another shape than its configuration says.
    """
    from transformers import AutoModel

    try:
        model, info = AutoModel.from_pretrained(
            where, use_safetensors=True, dtype=torch.float32, output_loading_info=True, **options
        )
    except RuntimeError as error:  # how transformers reports shapes that differ
        raise ValueError(str(error)) from error
    missing = sorted(name for name in info["missing_keys"] if "pooler" not in name)
    if missing:
        shown = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise ValueError(f"its checkpoint lacks {len(missing)} weights: {shown}")
    return model


def _positions(model: PreTrainedModel) -> int | None:
    """Tokens that fit; None for models without a limit."""
    limit = getattr(model.config, "max_position_embeddings", None)
    table = getattr(getattr(model, "embeddings", None), "position_embeddings", None)
    padding = getattr(table, "padding_idx", None)
    if limit is None:
        return None
    # RoBERTa and its kin count positions from behind the padding token's
    return int(limit) if padding is None else int(limit) - padding - 1


def choose_device(name: str) -> torch.device:
    """The device of a name such as ``cuda:1``; ``auto`` is a GPU where there is one.

    Raises:
        ConfigError: The device is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"device={name}: no CUDA device is visible here. Use device=cpu.")
    if name == "mps" and not torch.backends.mps.is_available():
        raise ConfigError("device=mps: not available here. Use device=cpu.")
    return torch.device(name)


class TextBackbone(Backbone):
    """What encoders and decoders share: a tokenizer, dynamic padding, loading by name.

    Args:
        name: A Hugging Face model name, a local folder, or the address of a folder inside a
            package (``package:NAME==VERSION/FOLDER#sha256=HEX``).
        max_length: Tokens kept of each text; longer texts are cut on the right.
        revision: Branch, tag or commit on the hub.
        quantize: ``nf4``: 4-bit weights in the transformer's layers (QLoRA).
    """

    tokenizer: Any

    def __init__(
        self,
        name: str,
        max_length: int,
        revision: str | None,
        quantize: Literal["none", "nf4"] = "none",
    ) -> None:
        self.name = name
        self.max_length = max_length
        self.revision = revision
        self.quantize = quantize

    def _load(self, cache: Path, seed: int, progress: Progress | None) -> PreTrainedModel:
        with pretrained(self.name, self.revision, cache, progress) as (where, options):
            from transformers import AutoTokenizer

            self.tokenizer = AutoTokenizer.from_pretrained(where, **options)
            model = load_model(where, options)
        self._prepare_tokenizer()
        self.width = int(model.config.hidden_size)
        limit = _positions(model)
        if limit is not None and self.max_length > limit:
            raise ConfigError(
                f"backbone.max_length={self.max_length}: {self.name} has {limit} positions. Use "
                f"backbone.max_length={limit} or less."
            )
        return model

    def load(
        self, cache: Path, device: torch.device, seed: int, progress: Progress | None = None
    ) -> None:
        """Load as every backbone does, and name the tokenizer by its content.

        Only once: a tokenizer's own description changes when it is first used.
        """
        super().load(cache, device, seed, progress)
        self.tokenizer.truncation_side = "right"
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        whole = sorted(self.tokenizer.get_vocab().items()) if backend is None else backend.to_str()
        name = repr((type(self.tokenizer).__name__, whole))
        self._tokenizer_name = hashlib.sha256(name.encode()).hexdigest()

    @property
    def positions(self) -> int | None:
        """Positions of the model; None for models without a limit."""
        return _positions(self.model)

    @property
    def longest(self) -> int:
        """Where texts are cut."""
        return self.max_length

    def words(self, names: Sequence[str]) -> list[Tensor]:
        """Token ids of names, without special tokens; ``_`` is read as a space."""
        spoken = [name.replace("_", " ") for name in names]
        ids = self.tokenizer(spoken, add_special_tokens=False)["input_ids"]
        return [torch.tensor(row, dtype=torch.long) for row in ids]

    def _prepare_tokenizer(self) -> None:
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token or self.tokenizer.unk_token
        if self.tokenizer.pad_token_id is None:
            raise ConfigError(f"backbone.name={self.name}: its tokenizer has no padding token.")

    def preprocessing(self) -> dict[str, Any]:
        """Tokenizer, length limit, pooling."""
        return {
            "tokenizer": self._tokenizer_name,
            "max_length": self.max_length,
            "pooling": getattr(self, "pooling", None),
        }

    def encode(self, inputs: Sequence[Any]) -> Encoded:
        """Tokenize, with special tokens, cut at ``max_length``."""
        if not len(inputs):
            return Encoded(torch.zeros(0, dtype=torch.int32), np.zeros(0, dtype=np.int64))
        ids = self.tokenizer(list(inputs), truncation=True, max_length=self.max_length)["input_ids"]
        # a text that tokenizes to nothing still needs one position to pool
        ids = [row or [self.tokenizer.pad_token_id] for row in ids]
        flat = torch.tensor([token for row in ids for token in row], dtype=torch.int32)
        return Encoded(flat, np.array([len(row) for row in ids], dtype=np.int64))

    def collate(self, encoded: Encoded) -> Batch:
        """Pad on the right to the longest of these examples."""
        longest = int(encoded.lengths.max())
        ids = torch.full((len(encoded), longest), self.tokenizer.pad_token_id, dtype=torch.long)
        mask = torch.zeros((len(encoded), longest), dtype=torch.long)
        for row, (start, length) in enumerate(zip(encoded.starts, encoded.lengths, strict=True)):
            ids[row, :length] = encoded.values[start : start + length]
            mask[row, :length] = 1
        return {"input_ids": ids.to(self.device), "attention_mask": mask.to(self.device)}
