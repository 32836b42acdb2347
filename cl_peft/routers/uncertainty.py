r"""The module that is surest of its answer, by asking all of them: T passes per sample.

With ``p_t`` the posterior of task t's head on its own module's features, over its ``C_t`` classes,
a task's score is

* ``entropy``: ``-H(p_t) / log C_t``, the least entropy of the posterior (TUNA: Wang et al. 2025,
  arXiv:2508.08165), relative to the largest possible, so that heads of different sizes compare;
* ``confidence``: ``max_c p_t(c)`` (Hendrycks and Gimpel 2017, arXiv:1610.02136);
* ``margin``: ``max_c p_t(c)`` minus the second largest;
* ``energy``: ``log sum_c exp z_{t,c}`` of its logits ``z`` (Liu et al. 2020, arXiv:2010.03759).

A head with one class is always sure, which says nothing: it gets the least score of ``entropy``,
``confidence`` and ``margin``. Nothing is stored. Modules are not trained to be unsure of other
tasks' samples, which is what limits all four.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from cl_peft.routers.base import Choice, Router
from cl_peft.store import require

if TYPE_CHECKING:
    from cl_peft.memo import Questions


class Uncertainty(Router):
    """Asks every module, and believes the surest.

    Args:
        measure: What sure means.
        common: See :class:`~cl_peft.routers.base.Router`.
    """

    needs_features: ClassVar[bool] = False

    def __init__(
        self,
        measure: Literal["entropy", "confidence", "margin", "energy"] = "entropy",
        **common: Any,  # noqa: ANN401
    ) -> None:
        super().__init__(**common)
        self.measure = measure

    def fit(self, features: Tensor, labels: Tensor, task: int) -> None:
        """Nothing to learn."""

    def choose(self, features: Tensor, tasks: Tensor | None = None) -> Choice:
        """Features alone do not say what modules answer."""
        raise RuntimeError("this router asks modules: call route()")

    def _choose(self, questions: Questions) -> Choice:
        with self.timed(len(questions)):  # what the memo has costs no pass
            logits = questions.logits()
            scores = [self._score(logits[task]) for task in sorted(logits)]
            return Choice.best(torch.stack(scores, dim=1))

    def _score(self, z: Tensor) -> Tensor:
        """``(N, C)`` to ``(N,)``."""
        if self.measure == "energy":
            return z.logsumexp(1)
        if z.shape[1] == 1:
            return z.new_full((len(z),), -1.0 if self.measure == "entropy" else 0.0)
        log_p = z.log_softmax(1)
        if self.measure == "entropy":
            return (log_p.exp() * log_p).sum(1) / math.log(z.shape[1])
        top = log_p.exp().topk(2, dim=1).values
        return top[:, 0] if self.measure == "confidence" else top[:, 0] - top[:, 1]

    def state(self) -> dict[str, Tensor]:
        """Empty."""
        return {}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Nothing to load."""
        require(state, set(), "router=uncertainty")
