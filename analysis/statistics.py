"""Intervals and tests for a few seeds, in numpy; formula and source in each docstring.

Every result says how many pairs or runs it rests on and, for tests, the smallest p that so many
could reach at all: with five seeds a paired test cannot fall below 0.0625, whatever the numbers.

Sources:
    Agarwal et al. 2021, Deep RL at the Edge of the Statistical Precipice,
        https://arxiv.org/abs/2108.13264 (stratified bootstrap, interquartile mean)
    Demsar 2006, Statistical Comparisons of Classifiers over Multiple Data Sets, JMLR 7
        (Friedman, Nemenyi, critical-difference diagrams)
    Holm 1979, A Simple Sequentially Rejective Multiple Test Procedure, Scand. J. Stat. 6
    Phipson and Smyth 2010, Permutation P-values Should Never Be Zero,
        https://arxiv.org/abs/1603.05766
    Field and Welsh 2007, Bootstrapping Clustered Data, JRSS B 69
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from analysis.listing import count
from analysis.pairing import in_same_tasks
from cl_peft.errors import DataError

NAN = float("nan")
#: Up to this many pairs all sign patterns are tried (65,536); beyond, random ones.
MOST_EXACT = 16
Statistic = Callable[..., np.ndarray]


# ---------------------------------------------------------------- intervals


@dataclass(frozen=True)
class Interval:
    """An estimate with a bootstrap interval.

    Attributes:
        estimate: The statistic of the values as they are.
        low: Lower end; NaN where there is nothing to resample.
        high: Upper end.
        level: Nominal coverage.
        n: Values (or clusters) resampled.
    """

    estimate: float
    low: float
    high: float
    level: float
    n: int

    @property
    def half_width(self) -> float:
        """Half of the interval's width: the number after the plus-minus sign."""
        return (self.high - self.low) / 2


def interquartile_mean(values: ArrayLike) -> float:
    """Mean of the middle half of the values (Agarwal et al. 2021, IQM).

    ``mean(x_(g+1), ..., x_(n-g))``, ``g = floor(n / 4)``, as ``scipy.stats.trim_mean(x, 0.25)``.
    NaN for no values, and where one of them is NaN.
    """
    return float(_iqm(np.asarray(values, dtype=np.float64).reshape(-1)))


