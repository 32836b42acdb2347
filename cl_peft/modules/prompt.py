r"""Prompt tuning: trained virtual tokens before the input (Lester et al. 2021, arXiv:2104.08691).

.. math:: h = f([P ; E(x)])

``P (tokens, H)`` are rows of the kind that the embedding table gives; they pass through all that
the table's rows pass through (positions, normalisation), as in Hugging Face peft. Their outputs
are dropped, so pooling sees the text's own tokens. In a vision transformer they stand beside CLS
and patches behind the embedding layer (VPT-shallow: Jia et al. 2022, arXiv:2203.12119).

Start: rows of the vocabulary, drawn without replacement from the first 5000; or the names of the
task's classes, each the mean of its tokens' rows, in order of class ids, and rows of the vocabulary
where there are more tokens than classes; or ``U(-0.5, 0.5)`` (section 3.2 has the three). Images
have no vocabulary: there ``U(-v, v)`` with ``v = sqrt(6 / (channels patch^2 + H))``, as in VPT's
code. A fresh prompt changes the output. Parameters: ``tokens H``.

Several prompts of one sample stand one after another (Progressive Prompts: Razdaibiedina et al.
2023, arXiv:2301.12314).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from cl_peft.errors import ConfigError
from cl_peft.modules.base import Handle, Params, Site
from cl_peft.modules.virtual import (
    VirtualTokens,
    accepts,
    config_of,
    place,
    reads_images,
    with_mask,
)

if TYPE_CHECKING:
    from cl_peft.modules.bank import Active, Bank

#: Rows of the vocabulary that prompts start from; the most frequent tokens come first.
FREQUENT = 5000


class Prompt(VirtualTokens):
    """Virtual tokens at the input.

    Args:
        tokens: Number of virtual tokens, ``P``.
        init: ``vocabulary``: rows of the embedding table; ``labels``: names of the task's classes
            (learners with a pool of prompts, and those that merge prompts, start from the
            vocabulary all the same); ``uniform``: ``U(-0.5, 0.5)``.
    """

    def __init__(
        self,
        tokens: PositiveInt = 20,
        init: Literal["vocabulary", "labels", "uniform"] = "vocabulary",
    ) -> None:
        self.count, self.start = tokens, init

    def sites(self, model: nn.Module) -> list[Site]:
        """The model's input.

        Raises:
            ConfigError: The model has no place for virtual tokens, or fewer rows to start from.
        """
        if reads_images(model):
            if not isinstance(getattr(model, "embeddings", None), nn.Module):
                raise ConfigError(
                    f"module.name=prompt: {type(model).__name__} has no embedding layer to put "
                    "virtual tokens behind. Use module=lora, or a ViT."
                )
            if self.start == "labels":
                raise ConfigError(
                    "module.init=labels: images have no words to start from. Use "
                    "module.init=vocabulary, or uniform."
                )
        elif self.start != "uniform" and self.count > (most := len(_vocabulary(model))):
            raise ConfigError(
                f"module.tokens={self.count}: the vocabulary has {most} rows to start from. Use "
                f"module.tokens={most} or less, or module.init=uniform."
            )
        return [Site("input", model)]

    def init(self, site: Site, generator: torch.Generator) -> Params:
        """Rows of the vocabulary, or uniform."""
        config = config_of(site.layer)
        if not reads_images(site.layer):
            rows = _vocabulary(site.layer)
            if self.start != "uniform":
                chosen = torch.randperm(len(rows), generator=generator)[: self.count]
                return {"tokens": rows[chosen.to(rows.device)].float().cpu()}
            width = rows.shape[1]
        else:
            width = int(config.hidden_size)
        bound = 0.5
        if self.start == "vocabulary":
            bound = math.sqrt(6 / (config.num_channels * config.patch_size**2 + width))
        tokens = torch.empty(self.count, width)
        return {"tokens": tokens.uniform_(-bound, bound, generator=generator)}

    def worded(self, site: Site, p: Params, words: Sequence[Tensor]) -> Params:
        """The first tokens become the mean rows of the classes' names, if that was asked for."""
        if self.start != "labels" or not any(len(ids) for ids in words):
            return p
        table = _table(site.layer)
        means = [table[ids.to(table.device)].float().mean(0).cpu() for ids in words if len(ids)]
        means = means[: self.count]
        return {"tokens": torch.cat([torch.stack(means), p["tokens"][len(means) :]])}

    def peft_config(self, sites: list[Site]) -> dict[str, Any] | None:
        """A ``PromptTuningConfig``; none for images, where peft has no prompts."""
        (site,) = sites
        if reads_images(site.layer):
            return None
        config = config_of(site.layer)
        return {
            "peft_type": "PROMPT_TUNING",
            "task_type": "FEATURE_EXTRACTION",
            "num_virtual_tokens": self.count,
            "token_dim": int(_vocabulary(site.layer).shape[1]),
            "num_layers": int(config.num_hidden_layers),
            "num_attention_heads": int(config.num_attention_heads),
            "num_transformer_submodules": 1,
            "prompt_tuning_init": "RANDOM",
        }

    def install(self, bank: Bank, model: nn.Module) -> list[Handle]:
        """Put the tokens in before the model's forward pass, and take their outputs out after."""
        (site,) = bank.sites
        insertion = _Insertion(self, bank, site)
        handles: list[Handle] = [
            model.register_forward_pre_hook(insertion.open, with_kwargs=True),
            model.register_forward_hook(insertion.close),
        ]
        if reads_images(model):
            embeddings = model.embeddings
            assert isinstance(embeddings, nn.Module)
            handles.append(embeddings.register_forward_hook(insertion.embed))
        return handles


