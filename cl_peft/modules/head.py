"""A task's classifier on the pooled feature. Heads live outside the backbone."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Head:
    """Linear classifier ``logits = f W^T + b`` over its own classes.

    Attributes:
        weight: ``(C, H)``.
        bias: ``(C,)``.
        classes: Global class id of each output, ascending by arrival.
    """

    weight: Tensor
    bias: Tensor
    classes: tuple[int, ...]

    @staticmethod
    def fresh(
        classes: tuple[int, ...], width: int, generator: torch.Generator, device: torch.device
    ) -> Head:
        """Start at ``U(-1/sqrt(H), 1/sqrt(H))``, as torch.nn.Linear does; bias zero."""
        bound = 1 / math.sqrt(width)
        weight = torch.empty(len(classes), width).uniform_(-bound, bound, generator=generator)
        bias = torch.zeros(len(classes), device=device)
        return Head(
            weight.to(device).requires_grad_(True), bias.requires_grad_(True), tuple(classes)
        )

    def widen(self, classes: tuple[int, ...], generator: torch.Generator) -> Head:
        """A head that also answers ``classes``; what it knew keeps its weights."""
        new = tuple(c for c in classes if c not in self.classes)
        more = Head.fresh(new, self.weight.shape[1], generator, self.weight.device)
        weight = torch.cat([self.weight.detach(), more.weight.detach()])
        bias = torch.cat([self.bias.detach(), more.bias.detach()])
        return Head(weight.requires_grad_(True), bias.requires_grad_(True), self.classes + new)

    def __call__(self, features: Tensor) -> Tensor:
        """Logits ``(B, C)``."""
        return features @ self.weight.T + self.bias

    @property
    def parameters(self) -> list[Tensor]:
        """What an optimizer trains."""
        return [self.weight, self.bias]

    def frozen(self) -> Head:
        """A copy that no longer trains."""
        return Head(self.weight.detach().clone(), self.bias.detach().clone(), self.classes)

    def local(self, labels: Tensor) -> Tensor:
        """Global labels as positions among this head's outputs.

        Raises:
            ValueError: A label that the head does not answer.
        """
        table = torch.full((max(self.classes) + 1,), -1, dtype=torch.long)
        table[torch.tensor(self.classes)] = torch.arange(len(self.classes))
        known = labels <= max(self.classes)
        positions = torch.where(known, table[labels.clamp_max(max(self.classes))], -1)
        if bool((positions < 0).any()):
            raise ValueError(f"labels {labels[positions < 0].tolist()[:5]} are not in this head")
        return positions

    def tensors(self) -> dict[str, Tensor]:
        """As stored on disk."""
        classes = torch.tensor(self.classes, dtype=torch.int64)
        weight, bias = self.weight.detach(), self.bias.detach()
        return {"head.weight": weight, "head.bias": bias, "head.classes": classes}

    @staticmethod
    def from_tensors(tensors: dict[str, Tensor], device: torch.device) -> Head:
        """The inverse of :meth:`tensors`."""
        classes = tuple(tensors["head.classes"].tolist())
        return Head(tensors["head.weight"].to(device), tensors["head.bias"].to(device), classes)