def bootstrap_interval(
    values: ArrayLike,
    strata: ArrayLike | None = None,
    *,
    statistic: str | Statistic = "mean",
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """Percentile interval by the stratified bootstrap (Agarwal et al. 2021, section 4).

    Within each stratum (a stream, a task) as many values as it has are drawn with replacement; the
    statistic of all strata's draws together gives one of ``resamples`` values, whose
    ``(1 - level) / 2`` and ``(1 + level) / 2`` quantiles are the interval.

    Give one value per independent run. Runs over several streams: the streams are the strata. The
    tasks of one run are not independent of one another, so as strata they suit values of runs that
    each stand for one task, not the cells of one accuracy matrix.

    With few values the interval is too short: at a nominal 95 %, intervals of 3 normal values cover
    the mean in about 75 % of cases, of 5 in 85 %, of 10 in 90 %. Say n beside it.

    Args:
        values: ``(N,)`` numbers, one per run.
        strata: ``(N,)`` labels; None is one stratum.
        statistic: "mean", "iqm", or a function of an array and ``axis=``.
        level: Nominal coverage.
        resamples: Number of bootstrap samples.
        seed: Of the resampling.

    Returns:
        The interval; its ends are NaN if no stratum holds two values, or one of them is NaN.

    Raises:
        DataError: No values, different lengths, or a level outside (0, 1).
    """
    data = np.asarray(values, dtype=np.float64)
    groups = np.zeros(len(data)) if strata is None else np.asarray(strata)
    if data.ndim != 1 or not len(data) or groups.shape != data.shape:
        raise DataError(f"One value per run, one stratum each: {data.shape} and {groups.shape}.")
    _check_level(level)
    f = _statistic(statistic)
    # sorted, so that equal values have equal intervals in whatever order runs were found
    parts = [np.sort(data[groups == label]) for label in sorted(pd.unique(groups), key=str)]
    estimate = float(f(np.concatenate(parts), axis=-1))
    if max(map(len, parts)) < 2 or np.isnan(data).any():
        return Interval(estimate, NAN, NAN, level, len(data))
    rng = np.random.default_rng(seed)
    drawn = [part[rng.integers(0, len(part), (resamples, len(part)))] for part in parts]
    values_drawn = np.asarray(f(np.concatenate(drawn, axis=1), axis=-1))
    return Interval(estimate, *_quantiles(values_drawn, level), level, len(data))


# ---------------------------------------------------------------- paired tests


@dataclass(frozen=True)
class PairedTest:
    """A two-sided paired test.

    Attributes:
        difference: Mean of ``a - b``.
        p: Two-sided p.
        n: Number of pairs.
        smallest_p: The smallest p that ``n`` pairs can give.
        exact: Whether all sign patterns were tried.
    """

    difference: float
    p: float
    n: int
    smallest_p: float
    exact: bool

    def note(self, alpha: float = 0.05) -> str:
        """What the test can show, for beside the result."""
        kind = "all sign patterns" if self.exact else "random sign patterns"
        text = f"{count(self.n, 'pair')}, {kind}"
        text += f"; the smallest p they can give is {self.smallest_p:.2g}"
        short = self.smallest_p > alpha
        return text + (f", so none can be significant at {alpha:g}" if short else "")


def paired_permutation(
    a: ArrayLike, b: ArrayLike, *, resamples: int = 20_000, seed: int = 0
) -> PairedTest:
    """Paired permutation test of the mean difference, two-sided, by flipping signs.

    If a and b are exchangeable within each pair, every pattern of signs of ``d = a - b`` is equally
    likely. With up to 16 pairs all are tried: ``p = #{|mean(s d)| >= |mean(d)|} / 2^n``. Beyond,
    ``m`` random ones: ``p = (1 + #{...}) / (1 + m)`` (Phipson and Smyth 2010), never zero.

    The smallest p is ``2 / 2^n`` for the exact test and ``1 / (1 + m)`` for the other.

    Args:
        a: ``(n,)`` values of one configuration, in the order of the pairs (the seeds).
        b: ``(n,)`` values of the other.
        resamples: ``m``.
        seed: Of the random patterns.

    Raises:
        DataError: Different lengths, no pair, or a value that is NaN.
    """
    first, second = checked_pairs(a, b)
    d = first - second
    n = len(d)
    exact = n <= MOST_EXACT
    if exact:
        bits = np.arange(2**n, dtype=np.int64)[:, None] >> np.arange(n) & 1
        signs = 1.0 - 2.0 * bits
    else:
        signs = np.random.default_rng(seed).choice([-1.0, 1.0], size=(resamples, n))
    # differences of equal numbers, and sums in another order, may be off in the last bits
    bound = abs(d.sum()) - 1e-12 * (np.abs(first) + np.abs(second)).sum()
    extreme = int((np.abs(signs @ d) >= bound).sum())
    p = extreme / 2**n if exact else (1 + extreme) / (1 + resamples)
    return PairedTest(float(d.mean()), p, n, smallest_p(n, resamples), exact)


def checked_pairs(a: ArrayLike, b: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Both sides of a paired test.

    Raises:
        DataError: Different lengths, no pair, or a value that is NaN.
    """
    first, second = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if first.shape != second.shape or first.ndim != 1 or not len(first):
        raise DataError(f"A paired test needs pairs: shapes {first.shape} and {second.shape}.")
    if np.isnan(first - second).any():
        raise DataError("A paired test needs numbers on both sides of every pair; one is NaN.")
    return first, second


def smallest_p(n: int, resamples: int = 20_000) -> float:
    """The smallest two-sided p that :func:`paired_permutation` can give for ``n`` pairs."""
    return 2.0 ** (1 - n) if n <= MOST_EXACT else 1 / (1 + resamples)


def mcnemar(only_a: int, only_b: int) -> float:
    """Exact two-sided McNemar test: are two models right equally often on the same examples?

    ``p = min(1, 2 P(X <= min(only_a, only_b)))``, ``X ~ Binomial(only_a + only_b, 1/2)``.
    Equals the paired permutation test of the examples' differences. About these two runs and other
    examples like these; other seeds are another question.

    Args:
        only_a: Examples that only the first answers right.
        only_b: Examples that only the second answers right.
    """
    n, k = only_a + only_b, min(only_a, only_b)
    logs = [
        math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1) - n * math.log(2)
        for i in range(k + 1)
    ]
    return min(1.0, 2 * math.fsum(map(math.exp, logs)))


def holm(p: ArrayLike) -> np.ndarray:
    """Holm's correction: adjusted p of several tests, the family-wise error under control.

    Sorted ascending, ``p~_(i) = max_{j <= i} min(1, (m - j + 1) p_(j))``. NaN (a test that was not
    possible) stays NaN and does not count in ``m``.
    """
    raw = np.asarray(p, dtype=np.float64)
    adjusted = np.full(raw.shape, NAN)
    tested = np.flatnonzero(~np.isnan(raw))
    order = tested[np.argsort(raw[tested], kind="stable")]
    factors = np.arange(len(order), 0, -1)
    adjusted[order] = np.maximum.accumulate(np.minimum(1.0, factors * raw[order]))
    return adjusted


# ---------------------------------------------------------------- per example, over runs


@dataclass(frozen=True)
class ExampleComparison:
    """Two configurations compared on the same examples.

    Attributes:
        difference: Accuracy of a minus accuracy of b, over all examples of all pairs of runs.
        interval: Of the difference.
        unit: What was resampled: "run", or "example" where there is a single pair of runs.
        pairs: One row per pair of runs: n, accuracy_a, accuracy_b, difference, only_a, only_b
            (right by one only).
        test: Sign-flip test over the pairs of runs; None for a single pair.
        mcnemar_p: For a single pair of runs, the exact McNemar p; else NaN.
    """

    difference: float
    interval: Interval
    unit: str
    pairs: pd.DataFrame
    test: PairedTest | None
    mcnemar_p: float


def compare_examples(
    pairs: Sequence[tuple[pd.DataFrame, pd.DataFrame]],
    *,
    prediction: str = "routed_prediction",
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> ExampleComparison:
    """Compare two configurations example by example, over several order seeds.

    Each pair holds the final predictions of two runs with the same seeds, so the same examples in
    the same tasks. The examples of one run share its modules and its order and are not independent,
    so whole pairs of runs are resampled (cluster bootstrap, Field and Welsh 2007): with ``D_r`` the
    sum over the examples of pair r of (a right) - (b right) and ``n_r`` their number, the statistic
    of a resample of pairs is ``sum D_r / sum n_r``. The p comes from flipping the signs of the
    pairs' differences in accuracy.

    A single pair leaves only its examples to resample, within each task; what comes out then holds
    for these two runs, and ``unit`` says "example".

    Args:
        pairs: ``(a, b)`` frames of :func:`analysis.load_predictions`, one evaluation each
            (``after_task=-1``).
        prediction: "routed_prediction" or "oracle_prediction".
        level: Nominal coverage.
        resamples: Number of bootstrap samples.
        seed: Of the resampling.

    Raises:
        DataError: No pairs; or two runs of a pair were not tested on the same examples, which is
            checked by content (:mod:`analysis.pairing`) where the frames say whose they are.
    """
    if not pairs:
        raise DataError("There is no pair of runs to compare.")
    _check_level(level)
    joined = [_joined(a, b, prediction) for a, b in pairs]
    table = pd.DataFrame([_pair_row(both) for both in joined])
    total = float((table["only_a"] - table["only_b"]).sum() / table["n"].sum())
    rng = np.random.default_rng(seed)
    if len(pairs) > 1:
        picks = rng.integers(0, len(table), (resamples, len(table)))
        gained = (table["only_a"] - table["only_b"]).to_numpy(dtype=np.float64)
        sizes = table["n"].to_numpy(dtype=np.float64)
        order = np.lexsort((sizes, gained))  # the order of the pairs decides nothing
        gained, sizes = gained[order], sizes[order]
        drawn = gained[picks].sum(1) / sizes[picks].sum(1)
        test = paired_permutation(table["accuracy_a"], table["accuracy_b"], seed=seed)
        interval = Interval(total, *_quantiles(drawn, level), level, len(table))
        return ExampleComparison(total, interval, "run", table, test, NAN)
    drawn = np.zeros(resamples)
    for _, task in joined[0].groupby("eval_task"):
        # drawing examples with replacement is drawing how many of each outcome there are
        outcome = [int((task["d"] == value).sum()) for value in (-1, 0, 1)]
        counts = rng.multinomial(len(task), np.array(outcome) / len(task), size=resamples)
        drawn += counts[:, 2] - counts[:, 0]
    n = len(joined[0])
    interval = Interval(total, *_quantiles(drawn / n, level), level, n)
    p = mcnemar(int(table["only_a"].iloc[0]), int(table["only_b"].iloc[0]))
    return ExampleComparison(total, interval, "example", table, None, p)


def _joined(a: pd.DataFrame, b: pd.DataFrame, prediction: str) -> pd.DataFrame:
    key = ["eval_task", "row", "label"]
    for name, frame in (("first", a), ("second", b)):
        if frame.empty or frame["after_task"].nunique() > 1 or frame.duplicated(key).any():
            raise DataError(
                f"The {name} frame must hold each example of one evaluation once; load it with "
                "load_predictions(folder, after_task=-1)."
            )
    folders = [frame.attrs.get("run_folder") for frame in (a, b)]
    if folders[0] is not None and folders[1] is not None:
        in_same_tasks(folders[0], folders[1])
    columns = [*key, prediction]
    both = a[columns].merge(b[columns], on=key, suffixes=("_a", "_b"))
    if not len(both) == len(a) == len(b):
        raise DataError(
            f"The two runs of a pair share {len(both)} examples, of {len(a)} and {len(b)}: other "
            "tasks, order or test data. Pair runs of equal stream and seed.order."
        )
    right = {side: both[f"{prediction}_{side}"] == both["label"] for side in ("a", "b")}
    return both.assign(
        right_a=right["a"],
        right_b=right["b"],
        d=right["a"].astype("int8") - right["b"].astype("int8"),
    )


def _pair_row(both: pd.DataFrame) -> dict[str, float]:
    a, b = both["right_a"], both["right_b"]
    return {
        "n": len(both),
        "accuracy_a": float(a.mean()),
        "accuracy_b": float(b.mean()),
        "difference": float(a.mean() - b.mean()),
        "only_a": int((a & ~b).sum()),
        "only_b": int((b & ~a).sum()),
    }


# ---------------------------------------------------------------- shared


def _statistic(statistic: str | Statistic) -> Statistic:
    known: dict[str, Statistic] = {"mean": np.mean, "iqm": _iqm}
    if not isinstance(statistic, str):
        return statistic
    if statistic not in known:
        raise DataError(f'statistic is {statistic!r}; allowed: "mean", "iqm", or a function')
    return known[statistic]


def _iqm(values: np.ndarray, axis: int = -1) -> np.ndarray:
    n = values.shape[axis]
    if n == 0:
        return np.full(np.delete(values.shape, axis), NAN)
    cut = n // 4
    ordered = np.sort(values, axis=axis)
    mean = np.take(ordered, np.arange(cut, n - cut), axis=axis).mean(axis=axis)
    # sorting moves NaN to the end, where it would be cut off unseen
    return np.where(np.isnan(values).any(axis=axis), NAN, mean)


def _quantiles(values: np.ndarray, level: float) -> tuple[float, float]:
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise DataError(f"level is {level}; it must lie between 0 and 1, such as 0.95")
