import numpy as np
import pytest
import torch
from core_fixtures import same, stream_of, world
from learner_cases import METHODS, check_batches, check_resume, check_run, world_with
from peft.utils import merge_utils

from cl_peft.errors import DamagedRunError
from cl_peft.learners.merging import Merging, joined, merge
from cl_peft.modules.bank import flatten
from cl_peft.modules.head import Head


def vectors(tasks=5, count=200, seed=0):
    return torch.randn(tasks, count, generator=torch.Generator().manual_seed(seed))


def naive_ties(vectors, keep, scale):
    """In numpy, one parameter after another."""
    given = vectors.double().numpy()
    kept = np.zeros_like(given)
    for row, values in zip(kept, given, strict=True):
        for j in sorted(range(len(values)), key=lambda j: -abs(values[j]))[: int(keep * len(row))]:
            row[j] = values[j]
    out = np.zeros(given.shape[1])
    for j in range(given.shape[1]):
        sign = 1 if kept[:, j].sum() >= 0 else -1
        same_sign = [v for v in kept[:, j] if v * sign > 0]
        out[j] = scale * (sum(same_sign) / len(same_sign) if same_sign else 0.0)
    return torch.from_numpy(out).float()


@pytest.mark.parametrize(("keep", "scale", "tasks"), [(0.2, 1.0, 5), (0.55, 0.7, 4), (1, 1, 1)])
def test_ties_against_numpy(keep, scale, tasks):
    given = vectors(tasks)
    torch.testing.assert_close(merge(given, "ties", scale, keep), naive_ties(given, keep, scale))


@pytest.mark.parametrize("density", [0.2, 0.5, 0.9])
def test_rules_against_peft(density):
    given = vectors()
    rows, ones = list(given), torch.ones(len(given))
    ties = merge_utils.ties(rows, ones, density)
    torch.testing.assert_close(merge(given, "ties", 1.0, density), ties)
    torch.testing.assert_close(merge(given, "ties", 0.3, density), 0.3 * ties)
    added = merge_utils.task_arithmetic(rows, 0.4 * ones)
    torch.testing.assert_close(merge(given, "task_arithmetic", 0.4), added)
    mean = merge_utils.task_arithmetic(rows, ones / len(rows))
    torch.testing.assert_close(merge(given, "average"), mean)


def test_laws_of_the_rules():
    given = vectors()
    order = torch.randperm(5, generator=torch.Generator().manual_seed(1))
    for rule in ("average", "task_arithmetic", "ties"):
        merged = merge(given, rule)
        torch.testing.assert_close(merge(given[order], rule), merged)
        torch.testing.assert_close(merge(-given, rule), -merged)
    same_task = given[:1].expand(4, -1)
    torch.testing.assert_close(merge(same_task, "average"), given[0])
    torch.testing.assert_close(merge(same_task, "ties", keep=1.0), given[0])
    # opposite vectors of equal size cancel in a sum, and the positive ones are elected by TIES
    pair = torch.stack([given[0], -given[0]])
    assert not merge(pair, "task_arithmetic").any()
    torch.testing.assert_close(merge(pair, "ties", keep=1.0), given[0].abs())


def test_defaults_of_the_scale():
    assert [Merging(rule).scale for rule in ("average", "task_arithmetic", "ties")] == [1, 0.4, 1]
    assert Merging("ties", scale=0.5).scale == 0.5


def test_heads_stand_side_by_side_and_shared_classes_are_averaged():
    a = Head(torch.tensor([[1.0, 2], [3, 4]]), torch.tensor([1.0, 2]), (4, 0))
    b = Head(torch.tensor([[5.0, 6], [7, 8]]), torch.tensor([3.0, 6]), (2, 0))
    head = joined([a, b])
    assert head.classes == (4, 0, 2)
    torch.testing.assert_close(head.weight, torch.tensor([[1.0, 2], [5, 6], [5, 6]]))
    torch.testing.assert_close(head.bias, torch.tensor([1.0, 4, 3]))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rule", ["average", "ties"])
def test_the_unit_is_the_start_plus_the_merge_of_modules_trained_alone(rule, method, monkeypatch):
    w = world_with(Merging(rule, keep=0.5), METHODS[method](), stream=stream_of(train=6))
    learner, starts, ends = w.learner, [], []
    fit, fold = learner._fit, learner._folded

    def spy(task, module, head, *rest):
        starts.append({n: t.clone() for n, t in flatten(fold(module)).items()})
        fit(task, module, head, *rest)
        ends.append(({n: t.clone() for n, t in flatten(fold(module)).items()}, head.tensors()))

    monkeypatch.setattr(learner, "_fit", spy)
    for count, task in enumerate(w.stream.tasks, start=1):
        learner.learn(task)
        assert same(starts[-1], starts[0])  # all start at the same place
        names = sorted(starts[0])
        flat = [torch.cat([end[n].flatten() for n in names]) for end, _ in ends]
        start = torch.cat([starts[0][n].flatten() for n in names])
        change = torch.stack([f - start for f in flat])
        expected = start + (change.mean(0) if rule == "average" else naive_ties(change, 0.5, 1.0))
        got = learner.snapshot()
        torch.testing.assert_close(
            torch.cat([got[n].flatten() for n in names]), expected, atol=1e-5, rtol=1e-5
        )
        weights = torch.cat([head["head.weight"] for _, head in ends])
        assert torch.equal(got["head.weight"], weights)
        assert learner.tools.bank.count == 1
        assert len(learner.state()) == count * (len(names) + 3)
    assert not same(ends[0][0], ends[1][0])


def test_one_averaged_task_is_that_task():
    w = world(Merging())
    w.learner.learn(w.stream.tasks[0])
    snapshot = w.learner.snapshot()
    from cl_peft.learners.isolated import Isolated

    other = world(Isolated())
    other.learner.learn(w.stream.tasks[0])
    for name, tensor in other.learner.snapshot().items():
        torch.testing.assert_close(snapshot[name], tensor)


@pytest.mark.parametrize("scenario", ["class", "domain"])
@pytest.mark.parametrize("rule", ["average", "ties"])
def test_resume(rule, scenario):
    check_batches(check_resume(lambda: Merging(rule), stream_of(scenario)))


def test_state_that_does_not_fit_is_refused():
    w = world(Merging())
    w.learner.learn(w.stream.tasks[0])
    state = w.learner.state()
    gone = next(iter(state))
    del state[gone]
    with pytest.raises(DamagedRunError, match=f"missing {gone[2:]}"):
        w.learner.load_state(state)


@pytest.mark.parametrize("rule", ["average", "task_arithmetic", "ties"])
def test_whole_run(rule, places):
    _, values = check_run("learner=merging", f"learner.rule={rule}", *places)
    module = values["module_parameters", "none"]
    head = values["head_parameters", "none"]  # of all classes
    assert values["bank_modules", "none"] == 1
    # three task vectors, all heads, and the ids of six classes
    assert values["learner_state_bytes", "none"] == 4 * (3 * module + head) + 8 * 6
