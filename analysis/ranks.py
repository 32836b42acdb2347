"""Methods over several data sets: Wilcoxon for two, Friedman and Nemenyi for more.

After Demsar 2006, Statistical Comparisons of Classifiers over Multiple Data Sets, JMLR 7, sections
3.1.3 and 3.2. A data set is a stream, with one number per method: its mean over seeds. Seeds are no
data sets. The distributions are computed here, so nothing beyond numpy is needed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from analysis.statistics import PairedTest, checked_pairs, paired_permutation
from cl_peft.errors import DataError

#: What ranks over blocks are about.
ABOUT = {
    "stream": "streams",
    "seed": "seeds of one stream (so about its seeds only)",
    "block": "blocks",
}


@dataclass(frozen=True)
class CriticalDifference:
    """What a critical-difference diagram shows.

    Attributes:
        ranks: Average rank of each method, best (lowest) first.
        cd: Critical difference: methods whose ranks are closer are not told apart (Nemenyi).
        alpha: Level of the Nemenyi test.
        n: Number of blocks ranked.
        unit: What a block is: "stream", "seed" (of a single stream) or "block".
        statistic: Friedman's chi-square, corrected for ties.
        p: Of Friedman's test: are all methods equal?
        smallest_p: The smallest p that so many blocks and methods can give.
        pairs: Nemenyi p of each pair: columns a, b, difference (of ranks), p.
        cliques: Largest sets of methods next to one another that are not told apart.
    """

    ranks: pd.Series
    cd: float
    alpha: float
    n: int
    unit: str
    statistic: float
    p: float
    smallest_p: float
    pairs: pd.DataFrame
    cliques: tuple[tuple[str, ...], ...]

    def note(self) -> str:
        """One sentence for beside the diagram."""
        what = f"{self.n} {ABOUT[self.unit]} and {len(self.ranks)} methods"
        short = ", so none can be significant" if self.smallest_p >= self.alpha else ""
        return (
            f"Friedman over {what}: chi-square {self.statistic:.2f}, p {self.p:.2g} (the smallest "
            f"they can give is {self.smallest_p:.2g}{short}); "
            f"Nemenyi CD {self.cd:.2f} at {self.alpha:g}"
        )


def critical_difference(
    scores: pd.DataFrame,
    *,
    alpha: float = 0.05,
    higher_is_better: bool = True,
    unit: str = "block",
) -> CriticalDifference:
    """Rank methods within each block and test which ranks differ.

    With ``N`` blocks, ``k`` methods and average ranks ``R_j`` (ties share their mean rank):

    Friedman ``chi2 = 12 N / (k (k + 1)) sum_j (R_j - (k + 1) / 2)^2 / C``, with the correction for
    ties ``C = 1 - sum (t^3 - t) / (N k (k^2 - 1))``; k - 1 degrees of freedom.

    Nemenyi ``CD = q_alpha sqrt(k (k + 1) / (6 N))``, ``q_alpha`` the studentized range of k means
    with infinite degrees of freedom, divided by ``sqrt(2)``.

    The chi-square is an approximation that is rough for fewer than about 10 blocks.

    Args:
        scores: Index: blocks, best streams. Columns: methods.
        alpha: Level of the Nemenyi test.
        higher_is_better: False ranks low values first.
        unit: What a block is: "stream", "seed" or "block".

    Raises:
        DataError: Fewer than two blocks or methods, or a missing score.
    """
    table = scores.to_numpy(dtype=np.float64)
    n, k = table.shape
    if n < 2 or k < 2:
        raise DataError(f"Ranks need at least 2 {unit}s and 2 methods, not {n} and {k}.")
    if np.isnan(table).any():
        row, column = np.argwhere(np.isnan(table))[0]
        raise DataError(
            f"Method {scores.columns[column]!r} has no score in block {scores.index[row]!r}. Leave "
            "out one of them."
        )
    ranked = pd.DataFrame(-table if higher_is_better else table).rank(axis=1).to_numpy()
    means = ranked.mean(0)
    statistic, p = _friedman(ranked)
    names = [str(c) if not isinstance(c, tuple) else ", ".join(map(str, c)) for c in scores.columns]
    ranks = pd.Series(means, index=names, name="rank").sort_values(kind="stable")
    spread = math.sqrt(k * (k + 1) / (6 * n))
    cd = range_quantile(1 - alpha, k) / math.sqrt(2) * spread
    pairs = pd.DataFrame(
        [
            (a, b, ranks[b] - ranks[a], 1 - range_cdf((ranks[b] - ranks[a]) / spread * 2**0.5, k))
            for i, a in enumerate(ranks.index)
            for b in ranks.index[i + 1 :]
        ],
        columns=["a", "b", "difference", "p"],
    )
    return CriticalDifference(
        ranks=ranks,
        cd=cd,
        alpha=alpha,
        n=n,
        unit=unit,
        statistic=statistic,
        p=p,
        smallest_p=chi_square_tail(n * (k - 1), k - 1),
        pairs=pairs,
        cliques=_cliques(ranks, cd),
    )


def wilcoxon(a: ArrayLike, b: ArrayLike, *, seed: int = 0) -> PairedTest:
    """Wilcoxon's signed-rank test of two methods over data sets, two-sided (Demsar 2006, 3.1.3).

    The sizes of ``d = a - b`` are ranked (ties share their mean rank, a difference of 0 is ranked
    and counts for neither side, after Pratt 1959); p is the share of all patterns of signs whose
    ``|sum of signed ranks|`` is at least that found, random patterns beyond 16 pairs. Ranks, since
    a point on one stream is not worth a point on another.

    The smallest p is ``2 / 2^n``: five data sets cannot fall below 0.0625, whatever the numbers.

    Args:
        a: ``(n,)`` one number per data set for one method.
        b: ``(n,)`` for the other.
        seed: Of the random patterns.

    Raises:
        DataError: Different lengths, no pair, or a value that is NaN.
    """
    first, second = checked_pairs(a, b)
    d = (first - second).round(12)  # equal differences of other numbers may be off in the last bits
    signed = np.sign(d) * pd.Series(np.abs(d)).rank().to_numpy()
    ranked = paired_permutation(signed, np.zeros(len(d)), seed=seed)
    return replace(ranked, difference=float((first - second).mean()))


def friedman(scores: ArrayLike) -> tuple[float, float]:
    """Friedman's test: chi-square corrected for ties, and p; see :func:`critical_difference`.

    Args:
        scores: ``(N, k)`` blocks by methods.

    Returns:
        Statistic and p; NaN and 1.0 where all methods tie in every block.
    """
    return _friedman(pd.DataFrame(np.asarray(scores, dtype=np.float64)).rank(axis=1).to_numpy())


def chi_square_tail(x: float, df: int) -> float:
    """``P(X >= x)`` of a chi-square with a whole number of degrees of freedom, in closed form.

    Even: ``exp(-x/2) sum_{i < df/2} (x/2)^i / i!``. Odd: ``erfc(sqrt(x/2)) + exp(-x/2)
    sum_{i < (df-1)/2} (x/2)^(i + 1/2) / Gamma(i + 3/2)``. (Abramowitz and Stegun 26.4.4 and .5.)
    """
    half = x / 2
    if half <= 0:
        return 1.0
    offset = 0.5 if df % 2 else 0.0
    terms = [
        math.exp(-half + (i + offset) * math.log(half) - math.lgamma(i + offset + 1))
        for i in range((df - (df % 2)) // 2)
    ]
    return min(1.0, (math.erfc(math.sqrt(half)) if df % 2 else 0.0) + math.fsum(terms))


def range_cdf(q: float, k: int) -> float:
    """``P(range of k standard normals <= q)``: the studentized range with infinite freedom.

    ``k integral phi(z) (Phi(z) - Phi(z - q))^(k - 1) dz``, by Simpson's rule on [-9, 9 + q].
    """
    if q <= 0:
        return 0.0
    z = np.linspace(-9.0, 9.0 + q, 4001)
    density = np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)
    integrand = k * density * (_normal_cdf(z) - _normal_cdf(z - q)) ** (k - 1)
    weights = np.full(len(z), 2.0)
    weights[1::2] = 4.0
    weights[[0, -1]] = 1.0
    return float(min(1.0, (weights * integrand).sum() * (z[1] - z[0]) / 3))


def range_quantile(probability: float, k: int) -> float:
    """The ``q`` with ``range_cdf(q, k) = probability``, by bisection."""
    low, high = 0.0, 20.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if range_cdf(middle, k) < probability else (low, middle)
    return (low + high) / 2


# ---------------------------------------------------------------- parts


def _friedman(ranked: np.ndarray) -> tuple[float, float]:
    n, k = ranked.shape
    ties = 0.0
    for row in ranked:
        sizes = np.unique(row, return_counts=True)[1].astype(np.float64)
        ties += float((sizes**3 - sizes).sum())
    correction = 1 - ties / (n * k * (k**2 - 1))
    if correction <= 0:
        return float("nan"), 1.0
    spread = float(((ranked.mean(0) - (k + 1) / 2) ** 2).sum())
    statistic = 12 * n / (k * (k + 1)) * spread / correction
    return statistic, chi_square_tail(statistic, k - 1)


def _cliques(ranks: pd.Series, cd: float) -> tuple[tuple[str, ...], ...]:
    """Runs of neighbours no farther apart than ``cd``, without those inside a longer one."""
    values, names = ranks.to_numpy(), list(ranks.index)
    found: list[tuple[str, ...]] = []
    reached = 0
    for i in range(len(values)):
        last = int(np.searchsorted(values, values[i] + cd, side="right"))
        if last > reached and last - i > 1:
            found.append(tuple(names[i:last]))
        reached = max(reached, last)
    return tuple(found)


def _normal_cdf(z: np.ndarray) -> np.ndarray:
    return 0.5 * np.vectorize(math.erfc)(-z / math.sqrt(2))
