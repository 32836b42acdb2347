"""Virtual tokens: what prompt tuning and prefix tuning share.

A module is ``P`` virtual tokens that stand before a sample's own. In a batch with a route per
sample, the virtual tokens of all its modules stand side by side, and a mask says which of them are
really there for whom: a sample without any comes out as if nobody had some.

Positions are Hugging Face peft's: the own tokens of a sample with ``P`` virtual ones count on from
``P``; those of a sample without virtual tokens stay where they are.
"""

from __future__ import annotations

import inspect
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from cl_peft.errors import ConfigError
from cl_peft.modules.bank import Active
from cl_peft.modules.base import Method, Params, Site


class VirtualTokens(Method):
    """A method whose module is tokens ``(P, ...)`` before those of a sample.

    Attributes:
        count: Their number, ``P``.
    """

    count: int
    weightable: ClassVar[bool] = False

    @property
    def virtual(self) -> int:
        """``P``."""
        return self.count

    def tokens(self, site: Site, p: Params) -> Tensor:
        """The virtual tokens ``(P, ...)`` that parameters stand for."""
        return p["tokens"]

    def fold(self, site: Site, p: Params) -> Params:
        """The virtual tokens themselves."""
        return {"tokens": self.tokens(site, p)}

    def peft_tensors(self, site: Site, p: Params) -> Params:
        """``prompt_embeddings``: one row per virtual token."""
        return {"prompt_embeddings": self.tokens(site, p).flatten(1)}

    def one(self, site: Site, x: Tensor, y: Tensor, p: Params) -> Tensor:
        """``[tokens ; y]`` along the sequence, ``(B, P + L, ...)``."""
        tokens = self.tokens(site, p).to(y.dtype)
        return torch.cat([tokens.expand(len(y), *tokens.shape), y], dim=1)

    def mixed(self, site: Site, x: Tensor, y: Tensor, p: Params, weights: Tensor) -> Tensor:
        """``[tokens_n1 ; ... ; tokens_nk ; y_n]``, ``(B, k P + L, ...)``.

        Tokens whose weight is 0 stand there as well; :meth:`present` says which, for masks.
        """
        return torch.cat([p["tokens"].flatten(1, 2).to(y.dtype), y], dim=1)

    def before(self, site: Site, y: Tensor, active: Active) -> Tensor:
        """Virtual tokens before ``y``, as the open scope has them.

        Args:
            site: Where.
            y: ``(B, L, ...)``.
            active: What is active there.

        Returns:
            ``(B, n + L, ...)``; ``n = k P`` over the k modules that any sample uses.
        """
        if active.weights is None:
            return self.one(site, y, y, active.params)
        used = active.weights.any(0)
        params = {name: tensor[:, used] for name, tensor in active.params.items()}
        return self.mixed(site, y, y, params, active.weights[:, used])

    def present(self, active: Active, batch: int) -> Tensor:
        """Which of the virtual tokens are there for whom: boolean ``(B, n)``.

        Raises:
            ConfigError: A weight is neither 0 nor 1: tokens are there, or they are not.
        """
        weights = active.weights
        if weights is None:
            like = next(iter(active.params.values()))
            return like.new_ones((batch, self.count), dtype=torch.bool)
        if len(weights) != batch:
            raise ValueError(f"the route has {len(weights)} rows, the batch has {batch}")
        partly = (weights != 0) & (weights != 1)
        if bool(partly.any()):
            raise ConfigError(
                f"{type(self).__name__}: virtual tokens are there or not, so a route's weights "
                f"must be 0 or 1, not {float(weights[partly][0]):.3g}. Use a router that chooses "
                "modules, or a module that can be weighted."
            )
        return weights[:, weights.any(0)].bool().repeat_interleave(self.count, dim=1)


def place(model: nn.Module, inputs: dict[str, Any], shift: Tensor) -> Tensor:
    """Positions of a text's own tokens behind ``shift`` virtual ones, ``(B, L)``.

    Args:
        model: The backbone's model.
        inputs: What its forward is called with; ``attention_mask`` and ``position_ids`` count.
        shift: ``(B, 1)`` number of virtual tokens per sample.

    Raises:
        ConfigError: A token does not fit into the model's positions any more.
    """
    mask, positions = inputs["attention_mask"], inputs.get("position_ids")
    first = _first_position(model)
    if positions is None:
        positions = (mask.cumsum(1) - 1).clamp_min(0) + first
    positions = positions + shift
    limit = getattr(model.config, "max_position_embeddings", None)
    row = int(positions.amax(1).argmax())
    last, most = int(positions[row].max()), int(shift[row])
    if limit is not None and last >= limit:
        raise ConfigError(
            f"a text of {last - most - first + 1} tokens and {most} virtual ones need "
            f"{last - first + 1} positions; the backbone has {limit - first}. Use "
            f"backbone.max_length={limit - first - most} or less, or a smaller module.tokens."
        )
    return positions


def config_of(model: nn.Module) -> Any:  # noqa: ANN401
    """The configuration of a transformers model, by whatever names it has."""
    return model.config


def with_mask(inputs: dict[str, Any], tokens: Tensor) -> dict[str, Any]:
    """A text's inputs, with an attention mask ``(B, L)`` in any case."""
    if inputs.get("attention_mask") is not None:
        return inputs
    return {**inputs, "attention_mask": tokens.new_ones(tokens.shape[:2], dtype=torch.long)}


def accepts(model: nn.Module, name: str) -> bool:
    """Whether the model's forward has an argument of this name."""
    return name in inspect.signature(model.forward).parameters


def reads_images(model: nn.Module) -> bool:
    """Whether the model is a vision transformer."""
    return getattr(model, "main_input_name", "") == "pixel_values"


def _first_position(model: nn.Module) -> int:
    """Position of a text's first token: RoBERTa and its kin count from behind the padding's."""
    table = getattr(getattr(model, "embeddings", None), "position_embeddings", None)
    padding = getattr(table, "padding_idx", None)
    return 0 if padding is None else int(padding) + 1
