from itertools import pairwise

import numpy as np
import pytest
import torch
from core_fixtures import random_module, same, stream_of, world
from learner_cases import METHODS, check_batches, check_resume, check_run, fit_of, world_with
from torch.nn.functional import cosine_similarity, normalize

from cl_peft.errors import DamagedRunError
from cl_peft.learners.base import Fit
from cl_peft.learners.seqstar import SeqStar
from cl_peft.modules.bank import flatten


def cosines(learner, module, weight, inputs):
    """Naive: one text and one class at a time."""
    with torch.no_grad(), learner.tools.bank.use(module):
        features = [learner._pooled([text], np.arange(1))[0] for text in inputs]
    return torch.stack(
        [torch.stack([cosine_similarity(f, row, dim=0) for row in weight]) for f in features]
    )


@pytest.mark.parametrize("future", [0, 3])
def test_loss_is_entropy_of_scaled_cosines_over_all_rows_there_are(future):
    w = world(SeqStar(scale=4.0), dropout=0.0)
    learner, task = w.learner, w.stream.tasks[1]
    module = random_module(learner.tools.bank, 1)
    _, head = learner._fresh(w.stream.tasks[0])
    head = head.widen(task.classes, torch.Generator().manual_seed(3))
    later = torch.randn(future, head.weight.shape[1])
    plain = fit_of(learner, task, module, head)
    extra = {"future": later.requires_grad_(True)} if future else {}
    fit = Fit(task, module, head, task.train, plain.labels, extra)
    rows = np.array([5, 1, 2])
    loss = learner._loss(fit, rows)
    z = 4.0 * cosines(learner, module, torch.cat([head.weight, later]).detach(),
                      [task.train.inputs[r] for r in rows])  # fmt: skip
    wanted = [head.classes.index(int(c)) for c in task.train.labels[rows]]
    expected = -torch.stack([q.log_softmax(0)[c] for q, c in zip(z, wanted, strict=True)]).mean()
    torch.testing.assert_close(loss.detach(), expected, atol=1e-5, rtol=1e-5)
    loss.backward()
    assert all(t.grad is not None for t in extra.values())


@pytest.mark.parametrize("preallocate", [False, True])
def test_only_new_rows_move_after_the_first_task(preallocate, monkeypatch):
    w = world(SeqStar(preallocate=preallocate, head_epochs=7))
    learner, fits = w.learner, []
    fit = learner._fit

    def spy(task, module, head, *rest):
        fits.append((task.index, bool(module)))
        before = normalize(head.weight.detach().clone())
        fit(task, module, head, *rest)
        still = (normalize(head.weight.detach()) - before).abs().amax(1) < 1e-6
        assert still.tolist() == [c not in task.classes for c in head.classes]

    monkeypatch.setattr(learner, "_fit", spy)
    learner.tools.optimizer.weight_decay = 0.1  # would shrink old rows if nothing held them
    units, modules = [], []
    for task in w.stream.tasks:
        learner.learn(task)
        units.append(learner.units[task.index])
        modules.append({n: t.clone() for n, t in flatten(learner.tools.bank.get(0)).items()})
    assert fits == [(0, True), (0, False), (1, False), (2, False)]  # warm-up, then heads alone
    assert learner.report.epochs == 7
    assert learner.tools.trainer.epochs == 2
    assert same(modules[1], modules[0])
    assert same(modules[2], modules[0])
    fresh = learner.tools.bank.fresh(torch.Generator())
    assert not same(modules[0], flatten(fresh))
    for before, after in pairwise(units):
        count = len(before.head.classes)
        assert torch.equal(after.head.weight[:count], before.head.weight)
        assert len(after.head.classes) == count + 2
    lengths = units[2].head.weight.norm(dim=1)
    torch.testing.assert_close(lengths, torch.ones(6))
    assert not units[2].head.bias.any()


def test_an_old_row_gets_no_gradient_even_while_it_is_in_the_softmax():
    """With and without the first task's rows in the softmax the new rows end elsewhere."""
    w = world(SeqStar(), dropout=0.0)
    for task in w.stream.tasks[:2]:
        w.learner.learn(task)
    with_old = w.learner.units[1].head.weight[2:]
    other = world(SeqStar(), dropout=0.0)
    other.learner.learn(other.stream.tasks[0])
    unit = other.learner.units[0]
    unit.head.weight.zero_()  # cosine 0 with everything
    other.learner.learn(other.stream.tasks[1])
    assert not other.learner.units[1].head.weight[:2].any()
    assert not torch.equal(other.learner.units[1].head.weight[2:], with_old)


def test_answers_are_cosines_with_rows_of_classes_seen():
    w = world(SeqStar(scale=3.0, preallocate=True))
    for task in w.stream.tasks[:2]:
        w.learner.learn(task)
    inputs = w.stream.tasks[0].test.inputs
    answer = w.learner.logits(inputs, np.ones(len(inputs), dtype=int))
    head = w.learner.units[1].head
    expected = cosines(w.learner, w.learner.tools.bank.get(0), head.weight, inputs)
    torch.testing.assert_close(answer[:, list(head.classes)], 3 * expected, atol=1e-5, rtol=1e-5)
    unseen = list(w.stream.tasks[2].classes)
    assert answer[:, unseen].isinf().all()


def test_rows_to_come_are_trained_and_then_taken():
    w = world(SeqStar(preallocate=True))
    before = w.learner.future.clone()
    w.learner.learn(w.stream.tasks[0])
    own, others = list(w.stream.tasks[0].classes), [
        c for t in w.stream.tasks[1:] for c in t.classes
    ]  # fmt: skip
    moved = (w.learner.future - before).abs().amax(1)
    assert not moved[own].any()
    assert (moved[others] > 0).all()
    starts = []
    w.learner._fit = lambda task, module, head, *rest: starts.append(head.weight.detach().clone())
    future = w.learner.future.clone()
    second = w.stream.tasks[1]
    w.learner.learn(second)
    torch.testing.assert_close(starts[0][2:], future[list(second.classes)])


def test_a_task_without_new_classes_trains_nothing():
    w = world(SeqStar(), stream=stream_of("domain"))
    w.learner.learn(w.stream.tasks[0])
    before, steps = w.learner.snapshot(), w.learner.steps
    w.learner.learn(w.stream.tasks[1])
    assert same(w.learner.snapshot(), before)
    assert w.learner.steps == steps
    assert w.learner.report is None


@pytest.mark.parametrize("method", ["dora", "prefix", "adapter"])
def test_with_other_modules(method):
    w = check_resume(SeqStar, stream_of(train=6), METHODS[method])
    check_batches(w)
    assert world_with(SeqStar(), METHODS[method]()).learner.units == {}


@pytest.mark.parametrize("scenario", ["class", "domain"])
@pytest.mark.parametrize("preallocate", [False, True])
def test_resume(preallocate, scenario):
    check_batches(check_resume(lambda: SeqStar(preallocate=preallocate), stream_of(scenario)))


def test_state_that_does_not_fit_is_refused():
    w = world(SeqStar())
    with pytest.raises(DamagedRunError, match=r"learner=seqstar.*future"):
        w.learner.load_state({"future": torch.zeros(6, 4)})


def test_whole_run(places):
    _, values = check_run("learner=seqstar", "learner.preallocate=true", *places)
    width = values["head_parameters", "none"] / 6 - 1
    assert values["learner_state_bytes", "none"] == 4 * 6 * width
