r"""InfLoRA: new modules act outside the space of old inputs (Liang and Li 2024, arXiv:2404.00228).

Let :math:`C = \sum_x x x^T` be the second moment of a site's inputs ``x`` over a task's training
examples, with all modules so far active. ``M (in, m)`` holds orthonormal directions: those that old
tasks use (``remove``), or, once these fill more than half of the space, those that are left
(``retain``); ``P = I - M M^T`` or ``P = M M^T`` projects onto what is left. For a new task

.. math:: A = U_{:r}^T / \sqrt 3, \qquad P C = U S V^T

which stays fixed; only ``B``, from zero, and the head train. As ``A P = A``, an input inside the
old space gives the same output as before. After the task, with the new ``C``, DualGPM (Liang and
Li, CVPR 2023) lets ``M`` take in, or give away, as few left singular vectors of ``P C`` as bring
the share of used directions

.. math:: 1 - \|P C\|_F^2 / \|C\|_F^2 \ \ge \ \epsilon_t, \qquad
          \epsilon_t = \epsilon_1 + (\epsilon_{end} - \epsilon_1) (t - 1) / T

Shapes: ``A (r, in)``, ``B (out, r)``. At test time all modules are summed. Stored: module and head
per task; ``M`` per site (state). Source: methods/inflora.py of github.com/liangyanshuo/InfLoRA;
defaults: its configs/cifar100_inflora.json (``lamb 0.95``, ``lame 1.0``; 0.98 for ImageNet-R).

As in that code the share is counted on squared singular values of ``C``, fourth powers of those of
the inputs. Differences: the code looks at keys and values of attention layers, here at every linear
site of the module; padding is left out of ``C``; the first task, too, takes directions until the
threshold is reached (the code stops one short) and may turn to ``retain``; directions of ``U`` that
``P`` does not hold (fewer left than ``r``) become zero rows of ``A``. One pass over the training
examples before and one after each task, at about the cost of an epoch of training together.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from cl_peft.batching import by_length
from cl_peft.errors import ConfigError
from cl_peft.learners.base import Tools
from cl_peft.learners.summed import Summed
from cl_peft.modules.bank import Module
from cl_peft.store import require
from cl_peft.streams.base import Task
from cl_peft.training import generator


@dataclass(frozen=True)
class Memory:
    """Directions of a site's inputs that old tasks use.

    Attributes:
        basis: ``M (in, m)`` orthonormal columns, float32.
        retain: Whether they span what is left, not what was used.
    """

    basis: Tensor
    retain: bool = False

    def left(self, x: Tensor) -> Tensor:
        """``P x``: the part of the columns of ``x (in, n)`` that no old task uses."""
        basis = self.basis.to(x.dtype)
        used = basis @ (basis.T @ x)
        return used if self.retain else x - used

    def update(self, second: Tensor, threshold: float) -> Memory:
        """Take in as many directions of ``second``, ``C (in, in)``, as reach ``threshold``."""
        total, width = second.square().sum(), len(second)
        if not total:
            return self
        directions, values = principal(self.left(second))
        unused = values.sum() / total
        # share of C that is used once the first 0, 1, 2, ... of them are taken in
        reached = 1 - unused + torch.cat([values.new_zeros(1), values.cumsum(0) / total])
        count = int((reached < threshold).sum())
        room = self.basis.shape[1] if self.retain else width - self.basis.shape[1]
        new, basis = directions[:, : min(count, room)], self.basis.to(second.dtype)
        if self.retain:
            kept = basis.shape[1] - new.shape[1]
            rest = basis - new @ (new.T @ basis)
            return Memory(torch.linalg.svd(rest, full_matrices=False)[0][:, :kept].float(), True)
        basis = torch.linalg.qr(torch.cat([basis, new], 1))[0]  # orthonormal again, to the last bit
        if basis.shape[1] <= width / 2:
            return Memory(basis.float())
        whole = torch.linalg.qr(basis, mode="complete")[0]
        return Memory(whole[:, basis.shape[1] :].float(), True)


class InfLoRA(Summed):
    """A module per task, summed; ``A`` from the inputs outside the old space, ``B`` trained.

    Args:
        threshold: ``epsilon_1``, the share of a site's inputs that counts as used by old tasks.
        threshold_end: ``epsilon_end``, what it grows towards.
        examples: Look at so many training examples of a task; null: at all of them.
        common: See :class:`~cl_peft.learners.summed.Summed`.
    """

    def __init__(
        self,
        threshold: Annotated[float, Field(gt=0, le=1)] = 0.95,
        threshold_end: Annotated[float, Field(gt=0, le=1)] = 1.0,
        examples: PositiveInt | None = None,
        **common: Any,  # noqa: ANN401
    ) -> None:
        super().__init__(**common)
        self.threshold, self.threshold_end, self.examples = threshold, threshold_end, examples

    def start(self, tools: Tools) -> None:
        """No direction is used yet.

        Raises:
            ConfigError: A site has no input vectors.
        """
        super().start(tools)
        for site in tools.bank.sites:
            if isinstance(site.layer, nn.Embedding):
                raise ConfigError(
                    f"learner=inflora looks at the input vectors of layers, but {site.name} reads "
                    "token ids. Leave embeddings out of module.sites."
                )
        self.memory = {s.name: Memory(torch.zeros(s.d_in, 0)) for s in tools.bank.sites}

    def learn(self, task: Task) -> None:
        """Fix ``A``, train ``B``, and remember which directions the task uses."""
        module, head = self._begin(task)
        for site, second in self._seconds(task, module).items():
            a, memory = module[site]["A"], self.memory[site]
            u = principal(memory.left(second))[0][:, : len(a)]
            # again through P: where fewer than r directions are left, the others are noise
            module[site]["A"] = (memory.left(u).T / math.sqrt(3)).to(a.device, a.dtype)
        self._fit(task, module, head, task.train, task.validation)
        share = task.index / self.tools.n_tasks
        threshold = self.threshold + (self.threshold_end - self.threshold) * share
        seconds = self._seconds(task, module)
        self.memory = {site: self.memory[site].update(c, threshold) for site, c in seconds.items()}
        self._keep(task.index, module, head)

    @torch.no_grad()
    def _seconds(self, task: Task, module: Module) -> dict[str, Tensor]:
        """``C`` of every site, ``(in, in)`` float64 on the CPU; ``module`` and all rows active."""
        bank, backbone = self.tools.bank, self.tools.backbone
        encoded = self.tools.features.encoded(task.train.inputs)
        if self.examples is not None and self.examples < len(encoded):
            random = generator(
                self.tools.seeds.data, task.index, 17
            )  # 17: other draws than batches
            encoded = encoded.take(
                torch.randperm(len(encoded), generator=random).numpy()[: self.examples]
            )
        sums = {s.name: torch.zeros(s.d_in, s.d_in, dtype=torch.float64) for s in bank.sites}
        mask: Tensor | None = None

        def watch(site: str) -> Callable[..., None]:
            def hook(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
                x = args[0].float()
                tokens = mask is not None and x.shape[:-1] == mask.shape
                x = x[mask] if tokens else x.flatten(0, -2)
                sums[site] += (x.T @ x).double().cpu()

            return hook

        ones = torch.ones(bank.count + 1, device=self._device)
        given = bank.compose(range(bank.count), ones, module)
        handles = [s.layer.register_forward_pre_hook(watch(s.name)) for s in bank.sites]
        try:
            with bank.give(given):
                for rows in by_length(encoded.lengths, self.tools.trainer.eval_batch_size):
                    batch = backbone.collate(encoded.take(rows))
                    mask = batch["attention_mask"].bool() if "attention_mask" in batch else None
                    backbone(batch)
        finally:
            for handle in handles:
                handle.remove()
        return sums

    def state(self) -> dict[str, Tensor]:
        """``M`` of every site."""
        return {_name(site, m.retain): m.basis for site, m in self.memory.items()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """The inverse of :meth:`state`."""
        retain = {site: _name(site, True) in state for site in self.memory}
        require(state, {_name(site, kind) for site, kind in retain.items()}, "learner=inflora")
        self.memory = {s: Memory(state[_name(s, kind)], kind) for s, kind in retain.items()}


def principal(x: Tensor) -> tuple[Tensor, Tensor]:
    """Left singular vectors of ``x (n, k)`` and squared singular values, largest first.

    By the eigenvectors of ``x x^T``, several times faster than the whole decomposition; exact
    enough in float64, as only large singular values are of interest.
    """
    values, vectors = torch.linalg.eigh(x @ x.T)
    return vectors.flip(1), values.clamp_min(0).flip(0)


def _name(site: str, retain: bool) -> str:
    return f"{site}/{'retain' if retain else 'remove'}"
