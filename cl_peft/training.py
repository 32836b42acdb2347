"""Fit one module on one task: the loop that every learner shares.

What is random here depends on seeds, the task and the epoch alone, never on what ran before; so a
task that is trained again after an interruption ends with the same bits.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal, Protocol

import numpy as np
import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor

from cl_peft.batching import bucketed
from cl_peft.console import Console
from cl_peft.errors import DivergedError

log = logging.getLogger(__name__)


class OptimizerFactory(Protocol):
    """What ``conf/optimizer`` builds."""

    def make(self, module: list[Tensor], head: list[Tensor]) -> torch.optim.Optimizer:
        """An optimizer over leaf tensors."""
        ...


@dataclass
class Job:
    """One fit.

    Attributes:
        task: Index of the task.
        title: What a progress bar says, such as ``"task 2/5"``.
        module: Leaf tensors of the module.
        head: Leaf tensors of the head.
        lengths: ``(N,)`` tokens per training example, for bucketing.
        loss: Loss of the training examples at these positions; a scalar to descend.
        seed: ``(seed.data, seed.init)``.
        validate: Accuracy on held-out examples, or None.
        on_step: Receives (step, values to log).
    """

    task: int
    title: str
    module: list[Tensor]
    head: list[Tensor]
    lengths: np.ndarray
    loss: Callable[[np.ndarray], Tensor]
    seed: tuple[int, int]
    validate: Callable[[], float] | None = None
    on_step: Callable[[int, dict[str, float]], None] | None = None


@dataclass(frozen=True)
class Report:
    """What a fit did.

    Attributes:
        steps: Optimizer steps.
        epochs: Epochs that ran.
        loss: Mean loss of the last epoch.
        validation: Validation accuracy of the weights that were kept; NaN without validation.
        padding: Share of positions that were padding.
    """

    steps: int
    epochs: int
    loss: float
    validation: float
    padding: float


class Trainer:
    """Epochs of mini-batches with warm-up, decay, clipping and optional early stopping.

    Learning rate at step s of S: ``s / (warmup S)`` of the peak while warming up, then linearly or
    by a half cosine down to zero, or constant.

    Args:
        epochs: Passes over a task's training examples.
        batch_size: Examples per step.
        accumulate: Micro-batches that a step is split into, one after another through the backbone:
            less memory. Their gradients, each weighted by its share of the examples, add up to
            those of the whole step, but for rounding (sums are taken in another order) and for
            dropout (each micro-batch draws its own; learners' draws alike).
        checkpointing: ``on``: the backbone's layers keep their inputs alone and are computed again
            in the backward pass: less memory, the same bits, half as much time again.
        eval_batch_size: Examples per forward pass of an evaluation.
        warmup: Share of all steps that warm up.
        decay: What follows.
        clip: Largest gradient norm over all trained tensors; 0 switches clipping off.
        patience: Stop when validation accuracy has not risen for so many epochs, and keep the best
            epoch's weights; null trains all epochs and keeps the last.
        precision: ``auto``: bfloat16 autocast on devices that compute in it, else float32.
        diverged_above: A loss above this, or one that is not finite, stops the task.
        trunk: ``once``: where modules sit in upper layers alone, the frozen layers below are
            computed once per example and task, and kept in memory (validation examples, too, where
            patience asks for them in every epoch); ``every_step``: in every step.
        trunk_gb: Memory for that, in GB; where a task's training examples need more, it is
            ``every_step``.
    """

    def __init__(
        self,
        epochs: PositiveInt = 5,
        batch_size: PositiveInt = 32,
        eval_batch_size: PositiveInt = 64,
        warmup: Annotated[float, Field(ge=0, lt=1)] = 0.1,
        decay: Literal["linear", "cosine", "constant"] = "linear",
        clip: NonNegativeFloat = 1.0,
        patience: PositiveInt | None = None,
        precision: Literal["auto", "fp32", "bf16"] = "auto",
        diverged_above: PositiveFloat = 1000.0,
        trunk: Literal["once", "every_step"] = "once",
        trunk_gb: PositiveFloat = 1.0,
        accumulate: PositiveInt = 1,
        checkpointing: Literal["on", "off"] = "off",
    ) -> None:
        self.epochs, self.batch_size, self.eval_batch_size = epochs, batch_size, eval_batch_size
        self.warmup, self.decay, self.clip, self.patience = warmup, decay, clip, patience
        self.precision, self.diverged_above = precision, diverged_above
        self.trunk, self.trunk_gb = trunk, trunk_gb
        self.accumulate, self.checkpointing = accumulate, checkpointing

    def in_bf16(self, device: torch.device) -> bool:
        """Whether training computes in bfloat16 there: by the card's kind, where it is ``auto``."""
        if self.precision != "auto":
            return self.precision == "bf16"
        return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)

    def autocast(self, device: torch.device) -> torch.autocast:
        """The context in which forward passes of training run."""
        return torch.autocast(device.type, torch.bfloat16, enabled=self.in_bf16(device))

    def rate(self, step: int, total: int) -> float:
        """Factor of the learning rate before step ``step`` (0-based) of ``total``."""
        warm = math.ceil(self.warmup * total)
        if step < warm:
            return (step + 1) / warm
        left = (total - step) / max(1, total - warm)
        if self.decay == "linear":
            return left
        return 1.0 if self.decay == "constant" else 0.5 * (1 + math.cos(math.pi * (1 - left)))

    def fit(
        self, job: Job, factory: OptimizerFactory, device: torch.device, console: Console
    ) -> Report:
        """Train ``job``'s leaf tensors in place.

        Raises:
            DivergedError: The loss is not finite, or above :attr:`diverged_above`.
        """
        tensors = job.module + job.head
        optimizer = factory.make(job.module, job.head)
        peaks = [group["lr"] for group in optimizer.param_groups]
        per_epoch = len(self._batches(job, 0))
        total, step, loss_sum, padding = self.epochs * per_epoch, 0, 0.0, [0, 0]
        best, best_epoch, kept = -1.0, -1, [t.detach().clone() for t in tensors]
        epoch = 0
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(_mix(job.seed[1], job.task, 13))  # 13: other numbers than init draws
            for epoch in range(self.epochs):
                loss_sum = 0.0
                title = f"{job.title}  epoch {epoch + 1}/{self.epochs}"
                with console.bar(title, total=per_epoch) as bar:
                    for rows in self._batches(job, epoch):
                        rate = self.rate(step, total)
                        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                            group["lr"] = peak * rate
                        value, norm = self._step(job, rows, optimizer, tensors, device)
                        self._check(value, job, epoch, step, peaks[0] * rate)
                        loss_sum, step = loss_sum + value, step + 1
                        for part in self._parts(rows):
                            lengths = job.lengths[part]
                            padding[0] += int(lengths.sum())
                            padding[1] += int(lengths.max()) * len(part)
                        bar.advance(loss=value)
                        if job.on_step is not None:
                            values = {"loss": value, "lr": peaks[0] * rate, "grad_norm": norm}
                            job.on_step(step, values)
                if job.validate is not None and self.patience is not None:
                    accuracy = job.validate()
                    if accuracy > best:
                        best, best_epoch = accuracy, epoch
                        kept = [t.detach().clone() for t in tensors]
                    elif epoch - best_epoch >= self.patience:
                        log.info("%s: stopped after epoch %d", job.title, epoch + 1)
                        break
        if job.validate is not None and self.patience is not None:
            with torch.no_grad():
                for tensor, value_kept in zip(tensors, kept, strict=True):
                    tensor.copy_(value_kept)
        validation = math.nan if job.validate is None else job.validate()
        waste = 1 - padding[0] / max(1, padding[1])
        return Report(step, epoch + 1, loss_sum / max(1, per_epoch), validation, waste)

    def _batches(self, job: Job, epoch: int) -> list[np.ndarray]:
        rng = np.random.default_rng([job.seed[0], 11, job.task, epoch])
        return bucketed(job.lengths, self.batch_size, rng)

    def _parts(self, rows: np.ndarray) -> list[np.ndarray]:
        """Micro-batches of a step; none is empty."""
        return np.array_split(rows, min(self.accumulate, len(rows)))

    def _step(
        self,
        job: Job,
        rows: np.ndarray,
        optimizer: torch.optim.Optimizer,
        tensors: list[Tensor],
        device: torch.device,
    ) -> tuple[float, float]:
        optimizer.zero_grad(set_to_none=True)
        value = 0.0
        for part in self._parts(rows):
            with self.autocast(device):
                loss = job.loss(part) * (len(part) / len(rows))
            value += float(loss.detach())
            if not math.isfinite(value):
                return value, math.nan
            loss.backward()
        limit = self.clip if self.clip > 0 else math.inf
        norm = float(torch.nn.utils.clip_grad_norm_(tensors, limit))
        if math.isfinite(norm):
            optimizer.step()
            return value, norm
        return math.nan, norm

    def _check(self, value: float, job: Job, epoch: int, step: int, rate: float) -> None:
        if math.isfinite(value) and value <= self.diverged_above:
            return
        raise DivergedError(
            f"{job.title}: training diverged in epoch {epoch + 1}, step {step + 1}: loss {value} "
            f"at learning rate {rate:.3g}. Nothing of this task was kept; earlier tasks are safe. "
            "Try a lower optimizer.lr, a longer trainer.warmup, or trainer.clip=1."
        )


def _mix(*numbers: int) -> int:
    """One 63-bit seed out of several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


def generator(*numbers: int) -> torch.Generator:
    """A CPU random generator seeded by several numbers."""
    return torch.Generator().manual_seed(_mix(*numbers))
