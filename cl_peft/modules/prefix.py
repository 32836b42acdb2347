r"""Prefix tuning: trained keys and values at every attention layer (Li and Liang 2021).

arXiv:2101.00190, section 4, equation 3, as attention sees it:

.. math:: \mathrm{attention}(Q, [P_k ; K], [P_v ; V])

Shapes: ``tokens (P, layers, 2, kv)``: for each virtual token its key and value at each layer, ``kv
= key-value heads x head width``; flattened to ``(P, layers 2 kv)`` it is what Hugging Face peft
stores. While a module trains it is given by a small network, which the paper finds to learn more
stably (section 4.3), and which is folded away when the task ends:

.. math:: P = W_2 \tanh(W_1 E + b_1) + b_2

with ``E (P, kv)``, ``W1 (hidden, kv)``, ``W2 (layers 2 kv, hidden)``. Start: ``E`` (or, without the
network, the tokens) standard normal, the linear layers as torch.nn.Linear starts. A fresh prefix
takes some attention, so it changes the output. Parameters: ``2 layers P kv`` when finished.

The keys are not rotated in models with rotary positions, and a text's own tokens count on from
position ``P``, both as in peft; images have no positions to shift.

It acts through transformers' attention interface: the model's attention is switched to a function
that adds what is active and calls sdpa; with nothing active it is sdpa, bit for bit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from pydantic import PositiveInt
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

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
    from cl_peft.modules.bank import Bank

#: Our attention function's name in transformers' registry.
NAME = "cl_peft"


class Prefix(VirtualTokens):
    """Virtual keys and values at every attention layer.

    Args:
        tokens: Number of virtual tokens, ``P``.
        reparameterise: Train through the network instead of the keys and values themselves.
        hidden: The network's inner width.
    """

    def __init__(
        self, tokens: PositiveInt = 10, reparameterise: bool = True, hidden: PositiveInt = 512
    ) -> None:
        self.count, self.reparameterise, self.hidden = tokens, reparameterise, hidden

    def sites(self, model: nn.Module) -> list[Site]:
        """All attention layers as one site, since the network gives them together.

        Raises:
            ConfigError: The model's attention cannot be extended.
        """
        config = config_of(model)
        kind, found = getattr(config, "_attn_implementation", None), len(_layers(model))
        if kind not in ("sdpa", NAME) or found != config.num_hidden_layers:
            raise ConfigError(
                f"module.name=prefix: {type(model).__name__} does not use transformers' attention "
                f"interface with sdpa (attention '{kind}', {found} of {config.num_hidden_layers} "
                "layers). Use module=prompt or module=lora, or a BERT, RoBERTa, Llama or ViT."
            )
        return [Site("attention", model)]

    def init(self, site: Site, generator: torch.Generator) -> Params:
        """The network, or the tokens themselves."""
        layers, heads, width = _shape(site)
        kv = heads * width
        if not self.reparameterise:
            return {"tokens": torch.empty(self.count, layers, 2, kv).normal_(generator=generator)}

        def linear(out: int, into: int) -> tuple[Tensor, Tensor]:
            bound = 1 / math.sqrt(into)
            weight, bias = torch.empty(out, into), torch.empty(out)
            return tuple(t.uniform_(-bound, bound, generator=generator) for t in (weight, bias))  # type: ignore[return-value]

        embedding = torch.empty(self.count, kv).normal_(generator=generator)
        w1, b1 = linear(self.hidden, kv)
        w2, b2 = linear(layers * 2 * kv, self.hidden)
        return {"E": embedding, "W1": w1, "b1": b1, "W2": w2, "b2": b2}

    def tokens(self, site: Site, p: Params) -> Tensor:
        """Keys and values ``(P, layers, 2, kv)``, of a module in training or a finished one."""
        if "tokens" in p:
            return p["tokens"]
        layers, heads, width = _shape(site)
        inner = torch.tanh(nn.functional.linear(p["E"], p["W1"], p["b1"]))
        flat = nn.functional.linear(inner, p["W2"], p["b2"])
        return flat.view(self.count, layers, 2, heads * width)

    def peft_config(self, sites: list[Site]) -> dict[str, Any] | None:
        """A ``PrefixTuningConfig`` without its network; none for images, as in peft."""
        (site,) = sites
        if reads_images(site.layer):
            return None
        layers, heads, width = _shape(site)
        return {
            "peft_type": "PREFIX_TUNING",
            "task_type": "FEATURE_EXTRACTION",
            "num_virtual_tokens": self.count,
            "token_dim": heads * width,
            "num_layers": layers,
            "num_attention_heads": heads,
            "num_transformer_submodules": 1,
            "encoder_hidden_size": self.hidden,
            "prefix_projection": False,
        }

    def install(self, bank: Bank, model: nn.Module) -> list[Handle]:
        """Switch the model's attention to the function that knows prefixes."""
        (site,) = bank.sites
        given = _Given(self, bank, site)
        return [
            model.register_forward_pre_hook(given.open, with_kwargs=True),
            model.register_forward_hook(given.close),
            _Switch(model, given),
        ]


