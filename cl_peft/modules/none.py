"""No module: the backbone as it is."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cl_peft.modules.base import Method, Params, Site


class NoModule(Method):
    """Acts nowhere; what the ``frozen`` learner uses."""

    def sites(self, model: nn.Module) -> list[Site]:
        """No site at all."""
        return []

    def init(self, site: Site, generator: torch.Generator) -> Params:
        """Nothing."""
        return {}

    def one(self, site: Site, x: Tensor, y: Tensor, p: Params) -> Tensor:
        """The frozen output."""
        return y

    def mixed(self, site: Site, x: Tensor, y: Tensor, p: Params, weights: Tensor) -> Tensor:
        """The frozen output."""
        return y
