r"""DualPrompt (Wang et al. 2022, ECCV, arXiv:2204.04799).

A general prompt ``g`` that trains on every task, and per task an expert prompt ``e_t`` with a key
``k_t (H,)``, both fixed when the task ends. Task t trains with its own expert:

.. math::
    L = \mathrm{CE}(h(f([g ; e_t ; x])), y) + \lambda (1 - \cos(q, k_t))

averaged over a batch; ``q`` is the sample's frozen feature. At test time, and for validation, a
sample takes the expert whose key is nearest to its query: :math:`\mathrm{argmax}_t \cos(q, k_t)`.
The cross-entropy compares the task's classes (``train_mask`` of the official code).

Shapes: general ``(1, P, ...)``, experts ``(t, P, ...)``, keys ``(t, H)`` from ``U(0, 1)``. Stored:
these and the widening head. The expert is chosen by the key alone, also for the oracle, which only
narrows the answer to the true task's classes.

Defaults: official code for CIFAR-100 (github.com/google-research/l2p): both prompts have 5 tokens,
``lambda = 1``, an expert starts as a copy of the last one (``shared_prompt_pool``).

Differences: the paper places both as prefixes, the general one at layers 1-2 and experts at 3-5. A
module of this platform acts at all its layers, so here both are at all layers (``module=prefix``)
or at the input (``module=prompt``), and both have ``module.tokens`` tokens. The official test code
lets a batch vote on its expert (``batchwise_prompt``); here each sample chooses its own.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import NonNegativeFloat
from torch import Tensor

from cl_peft.learners.pool import Pool, PromptPool, similarity


class DualPrompt(PromptPool):
    """A general prompt, and an expert prompt per task that samples choose by its key.

    Args:
        pull: Weight ``lambda`` that pulls the task's key to its queries.
        copy_last: Start an expert as a copy of the last one; otherwise afresh.
        common: See :class:`~cl_peft.learners.pool.PromptPool`.
    """

    prompts: ClassVar[tuple[str, ...]] = ("general", "experts")
    grown: ClassVar[tuple[str, ...]] = ("experts", "keys")

    def __init__(
        self,
        pull: NonNegativeFloat = 1.0,
        copy_last: bool = True,
        **common: Any,  # noqa: ANN401
    ) -> None:
        super().__init__(**common)
        self.pull, self.copy_last = pull, copy_last

    @property
    def at_once(self) -> int:
        """The general prompt and an expert."""
        return 2

    def _start(self, random: torch.Generator) -> Pool:
        general, experts = self._draw(2, random).split(1)
        keys = torch.rand(1, self.tools.backbone.width, generator=random)
        if self.pool:
            general = self.pool["general"]
            experts = self.pool["experts"][-1:] if self.copy_last else experts
        return {"general": general, "experts": experts, "keys": keys}

    def _compose(self, pool: Pool, queries: Tensor, training: bool) -> Tensor:
        if training:
            chosen = torch.full((len(queries),), len(pool["keys"]) - 1, device=queries.device)
        else:
            chosen = similarity(queries, pool["keys"]).argmax(1)
        general = pool["general"].expand(len(queries), *pool["general"].shape[1:])
        return torch.stack([general, pool["experts"][chosen]], dim=1)

    def _penalty(self, pool: Pool, queries: Tensor) -> Tensor:
        return self.pull * (1 - similarity(queries, pool["keys"][-1:])).mean()
