r"""A router's opinion about classes and the heads' own, combined log-linearly.

A router that knows classes has a score ``s_c`` for each class, from frozen features. The head of a
task that it routes to has a posterior ``p_t(c)``, from features that a module has adapted. They err
on different samples, so the class that answers is

.. math::
    \arg\max_{t \in \mathrm{top}_k, \; c \in t} \; a \, s_{t,c} + \log p_t(c)

over the ``k`` best tasks, or the best task's head alone. Which it is, and the weight ``a``, is
decided by the number of validation examples that each gets right, each counted once, when its task
has just been learned, so nothing is kept but a count per candidate. This is the product of experts
with one free exponent (Hinton 2002, equation 1); scores of any scale fit, since ``a`` covers it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from cl_peft.memo import Questions
    from cl_peft.routers.base import Choice

#: Candidates: None, the routed head alone; then ``a``, from nothing of the router's classes to
#: almost nothing of the heads. Small ones matter for routers whose scores are sharp, such as log
#: posteriors of Gaussians.
WEIGHTS = (None, 0.0, *(2.0**e for e in range(-10, 11)))


def opinions(choice: Choice, questions: Questions, top_k: int) -> tuple[Tensor, Tensor]:
    """What router and heads say about classes.

    Args:
        choice: With class scores.
        questions: The samples.
        top_k: Number of tasks that are asked.

    Returns:
        ``s`` and ``log p``, both ``(k, N, classes)``; ``-inf`` where a task does not know a class.
    """
    assert choice.class_scores is not None
    assert choice.pairs is not None
    tasks = choice.scores.topk(min(top_k, choice.scores.shape[1]), dim=1).indices
    heads = [z.log_softmax(1) for z in questions.ask(*tasks.T.numpy())]
    scores = []
    for chosen in tasks.T:
        mine = choice.pairs[None, :, 0] == chosen[:, None]  # (N, K)
        known = choice.class_scores.masked_fill(~mine, float("-inf"))
        classes = choice.pairs[:, 1].expand_as(known)
        out = torch.full_like(heads[0], float("-inf"))
        scores.append(out.scatter_reduce(1, classes, known, "amax"))
    return torch.stack(scores), torch.stack(heads)


def combine(scores: Tensor, heads: Tensor, weight: float | None) -> Tensor:
    """``max_t (a s + log p)``, ``(N, classes)``; ``-inf`` where no task asked knows a class.

    Without a weight the best task's ``log p``.
    """
    if weight is None:
        return heads[0].masked_fill(scores[0].isinf(), float("-inf"))
    known = ~(scores.isinf() | heads.isinf())
    both = torch.where(known, weight * scores + heads, float("-inf"))
    return both.amax(0)


def count_right(scores: Tensor, heads: Tensor, labels: Tensor) -> Tensor:
    """How many samples each of :data:`WEIGHTS` gets right, ``(weights,)`` int64."""
    return torch.stack(
        [(combine(scores, heads, weight).argmax(1) == labels).sum() for weight in WEIGHTS]
    )


def best_weight(right: Tensor) -> float | None:
    """The candidate with most right; of several the middle weight."""
    tied = torch.nonzero(right == right.max()).flatten()
    weights = tied[tied > 0]  # what the router knows of classes is used unless it hurts
    return WEIGHTS[int(weights[len(weights) // 2])] if len(weights) else None


def classes_alone(choice: Choice, n_classes: int) -> Tensor:
    """The router's class scores as logits, ``(N, classes)``: no head is asked."""
    assert choice.class_scores is not None
    assert choice.pairs is not None
    out = choice.class_scores.new_full((len(choice.class_scores), n_classes), float("-inf"))
    classes = choice.pairs[:, 1].expand_as(choice.class_scores)
    return out.scatter_reduce(1, classes, choice.class_scores, "amax")
