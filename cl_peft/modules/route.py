"""Which modules are active for whom: routes over the bank's rows, and what sites then see."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cl_peft.modules.base import Params

#: One module: parameters per site name.
Module = dict[str, Params]


@dataclass(frozen=True)
class Active:
    """What is active at a site inside a scope.

    Attributes:
        params: Without leading dimensions, if the whole batch goes through one module; else
            ``(B, k, ...)``, k modules per sample.
        weights: None in the first case; else ``(B, k)``, 0 where a module is switched off.
    """

    params: Params
    weights: Tensor | None = None


#: What a learner hands to sites, by site name.
Given = dict[str, Active]


@dataclass(frozen=True)
class Route:
    """For each sample, weights over the bank's modules, kept sparse.

    Attributes:
        modules: ``(B, k)`` int64 bank rows.
        weights: ``(B, k)`` float32; a row of zeros is the frozen backbone.
        single: The bank row, where the whole batch goes through one module with weight 1.
    """

    modules: Tensor
    weights: Tensor
    single: int | None = None

    @staticmethod
    def to(module: int, batch: int, device: torch.device | str = "cpu") -> Route:
        """The whole batch through one module."""
        rows = torch.full((batch, 1), module, dtype=torch.long, device=device)
        return Route(rows, torch.ones(batch, 1, device=device), module)

    @staticmethod
    def each(modules: Tensor) -> Route:
        """One module per sample; ``-1`` is the frozen backbone.

        Args:
            modules: ``(B,)`` bank rows.
        """
        first = int(modules[0])
        if first >= 0 and bool((modules == first).all()):
            return Route.to(first, len(modules), modules.device)
        weights = (modules >= 0).to(torch.float32)
        return Route(modules.clamp_min(0).unsqueeze(1), weights.unsqueeze(1))

    @staticmethod
    def dense(weights: Tensor) -> Route:
        """Any weights over all modules, ``(B, T)``: soft mixtures, or all ones."""
        rows = torch.arange(weights.shape[1], device=weights.device).expand_as(weights)
        return Route(rows, weights.to(torch.float32))
