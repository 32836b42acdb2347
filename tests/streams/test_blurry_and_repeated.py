"""Streams whose tasks are uneven, share examples' classes with their neighbours, or come again."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_protocol import cut, groups, per_class, raw

from cl_peft.errors import DataError
from cl_peft.streams.base import Stream


def rows(stream, *splits):
    return sorted(
        int(row) for task in stream.tasks for split in splits for row in getattr(task, split).rows
    )


# ------------------------------------------------------------------ uneven


def test_sizes_are_those_asked_for():
    sizes = [3, 1, 2]
    even, uneven = cut(raw(), order=4), cut(raw(), order=4, sizes=sizes)
    assert [len(g) for g in groups(uneven)] == sizes
    assert cut(raw(), order=4, sizes=sizes, tasks=None).fingerprint == uneven.fingerprint
    assert cut(raw(), order=4, sizes=[2, 2, 2]).fingerprint == even.fingerprint


@settings(max_examples=40, deadline=None)
@given(classes=st.integers(1, 10), tasks=st.integers(1, 10), seed=st.integers(0, 99))
def test_random_sizes_are_a_partition_that_the_order_seed_decides(classes, tasks, seed):
    if tasks > classes:
        return
    data = raw((3,) * classes, (2,) * classes)
    stream = cut(data, order=seed, tasks=tasks, sizes="random")
    assert len(stream.tasks) == tasks
    assert sorted(c for g in groups(stream) for c in g) == list(range(classes))
    assert min(len(g) for g in groups(stream)) >= 1
    assert groups(cut(data, order=seed, sample=7, tasks=tasks, sizes="random")) == groups(stream)


def test_random_sizes_differ_between_seeds_and_are_fair():
    data = raw((3,) * 4, (2,) * 4)
    drawn = [
        tuple(len(g) for g in groups(cut(data, order=seed, tasks=2, sizes="random")))
        for seed in range(300)
    ]
    counts = [drawn.count(sizes) for sizes in ((1, 3), (2, 2), (3, 1))]
    assert sum(counts) == 300
    assert min(counts) > 70  # 100 each, standard deviation 8


# ------------------------------------------------------------------ blurry


@settings(max_examples=40, deadline=None)
@given(
    share=st.floats(0.01, 0.99),
    tasks=st.integers(2, 6),
    order=st.integers(0, 5),
    sample=st.integers(0, 5),
)
def test_blurry_moves_a_share_to_the_neighbours_and_nothing_else(share, tasks, order, sample):
    data = raw(train=(9, 12, 15, 18, 21, 24))
    clear = cut(data, order, sample, tasks=tasks)
    blurry = cut(data, order, sample, tasks=tasks, blurry=share)
    assert rows(blurry, "train") == rows(clear, "train")  # each once
    for before, after in zip(clear.tasks, blurry.tasks, strict=True):
        assert after.owned == before.classes
        assert set(after.train.labels) == set(after.classes)
        assert set(after.classes) == set(after.owned) | set(after.borrowed)
        for split in ("validation", "test"):
            assert (getattr(after, split).rows == getattr(before, split).rows).all()
        around = [t for t in clear.tasks if abs(t.index - after.index) == 1]
        neighbours = {c for task in around for c in task.classes}
        assert set(after.borrowed) <= neighbours
        for label in before.classes:
            had, left = (int(sum(t.train.labels == label)) for t in (before, after))
            gone = int(share * had)
            assert had - left == gone
            got = [int(sum(blurry.tasks[t.index].train.labels == label)) for t in around]
            assert sum(got) == gone
            assert max(got) - min(got) <= 1 or len(got) == 1
    assert (blurry.owners == clear.owners).all()


def test_a_class_leaks_the_same_examples_in_any_order_and_more_with_a_larger_share():
    def left(share, order):
        stream = cut(raw((20,) * 6), order=order, blurry=share)
        return {
            label: {
                int(r)
                for task in stream.tasks
                if label in task.borrowed
                for r, own in zip(task.train.rows, task.train.labels, strict=True)
                if own == label
            }
            for label in range(6)
        }

    few, many = left(0.2, 0), left(0.5, 0)
    assert left(0.2, 3) == few
    assert all(few[c] < many[c] for c in range(6))


def test_blurry_domains_exchange_examples_and_keep_their_classes():
    data = raw(domains=("a", "b", "c"), train=(24,) * 4, test=(6,) * 4)
    clear = cut(data, scenario="domain", tasks=None)
    stream = cut(data, scenario="domain", tasks=None, blurry=0.5)
    assert groups(stream) == groups(clear)
    assert all(task.borrowed == () for task in stream.tasks)
    first = {data.train.domains[i] for i in stream.tasks[0].train.rows}
    assert first == {stream.tasks[0].name, stream.tasks[1].name}
    assert rows(stream, "train") == rows(clear, "train")


def test_an_unblurred_stream_keeps_its_fingerprint():
    assert cut(raw(), blurry=0.0, repetitions=1).fingerprint == cut(raw()).fingerprint
    assert cut(raw((30,) * 6), blurry=0.2).fingerprint != cut(raw((30,) * 6)).fingerprint


# ------------------------------------------------------------------ repeated


@settings(max_examples=30, deadline=None)
@given(visits=st.integers(2, 4), order=st.integers(0, 5), given_split=st.booleans())
def test_repetition_deals_every_example_to_one_visit(visits, order, given_split):
    data = raw(train=(13,) * 6, test=(7,) * 6, validation=(5,) * 6 if given_split else None)
    once = cut(data, order, shots=12)
    stream = cut(data, order, repetitions=visits, shots=12)
    assert groups(stream) == groups(once) * visits
    assert rows(stream, "test") == rows(once, "test")
    if given_split:
        assert rows(stream, "train") == rows(once, "train")
        assert rows(stream, "validation") == rows(once, "validation")
    else:
        assert rows(stream, "train", "validation") == rows(once, "train", "validation")
    for split in ("train", "test"):
        sizes = [len(getattr(task, split)) for task in stream.tasks]
        assert max(sizes) - min(sizes) <= 2 * 2  # two classes, dealt and held out one more or less
    assert len({task.name for task in stream.tasks}) == 3 * visits
    assert stream.tasks[3].name == "task 1 (visit 2)"


def test_owners_are_those_that_only_one_task_can_be():
    assert (cut(raw(), repetitions=2).owners == -1).all()
    once = cut(raw(), order=2)
    assert [once.tasks[i].index for i in once.owners] == once.owners.tolist()
    assert all(c in once.tasks[once.owners[c]].classes for c in range(6))
    domains = raw(domains=("a", "b"), train=(8,) * 3, test=(4,) * 3)
    assert (cut(domains, scenario="domain", tasks=None).owners == -1).all()
    some = cut(raw(), tasks=2, max_classes=4)
    assert sorted(np.flatnonzero(some.owners >= 0)) == sorted(c for g in groups(some) for c in g)
    assert Stream("empty", "class", ("a",), ()).owners.tolist() == [-1]


def test_repeated_domains_and_blurry_repetition():
    data = raw(domains=("a", "b"), train=(16,) * 3, test=(8,) * 3)
    stream = cut(data, scenario="domain", tasks=None, repetitions=2)
    assert [t.name.split()[0] for t in stream.tasks[:2]] == [t.name.split()[0] for t in
                                                            stream.tasks[2:]]  # fmt: skip
    assert rows(stream, "test") == list(range(24))
    both = cut(raw((20,) * 6), repetitions=2, blurry=0.4)
    assert rows(both, "train") == rows(cut(raw((20,) * 6), repetitions=2), "train")
    assert both.tasks[3].borrowed  # the last task of a round borders on the first of the next
    assert set(both.tasks[3].borrowed) & set(both.tasks[2].owned)


def test_which_examples_a_visit_gets_is_the_data_seed_s_and_not_the_order_s():
    data = raw((20,) * 6)
    first = [
        per_class(Stream("s", "class", (), cut(data, o, d, repetitions=2).tasks[:3]), "train", 0)
        for o, d in ((0, 0), (3, 0), (0, 1))
    ]
    assert first[0] == first[1] != first[2]


@pytest.mark.parametrize(
    ("data", "protocol", "message"),
    [
        (raw(), {"sizes": [3, 2]}, r"makes 5 classes, but stream=s has 6.*max_classes=5"),
        (raw(), {"sizes": [3, 2], "max_classes": 4}, "but stream=s has 4"),
        (raw(), {"sizes": "random", "tasks": 7}, "only 6 classes"),
        (raw(), {"blurry": 0.5, "tasks": 1}, "no neighbouring task"),
        (raw(), {"repetitions": 5}, "class 'c[0-5]' has only 4 test example"),
        (raw(), {"repetitions": 4, "shots": 3}, "has only 3 training example"),
    ],
)
def test_what_does_not_fit(data, protocol, message):
    with pytest.raises(DataError, match=message):
        cut(data, **protocol)
