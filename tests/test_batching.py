import numpy as np
import pytest

from cl_peft.batching import bucketed, by_length


@pytest.fixture
def lengths():
    return np.random.default_rng(0).integers(1, 120, 517)


def waste(batches, lengths):
    padded = sum(lengths[b].max() * len(b) for b in batches)
    return 1 - lengths.sum() / padded


def test_by_length_gives_every_index_once_longest_first(lengths):
    batches = list(by_length(lengths, 32))
    order = np.concatenate(batches)
    assert sorted(order) == list(range(517))
    assert [len(b) for b in batches] == [32] * 16 + [5]
    assert (np.diff(lengths[order]) <= 0).all()
    equal = np.concatenate(list(by_length(np.full(7, 3), 2)))
    assert equal.tolist() == list(range(7))
    assert list(by_length(np.zeros(0, dtype=int), 4)) == []


@pytest.mark.parametrize(("count", "size"), [(517, 32), (64, 32), (5, 32), (33, 1), (0, 4)])
def test_bucketed_gives_every_index_once(count, size):
    lengths = np.random.default_rng(1).integers(1, 50, count)
    batches = bucketed(lengths, size, np.random.default_rng(2))
    assert sorted(i for b in batches for i in b) == list(range(count))
    assert all(0 < len(b) <= size for b in batches)
    assert len(batches) == -(-count // size)


def test_bucketed_wastes_less_than_a_plain_shuffle_and_still_shuffles(lengths):
    batches = bucketed(lengths, 32, np.random.default_rng(3))
    order = np.random.default_rng(3).permutation(517)
    naive = [order[i : i + 32] for i in range(0, 517, 32)]
    assert waste(batches, lengths) < 0.5 * waste(naive, lengths)
    means = [lengths[b].mean() for b in batches]
    assert means != sorted(means)
    assert means != sorted(means, reverse=True)


def test_bucketed_is_decided_by_its_generator(lengths):
    def run(seed):
        return [b.tolist() for b in bucketed(lengths, 32, np.random.default_rng(seed))]

    assert run(4) == run(4)
    assert run(4) != run(5)
    first = {frozenset(b) for b in run(4)}
    assert not first & {frozenset(b) for b in run(5)}  # other batches, not only another order
