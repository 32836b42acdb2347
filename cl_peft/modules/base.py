"""What a PEFT method has to say: where it acts, how a module starts, and its formula.

A method is stateless: it owns no tensors. The bank (``bank.py``) owns them, stacked over all
modules, and hands them to the method's formula in one of two shapes.
"""

from __future__ import annotations

import fnmatch
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cl_peft.errors import ConfigError, did_you_mean

#: The parameters of one module at one site, or of a whole batch of modules stacked in front.
Params = dict[str, Tensor]


@dataclass(frozen=True)
class Site:
    """One place in the backbone where a module acts.

    Attributes:
        name: Dotted name inside the backbone's model.
        layer: The frozen linear layer, weight ``(out, in)``.
    """

    name: str
    layer: nn.Linear

    @property
    def d_in(self) -> int:
        """Input width."""
        return self.layer.in_features

    @property
    def d_out(self) -> int:
        """Output width."""
        return self.layer.out_features


class Method(ABC):
    """A PEFT method on linear sites."""

    @abstractmethod
    def sites(self, model: nn.Module) -> list[Site]:
        """Places where this method acts.

        Raises:
            ConfigError: A pattern matches nothing.
        """

    @abstractmethod
    def init(self, site: Site, generator: torch.Generator) -> Params:
        """Fresh parameters of one module at ``site``, float32 on the CPU."""

    @abstractmethod
    def one(self, site: Site, x: Tensor, y: Tensor, p: Params) -> Tensor:
        """Whole batch through one module.

        Args:
            site: Where.
            x: Input of the frozen layer, ``(B, ..., in)``.
            y: Its output, ``(B, ..., out)``.
            p: The module's parameters, without a leading dimension.

        Returns:
            The adapted output, shaped like ``y``.
        """

    @abstractmethod
    def mixed(self, site: Site, x: Tensor, y: Tensor, p: Params, weights: Tensor) -> Tensor:
        """Every sample through its own modules, in one pass.

        Args:
            site: Where.
            x: ``(B, L, in)``.
            y: ``(B, L, out)``.
            p: Parameters with two leading dimensions ``(B, k, ...)``: k modules per sample.
            weights: ``(B, k)`` weight of each module for each sample; 0 switches one off.
        """

    def training_mode(self, training: bool) -> None:  # noqa: B027 (an option, not a duty)
        """Switch what only happens in training, such as dropout."""


def linear_sites(model: nn.Module, patterns: list[str]) -> list[Site]:
    """Linear layers whose dotted name matches a pattern.

    A pattern is a shell pattern (``*.query``) on the whole dotted name or on its end
    (``query``, ``attention.*``); ``all`` means every linear layer of the transformer's layers
    (poolers, heads and embeddings are outside: their outputs do not reach the pooled feature).

    Raises:
        ConfigError: A pattern matches no linear layer; the layers' last names are listed.
    """
    linears = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    inner = {n: m for n, m in linears.items() if any(part.isdigit() for part in n.split("."))}
    chosen: dict[str, nn.Linear] = {}
    for pattern in patterns:
        if pattern == "all":
            found = inner
        else:
            found = {
                n: m
                for n, m in linears.items()
                if fnmatch.fnmatchcase(n, pattern) or fnmatch.fnmatchcase(n, f"*.{pattern}")
            }
        if not found:
            ends = sorted({n.rsplit(".", 1)[-1] for n in linears})
            raise ConfigError(
                f"module.sites: '{pattern}' matches no linear layer of the backbone."
                f"{did_you_mean(pattern, ends)}\n  layers are called: {', '.join(ends)}, or 'all'"
            )
        chosen.update(found)
    return [Site(name, layer) for name, layer in linears.items() if name in chosen]
