"""Each metric against a naive twin written from its formula with loops and 1-based indices."""

import math
from dataclasses import asdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from cl_peft import metrics as m

NAN = float("nan")


# ------------------------------------------------------------ naive twins, straight from the papers


class Paper:
    """R[t, i] with 1-based indices, so that the formulas read as printed."""

    def __init__(self, R):
        self.R, self.T = R, len(R)

    def __getitem__(self, cell):
        t, i = cell
        return float(self.R[t - 1][i - 1])


def naive_average_accuracy(R, t=None):
    p = Paper(R)
    t = t or p.T
    return sum(p[t, i] for i in range(1, t + 1)) / t


def naive_average_accuracy_micro(R, n):
    p = Paper(R)
    return sum(n[i - 1] * p[p.T, i] for i in range(1, p.T + 1)) / sum(n)


def naive_average_incremental_accuracy(R):
    return sum(naive_average_accuracy(R, t) for t in range(1, len(R) + 1)) / len(R)


def naive_learning_accuracy(R):
    p = Paper(R)
    return sum(p[i, i] for i in range(1, p.T + 1)) / p.T


def naive_forgetting(R):
    p, total = Paper(R), 0.0
    for i in range(1, p.T):
        total += max(p[k, i] for k in range(i, p.T)) - p[p.T, i]
    return total / (p.T - 1)


def naive_forgetting_nonnegative(R):
    p, total = Paper(R), 0.0
    for i in range(1, p.T):
        total += max(p[k, i] for k in range(i, p.T + 1)) - p[p.T, i]
    return total / (p.T - 1)


def naive_forgetting_first_last(R):
    p = Paper(R)
    return sum(p[i, i] - p[p.T, i] for i in range(1, p.T)) / (p.T - 1)


def naive_forgetting_one_step(R):
    p, total = Paper(R), 0.0
    for t in range(2, p.T + 1):
        for i in range(1, t):
            total += (p[t - 1, i] - p[t, i]) / (t - 1)
    return total / (p.T - 1)


def naive_backward_transfer(R):
    p = Paper(R)
    return sum(p[p.T, i] - p[i, i] for i in range(1, p.T)) / (p.T - 1)


def naive_forward_transfer(R, b):
    p = Paper(R)
    return sum(p[i - 1, i] - b[i - 1] for i in range(2, p.T + 1)) / (p.T - 1)


TWINS = {
    m.average_accuracy: naive_average_accuracy,
    m.average_incremental_accuracy: naive_average_incremental_accuracy,
    m.learning_accuracy: naive_learning_accuracy,
    m.forgetting: naive_forgetting,
    m.forgetting_nonnegative: naive_forgetting_nonnegative,
    m.forgetting_first_last: naive_forgetting_first_last,
    m.forgetting_one_step: naive_forgetting_one_step,
    m.backward_transfer: naive_backward_transfer,
}
NEEDS_TWO_TASKS = [
    m.forgetting,
    m.forgetting_nonnegative,
    m.forgetting_first_last,
    m.forgetting_one_step,
    m.backward_transfer,
]

accuracies = st.integers(0, 40).map(lambda k: k / 40)  # a test set of 40: ties do happen


@st.composite
def lower_triangular(draw, smallest=2):
    n_tasks = draw(st.integers(smallest, 6))
    R = draw(hnp.arrays(np.float64, (n_tasks, n_tasks), elements=accuracies))
    R[np.triu_indices(n_tasks, 1)] = NAN
    return R


# Worked by hand. Task 1: .9, .5, .7; task 2: .8, .6; task 3: .7
HAND = np.array([[0.9, NAN, NAN], [0.5, 0.8, NAN], [0.7, 0.6, 0.7]])


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        (m.average_accuracy, (0.7 + 0.6 + 0.7) / 3),
        (m.average_incremental_accuracy, (0.9 + 0.65 + 2.0 / 3) / 3),
        (m.learning_accuracy, 0.8),
        (m.forgetting, (0.2 + 0.2) / 2),
        (m.forgetting_first_last, (0.2 + 0.2) / 2),
        # step 2: .9 - .5; step 3: mean(.5 - .7, .8 - .6) = 0
        (m.forgetting_one_step, (0.4 + 0.0) / 2),
        (m.backward_transfer, -0.2),
    ],
)
def test_hand_computed(metric, expected):
    assert metric(HAND) == pytest.approx(expected, abs=1e-12)


