"""What learners are made of and handed: tools, units, fits, and two small functions on them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from cl_peft.backbones.base import Backbone
from cl_peft.backbones.features import Features
from cl_peft.config import Seeds
from cl_peft.console import Console
from cl_peft.modules.bank import Bank, Module
from cl_peft.modules.head import Head
from cl_peft.streams.base import Split, Task
from cl_peft.tracking import Tracker
from cl_peft.training import OptimizerFactory, Trainer


@dataclass(frozen=True)
class Tools:
    """What a learner works with."""

    backbone: Backbone
    bank: Bank
    features: Features
    trainer: Trainer
    optimizer: OptimizerFactory
    seeds: Seeds
    class_names: tuple[str, ...]
    n_tasks: int
    console: Console
    tracker: Tracker

    @property
    def n_classes(self) -> int:
        """Number of classes of the whole stream."""
        return len(self.class_names)

    def words(self, classes: Sequence[int]) -> list[Tensor]:
        """Token ids of what classes are called, for modules that start from words."""
        return self.backbone.words([self.class_names[c] for c in classes])


@dataclass(frozen=True)
class Unit:
    """What gives one prediction.

    Attributes:
        row: Row of the bank; -1 is the frozen backbone.
        head: Its classifier.
        fingerprint: Name of all values that its answers depend on; the key of remembered
            predictions.
        others: Further rows that are active with it, and their weights.
    """

    row: int
    head: Head
    fingerprint: str
    others: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Later:
    """A task's stored unit whose module need not be read before something needs it.

    Attributes:
        digest: Name of everything in it.
        head: Its head's tensors, as far as it has a head.
        read: Reads all of it, and checks that it is what ``digest`` and ``head`` say.
    """

    digest: str
    head: dict[str, Tensor]
    read: Callable[[], dict[str, Tensor]]


@dataclass(frozen=True)
class Fit:
    """One fit, as a learner's loss sees it.

    Attributes:
        task: The task that is learned.
        module: Leaf tensors by site.
        head: The head that trains.
        train: Examples.
        labels: ``(N,)`` their labels as positions in the head.
        extra: Further leaf tensors that train, by name.
    """

    task: Task
    module: Module
    head: Head
    train: Split
    labels: Tensor
    extra: dict[str, Tensor] = field(default_factory=dict)

    def targets(self, rows: np.ndarray) -> Tensor:
        """Labels of some examples."""
        return self.labels[torch.from_numpy(rows).to(self.labels.device)]


def among_task(fit: Fit, logits: Tensor) -> Tensor:
    """Logits ``(B, C)`` with ``-inf`` for classes that the task does not have.

    Cross-entropy on them compares the task's classes alone, so a head's rows for other classes get
    no gradient.
    """
    other = torch.tensor([c not in fit.task.classes for c in fit.head.classes])
    return logits.masked_fill(other.to(logits.device), float("-inf"))


def trainable(module: Module) -> Module:
    """A copy of a module whose tensors are leaves that ask for gradients."""
    return {
        s: {n: t.detach().clone().requires_grad_(True) for n, t in params.items()}
        for s, params in module.items()
    }
