"""How a source's examples become tasks: who decides what."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cl_peft.config import Protocol
from cl_peft.errors import DataError
from cl_peft.streams.base import Examples, RawData
from cl_peft.streams.protocol import make_stream


def raw(train=(9,) * 6, test=(4,) * 6, domains=None, validation=None):
    """Examples per class in each split; with ``domains``, dealt out to them in turn."""

    def examples(counts, split):
        labels = np.random.default_rng(0).permutation(np.repeat(np.arange(len(counts)), counts))
        inputs = [f"{split} {i} of {label}" for i, label in enumerate(labels)]
        names = [domains[i % len(domains)] for i in range(len(labels))] if domains else None
        return Examples(inputs, labels.astype(np.int64), names)

    return RawData(
        examples(train, "train"),
        examples(test, "test"),
        tuple(f"c{i}" for i in range(len(train))),
        examples(validation, "validation") if validation else None,
    )


def cut(data, order=0, sample=0, **protocol):
    settings = Protocol(name="s", **{"tasks": 3, **protocol})
    return make_stream(data, settings, order_seed=order, data_seed=sample)


def groups(stream):
    return [task.classes for task in stream.tasks]


def per_class(stream, split, label):
    """Rows of a class, wherever it is."""
    return {
        int(row)
        for task in stream.tasks
        for row, own in zip(getattr(task, split).rows, getattr(task, split).labels, strict=True)
        if own == label
    }


# ------------------------------------------------------------------ partition


@settings(max_examples=40, deadline=None)
@given(
    classes=st.integers(1, 12), tasks=st.integers(1, 12), seed=st.integers(0, 99), data=st.data()
)
def test_classes_are_a_partition_and_every_example_has_its_place(classes, tasks, seed, data):
    if tasks > classes:
        return
    counts = data.draw(st.lists(st.integers(2, 9), min_size=classes, max_size=classes))
    source = raw(tuple(counts), tuple(counts))
    stream = cut(source, order=seed, tasks=tasks, validation_share=0.3)
    assert sorted(c for g in groups(stream) for c in g) == list(range(classes))
    sizes = [len(g) for g in groups(stream)]
    assert sizes == sorted(sizes, reverse=True)
    assert max(sizes) - min(sizes) <= 1
    for split in ("train", "test"):
        source_split = getattr(source, split)
        parts = [getattr(task, split) for task in stream.tasks]
        if split == "train":
            parts += [task.validation for task in stream.tasks]
        rows = np.concatenate([part.rows for part in parts])
        assert sorted(rows) == list(range(len(source_split)))  # each once: nothing shared
        for part in parts:
            assert part.inputs == [source_split.inputs[i] for i in part.rows]
            assert (part.labels == source_split.labels[part.rows]).all()
    for task in stream.tasks:
        assert set(task.train.labels) == set(task.test.labels) == set(task.classes)


def test_validation_takes_the_same_share_of_every_class():
    stream = cut(raw(train=(10, 20, 30)), validation_share=0.2)
    held = [len(per_class(stream, "validation", label)) for label in range(3)]
    assert held == [2, 4, 6]
    none = cut(raw(train=(10, 20, 30)), validation_share=0.0)
    assert [len(task.validation) for task in none.tasks] == [0, 0, 0]


def test_given_validation_split_is_used():
    stream = cut(raw(validation=(2, 3, 4, 5, 6, 7)), validation_share=0.5)
    assert [len(per_class(stream, "validation", c)) for c in range(6)] == [2, 3, 4, 5, 6, 7]
    assert [len(per_class(stream, "train", c)) for c in range(6)] == [9] * 6
    assert all(item.startswith("validation") for t in stream.tasks for item in t.validation.inputs)


# ------------------------------------------------------------------ seeds


def test_order_seed_moves_classes_and_no_example():
    data = raw(train=(20,) * 6)
    streams = [cut(data, order=o, shots=8, test_shots=3, validation_share=0.25) for o in range(4)]
    assert len({tuple(groups(s)) for s in streams}) > 1
    for label in range(6):
        for split in ("train", "validation", "test"):
            assert len({frozenset(per_class(s, split, label)) for s in streams}) == 1


def test_data_seed_draws_examples_and_moves_no_class():
    data = raw(train=(20,) * 6)
    streams = [cut(data, sample=s, shots=8, test_shots=3, validation_share=0.25) for s in range(4)]
    assert len({tuple(groups(s)) for s in streams}) == 1
    for split in ("train", "validation", "test"):
        assert len({frozenset(per_class(s, split, 0)) for s in streams}) > 1
    sizes = {tuple(len(per_class(s, split, 0)) for split in ("train", "validation", "test"))
             for s in streams}  # fmt: skip
    assert sizes == {(6, 2, 3)}


def test_same_seeds_same_stream():
    prints = {cut(raw(), order=1, sample=2, shots=5).fingerprint for _ in range(2)}
    assert len(prints) == 1
    others = [cut(raw(), order=2, sample=2, shots=5), cut(raw(), order=1, sample=3, shots=5)]
    assert len(prints | {other.fingerprint for other in others}) == 3
    changed = raw()
    changed.train.inputs[0] += "!"
    assert cut(changed, order=1, sample=2).fingerprint != cut(raw(), order=1, sample=2).fingerprint


def test_larger_subset_contains_the_smaller():
    data = raw(train=(5, 20, 20, 20, 20, 20), test=(9,) * 6)
    streams = [cut(data, shots=k, test_shots=k, validation_share=0.0) for k in (2, 4, 8, 99)]
    for label in range(6):
        for split in ("train", "test"):
            rows = [per_class(s, split, label) for s in streams]
            assert all(small <= large for small, large in pairwise(rows))
    assert [len(per_class(s, "train", 0)) for s in streams] == [2, 4, 5, 5]  # has no more
    assert [len(per_class(s, "train", 1)) for s in streams] == [2, 4, 8, 20]


# ------------------------------------------------------------------ scenarios


def test_task_scenario_cuts_as_class_does():
    assert groups(cut(raw(), scenario="task")) == groups(cut(raw(), scenario="class"))
    assert cut(raw(), scenario="task").scenario == "task"


def test_domain_scenario_has_a_task_per_domain_with_all_classes():
    data = raw(domains=("books", "films", "songs"), train=(12,) * 4, test=(6,) * 4)
    stream = cut(data, scenario="domain", tasks=None)
    assert sorted(task.name for task in stream.tasks) == ["books", "films", "songs"]
    assert groups(stream) == [(0, 1, 2, 3)] * 3
    for task in stream.tasks:
        for split, source in ((task.train, data.train), (task.test, data.test)):
            assert {source.domains[i] for i in split.rows} == {task.name}
    orders = {tuple(t.name for t in cut(data, order=o, scenario="domain").tasks) for o in range(9)}
    assert len(orders) > 1
    assert len(cut(data, scenario="domain", tasks=2).tasks) == 2
    order = Protocol(name="s", scenario="domain", order=["songs", "books", "films"])
    named = make_stream(data, order, order_seed=1, data_seed=0)
    assert [task.name for task in named.tasks] == ["songs", "books", "films"]


def test_explicit_order_decides_tasks_whatever_the_seed():
    names = ["c5", "c0", "c4", "c1", "c3", "c2"]
    streams = [
        make_stream(raw(), Protocol(name="s", tasks=3, order=names), order_seed=o, data_seed=0)
        for o in range(3)
    ]
    assert [groups(s) for s in streams] == [[(0, 5), (1, 4), (2, 3)]] * 3


def test_seen_and_after():
    stream = cut(raw())
    assert stream.after(2) == stream.tasks[2:]
    assert stream.seen(stream.tasks[1]) == stream.tasks[:2]


# ------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("data", "protocol", "message"),
    [
        (raw(), {"tasks": 7}, r"stream\.tasks=7: there are only 6 classes .* stream\.tasks=6"),
        (raw(train=(9, 0, 9)), {}, "no training example for 'c1'"),
        (raw(train=(9,) * 3, test=(4, 4, 0)), {}, "no test example for 'c2'"),
        (raw(), {"order": ["c0", "c1"]}, "each of the 6 class names exactly once"),
        (raw(), {"order": ["c0"] * 6}, "each of the 6 class names exactly once"),
        (
            raw(),
            {"order": ["c0", "c1", "c2", "c3", "c4", "c55"]},
            "no class 'c55'. Did you mean 'c5'",
        ),
        (raw(), {"scenario": "domain"}, r"stream\.domain=COLUMN"),
        (raw(domains=("a", "b")), {"scenario": "domain"}, "only 2 domains"),
        (raw(train=(1,) * 6), {"validation_share": 0.9}, r"raise stream\.shots"),
        (raw(), {"shots": 1, "validation_share": 0.6}, "without training examples"),
    ],
)
def test_protocol_that_does_not_fit(data, protocol, message):
    with pytest.raises(DataError, match=message):
        make_stream(data, Protocol(name="s", **{"tasks": 3} | protocol), order_seed=0, data_seed=0)


def test_domain_without_test_examples():
    data = raw(domains=("a", "b"), train=(4,) * 2, test=(4,) * 2)
    test = Examples(data.test.inputs, data.test.labels, ["a"] * len(data.test))
    data = RawData(data.train, test, data.class_names)
    with pytest.raises(DataError, match="no test example for domain 'b'"):
        cut(data, scenario="domain", tasks=None)


def test_only_some_classes():
    """The first of the order: fewer classes are a prefix of the same partition."""
    whole = groups(cut(raw(), order=3, tasks=6))
    assert groups(cut(raw(), order=3, tasks=4, max_classes=4)) == whole[:4]
    with pytest.raises(DataError, match=r"stream\.max_classes=7: there are only 6 classes"):
        cut(raw(), max_classes=7)
    with pytest.raises(DataError, match=r"stream\.tasks=3: there are only 2 classes"):
        cut(raw(), max_classes=2, tasks=3)


# ------------------------------------------------------------------ what was tested


def digests_of(stream):
    return [stream.test_digest(task) for task in stream.tasks]


def total(stream):
    return sum(int(digest, 16) for digest in digests_of(stream)) % 2**64


def test_digests_name_the_test_examples_and_nothing_else():
    data = raw()
    one = cut(data)
    assert all(len(digest) == 16 for digest in digests_of(one))
    assert len(set(digests_of(one))) == 3
    # another order, other numbers of tasks and training examples: the same tests in other tasks
    assert digests_of(cut(data, shots=3)) == digests_of(one)
    assert digests_of(cut(data, order=1)) != digests_of(one)
    for other in (cut(data, order=1), cut(data, tasks=2), cut(data, scenario="task")):
        assert total(other) == total(one)
    assert total(cut(data, test_shots=2)) != total(one)


def test_a_digest_sees_content_row_and_label():
    data = raw()
    digest = total(cut(data))
    inputs, labels = list(data.test.inputs), data.test.labels
    back = np.arange(len(labels))[::-1]
    for changed in (
        Examples(["other", *inputs[1:]], labels),
        Examples([inputs[i] for i in back], labels[back]),
        Examples(inputs, (labels + 1) % 6),
    ):
        assert total(cut(replace(data, test=changed))) != digest