def test_forgetting_variants_disagree_as_they_should():
    # Task 1: .5, then .9, then .6. Task 2 ends better than ever before: .4, then .7.
    R = [[0.5, NAN, NAN], [0.9, 0.4, NAN], [0.6, 0.7, 0.8]]
    assert m.forgetting(R) == pytest.approx((0.3 - 0.3) / 2, abs=1e-12)
    assert m.forgetting_nonnegative(R) == pytest.approx((0.3 + 0.0) / 2)
    assert m.forgetting_first_last(R) == pytest.approx((-0.1 - 0.3) / 2)
    assert m.forgetting_one_step(R) == pytest.approx((-0.4 + (0.3 - 0.3) / 2) / 2)


def test_average_accuracy_of_an_earlier_row():
    assert m.average_accuracy(HAND, 0) == pytest.approx(0.9)
    assert m.average_accuracy(HAND, 1) == pytest.approx(0.65)


def test_micro_weighs_by_test_samples():
    assert m.average_accuracy_micro([[1.0, NAN], [1.0, 0.0]], [30, 10]) == pytest.approx(0.75)
    assert m.average_accuracy_micro([[1.0, NAN], [1.0, 0.0]], [30, 10], t=0) == 1.0


def test_backward_transfer_divisors():
    assert m.backward_transfer(HAND, "T") == pytest.approx(-0.2 * 2 / 3)
    with pytest.raises(ValueError, match='"T-1", "T"'):
        m.backward_transfer(HAND, "T+1")


def test_forward_transfer_needs_cells_above_the_diagonal():
    full = [[0.9, 0.3, 0.2], [0.8, 0.9, 0.5], [0.7, 0.8, 0.9]]
    assert m.forward_transfer(full, [NAN, 0.1, 0.1]) == pytest.approx((0.2 + 0.4) / 2)
    assert math.isnan(m.forward_transfer(HAND, [0.1, 0.1, 0.1]))


