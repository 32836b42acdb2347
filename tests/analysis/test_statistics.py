import itertools

import numpy as np
import pandas as pd
import pytest
import scipy.stats

import analysis
from analysis import ranks, statistics
from cl_peft.errors import DataError


@pytest.fixture
def rng():
    return np.random.default_rng(7)


# ---------------------------------------------------------------- intervals


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 7, 8, 20])
def test_interquartile_mean_is_a_trimmed_mean(rng, n):
    values = rng.normal(size=n)
    assert analysis.interquartile_mean(values) == pytest.approx(
        scipy.stats.trim_mean(values, 0.25), abs=1e-12
    )


def test_interquartile_mean_does_not_trim_what_is_missing():
    assert np.isnan(analysis.interquartile_mean([1, 2, 3, np.nan]))
    assert np.isnan(analysis.interquartile_mean([]))


@pytest.mark.parametrize("statistic", [np.mean, np.median])
def test_bootstrap_agrees_with_scipy(rng, statistic):
    values = np.sort(rng.normal(size=12))  # as the interval draws from them
    mine = analysis.bootstrap_interval(values, statistic=statistic, resamples=5000, seed=3)
    theirs = scipy.stats.bootstrap(
        (values,), statistic, n_resamples=5000, method="percentile", rng=np.random.default_rng(3)
    ).confidence_interval
    assert (mine.low, mine.high) == pytest.approx((theirs.low, theirs.high), abs=1e-12)
    assert mine.estimate == pytest.approx(statistic(values))
    assert mine.half_width == pytest.approx((theirs.high - theirs.low) / 2)


def test_strata_are_resampled_apart():
    """Between two streams that differ a lot, no seed varies: stratified, nothing is uncertain."""
    values, streams = [0.2] * 4 + [0.9] * 4, ["hard"] * 4 + ["easy"] * 4
    together = analysis.bootstrap_interval(values)
    apart = analysis.bootstrap_interval(values, streams)
    assert together.low < 0.45
    assert (apart.low, apart.high) == pytest.approx((0.55, 0.55))


def test_stratified_bootstrap_against_all_resamples():
    """Two strata of two and three values: every resample listed, its exact quantiles compared."""
    a, b = [0.0, 1.0], [0.0, 3.0, 9.0]
    means = [
        np.mean([*x, *y])
        for x in itertools.product(a, repeat=2)
        for y in itertools.product(b, repeat=3)
    ]
    exact = np.quantile(means, [0.05, 0.95])
    mine = analysis.bootstrap_interval([*a, *b], list("aabbb"), level=0.9, resamples=40_000)
    assert (mine.low, mine.high) == pytest.approx(exact, abs=0.15)
    assert mine.estimate == np.mean([*a, *b])


def test_the_order_of_values_decides_nothing(rng):
    values, streams = rng.normal(size=8), np.array(["a", "b"] * 4)
    found = analysis.bootstrap_interval(values, streams, resamples=200)
    for order in (np.arange(8)[::-1], rng.permutation(8)):
        other = analysis.bootstrap_interval(values[order], streams[order], resamples=200)
        assert (other.low, other.high) == (found.low, found.high)


def test_intervals_of_too_little():
    one = analysis.bootstrap_interval([0.7])
    assert (one.estimate, one.n) == (0.7, 1)
    assert np.isnan([one.low, one.high, one.half_width]).all()
    assert np.isnan(analysis.bootstrap_interval([0.7, np.nan]).low)
    with pytest.raises(DataError, match="One value per run"):
        analysis.bootstrap_interval([])
    with pytest.raises(DataError, match="between 0 and 1"):
        analysis.bootstrap_interval([1, 2], level=95)
    with pytest.raises(DataError, match="statistic is 'median'"):
        analysis.bootstrap_interval([1, 2], statistic="median")


def test_the_same_seed_gives_the_same_interval(rng):
    values = rng.normal(size=9)
    assert analysis.bootstrap_interval(values) == analysis.bootstrap_interval(values)
    assert analysis.bootstrap_interval(values) != analysis.bootstrap_interval(values, seed=1)


# ---------------------------------------------------------------- tests


