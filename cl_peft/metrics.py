"""Continual-learning metrics: pure numpy functions, formula and source in each docstring.

Notation. ``T`` tasks; ``R[t, i]`` is the accuracy on task ``i`` after learning task ``t``, both
0-based here (formulas below write them 1-based, as the papers do). A cell that does not exist, or
was not evaluated, is NaN. NaN is never read as zero and never skipped: a metric that needs a
missing cell is itself NaN, and so is one that has nothing to average (forgetting of one task).
For the value "after task t" of a metric, pass the leading block ``R[:t + 1, :t + 1]``.

Four different quantities are called forgetting in the literature; each has its own name here, and
is stored under that name.

Sources:
    GEM: Lopez-Paz and Ranzato 2017, https://arxiv.org/abs/1706.08840
    RWalk: Chaudhry et al. 2018, https://arxiv.org/abs/1801.10112
    iCaRL: Rebuffi et al. 2017, https://arxiv.org/abs/1611.07725
    MER: Riemer et al. 2019, https://arxiv.org/abs/1810.11910
    CODA-Prompt: Smith et al. 2023, https://arxiv.org/abs/2211.13218
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

NAN = float("nan")


# ---------------------------------------------------------------- averages over the matrix


def average_accuracy(R: ArrayLike, t: int | None = None) -> float:
    """Macro average accuracy: every task counts the same (ACC of GEM).

    ``A_t = (1 / t) sum_{i <= t} R[t, i]``

    Args:
        R: ``(T, T)`` accuracies.
        t: 0-based row; None is the last one, so the result is ``A_T``.
    """
    matrix = _matrix(R)
    row = len(matrix) - 1 if t is None else t
    return _mean(matrix[row, : row + 1])


def average_accuracy_micro(R: ArrayLike, n: ArrayLike, t: int | None = None) -> float:
    """Micro average accuracy: every test sample counts the same.

    ``sum_{i <= t} n_i R[t, i] / sum_{i <= t} n_i``

    Equals :func:`average_accuracy` only where all test sets have the same size.

    Args:
        R: ``(T, T)`` accuracies.
        n: ``(T,)`` number of test samples of each task.
        t: 0-based row; None is the last one.

    Raises:
        ValueError: ``n`` does not have one entry per task.
    """
    matrix = _matrix(R)
    sizes = _per_task(n, len(matrix), "n")
    row = len(matrix) - 1 if t is None else t
    total = sizes[: row + 1].sum()
    return float(sizes[: row + 1] @ matrix[row, : row + 1] / total) if total > 0 else NAN


def average_incremental_accuracy(R: ArrayLike) -> float:
    """Average over time of the average accuracy so far (iCaRL; also AAA, average anytime accuracy).

    ``AAA = (1 / T) sum_t A_t``
    """
    matrix = _matrix(R)
    return _mean([average_accuracy(matrix, t) for t in range(len(matrix))])


def learning_accuracy(R: ArrayLike) -> float:
    """How well each task was learned when it was new (MER): ``(1 / T) sum_i R[i, i]``."""
    return _mean(np.diagonal(_matrix(R)))


# ---------------------------------------------------------------- forgetting, four variants


def forgetting(R: ArrayLike) -> float:
    """Forgetting of Chaudhry et al. (RWalk): the best past accuracy minus the last one.

    ``F = 1 / (T - 1) sum_{i < T} ( max_{i <= l < T} R[l, i] - R[T, i] )``

    The last row is not in the maximum, so a task that ends better than ever before contributes a
    negative value.
    """
    matrix = _matrix(R)
    return _mean([matrix[i:-1, i].max() - matrix[-1, i] for i in range(len(matrix) - 1)])


def forgetting_nonnegative(R: ArrayLike) -> float:
    """The variant of :func:`forgetting` whose maximum includes the last row: never below zero.

    ``1 / (T - 1) sum_{i < T} ( max_{i <= l <= T} R[l, i] - R[T, i] )``
    """
    matrix = _matrix(R)
    return _mean([matrix[i:, i].max() - matrix[-1, i] for i in range(len(matrix) - 1)])


def forgetting_first_last(R: ArrayLike) -> float:
    """The variant "first minus last" (Avalanche's ``Forgetting``): minus backward transfer.

    ``1 / (T - 1) sum_{i < T} ( R[i, i] - R[T, i] )``
    """
    matrix = _matrix(R)
    return _mean(np.diagonal(matrix)[:-1] - matrix[-1, :-1])


def forgetting_one_step(R: ArrayLike) -> float:
    """CODA-Prompt's forgetting: the drop of each old task at each step, averaged over steps.

    ``1 / (T - 1) sum_{2 <= t <= T} 1 / (t - 1) sum_{i < t} ( R[t - 1, i] - R[t, i] )``

    As in ``utils/calc_forgetting.py`` of the authors' code, for tasks of equal size. One step's
    drop is about ``1 / (T - 1)`` of the whole, so the numbers are several times smaller than those
    of :func:`forgetting`.
    """
    matrix = _matrix(R)
    return _mean([_mean(matrix[t - 1, :t] - matrix[t, :t]) for t in range(1, len(matrix))])


# ---------------------------------------------------------------- transfer and plasticity


def backward_transfer(R: ArrayLike, divisor: Literal["T-1", "T"] = "T-1") -> float:
    """Backward transfer (GEM): what later tasks changed in earlier ones; negative is forgetting.

    ``BWT = 1 / (T - 1) sum_{i < T} ( R[T, i] - R[i, i] )``

    Args:
        R: ``(T, T)`` accuracies.
        divisor: ``"T-1"`` as in the paper, or ``"T"`` as some code divides.

    Raises:
        ValueError: An unknown divisor.
    """
    if divisor not in ("T-1", "T"):
        raise ValueError(f'divisor is {divisor!r}; allowed: "T-1", "T"')
    matrix = _matrix(R)
    mean = _mean(matrix[-1, :-1] - np.diagonal(matrix)[:-1])
    return mean if divisor == "T-1" else mean * (len(matrix) - 1) / len(matrix)


def forward_transfer(R: ArrayLike, baseline: ArrayLike) -> float:
    """Forward transfer (GEM): accuracy on a task before it is learned, above the untrained model.

    ``FWT = 1 / (T - 1) sum_{2 <= i <= T} ( R[i - 1, i] - b_i )``

    NaN where the matrix has no cells above its diagonal, as with per-task heads that do not exist
    before their task.

    Args:
        R: ``(T, T)`` accuracies, with ``R[i - 1, i]`` filled.
        baseline: ``(T,)`` accuracy ``b_i`` of the untrained model; its first entry is not used.

    Raises:
        ValueError: ``baseline`` does not have one entry per task.
    """
    matrix = _matrix(R)
    untrained = _per_task(baseline, len(matrix), "baseline")
    return _mean(np.diagonal(matrix, offset=1) - untrained[1:])


def intransigence(R: ArrayLike, joint: ArrayLike) -> np.ndarray:
    """Intransigence (RWalk): how far a new task stays below what joint training reaches on it.

    ``I_t = a*_t - R[t, t]``

    Args:
        R: ``(T, T)`` accuracies.
        joint: ``(T,)`` accuracy ``a*_t`` on task t of a model trained jointly on tasks 1..t.

    Returns:
        ``(T,)`` one value per task, NaN where either is missing.

    Raises:
        ValueError: ``joint`` does not have one entry per task.
    """
    matrix = _matrix(R)
    return _per_task(joint, len(matrix), "joint") - np.diagonal(matrix)


# ---------------------------------------------------------------- routing


def router_accuracy(true_task: ArrayLike, routed_task: ArrayLike) -> float:
    """Task identification: the share of samples routed to their own task; NaN for no samples.

    Args:
        true_task: ``(N,)`` task of each sample.
        routed_task: ``(N,)`` task it was routed to, counted from the same base.

    Raises:
        ValueError: Different lengths.
    """
    true, routed = _aligned(true_task=true_task, routed_task=routed_task)
    return _mean(true == routed)


def routing_confusion(true_task: ArrayLike, routed_task: ArrayLike, n_tasks: int) -> np.ndarray:
    """Confusion matrix of the router.

    Args:
        true_task: ``(N,)`` 0-based task of each sample.
        routed_task: ``(N,)`` 0-based task it was routed to, or -1 for no task.
        n_tasks: ``T``.

    Returns:
        ``(T, T + 1)`` counts: row = true task, column = routed task, last column = no task.

    Raises:
        ValueError: Different lengths, or a task outside ``0 .. T - 1`` (or ``-1``).
    """
    true, routed = _aligned(true_task=true_task, routed_task=routed_task)
    counts = np.zeros((n_tasks, n_tasks + 1), dtype=np.int64)
    if not len(true):
        return counts
    if true.min() < 0 or routed.min() < -1 or max(true.max(), routed.max()) >= n_tasks:
        raise ValueError(
            f"tasks must lie in 0..{n_tasks - 1} (routed: or -1); found true {true.min()}.."
            f"{true.max()}, routed {routed.min()}..{routed.max()}"
        )
    np.add.at(counts, (true, routed), 1)  # -1 lands in the last column by itself
    return counts


@dataclass(frozen=True)
class Decomposition:
    """Where the routed model's errors come from, as counts; field names are the stored metrics.

    A sample was routed right or wrong, and the true task's module (the oracle) answers it right or
    wrong: four counts that add up to ``n``. Two more compare the two predictions of a sample:
    ``n_lost_by_routing`` (oracle right, routed wrong) and ``n_lucky`` (oracle wrong, routed right:
    by another task's module, or where the router mixes modules or has an opinion about classes,
    even if it found the task). The identity is exact, in whole samples:

    ``n_correct = n_oracle_correct - n_lost_by_routing + n_lucky``
    """

    n: int = 0
    n_routed_right_oracle_right: int = 0
    n_routed_right_oracle_wrong: int = 0
    n_misrouted_oracle_right: int = 0
    n_misrouted_oracle_wrong: int = 0
    n_lost_by_routing: int = 0
    n_lucky: int = 0

    @property
    def n_oracle_correct(self) -> int:
        """Samples that the true task's module answers right."""
        return self.n_routed_right_oracle_right + self.n_misrouted_oracle_right

    @property
    def n_correct(self) -> int:
        """Samples that the routed model answers right."""
        return self.n_oracle_correct - self.n_lost_by_routing + self.n_lucky

    @property
    def accuracy(self) -> float:
        """Routed accuracy = oracle_accuracy - routing_loss + misroute_luck."""
        return self._share(self.n_correct)

    @property
    def oracle_accuracy(self) -> float:
        """Accuracy if every sample went to its own task's module."""
        return self._share(self.n_oracle_correct)

    @property
    def router_accuracy(self) -> float:
        """Share of samples routed to their own task."""
        return self._share(self.n_routed_right_oracle_right + self.n_routed_right_oracle_wrong)

    @property
    def routing_loss(self) -> float:
        """Share of all samples that routing turned from right to wrong."""
        return self._share(self.n_lost_by_routing)

    @property
    def misroute_luck(self) -> float:
        """Share of all samples that routing turned from wrong to right."""
        return self._share(self.n_lucky)

    def _share(self, count: int) -> float:
        return count / self.n if self.n else NAN

    @classmethod
    def pool(cls, parts: Iterable[Decomposition]) -> Decomposition:
        """Add the counts of several tasks: the decomposition over all their samples."""
        rows = list(parts)
        names = [field.name for field in fields(cls)]
        return cls(**{name: sum(getattr(part, name) for part in rows) for name in names})


def decompose(
    oracle_correct: ArrayLike, routed_correct: ArrayLike, routed_right: ArrayLike
) -> Decomposition:
    """Count right and wrong predictions by whether the route was right.

    Args:
        oracle_correct: ``(N,)`` bool, the true task's module answers right.
        routed_correct: ``(N,)`` bool, the module(s) that the router chose answer right.
        routed_right: ``(N,)`` bool, the router chose the true task.

    Raises:
        ValueError: Different lengths.
    """
    oracle, correct, right = (
        np.asarray(values, dtype=bool)
        for values in _aligned(
            oracle_correct=oracle_correct, routed_correct=routed_correct, routed_right=routed_right
        )
    )
    return Decomposition(
        n=len(oracle),
        n_routed_right_oracle_right=int((right & oracle).sum()),
        n_routed_right_oracle_wrong=int((right & ~oracle).sum()),
        n_misrouted_oracle_right=int((~right & oracle).sum()),
        n_misrouted_oracle_wrong=int((~right & ~oracle).sum()),
        n_lost_by_routing=int((oracle & ~correct).sum()),
        n_lucky=int((~oracle & correct).sum()),
    )


@dataclass(frozen=True)
class ForgettingSplit:
    """Routed forgetting in its two causes; see :func:`forgetting_split`."""

    module_drift: float
    routing_drift: float

    @property
    def total(self) -> float:
        """Chaudhry forgetting of the routed matrix."""
        return self.module_drift + self.routing_drift


def forgetting_split(oracle: ArrayLike, routed: ArrayLike) -> ForgettingSplit:
    """Split routed forgetting (Chaudhry) into module drift and routing drift.

    With ``D = oracle - routed`` (what routing costs in a cell) and, for each task ``i < T``, the
    time of its best routed accuracy ``l* = argmax_{i <= l < T} routed[l, i]`` (the earliest, on
    ties):

    ``module drift  = oracle[l*, i] - oracle[T, i]``: the modules themselves answer worse;
    ``routing drift = D[T, i] - D[l*, i]``: routing costs more than it did.

    Both are averaged over ``i < T``; they add up to ``forgetting(routed)``. A learner that never
    touches an old module has a module drift of exactly 0.

    Args:
        oracle: ``(T, T)`` accuracies under the true task's module.
        routed: ``(T, T)`` accuracies under the router's choice.

    Raises:
        ValueError: Different shapes.
    """
    Ro, Rr = _matrix(oracle), _matrix(routed)
    if Ro.shape != Rr.shape:
        raise ValueError(f"oracle has shape {Ro.shape}, routed {Rr.shape}; they must agree")
    last, cost = len(Rr) - 1, Ro - Rr
    module, routing = [], []
    for i in range(last):
        best = i + int(np.argmax(Rr[i:last, i]))  # a missing cell is found first and gives NaN
        module.append(Ro[best, i] - Ro[last, i])
        routing.append(cost[last, i] - cost[best, i])
    return ForgettingSplit(module_drift=_mean(module), routing_drift=_mean(routing))


# ---------------------------------------------------------------- shared checks


def _matrix(R: ArrayLike) -> np.ndarray:
    matrix = np.asarray(R, dtype=np.float64)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not len(matrix):
        raise ValueError(f"an accuracy matrix must be (T, T) with T >= 1, not {matrix.shape}")
    return matrix


def _per_task(values: ArrayLike, n_tasks: int, name: str) -> np.ndarray:
    array = np.asarray(values, dtype=np.float64)
    if array.shape != (n_tasks,):
        raise ValueError(f"{name} must have one entry per task ({n_tasks}), not {array.shape}")
    return array


def _aligned(**arrays: ArrayLike) -> list[np.ndarray]:
    columns = {name: np.asarray(values) for name, values in arrays.items()}
    if len({column.shape for column in columns.values()}) != 1:
        shapes = ", ".join(f"{name} {column.shape}" for name, column in columns.items())
        raise ValueError(f"one entry per sample each, but the shapes differ: {shapes}")
    return list(columns.values())


def _mean(values: ArrayLike) -> float:
    """Mean that lets NaN through, and is NaN (without a warning) for nothing at all."""
    array = np.asarray(values, dtype=np.float64)
    return float(array.mean()) if array.size else NAN
