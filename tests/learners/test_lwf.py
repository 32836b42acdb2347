import numpy as np
import pytest
import torch
from core_fixtures import random_module, stream_of, world
from learner_cases import alone, check_batches, check_resume, check_run, fit_of

from cl_peft.learners.lwf import LwF
from cl_peft.learners.sequential import Sequential


@pytest.fixture
def second_task(monkeypatch):
    """A learner at its second task, as ``_fit`` finds it: fit, and the unit that teaches."""
    w = world(LwF(alpha=0.7, temperature=3.0), dropout=0.0)
    learner = w.learner
    learner.learn(w.stream.tasks[0])
    unit, fits = learner.units[0], []
    before = {s: {n: t.clone() for n, t in p.items()} for s, p in learner.tools.bank.get(0).items()}
    monkeypatch.setattr(learner, "_fit", lambda *args: fits.append(args))
    learner.learn(w.stream.tasks[1])
    return learner, fits[0], before, unit.head


def test_loss_is_entropy_plus_distillation_of_old_classes(second_task):
    learner, (task, _, head, *_), before, old_head = second_task
    module, rows = random_module(learner.tools.bank, 2), np.array([3, 0, 8])
    loss = learner._loss(fit_of(learner, task, module, head), rows)
    texts = [task.train.inputs[r] for r in rows]
    new, old = alone(learner, module, head, texts), alone(learner, before, old_head, texts)
    total = 0.0
    for z, teacher, label in zip(new, old, task.train.labels[rows], strict=True):
        total -= torch.log(z.exp() / z.exp().sum())[head.classes.index(int(label))]
        p = torch.softmax(teacher, 0) ** (1 / 3.0)  # as the paper has it: a power of probabilities
        q = torch.softmax(z[: len(teacher)], 0) ** (1 / 3.0)
        total -= 0.7 * ((p / p.sum()) * torch.log(q / q.sum())).sum()
    torch.testing.assert_close(loss, total / 3, atol=1e-5, rtol=1e-5)


def test_the_teacher_is_asked_once_and_not_in_the_first_task(monkeypatch):
    w, asked = world(LwF()), []
    logits = w.learner.logits
    monkeypatch.setattr(
        w.learner,
        "logits",
        lambda inputs, *rest: asked.append(len(inputs)) or logits(inputs, *rest),
    )
    for task in w.stream.tasks:
        w.learner.learn(task)
    assert asked == [len(task.train) for task in w.stream.tasks[1:]]


def test_without_weight_it_is_sequential_training():
    snapshots = []
    for learner in (LwF(alpha=0.0), Sequential()):
        w = world(learner)
        for task in w.stream.tasks:
            w.learner.learn(task)
        snapshots.append(w.learner.snapshot())
    for name, tensor in snapshots[0].items():
        torch.testing.assert_close(tensor, snapshots[1][name])


@pytest.mark.parametrize("scenario", ["class", "domain"])
def test_resume(scenario):
    check_batches(check_resume(LwF, stream_of(scenario)))


def test_whole_run(places):
    _, values = check_run("learner=lwf", *places)
    assert values["learner_state_bytes", "none"] == 0
