import numpy as np
import pytest
import torch
from core_fixtures import random_module, stream_of, world
from learner_cases import alone, check_batches, check_resume, check_run, fit_of

from cl_peft.learners.derpp import DERpp


def test_loss_is_that_of_the_paper_with_unknown_logits_left_out():
    """A buffer with offers from before and after the head widened."""
    w = world(DERpp(alpha=0.3, beta=0.7, size=40, replay_batch=6), dropout=0.0)
    learner = w.learner
    for task in w.stream.tasks[:2]:
        learner.learn(task)
    task = w.stream.tasks[2]
    learner._filling, learner._random = learner.buffer.copy(), np.random.default_rng(3)
    head = learner.units[1].head.widen(task.classes, torch.Generator().manual_seed(0))
    module = random_module(learner.tools.bank, 1)
    rows = np.array([4, 0, 9])
    loss = learner._loss(fit_of(learner, task, module, head), rows)

    random = np.random.default_rng(3)
    (dark, stored), (labelled, _) = (learner.buffer.draw(6, random) for _ in range(2))
    text = lambda place: w.stream.tasks[place[0]].train.inputs[place[1]]  # noqa: E731
    label = lambda place: int(w.stream.tasks[place[0]].train.labels[place[1]])  # noqa: E731

    def entropy(places):
        z = alone(learner, module, head, [text(p) for p in places])
        wanted = [head.classes.index(label(p)) for p in places]
        return -torch.stack([q.log_softmax(0)[c] for q, c in zip(z, wanted, strict=True)]).mean()

    z, errors = alone(learner, module, head, [text(p) for p in dark.tolist()]).detach(), []
    widths = set()
    for place, new, old in zip(dark.tolist(), z, stored, strict=True):
        width = 2 * (place[0] + 1)  # classes that the head had when the example was offered
        widths.add(width)
        assert old[:width].isfinite().all()
        errors += [float((new[c] - old[c]) ** 2) for c in range(width)]
    assert widths == {2, 4}
    expected = (
        entropy([(2, r) for r in rows])
        + 0.3 * float(np.mean(errors))
        + 0.7 * entropy(labelled.tolist())
    )
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    loss.backward()
    assert all(p.grad.isfinite().all() for params in module.values() for p in params.values())


def test_stored_logits_are_those_of_the_step_that_offered_them():
    w = world(DERpp(size=400), dropout=0.0)
    seen, loss = {}, DERpp._loss

    def spy(self, fit, rows):
        value = loss(self, fit, rows)
        with torch.no_grad():
            pooled = self._feature(fit, fit.train.inputs, rows, training=True)
            for row, z in zip(rows.tolist(), self._logits(fit, pooled), strict=True):
                seen.setdefault((fit.task.index, row), []).append(z)
        return value

    DERpp._loss = spy
    try:
        w.learner.learn(w.stream.tasks[0])
    finally:
        DERpp._loss = loss
    buffer = w.learner.buffer
    assert len(buffer) == buffer.seen == sum(len(v) for v in seen.values())  # nothing was dropped
    for place, stored in zip(buffer.places.tolist(), buffer.values, strict=True):
        torch.testing.assert_close(stored, seen[tuple(place)].pop(0), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("scenario", ["class", "domain"])
def test_resume(scenario):
    w = check_resume(lambda: DERpp(size=15), stream_of(scenario))
    places, values = w.learner.buffer.places, w.learner.buffer.values
    assert set(places[:, 0].tolist()) == {0, 1, 2}
    assert values.shape == (15, 6)
    assert bool(values.isnan().any()) == (scenario == "class")
    check_batches(w)


def test_whole_run(places):
    _, values = check_run("learner=derpp", "learner.size=20", *places)
    classes = 6
    assert values["learner_state_bytes", "none"] == 20 * 2 * 8 + 8 + 20 * classes * 4
