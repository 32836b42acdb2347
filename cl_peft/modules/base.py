"""What a PEFT method has to say: where it acts, how a module starts, and its formula.

A method is stateless: it owns no tensors. The bank (``bank.py``) owns them, stacked over all
modules, and hands them to the method's formula in one of two shapes.
"""

from __future__ import annotations

import fnmatch
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn

from cl_peft.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from cl_peft.modules.bank import Bank

#: The parameters of one module at one site, or of a whole batch of modules stacked in front.
Params = dict[str, Tensor]
#: In which of the transformer's layers a method may act; None: in all.
Layers = Literal["upper_half", "upper_third"] | list[int] | None


@dataclass(frozen=True)
class Site:
    """One place in the backbone where a module acts.

    Attributes:
        name: Dotted name inside the backbone's model; with ``:`` and a word where one layer has
            several sites.
        layer: The frozen layer; most methods act on linear layers, weight ``(out, in)``.
    """

    name: str
    layer: nn.Module

    @property
    def d_in(self) -> int:
        """Input width of a linear layer."""
        return int(self.layer.in_features)  # type: ignore[arg-type]

    @property
    def d_out(self) -> int:
        """Output width of a linear layer."""
        return int(self.layer.out_features)  # type: ignore[arg-type]

    @property
    def quantized(self) -> bool:
        """Whether the layer keeps its weight as codes of a few bits."""
        weight = getattr(self.layer, "weight", None)
        return getattr(weight, "quant_state", None) is not None

    @property
    def weight(self) -> Tensor:
        """Frozen weight of a linear layer, ``(out, in)``; a copy, made anew, if quantized."""
        weight = self.layer.weight
        assert isinstance(weight, Tensor)
        if self.quantized:
            from cl_peft.backbones.nf4 import dequantized

            return dequantized(weight)
        return weight

    @property
    def bias(self) -> Tensor | None:
        """Frozen bias of a linear layer, ``(out,)``, if it has one."""
        bias = self.layer.bias
        assert bias is None or isinstance(bias, Tensor)
        return bias


class Handle(Protocol):
    """What ``register_forward_hook`` returns."""

    def remove(self) -> None:
        """Take the hook off."""
        ...


class Method(ABC):
    """A PEFT method.

    The common case changes the outputs of layers: :meth:`one` and :meth:`mixed`. A method that acts
    elsewhere (prompts, prefixes) overrides :meth:`install` and asks the bank for what is active.
    """

    #: Whether any weights make sense in a route, not 0 and 1 alone.
    weightable: ClassVar[bool] = True

    @property
    def virtual(self) -> int:
        """How many of the backbone's positions a module takes."""
        return 0

    @abstractmethod
    def sites(self, model: nn.Module) -> list[Site]:
        """Places where this method acts.

        Raises:
            ConfigError: A pattern matches nothing.
        """

    @abstractmethod
    def init(self, site: Site, generator: torch.Generator) -> Params:
        """Fresh parameters of one module at ``site``, float32 on the CPU."""

    def worded(self, site: Site, p: Params, words: Sequence[Tensor]) -> Params:
        """Fresh parameters that start from what the classes are called; by default they do not.

        Args:
            site: Where.
            p: What :meth:`init` gave.
            words: Token ids of each class's name; empty where the backbone reads no text.
        """
        return p

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

    def fused(self, site: Site, x: Tensor, y: Tensor, p: Params) -> Tensor:
        """As :meth:`one`, for a ``y`` that the frozen layer just gave and nobody else holds.

        It may be overwritten, and its graph may be left out: its derivative is the layer's weight.
        """
        return self.one(site, x, y, p)

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

    def mixed_fused(self, site: Site, x: Tensor, y: Tensor, p: Params, weights: Tensor) -> Tensor:
        """As :meth:`mixed`, for a ``y`` as :meth:`fused` receives it."""
        return self.mixed(site, x, y, p, weights)

    def derive(self, site: Site, p: Params) -> Params:
        """Tensors that follow from a finished module and are worth computing once.

        They are kept beside the module's own in the bank, never on disk, and handed to :meth:`one`
        and :meth:`mixed` together with them.
        """
        return {}

    def fold(self, site: Site, p: Params) -> Params:
        """What a module keeps when its task ends; a reparameterisation disappears here."""
        return p

    def join(self, site: Site, p: Params, weights: Tensor) -> Params | None:
        """Several modules that every sample uses with the same weights, as one of them.

        An equal but faster way than :meth:`mixed`, where the formula has one.

        Args:
            site: Where.
            p: Parameters ``(k, ...)`` of k modules.
            weights: ``(k,)``.

        Returns:
            Parameters for :meth:`one`; None where there is no such way.
        """
        return None

    def delta(self, site: Site, p: Params) -> tuple[Tensor, Tensor | None]:
        """Change of a linear layer's weight ``(out, in)`` and bias that equals the module.

        Raises:
            ConfigError: This method cannot be merged into the backbone.
        """
        raise ConfigError(f"{type(self).__name__} modules cannot be merged into the backbone.")

    def peft_config(self, sites: list[Site]) -> dict[str, Any] | None:
        """What peft's ``adapter_config.json`` says of it; None where peft has no such."""
        return None

    def peft_name(self, site: Site, name: str) -> str:
        """What Hugging Face peft calls a parameter at a site."""
        raise ConfigError(f"{type(self).__name__} has no equivalent in Hugging Face peft.")

    def peft_tensors(self, site: Site, p: Params) -> Params:
        """A finished module's tensors at a site, by the whole names that peft stores them under."""
        return {f"base_model.model.{site.name}.{self.peft_name(site, n)}": t for n, t in p.items()}

    def install(self, bank: Bank, model: nn.Module) -> list[Handle]:
        """Place hooks on the backbone; by default one on the output of every site."""
        return [site.layer.register_forward_hook(bank.hook(site)) for site in bank.sites]

    def source(self, site: Site, x: Tensor) -> Tensor:
        """What :meth:`one` and :meth:`mixed` receive as ``x``; by default the layer's input."""
        return x

    def training_mode(self, training: bool) -> None:  # noqa: B027 (an option, not a duty)
        """Switch what only happens in training, such as dropout."""


