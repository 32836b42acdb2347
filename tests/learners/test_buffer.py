import numpy as np
import pytest
import torch
from core_fixtures import world
from learner_cases import fit_of, same_bits, through_disk
from scipy.stats import chisquare

from cl_peft.errors import DamagedRunError, DivergedError
from cl_peft.learners.buffer import Rehearsal, Reservoir
from cl_peft.learners.replay import Replay
from cl_peft.training import Trainer


def filled(size, count, seed=0, chunk=None):
    buffer = Reservoir(size, seed)
    for start in range(0, count, chunk or count):
        rows = np.arange(start, min(count, start + (chunk or count)))
        buffer.offer(3, rows, torch.from_numpy(rows[:, None] * 1.5).float())
    return buffer


def test_every_offer_is_kept_with_the_same_probability():
    size, count, seeds = 6, 30, 1500
    kept = np.zeros(count)
    pairs = np.zeros((count, count))
    for seed in range(seeds):
        buffer = Reservoir(size, seed)
        buffer.offer(0, np.arange(count))
        rows = buffer.places[:, 1].numpy()
        assert len(set(rows.tolist())) == size
        kept[rows] += 1
        pairs[np.ix_(rows, rows)] += 1
    assert chisquare(kept).pvalue > 0.01
    assert abs(kept / seeds - size / count).max() < 4 * np.sqrt(0.2 * 0.8 / seeds)
    # and so is every pair: the first items are no more often together than the last
    together = pairs[np.triu_indices(count, 1)] / seeds
    p = size * (size - 1) / (count * (count - 1))
    assert abs(together - p).max() < 5 * np.sqrt(p * (1 - p) / seeds)


def test_it_is_algorithm_r_with_one_draw_per_offer():
    kept = list(range(5))
    for n in range(5, 60):
        slot = int(np.random.default_rng([7, 29, n]).integers(n + 1))
        if slot < 5:
            kept[slot] = n
    buffer = filled(5, 60, seed=7)
    assert buffer.places[:, 1].tolist() == kept
    assert buffer.places[:, 0].tolist() == [3] * 5
    assert buffer.values[:, 0].tolist() == [1.5 * n for n in kept]  # values stay with their place
    assert buffer.seen == 60


@pytest.mark.parametrize("chunk", [1, 3, 7, 64])
def test_what_is_kept_depends_on_seed_and_order_alone(chunk):
    base = filled(10, 100, seed=1)
    assert same_bits(filled(10, 100, seed=1, chunk=chunk).tensors(), base.tensors())
    assert not torch.equal(filled(10, 100, seed=2).places, base.places)


def test_interrupted_it_goes_on_as_if_it_had_not_been():
    whole = filled(10, 100)
    part = filled(10, 40)
    stored = through_disk(part.tensors())
    again, other = Reservoir.from_tensors(stored, 10, 0), part.copy()
    for buffer in (again, other):
        rows = np.arange(40, 100)
        buffer.offer(3, rows, torch.from_numpy(rows[:, None] * 1.5).float())
        assert same_bits(buffer.tensors(), whole.tensors())
    assert same_bits(part.tensors(), stored)  # a copy is independent


def test_values_of_an_older_offer_are_padded():
    buffer = Reservoir(4, 0)
    buffer.offer(0, np.arange(2), torch.ones(2, 2))
    buffer.offer(1, np.arange(1), torch.ones(1, 3))
    nan = float("nan")
    expected = torch.tensor([[1, 1, nan], [1, 1, nan], [1, 1, 1]])
    torch.testing.assert_close(buffer.values, expected, equal_nan=True)
    assert len(buffer) == 3


def test_a_draw_takes_different_slots_and_as_many_as_there_are():
    buffer = filled(6, 50)
    places, values = buffer.draw(4, np.random.default_rng(0))
    assert len({tuple(p) for p in places.tolist()}) == 4
    assert torch.equal(places[:, 1] * 1.5, values[:, 0])
    assert sorted(buffer.draw(99, np.random.default_rng(0))[0].tolist()) == sorted(
        buffer.places.tolist()
    )
    empty = Reservoir(6, 0).draw(4, np.random.default_rng(0))
    assert [tuple(t.shape) for t in empty] == [(0, 2), (0, 0)]


# ------------------------------------------------------------------ what rehearsing learners share


def test_every_example_is_offered_once_per_epoch_in_the_order_of_training(monkeypatch):
    w, steps = world(Replay(size=20), trainer=Trainer(epochs=2, batch_size=8)), []
    loss = Replay._loss
    monkeypatch.setattr(
        Replay, "_loss", lambda self, fit, rows: steps.append(rows) or loss(self, fit, rows)
    )
    first, second = w.stream.tasks[:2]
    for task in (first, second):
        w.learner.learn(task)
    counts = [2 * len(first.train), 2 * len(second.train)]
    assert w.learner.buffer.seen == sum(counts)
    rows = np.concatenate(steps)
    twin = Reservoir(20, 0)
    twin.offer(0, rows[: counts[0]])
    twin.offer(1, rows[counts[0] :])
    assert torch.equal(twin.places, w.learner.buffer.places)


def test_replayed_examples_are_those_of_the_stream():
    w = world(Replay(size=30))
    for task in w.stream.tasks[:2]:
        w.learner.learn(task)
    learner = w.learner
    learner._filling, learner._random = learner.buffer, np.random.default_rng(0)
    head = learner.units[1].head
    fit = fit_of(learner, w.stream.tasks[1], {}, head)
    inputs, labels, _ = learner._replayed(fit)
    places = learner.buffer.draw(8, np.random.default_rng(0))[0].tolist()
    assert len(inputs) == 8  # as many as the trainer's batch
    for text, label, (task, row) in zip(inputs, labels.tolist(), places, strict=True):
        split = w.stream.tasks[task].train
        assert text == split.inputs[row]
        assert head.classes[label] == split.labels[row]
    assert {task for task, _ in places} == {0, 1}


def test_a_diverged_task_leaves_the_buffer_as_it_was():
    w = world(Replay(size=20), trainer=Trainer(epochs=2, batch_size=8, clip=0.0))
    w.learner.learn(w.stream.tasks[0])
    before = through_disk(w.learner.state())
    w.learner.tools.optimizer.lr = w.learner.tools.optimizer.head_lr = 1e9
    with pytest.raises(DivergedError):
        w.learner.learn(w.stream.tasks[1])
    assert same_bits(w.learner.state(), before)


def test_state_that_does_not_fit_is_refused():
    w = world(Replay())
    with pytest.raises(DamagedRunError, match="learner=replay"):
        w.learner.load_state({"places": torch.zeros(0, 2)})


def test_they_say_that_examples_are_kept():
    assert Rehearsal.keeps_examples
    assert Replay.keeps_examples
