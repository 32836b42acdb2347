"""AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101), torch's own."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat
from torch import Tensor


class AdamW:
    """Makes a torch AdamW for one task; its state starts fresh with every task.

    Args:
        lr: Peak learning rate of modules.
        head_lr: Peak learning rate of heads; None means ``lr``.
        betas: Decay of the two moments.
        eps: Added to the denominator.
        weight_decay: Decoupled decay of module weights; heads' biases are never decayed.
    """

    def __init__(
        self,
        lr: PositiveFloat = 1e-3,
        head_lr: PositiveFloat | None = None,
        betas: Annotated[list[float], Field(min_length=2, max_length=2)] = (0.9, 0.999),  # type: ignore[assignment]
        eps: PositiveFloat = 1e-8,
        weight_decay: NonNegativeFloat = 0.0,
    ) -> None:
        self.lr, self.head_lr = lr, head_lr if head_lr is not None else lr
        self.betas = (betas[0], betas[1])
        self.eps, self.weight_decay = eps, weight_decay

    def make(self, module: list[Tensor], head: list[Tensor]) -> torch.optim.Optimizer:
        """An optimizer over a module's and a head's leaf tensors."""
        matrices = [t for t in head if t.ndim > 1]
        biases = [t for t in head if t.ndim <= 1]
        groups = [
            {"params": module, "lr": self.lr},
            {"params": matrices, "lr": self.head_lr},
            {"params": biases, "lr": self.head_lr, "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(
            [g for g in groups if g["params"]],
            lr=self.lr,
            betas=self.betas,
            eps=self.eps,
            weight_decay=self.weight_decay,
        )
