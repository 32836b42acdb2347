"""What every statistical router has to keep, whatever its formula."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from router_cases import KINDS, WIDTH, fitted, queries, started, tasks
from safetensors.torch import load, save

from cl_peft.errors import DamagedRunError
from cl_peft.routers.base import Choice
from cl_peft.routers.none import NoRouter
from cl_peft.routers.oracle import Oracle

every_kind = pytest.mark.parametrize("kind", KINDS)


def make(kind):
    return KINDS[kind][0]()


@every_kind
@given(order=st.permutations(range(4)), seed=st.integers(0, 10_000))
@settings(max_examples=10, deadline=None)
def test_the_final_state_does_not_depend_on_the_order_of_tasks(kind, order, seed):
    data = tasks(sizes=(2, 1, 3, 2), per_class=12, seed=seed)
    one, other = fitted(make(kind), data), fitted(make(kind), data, order)
    moved = [(order[t], c) for t, c in other.columns.pairs]
    columns = torch.tensor([moved.index(pair) for pair in one.columns.pairs])
    mine, theirs = one.state(), other.state()
    assert mine.keys() == theirs.keys()
    for name in mine.keys() - {"columns"}:
        axis = KINDS[kind][1].get(name)
        aligned = theirs[name] if axis is None else theirs[name].index_select(axis, columns)
        torch.testing.assert_close(mine[name], aligned, rtol=1e-4, atol=1e-3)
    asked = queries(30, seed)
    scores = other.choose(asked).scores[:, [order.index(t) for t in range(4)]]
    torch.testing.assert_close(one.choose(asked).scores, scores, atol=1e-3, rtol=1e-3)


@every_kind
def test_a_stored_router_goes_on_bit_for_bit(kind):
    data, asked = tasks(), queries()
    whole, before = fitted(make(kind), data), fitted(make(kind), data[:2])
    back = started(make(kind))
    back.load_state(load(save({k: v.contiguous() for k, v in before.state().items()})))
    for name in ("tasks", "scores", "margin"):
        assert torch.equal(getattr(back.choose(asked), name), getattr(before.choose(asked), name))
    back.fit(*data[2], 2)
    states = back.state(), whole.state()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][n], states[1][n]) for n in states[0])
    assert torch.equal(back.choose(asked).scores, whole.choose(asked).scores)
    assert whole.state_bytes() == sum(t.nbytes for t in states[1].values()) > 0


@every_kind
def test_a_state_loaded_over_another_replaces_it(kind):
    data, asked = tasks(), queries()
    wanted, other = fitted(make(kind), data[:2]), fitted(make(kind), data[1:])
    other.choose(asked)
    other.load_state(wanted.state())
    assert torch.equal(other.choose(asked).scores, wanted.choose(asked).scores)


@every_kind
def test_a_state_that_does_not_fit_is_refused_by_name(kind):
    state = dict(fitted(make(kind), tasks()).state())
    for name in sorted(state):
        rest = {n: t for n, t in state.items() if n != name}
        message = rf"router={kind.split('-')[0]} .*missing \['{name}'\]"
        with pytest.raises(DamagedRunError, match=message):
            started(make(kind)).load_state(rest)
    with pytest.raises(DamagedRunError, match=r"unknown \['more'\]"):
        started(make(kind)).load_state({**state, "more": state[name]})


@every_kind
def test_each_row_depends_on_itself_alone(kind):
    router, asked = fitted(make(kind), tasks()), queries()
    whole = router.choose(asked)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(1))[:33]
    part = router.choose(asked[order])
    torch.testing.assert_close(part.scores, whole.scores[order], atol=1e-6, rtol=1e-6)
    assert torch.equal(part.tasks, whole.tasks[order])
    alone = [router.choose(asked[i : i + 1]) for i in range(50)]
    assert torch.equal(torch.cat([c.tasks for c in alone]), whole.tasks)
    assert len(router.choose(asked[:0]).tasks) == 0


@every_kind
def test_tasks_that_share_classes_are_told_apart(kind):
    data = tasks(sizes=(3, 3, 3), per_class=30, shared=True)
    router = fitted(make(kind), data)
    assert len(router.columns.pairs) == 9
    features = torch.cat([f for f, _ in data])
    true = torch.cat([torch.full((90,), t) for t in range(3)])
    choice = router.choose(features)
    assert choice.scores.shape == (270, 3)
    assert (choice.tasks == true).float().mean() > 0.9


@every_kind
def test_a_task_scores_as_its_best_class(kind):
    data = tasks()
    router = fitted(make(kind), data)
    choice = router.choose(queries())
    assert router.knows_classes == (kind != "kmeans")
    if not router.knows_classes:
        assert choice.class_scores is None
        assert choice.pairs is None
        return
    owners = [(t, int(c)) for t, (_, y) in enumerate(data) for c in y.unique()]
    assert [tuple(pair) for pair in choice.pairs.tolist()] == owners
    for t in range(3):
        mine = [i for i, (owner, _) in enumerate(owners) if owner == t]
        assert torch.equal(choice.scores[:, t], choice.class_scores[:, mine].amax(1))
    right = [
        (choice.pairs[router.choose(f).class_scores.argmax(1), 1] == y).float().mean()
        for f, y in data
    ]
    assert min(right) > 0.7


@every_kind
def test_one_task_leaves_nothing_to_choose_and_no_margin(kind):
    data = tasks()
    router = fitted(make(kind), data[:1])
    choice = router.choose(queries())
    assert not choice.tasks.any()
    assert choice.margin.isnan().all()
    with pytest.raises(ValueError, match="task 1 was fitted before"):
        router.fit(*data[0], 0)


@every_kind
def test_one_example_per_class_is_enough(kind):
    data = tasks(sizes=(2, 1, 3), per_class=1)
    router = fitted(make(kind), data)
    assert router.choose(queries()).scores.isfinite().all()
    assert [int(t) for f, _ in data for t in router.choose(f).tasks] == [0, 0, 1, 2, 2, 2]


@every_kind
@pytest.mark.parametrize("value", [0.0, 2.5])
def test_features_that_never_change_are_no_problem(kind, value):
    data = [(torch.full((8, WIDTH), value), torch.arange(8) % 2 + 2 * t) for t in range(2)]
    router = fitted(make(kind), data)
    assert router.choose(torch.full((3, WIDTH), value)).scores.isfinite().all()
    assert router.choose(queries()).scores.isfinite().all()


@every_kind
def test_state_has_a_size_that_examples_do_not_change(kind):
    few, many = (fitted(make(kind), tasks(per_class=n)) for n in (6, 60))
    assert few.state_bytes() == many.state_bytes()


@pytest.mark.parametrize("kind", ["kmeans", "klda", "ridge", "ridge-ensemble"])
def test_random_numbers_come_from_the_seed(kind):
    data = tasks(per_class=12)

    def scores(seed):
        router = make(kind)
        router.start(WIDTH, seed)
        for index, task in enumerate(data):
            router.fit(*task, index)
        return router.choose(queries()).scores

    assert torch.equal(scores(1), scores(1))
    assert not torch.equal(scores(1), scores(2))


def test_margin_and_ties():
    choice = Choice.best(torch.tensor([[1.0, 3.0, 2.5], [2.0, 2.0, 1.0], [0.0, 5.0, 5.0]]))
    assert choice.tasks.tolist() == [1, 0, 1]
    assert choice.margin.tolist() == [0.5, 0.0, 0.0]


def test_oracle_and_none():
    oracle, none = Oracle(), NoRouter()
    assert oracle.choose(torch.zeros(3, 0), torch.tensor([2, 0, 1])).tasks.tolist() == [2, 0, 1]
    with pytest.raises(ValueError, match="needs the true tasks"):
        oracle.choose(torch.zeros(3, 0))
    with pytest.raises(RuntimeError, match="cannot choose"):
        none.choose(torch.zeros(3, 0))
    assert oracle.sees_task
    assert not none.sees_task
    assert not any(make(kind).sees_task for kind in KINDS)
    assert oracle.state_bytes() == none.state_bytes() == 0