class _Insertion:
    """The way of virtual tokens through one forward pass of the model."""

    def __init__(self, method: Prompt, bank: Bank, site: Site) -> None:
        self.method, self.bank, self.site = method, bank, site
        self.active: Active | None = None  # for an embedding layer inside the model
        self.added = 0

    def open(
        self, model: nn.Module, args: tuple[Any, ...], inputs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Before the forward pass."""
        self.added, self.active = 0, None
        active = self.bank.current(self.site)
        if active is None:
            return None
        if args:
            raise TypeError("a prompt needs the model's inputs by name")
        if reads_images(model):
            return args, self._image(model, inputs, active)
        return args, self._text(model, inputs, active)

    def _text(self, model: nn.Module, inputs: dict[str, Any], active: Active) -> dict[str, Any]:
        inputs = dict(inputs)
        ids, own = inputs.pop("input_ids", None), inputs.get("inputs_embeds")
        if own is None:
            own = model.get_input_embeddings()(ids)  # type: ignore[operator]
        inputs = with_mask(inputs, own)
        present = self.method.present(active, len(own))
        positions = place(model, inputs, present.sum(1, keepdim=True))
        if accepts(model, "position_ids"):
            first = positions[:, :1] - present.sum(1, keepdim=True)
            virtual = first + (present.cumsum(1) - 1).clamp_min(0)
            inputs["position_ids"] = torch.cat([virtual, positions], 1)
        # tokens that are not there are padding on the left: nobody attends to them
        mask = inputs["attention_mask"]
        inputs["attention_mask"] = torch.cat([present.to(mask.dtype), mask], 1)
        self.added = present.shape[1]
        return {**inputs, "inputs_embeds": self.method.before(self.site, own, active)}

    def _image(self, model: nn.Module, inputs: dict[str, Any], active: Active) -> dict[str, Any]:
        self.active = active
        if active.weights is None:
            return inputs
        pixels, mask = inputs["pixel_values"], inputs.get("attention_mask")
        if mask is None:
            # past the hooks, which are for the whole batch
            own = model.embeddings.forward(pixels[:1])  # type: ignore[union-attr]
            mask = pixels.new_ones((len(pixels), own.shape[1]), dtype=torch.long)
        present = self.method.present(active, len(pixels))
        if accepts(model, "attention_mask"):
            return {**inputs, "attention_mask": torch.cat([present.to(mask.dtype), mask], 1)}
        if not bool(present.all()):
            raise ConfigError(
                f"module.name=prompt: {type(model).__name__} takes no attention mask, so samples "
                "with and without a prompt cannot share a batch."
            )
        return inputs

    def embed(self, layer: nn.Module, args: tuple[Any, ...], own: Tensor) -> Tensor:
        """Behind an image's embedding layer."""
        if self.active is None:
            return own
        if not isinstance(own, Tensor):
            raise ConfigError(
                f"module.name=prompt: {type(layer).__name__} does not give a plain sequence of "
                "tokens. Use module=lora, or a ViT."
            )
        embedded = self.method.before(self.site, own, self.active)
        self.added, self.active = embedded.shape[1] - own.shape[1], None
        return embedded

    def close(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:  # noqa: ANN401
        """After the forward pass."""
        if self.added:
            output.last_hidden_state = output.last_hidden_state[:, self.added :]
            if output.get("pooler_output") is not None:
                output.pooler_output = None  # it would be that of a virtual token
            self.added = 0


def _vocabulary(model: nn.Module) -> Tensor:
    """The rows that prompts start from."""
    return _table(model)[:FREQUENT]


def _table(model: nn.Module) -> Tensor:
    weight = model.get_input_embeddings().weight  # type: ignore[operator]
    assert isinstance(weight, Tensor)
    return weight