def test_intransigence_is_per_task():
    found = m.intransigence(HAND, [0.9, 0.9, NAN])
    np.testing.assert_allclose(found, [0.0, 0.1, NAN], atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(R=lower_triangular(), data=st.data())
def test_agrees_with_naive_twins(R, data):
    for metric, twin in TWINS.items():
        assert metric(R) == pytest.approx(twin(R), abs=1e-12), metric.__name__
    n_tasks = len(R)
    assert m.backward_transfer(R, "T") == pytest.approx(
        naive_backward_transfer(R) * (n_tasks - 1) / n_tasks, abs=1e-12
    )
    sizes = data.draw(st.lists(st.integers(1, 50), min_size=n_tasks, max_size=n_tasks))
    assert m.average_accuracy_micro(R, sizes) == pytest.approx(
        naive_average_accuracy_micro(R, sizes)
    )
    full = np.nan_to_num(R, nan=0.25)
    baseline = data.draw(hnp.arrays(np.float64, n_tasks, elements=accuracies))
    assert m.forward_transfer(full, baseline) == pytest.approx(
        naive_forward_transfer(full, baseline), abs=1e-12
    )


@settings(max_examples=60, deadline=None)
@given(R=lower_triangular())
def test_relations_between_variants(R):
    assert m.forgetting_nonnegative(R) >= 0
    assert m.forgetting_nonnegative(R) >= m.forgetting(R) >= m.forgetting_first_last(R) - 1e-12
    assert m.forgetting_first_last(R) == pytest.approx(-m.backward_transfer(R), abs=1e-12)
    same_size = np.full(len(R), 17)
    assert m.average_accuracy_micro(R, same_size) == pytest.approx(m.average_accuracy(R))


def test_frozen_columns_forget_exactly_nothing():
    R = np.tril(np.tile([0.1, 0.3, 0.7], (3, 1)))
    R[np.triu_indices(3, 1)] = NAN
    for metric in NEEDS_TWO_TASKS:
        assert metric(R) == 0.0, metric.__name__


# ------------------------------------------------------------ cells that do not exist


@pytest.mark.filterwarnings("error")
def test_one_task_has_no_forgetting():
    for metric in NEEDS_TWO_TASKS:
        assert math.isnan(metric([[0.9]])), metric.__name__
    assert m.average_accuracy([[0.9]]) == m.average_incremental_accuracy([[0.9]]) == 0.9
    split = m.forgetting_split([[0.9]], [[0.8]])
    assert math.isnan(split.module_drift)
    assert math.isnan(split.routing_drift)


@pytest.mark.filterwarnings("error")
def test_only_the_last_row_was_evaluated():
    """The joint learner: the end is known, everything over time is not."""
    R = np.full((3, 3), NAN)
    R[-1] = [0.9, 0.8, 0.7]
    assert m.average_accuracy(R) == pytest.approx(0.8)
    assert m.average_accuracy_micro(R, [1, 1, 2]) == pytest.approx(0.775)
    for metric in (m.average_incremental_accuracy, m.learning_accuracy, *NEEDS_TWO_TASKS):
        assert math.isnan(metric(R)), metric.__name__
    assert math.isnan(m.forgetting_split(R, R).total)


@settings(max_examples=60, deadline=None)
@given(R=lower_triangular(), data=st.data())
def test_a_missing_cell_is_never_read_as_a_number(R, data):
    """NaN out exactly where the formula touches the cell; the other metrics do not move."""
    row = data.draw(st.integers(0, len(R) - 1))
    column = data.draw(st.integers(0, row))
    holed = R.copy()
    holed[row, column] = NAN
    last, diagonal, old = row == len(R) - 1, row == column, column < len(R) - 1
    touched = {
        m.average_accuracy: last,
        m.average_incremental_accuracy: True,
        m.learning_accuracy: diagonal,
        m.forgetting: old,
        m.forgetting_nonnegative: old,
        m.forgetting_first_last: old and (last or diagonal),
        m.forgetting_one_step: old,
        m.backward_transfer: old and (last or diagonal),
    }
    for metric, hit in touched.items():
        if hit:
            assert math.isnan(metric(holed)), metric.__name__
        else:
            assert metric(holed) == metric(R), metric.__name__


@pytest.mark.parametrize("bad", [[0.9, 0.8], [[0.9, 0.8]], np.zeros((0, 0))])
def test_not_a_matrix(bad):
    with pytest.raises(ValueError, match=r"\(T, T\)"):
        m.average_accuracy(bad)


def test_wrong_number_of_sizes():
    with pytest.raises(ValueError, match="n must have one entry per task"):
        m.average_accuracy_micro(HAND, [1, 2])


# ------------------------------------------------------------ routing


def test_router_accuracy_and_confusion():
    true, routed = [0, 0, 0, 1, 1, 2], [0, 1, -1, 1, 1, 0]
    assert m.router_accuracy(true, routed) == pytest.approx(3 / 6)
    np.testing.assert_array_equal(
        m.routing_confusion(true, routed, 3), [[1, 1, 0, 1], [0, 2, 0, 0], [1, 0, 0, 0]]
    )
    assert math.isnan(m.router_accuracy([], []))
    assert m.routing_confusion([], [], 2).sum() == 0


@pytest.mark.parametrize(("true", "routed"), [([3], [0]), ([0], [3]), ([-1], [0]), ([0], [-2])])
def test_confusion_refuses_unknown_tasks(true, routed):
    with pytest.raises(ValueError, match=r"0\.\.2"):
        m.routing_confusion(np.array(true), np.array(routed), 3)


def test_length_mismatch_is_named():
    with pytest.raises(ValueError, match=r"routed_task \(1,\)"):
        m.router_accuracy([1, 2], [1])
    with pytest.raises(ValueError, match=r"routed_right \(1,\)"):
        m.decompose([True, False], [True, False], [True])


def test_decompose_by_hand():
    oracle = [1, 1, 0, 1, 1, 0, 0]
    routed = [1, 1, 0, 0, 1, 0, 1]
    right = [1, 1, 1, 0, 0, 0, 0]
    found = m.decompose(oracle, routed, right)
    assert asdict(found) == {
        "n": 7,
        "n_routed_right_oracle_right": 2,
        "n_routed_right_oracle_wrong": 1,
        "n_misrouted_oracle_right": 2,
        "n_misrouted_oracle_wrong": 2,
        "n_lost_by_routing": 1,
        "n_lucky": 1,
    }
    assert found.accuracy == pytest.approx(4 / 7)
    assert found.oracle_accuracy == pytest.approx(4 / 7)
    assert found.router_accuracy == pytest.approx(3 / 7)
    assert found.routing_loss == found.misroute_luck == pytest.approx(1 / 7)


samples = st.lists(st.tuples(st.booleans(), st.booleans(), st.booleans()), max_size=60)


@settings(max_examples=100, deadline=None)
@given(parts=st.lists(samples, min_size=1, max_size=4))
def test_decomposition_identity(parts):
    columns = [np.array(part, dtype=bool).reshape(-1, 3).T for part in parts]
    found = [m.decompose(*column) for column in columns]
    pooled = m.Decomposition.pool(found)
    assert pooled == m.decompose(*np.concatenate(columns, axis=1))
    for one, (oracle, routed, right) in zip(found, columns, strict=True):
        assert (
            one.n
            == len(oracle)
            == (
                one.n_routed_right_oracle_right
                + one.n_routed_right_oracle_wrong
                + one.n_misrouted_oracle_right
                + one.n_misrouted_oracle_wrong
            )
        )
        assert one.n_correct == sum(routed)  # the identity, in whole samples
        assert one.n_oracle_correct == sum(oracle)
        if one.n:
            assert one.router_accuracy == pytest.approx(sum(right) / one.n)
            assert one.accuracy == pytest.approx(
                one.oracle_accuracy - one.routing_loss + one.misroute_luck, abs=1e-12
            )
        else:
            assert math.isnan(one.accuracy)


def naive_split(oracle, routed):
    o, r = Paper(oracle), Paper(routed)
    n_tasks, module, routing = o.T, 0.0, 0.0
    for i in range(1, n_tasks):
        best = i
        for k in range(i, n_tasks):
            if r[k, i] > r[best, i]:
                best = k
        module += o[best, i] - o[n_tasks, i]
        routing += (o[n_tasks, i] - r[n_tasks, i]) - (o[best, i] - r[best, i])
    return module / (n_tasks - 1), routing / (n_tasks - 1)


@settings(max_examples=100, deadline=None)
@given(oracle=lower_triangular(), data=st.data())
def test_drifts_add_up_to_routed_forgetting(oracle, data):
    shape = oracle.shape
    routed = data.draw(hnp.arrays(np.float64, shape, elements=accuracies))
    routed[np.triu_indices(len(routed), 1)] = NAN
    split = m.forgetting_split(oracle, routed)
    assert (split.module_drift, split.routing_drift) == pytest.approx(
        naive_split(oracle, routed), abs=1e-12
    )
    assert split.total == pytest.approx(m.forgetting(routed), abs=1e-12)


def test_split_names_the_cause():
    """Modules that never change: all forgetting is routing drift, and module drift exactly 0."""
    oracle = [[0.9, NAN], [0.9, 0.8]]
    split = m.forgetting_split(oracle, [[0.9, NAN], [0.6, 0.7]])
    assert split.module_drift == 0.0
    assert split.routing_drift == pytest.approx(0.3)
    # A perfect router: all forgetting is module drift, and routing drift exactly 0.
    drifting = [[0.9, NAN], [0.5, 0.8]]
    split = m.forgetting_split(drifting, drifting)
    assert split.module_drift == pytest.approx(0.4)
    assert split.routing_drift == 0.0


def test_split_needs_equal_shapes():
    with pytest.raises(ValueError, match="they must agree"):
        m.forgetting_split(HAND, [[0.9]])