class _Given:
    """The prefixes of one bank during one forward pass of the model.

    ``bank.passing`` holds them: ``(B, n, layers, 2, kv)``, and who has which, ``(B, n)``.
    """

    def __init__(self, method: Prefix, bank: Bank, site: Site) -> None:
        self.method, self.bank, self.site = method, bank, site

    def open(
        self, model: nn.Module, args: tuple[Any, ...], inputs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Before the forward pass: gather once for all layers."""
        self.bank.passing = None
        active = self.bank.current(self.site)
        if active is None:
            return None
        if args:
            raise TypeError("a prefix needs the model's inputs by name")
        names = ("input_ids", "inputs_embeds", "pixel_values")
        own = next(inputs[n] for n in names if inputs.get(n) is not None)
        layers, heads, width = _shape(self.site)
        like = next(iter(active.params.values()))
        present = self.method.present(active, len(own))
        tokens = self.method.before(
            self.site, like.new_empty(len(own), 0, layers, 2, heads * width), active
        )
        self.bank.passing = (tokens, present)
        if reads_images(model):
            return None
        inputs = with_mask(inputs, own)
        positions = place(model, inputs, present.sum(1, keepdim=True))
        if accepts(model, "position_ids"):
            inputs = {**inputs, "position_ids": positions}
        return args, inputs

    def close(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:  # noqa: ANN401
        """After the forward pass."""
        self.bank.passing = None

    def extend(
        self,
        layer: int,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        queries: int,
        causal: bool,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys and values ``(B, heads, n + L, width)``, and a mask that shows them.

        Args:
            layer: Index of the attention layer.
            key: ``(B, heads, L, width)``; ``value`` likewise.
            value: See ``key``.
            mask: Boolean ``(B or 1, 1, queries, L)``, or None.
            queries: Number of queries.
            causal: Whether no mask means a causal one.
        """
        if self.bank.passing is None:
            return key, value, mask
        tokens, present = self.bank.passing
        heads, width = key.shape[1], key.shape[3]
        pairs = tokens[:, :, layer].unflatten(-1, (heads, width)).to(key.dtype)
        extra = pairs.permute(2, 0, 3, 1, 4)  # (2, B, heads, n, width)
        if mask is None and (causal or not bool(present.all())):
            mask = present.new_ones((1, 1, queries, key.shape[2]))
            mask = mask.tril() if causal else mask
        if mask is not None:
            shown = present[:, None, None].expand(-1, 1, queries, -1)
            mask = torch.cat([shown, mask.expand(len(shown), -1, -1, -1)], -1)
        return torch.cat([extra[0], key], 2), torch.cat([extra[1], value], 2), mask


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,  # noqa: ANN401
) -> tuple[Tensor, None]:
    """Scaled dot-product attention with the prefixes that are active; sdpa where none is."""
    seat: _Seat | None = module.__dict__.get("_prefixes")
    if seat is not None:
        causal = options.get("is_causal")
        causal = bool(module.is_causal if causal is None else causal) and query.shape[2] > 1
        for given in seat.given:
            key, value, attention_mask = given.extend(
                seat.layer, key, value, attention_mask, query.shape[2], causal
            )
    result: tuple[Tensor, None] = sdpa_attention_forward(
        module, query, key, value, attention_mask, **options
    )
    return result


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


@dataclass
class _Seat:
    """An attention layer's place in the model, and whose prefixes it sees."""

    layer: int
    given: list[_Given]


class _Switch:
    """Attention layers of a model that look for a bank's prefixes, until removed."""

    def __init__(self, model: nn.Module, given: _Given) -> None:
        self.layers, self.given = _layers(model), given
        self.config = config_of(model)
        for index, layer in enumerate(self.layers):
            layer.__dict__.setdefault("_prefixes", _Seat(index, [])).given.append(given)
        self.config._attn_implementation = NAME

    def remove(self) -> None:
        """Put the attention back; with another bank's prefixes still there, take out one's own."""
        for layer in self.layers:
            seat: _Seat = layer.__dict__["_prefixes"]
            seat.given.remove(self.given)
            if not seat.given:
                del layer.__dict__["_prefixes"]
                self.config._attn_implementation = "sdpa"


def _layers(model: nn.Module) -> list[nn.Module]:
    """Layers that call the attention interface: it asks each whether it is causal."""
    return [module for module in model.modules() if hasattr(module, "is_causal")]


def _shape(site: Site) -> tuple[int, int, int]:
    """Attention layers, key-value heads, and a head's width."""
    config = config_of(site.layer)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(config.num_hidden_layers), int(heads), int(width)
