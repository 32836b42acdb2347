"""What every trained router has to keep, whatever its formula; each law takes a maker of routers.

Unlike sums and means, what is trained depends on the order of tasks (through the seed of each), so
these are fewer laws than those of ``tests/routers/test_routers.py``.
"""

import pytest
import torch
from router_cases import WIDTH, fitted, queries, started, tasks
from safetensors.torch import load, save

from cl_peft.errors import DamagedRunError


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def a_stored_router_goes_on_bit_for_bit(make):
    data, asked = tasks(), queries()
    whole, before = fitted(make(), data), fitted(make(), data[:2])
    back = started(make())
    back.load_state(load(save({n: t.contiguous() for n, t in before.state().items()})))
    for name in ("tasks", "scores", "margin"):
        assert torch.equal(getattr(back.choose(asked), name), getattr(before.choose(asked), name))
    back.fit(*data[2], 2)
    assert equal(back.state(), whole.state())
    assert torch.equal(back.choose(asked).scores, whole.choose(asked).scores)
    assert whole.state_bytes() == sum(t.nbytes for t in whole.state().values()) > 0


def a_state_that_does_not_fit_is_refused_by_name(make):
    router = fitted(make(), tasks())
    state = dict(router.state())
    for name in state:
        rest = {n: t for n, t in state.items() if n != name}
        with pytest.raises(DamagedRunError, match=rf"router=[a-z]+ .*missing \['{name}'\]"):
            started(make()).load_state(rest)
    with pytest.raises(DamagedRunError, match=r"unknown \['more'\]"):
        started(make()).load_state({**state, "more": torch.zeros(1)})


def only_the_seed_decides_what_is_random(make):
    data, states = tasks(), []
    for world_seed in (0, 1):
        torch.manual_seed(world_seed)
        before = torch.get_rng_state()
        with torch.no_grad():
            states.append(fitted(make(), data).state())
        assert torch.equal(torch.get_rng_state(), before)
    assert equal(*states)
    other = make()
    other.start(WIDTH, seed=4)
    other.fit(*data[0], 0)
    assert not equal(other.state(), fitted(make(), data[:1]).state())


def each_row_depends_on_itself_alone(make):
    router, asked = fitted(make(), tasks()), queries()
    whole = router.choose(asked)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(1))[:33]
    part = router.choose(asked[order])
    torch.testing.assert_close(part.scores, whole.scores[order], atol=1e-6, rtol=0)
    assert torch.equal(part.tasks, whole.tasks[order])
    alone = [router.choose(asked[i : i + 1]) for i in range(50)]
    scores = torch.cat([choice.scores for choice in alone])
    torch.testing.assert_close(scores, whole.scores, atol=1e-6, rtol=0)
    assert len(router.choose(asked[:0]).tasks) == 0


def choosing_changes_nothing(make):
    router = fitted(make(), tasks())
    before = {n: t.clone() for n, t in router.state().items()}
    router.choose(queries())
    assert equal(router.state(), before)
    assert not any(t.requires_grad for t in router.state().values())


def tasks_are_told_apart(make):
    for shared in (False, True):
        data = tasks(sizes=(3, 3, 3), per_class=30, shared=shared)
        router = fitted(make(), data)
        choice = router.choose(torch.cat([f for f, _ in data]))
        true = torch.arange(3).repeat_interleave(90)
        assert choice.scores.shape == (270, 3)
        assert (choice.tasks == true).float().mean() > 0.85


def one_task_leaves_nothing_to_choose_and_no_margin(make):
    data = tasks()
    router = fitted(make(), data[:1])
    choice = router.choose(queries())
    assert not choice.tasks.any()
    assert choice.margin.isnan().all()
    with pytest.raises(ValueError, match="task 1 was fitted before"):
        router.fit(*data[0], 0)


def poor_features_break_nothing(make):
    one_each = tasks(per_class=1)
    constant = [(torch.ones_like(f), y) for f, y in tasks()]
    zero = [(torch.zeros_like(f), y) for f, y in tasks()]
    a_dead_dimension = [(f * (torch.arange(WIDTH) != 3), y) for f, y in tasks()]
    for data in (one_each, constant, zero, a_dead_dimension):
        choice = fitted(make(), data).choose(torch.cat([queries(), data[0][0]]))
        assert choice.scores.isfinite().all()
        assert choice.margin.isfinite().all()


def the_state_does_not_grow_with_examples(make):
    few, many = fitted(make(), tasks(per_class=5)), fitted(make(), tasks(per_class=50))
    assert few.state_bytes() == many.state_bytes()


LAWS = [
    a_stored_router_goes_on_bit_for_bit,
    a_state_that_does_not_fit_is_refused_by_name,
    only_the_seed_decides_what_is_random,
    each_row_depends_on_itself_alone,
    choosing_changes_nothing,
    tasks_are_told_apart,
    one_task_leaves_nothing_to_choose_and_no_margin,
    poor_features_break_nothing,
    the_state_does_not_grow_with_examples,
]
every_law = pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
