import numpy as np
import pytest
import torch
from core_fixtures import random_module, stream_of, world
from learner_cases import alone, check_batches, check_resume, check_run, fit_of

from cl_peft.learners.replay import Replay
from cl_peft.learners.sequential import Sequential
from cl_peft.training import Trainer


@pytest.mark.parametrize("count", [None, 5])
def test_loss_is_the_mean_over_new_and_replayed_examples(count):
    w = world(Replay(size=30, replay_batch=count), dropout=0.0)
    learner = w.learner
    learner.learn(w.stream.tasks[0])
    task = w.stream.tasks[1]
    learner._tasks[1] = task
    learner._filling, learner._random = learner.buffer.copy(), np.random.default_rng(3)
    head = learner.units[0].head.widen(task.classes, torch.Generator().manual_seed(0))
    module = random_module(learner.tools.bank, 1)
    rows = np.array([4, 0, 9])
    loss = learner._loss(fit_of(learner, task, module, head), rows)

    places = learner.buffer.draw(count or 8, np.random.default_rng(3))[0].tolist()
    assert len(places) == (count or 8)
    pairs = [(task.train.inputs[r], task.train.labels[r]) for r in rows]
    old = w.stream.tasks[0].train
    pairs += [(old.inputs[r], old.labels[r]) for _, r in places]
    total = 0.0
    for (_, label), z in zip(
        pairs, alone(learner, module, head, [t for t, _ in pairs]), strict=True
    ):
        total -= z.log_softmax(0)[head.classes.index(int(label))]
    torch.testing.assert_close(loss, total / len(pairs), atol=1e-5, rtol=1e-5)
    assert learner._filling.seen == learner.buffer.seen + 3  # offered after the draw


def test_the_first_step_has_nothing_to_replay():
    w = world(Replay(), dropout=0.0)
    learner, task = w.learner, w.stream.tasks[0]
    learner._filling, learner._random = learner.buffer.copy(), np.random.default_rng(0)
    module, head = learner._fresh(task)
    loss = learner._loss(fit_of(learner, task, module, head), np.arange(6))
    z = alone(learner, module, head, task.train.inputs[:6])
    labels = torch.tensor([task.classes.index(c) for c in task.train.labels[:6]])
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(z, labels))


@pytest.mark.parametrize("scenario", ["class", "domain"])
def test_resume(scenario):
    w = check_resume(lambda: Replay(size=15), stream_of(scenario))
    assert set(w.learner.buffer.places[:, 0].tolist()) == {0, 1, 2}
    check_batches(w)


def test_it_forgets_less_than_without_a_buffer():
    def entropy(learner):
        """Of the first task's training examples, after the second."""
        w = world(learner, trainer=Trainer(epochs=4, batch_size=8))
        for task in w.stream.tasks[:2]:
            w.learner.learn(task)
        first = w.stream.tasks[0].train
        z = w.learner.logits(first.inputs, np.ones(len(first), dtype=int))
        return float(torch.nn.functional.cross_entropy(z, torch.from_numpy(first.labels)))

    assert entropy(Replay()) < entropy(Sequential()) - 0.5


def test_whole_run(places):
    _, values = check_run("learner=replay", "learner.size=20", *places)
    # places and the number of offers; the replayed texts themselves are not counted
    assert values["learner_state_bytes", "none"] == 20 * 2 * 8 + 8
    assert values["bank_modules", "none"] == 1