def matches(name: str, pattern: str) -> bool:
    """Whether a shell pattern fits a dotted name as a whole, or its end."""
    return fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name, f"*.{pattern}")


def by_pattern(name: str, patterns: dict[str, Any], default: Any) -> Any:  # noqa: ANN401
    """The value of the first pattern that fits a site's name."""
    return next((v for pattern, v in patterns.items() if matches(name, pattern)), default)


def layer_of(name: str) -> tuple[str, int] | None:
    """The list of layers that a dotted name lies in, and its place there, from 0; None outside."""
    parts = name.partition(":")[0].split(".")
    at = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    return None if at is None else (".".join(parts[:at]), int(parts[at]))


def among(model: nn.Module, name: str, layers: Layers) -> bool:
    """Whether a dotted name lies in one of these layers of the model.

    Args:
        model: The backbone's model.
        name: What lies in no layer at all (an embedding) was named on its own, and counts.
        layers: ``upper_half`` or ``upper_third``, rounded up to whole layers; numbers from 1, the
            lowest, to the backbone's depth; None: all.

    Raises:
        ConfigError: There is no such layer.
    """
    place = layer_of(name)
    if layers is None or place is None:
        return True
    depth = len(model.get_submodule(place[0]))  # type: ignore[arg-type]
    if isinstance(layers, str):
        return place[1] >= depth - math.ceil(depth / {"upper_half": 2, "upper_third": 3}[layers])
    wrong = [n for n in layers if not 1 <= n <= depth]
    if wrong or not layers:
        raise ConfigError(
            f"module.layers: the backbone has layers 1 to {depth}, not "
            f"{', '.join(map(str, wrong)) or 'none at all'}. The upper half is "
            f"module.layers=upper_half; null is all."
        )
    return place[1] + 1 in layers


def linear_sites(model: nn.Module, patterns: list[str], layers: Layers = None) -> list[Site]:
    """Linear layers whose dotted name matches a pattern.

    A pattern is a shell pattern (``*.query``) on the whole dotted name or on its end
    (``query``, ``attention.*``); ``all`` means every linear layer of the transformer's layers
    (poolers, heads and embeddings are outside: their outputs do not reach the pooled feature).

    Args:
        model: The backbone's model.
        patterns: Name patterns.
        layers: Only in these of the transformer's layers; see :func:`among`.

    Raises:
        ConfigError: A pattern matches no linear layer (the layers' last names are listed), or none
            in these layers, or there is no such layer.
    """
    linears = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    if not linears:
        raise ConfigError(
            "module.sites: the backbone has no torch.nn.Linear layers (GPT-2 has another kind, "
            "which is not supported). Use another backbone."
        )
    inner = {n: m for n, m in linears.items() if any(part.isdigit() for part in n.split("."))}
    chosen: dict[str, nn.Linear] = {}
    for pattern in patterns:
        if pattern == "all":
            found = inner
        else:
            found = {n: m for n, m in linears.items() if matches(n, pattern)}
        if not found:
            ends = sorted({n.rsplit(".", 1)[-1] for n in linears})
            raise ConfigError(
                f"module.sites: '{pattern}' matches no linear layer of the backbone."
                f"{did_you_mean(pattern, ends)}\n  layers are called: {', '.join(ends)}, or 'all'"
            )
        there = {n: m for n, m in found.items() if among(model, n, layers)}
        if not there:
            raise ConfigError(
                f"module.sites: '{pattern}' matches nothing in module.layers={layers}. Use "
                "module.layers=null, or patterns without numbers."
            )
        chosen.update(there)
    return [Site(name, layer) for name, layer in linears.items() if name in chosen]