@pytest.mark.parametrize("n", [2, 5, 8])
def test_paired_permutation_agrees_with_scipy(rng, n):
    a, b = rng.normal(size=n), rng.normal(0.3, size=n)
    mine = analysis.paired_permutation(a, b)
    theirs = scipy.stats.permutation_test(
        (a, b),
        lambda x, y, axis: np.mean(x - y, axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=np.inf,
    )
    assert mine.exact
    assert mine.p == pytest.approx(theirs.pvalue)
    assert mine.difference == pytest.approx(np.mean(a - b))


def test_smallest_p_is_reached_and_said():
    test = analysis.paired_permutation([1, 2, 3, 4, 5], [0, 0, 0, 0, 0])
    assert test.p == test.smallest_p == analysis.smallest_p(5) == 0.0625
    assert "5 pairs" in test.note()
    assert "none can be significant at 0.05" in test.note()
    assert "none" not in analysis.paired_permutation([1] * 6, [0] * 6).note()


def test_many_pairs_are_sampled(rng):
    a = rng.normal(0.5, size=40)
    b = rng.normal(size=40)
    mine = analysis.paired_permutation(a, b)
    theirs = scipy.stats.permutation_test(
        (a, b),
        lambda x, y, axis: np.mean(x - y, axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=20_000,
        rng=np.random.default_rng(0),
    )
    assert not mine.exact
    assert mine.p == pytest.approx(theirs.pvalue, abs=0.02)
    assert mine == analysis.paired_permutation(a, b)  # seeded
    far = analysis.paired_permutation(a + 100, b)
    assert far.p == far.smallest_p == pytest.approx(1 / 20_001)


def test_equal_sums_in_another_order_count_as_equal():
    a = np.array([0.1, 0.2, 0.3, 0.7])
    assert analysis.paired_permutation(a, a[::-1]).p == 1.0
    assert analysis.paired_permutation([0.1, 0.1, 0.1], [0.0, 0.0, 0.0]).p == 0.25


@pytest.mark.parametrize(("a", "b"), [([], []), ([1], [1, 2]), ([1, np.nan], [1, 2])])
def test_paired_permutation_needs_pairs(a, b):
    with pytest.raises(DataError, match="A paired test needs"):
        analysis.paired_permutation(a, b)


@pytest.mark.parametrize(("b", "c"), [(0, 0), (0, 1), (3, 12), (40, 31), (7, 7), (0, 300)])
def test_mcnemar_is_a_binomial_test(b, c):
    expected = scipy.stats.binomtest(b, b + c).pvalue if b + c else 1.0
    assert analysis.mcnemar(b, c) == pytest.approx(expected, rel=1e-9)


def test_mcnemar_is_the_permutation_test_of_the_examples():
    d = np.array([1.0] * 9 + [-1.0] * 3 + [0.0] * 4)
    assert analysis.mcnemar(9, 3) == pytest.approx(analysis.paired_permutation(d, 0 * d).p)


def test_holm():
    # the worked example: sorted 0.005, 0.01, 0.03, 0.04 times 4, 3, 2, 1, never decreasing
    np.testing.assert_allclose(analysis.holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])
    np.testing.assert_allclose(analysis.holm([0.5, np.nan, 0.02]), [0.5, np.nan, 0.04])
    np.testing.assert_allclose(analysis.holm([0.6, 0.7]), [1.0, 1.0])
    assert analysis.holm([]).size == 0


def test_holm_rejects_what_the_step_down_procedure_rejects(rng):
    for _ in range(50):
        p = rng.uniform(0, 0.1, size=6)
        rejected = set()
        for step, k in enumerate(np.argsort(p)):  # Holm 1979, as a procedure
            if p[k] > 0.05 / (len(p) - step):
                break
            rejected.add(k)
        assert set(np.flatnonzero(analysis.holm(p) <= 0.05)) == rejected


# ---------------------------------------------------------------- per example


def predictions(right, task=1):
    n = len(right)
    return pd.DataFrame(
        {
            "after_task": 2,
            "eval_task": task,
            "row": np.arange(n),
            "label": 0,
            "routed_prediction": np.where(right, 0, 1),
        }
    )


def test_examples_of_several_runs_are_resampled_by_run(rng):
    pairs, gains, sizes = [], [], []
    for n, rate in ((100, 0.9), (60, 0.7), (80, 0.8), (200, 0.6)):
        a, b = rng.random(n) < rate, rng.random(n) < rate - 0.2
        pairs.append((predictions(a), predictions(b).sample(frac=1, random_state=1)))
        gains.append(int(a.sum()) - int(b.sum()))
        sizes.append(n)
    result = analysis.compare_examples(pairs, resamples=40_000)
    assert result.unit == "run"
    assert result.difference == pytest.approx(sum(gains) / sum(sizes))
    every = [
        sum(gains[k] for k in pick) / sum(sizes[k] for k in pick)
        for pick in itertools.product(range(4), repeat=4)
    ]
    exact = np.quantile(every, [0.025, 0.975])
    assert (result.interval.low, result.interval.high) == pytest.approx(exact, abs=0.01)
    accuracies = np.array([[a["routed_prediction"].eq(0).mean() for a in pair] for pair in pairs])
    assert result.test.p == analysis.paired_permutation(*accuracies.T).p
    assert (result.pairs["only_a"] - result.pairs["only_b"]).tolist() == gains
    # the order of the pairs decides nothing
    few, other = (analysis.compare_examples(p, resamples=50) for p in (pairs, pairs[::-1]))
    assert few.interval == other.interval


def test_a_single_pair_of_runs_resamples_its_examples_within_tasks(rng):
    a, b = rng.random(150) < 0.8, rng.random(150) < 0.7
    second = (predictions(np.ones(50, bool), 2), predictions(np.zeros(50, bool), 2))
    one, two = (
        pd.concat([predictions(right), other]) for right, other in zip((a, b), second, strict=True)
    )
    result = analysis.compare_examples([(one, two)])
    assert result.unit == "example"
    assert result.test is None
    assert result.difference == pytest.approx((a.sum() - b.sum() + 50) / 200)
    d = a.astype(float) - b.astype(float)
    theirs = scipy.stats.bootstrap(
        (d,), lambda x, axis: (x.sum(axis) + 50) / 200, method="percentile", n_resamples=10_000
    ).confidence_interval
    assert (result.interval.low, result.interval.high) == pytest.approx(
        (theirs.low, theirs.high), abs=0.01
    )
    only_a, only_b = (a & ~b).sum() + 50, (b & ~a).sum()
    assert result.mcnemar_p == pytest.approx(scipy.stats.binomtest(only_a, only_a + only_b).pvalue)


def test_examples_must_be_the_same():
    a = predictions([True] * 5)
    with pytest.raises(DataError, match="share 3 examples, of 5 and 3"):
        analysis.compare_examples([(a, a.head(3))])
    with pytest.raises(DataError, match="each example of one evaluation once"):
        analysis.compare_examples([(pd.concat([a, a.assign(after_task=1)]), a)])
    with pytest.raises(DataError, match="no pair of runs"):
        analysis.compare_examples([])


# ---------------------------------------------------------------- ranks


@pytest.mark.parametrize("n", [3, 6, 9])
def test_wilcoxon_agrees_with_scipy(rng, n):
    for digits in (1, 8):  # with ties and differences of zero, and without
        a, b = rng.normal(size=n).round(digits), rng.normal(0.5, size=n).round(digits)
        b[0] = a[0] if digits == 1 else b[0]
        mine = analysis.wilcoxon(a, b)
        every = scipy.stats.PermutationMethod(n_resamples=np.inf)
        theirs = scipy.stats.wilcoxon((a - b).round(12), zero_method="pratt", method=every)
        assert mine.p == pytest.approx(theirs.pvalue)
        assert mine.difference == pytest.approx(np.mean(a - b))
        assert mine.smallest_p == analysis.smallest_p(n)


def test_wilcoxon_tries_the_signs_once(monkeypatch):
    calls = []
    plain = statistics.paired_permutation
    monkeypatch.setattr(
        ranks, "paired_permutation", lambda *a, **k: calls.append(a) or plain(*a, **k)
    )
    assert analysis.wilcoxon([3.0, 1.0, 2.5], [1.0, 2.0, 0.5]).difference == 1.0
    assert len(calls) == 1
    with pytest.raises(DataError, match="needs pairs"):
        analysis.wilcoxon([1.0], [1.0, 2.0])


def test_wilcoxon_ranks_differences():
    """One stream on which a wins by a lot counts as one rank, not as its points."""
    a, b = [0.9, 0.50, 0.51, 0.52], [0.1, 0.51, 0.53, 0.55]
    assert analysis.wilcoxon(a, b).difference == pytest.approx(0.185)
    assert analysis.wilcoxon(a, b).p == scipy.stats.wilcoxon(a, b, method="exact").pvalue == 0.875
    with pytest.raises(DataError, match="A paired test needs"):
        analysis.wilcoxon([1, 2], [1])


def test_friedman_agrees_with_scipy(rng):
    for digits in (1, 6):  # with and without ties
        scores = rng.normal(size=(9, 4)).round(digits)
        theirs = scipy.stats.friedmanchisquare(*scores.T)
        assert analysis.friedman(scores) == pytest.approx((theirs.statistic, theirs.pvalue))
    statistic, p = analysis.friedman(np.ones((3, 3)))
    assert np.isnan(statistic)
    assert p == 1.0


@pytest.mark.parametrize("df", range(1, 10))
def test_chi_square_tail(df):
    for x in (0.0, 0.01, 1.0, 7.5, 40.0, 200.0):
        assert ranks.chi_square_tail(x, df) == pytest.approx(scipy.stats.chi2.sf(x, df), rel=1e-9)


@pytest.mark.parametrize("k", [2, 3, 5, 10, 30])
def test_studentized_range(k):
    for p in (0.5, 0.9, 0.95, 0.99):
        q = scipy.stats.studentized_range.ppf(p, k, np.inf)
        assert ranks.range_quantile(p, k) == pytest.approx(q, abs=1e-6)
        assert ranks.range_cdf(q, k) == pytest.approx(p, abs=1e-7)
    assert ranks.range_cdf(0.0, k) == 0.0


def test_demsar_table():
    """Critical values q of Demsar 2006, table 5(a)."""
    for k, q in ((2, 1.960), (3, 2.343), (5, 2.728), (10, 3.164)):
        assert ranks.range_quantile(0.95, k) / np.sqrt(2) == pytest.approx(q, abs=1e-3)


def test_critical_difference():
    scores = pd.DataFrame(
        {"good": [0.9, 0.8, 0.95, 0.9], "fair": [0.7, 0.8, 0.6, 0.7], "bad": [0.1, 0.2, 0.3, 0.1]},
        index=["w", "x", "y", "z"],
    )
    result = analysis.critical_difference(scores)
    assert result.ranks.to_dict() == {"good": 1.125, "fair": 1.875, "bad": 3.0}
    assert result.cd == pytest.approx(2.3437 * np.sqrt(3 * 4 / (6 * 4)), abs=1e-3)
    assert result.cliques == (("good", "fair"), ("fair", "bad"))
    theirs = scipy.stats.friedmanchisquare(*scores.to_numpy().T)
    assert (result.statistic, result.p) == pytest.approx((theirs.statistic, theirs.pvalue))
    assert result.smallest_p == pytest.approx(scipy.stats.chi2.sf(8, 2))
    worst = result.pairs.set_index(["a", "b"]).loc[("good", "bad")]
    z = worst["difference"] / np.sqrt(3 * 4 / (6 * 4))
    p = scipy.stats.studentized_range.sf(z * np.sqrt(2), 3, np.inf)
    assert worst["p"] == pytest.approx(p, abs=1e-6)
    assert (worst["p"] < 0.05) == (worst["difference"] > result.cd)
    low = analysis.critical_difference(scores, higher_is_better=False)
    assert low.ranks.index.tolist() == ["bad", "fair", "good"]


def test_a_bar_inside_another_is_not_drawn():
    scores = pd.DataFrame(np.arange(12).reshape(4, 3) % 5, columns=list("abc"))
    result = analysis.critical_difference(scores)
    assert result.ranks.max() - result.ranks.min() < result.cd
    assert [len(clique) for clique in result.cliques] == [3]


def test_critical_difference_needs_a_whole_table():
    scores = pd.DataFrame({"a": [1.0, np.nan], "b": [0.5, 0.4]}, index=["x", "y"])
    with pytest.raises(DataError, match="'a' has no score in block 'y'"):
        analysis.critical_difference(scores)
    with pytest.raises(DataError, match="not 1 and 2"):
        analysis.critical_difference(scores.head(1))


def test_nothing_here_needs_scipy():
    for module in (statistics, ranks):
        assert not {"scipy", "sklearn"} & set(vars(module))
