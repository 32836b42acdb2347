import math

import numpy as np
import pytest
import torch
from core_fixtures import random_module, world
from scipy.stats import entropy
from summed_fixtures import changed, delta, pooled, same_gradients

from cl_peft.learners.base import Fit
from cl_peft.learners.sapt import SAPT
from cl_peft.modules.head import Head
from cl_peft.training import Trainer


def naive_attention(features, keys, query, temperature):
    """One sample at a time, in float64."""
    out = []
    for f in features.double():
        x = query["up"].double() @ (query["down"].double() @ f)
        x = x / (1 + torch.exp(-x))
        x = (x - x.mean()) / torch.sqrt(x.var(unbiased=False) + 1e-5)
        q = x * query["scale"].double() + query["shift"].double()
        scores = torch.stack([(key.double() * q).sum() for key in keys])
        scores = torch.exp(scores / (temperature * math.sqrt(len(q))))
        out.append(scores / scores.sum())
    return torch.stack(out)


def setting(replay, old=2):
    w = world(SAPT(hidden=6, temperature=0.3, replay=replay, replay_weight=0.4), dropout=0.0)
    learner, task, random = w.learner, w.stream.tasks[2], torch.Generator().manual_seed(1)
    modules = [random_module(learner.tools.bank, seed) for seed in range(old + 1)]
    for module in modules[:old]:
        learner.tools.bank.add(module)
    learner.keys = torch.randn(old, 32, generator=random)
    extra = {n: t.clone() + 0.1 for n, t in learner.query.items()}
    extra["key"] = torch.randn(1, 32, generator=random)
    for tensor in extra.values():
        tensor.requires_grad_(True)
    head = Head.fresh(task.classes, 32, random, torch.device("cpu"))
    labels = head.local(torch.from_numpy(task.train.labels))
    return w, modules, Fit(task, modules[old], head, task.train, labels, extra)


def naive_loss(w, modules, fit, rows):
    inputs = [fit.train.inputs[r] for r in rows]
    features = w.features.features(inputs)
    keys = torch.cat([w.learner.keys, fit.extra["key"]])
    weights = naive_attention(features, keys, fit.extra, 0.3).float()
    deltas = {
        site: torch.stack(
            [
                sum(v * delta(w, m, site) for v, m in zip(row, modules, strict=True))
                for row in weights
            ]
        )
        for site in fit.module
    }
    with changed(w, deltas):
        logits = fit.head(pooled(w, inputs))
    return torch.nn.functional.cross_entropy(logits, fit.labels[torch.from_numpy(rows)])


@pytest.mark.parametrize("old", [0, 2])
def test_loss_is_that_of_samples_with_their_own_mixtures(old):
    w, modules, fit = setting("none", old)
    rows = np.array([2, 5, 1])
    loss, expected = w.learner._loss(fit, rows), naive_loss(w, modules, fit, rows)
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    leaves = [t for p in fit.module.values() for t in p.values()]
    if old:  # with a single key the weight is 1, whatever the query
        leaves += list(fit.extra.values())
    same_gradients(loss, expected, leaves)


def test_replay_adds_the_divergence_from_the_attention_of_old_tasks():
    w, modules, fit = setting("gaussian")
    w.learner.past = {
        "means": torch.randn(2, 32, generator=torch.Generator().manual_seed(2)),
        "factors": torch.zeros(2, 32, 32),  # a Gaussian that gives its mean
        "attention": torch.tensor([[1.0, 0.0], [0.3, 0.7]]),
    }
    rows = np.array([4, 0])
    loss, expected = w.learner._loss(fit, rows), naive_loss(w, modules, fit, rows)
    keys = torch.cat([w.learner.keys, fit.extra["key"]])
    now = naive_attention(w.learner.past["means"], keys, fit.extra, 0.3).detach().numpy()
    expected = expected + 0.4 * (entropy([1, 0, 0], now[0]) + entropy([0.3, 0.7, 0], now[1]))
    torch.testing.assert_close(loss, expected.float(), atol=1e-5, rtol=1e-5)


def test_features_are_drawn_from_the_gaussian_of_a_tasks_features():
    w = world(SAPT(replay="gaussian"))
    for task in w.stream.tasks[:2]:
        w.learner.learn(task)
    for number, task in enumerate(w.stream.tasks[:2]):
        features = w.features.features(task.train.inputs).double()
        factor = w.learner.past["factors"][number].double()
        np.testing.assert_allclose(w.learner.past["means"][number], features.mean(0), atol=1e-5)
        covariance = np.cov(features.numpy().T, bias=True)
        np.testing.assert_allclose(factor @ factor.T, covariance, atol=1e-4)
    features = w.features.features(w.stream.tasks[1].train.inputs)
    weights = naive_attention(features, w.learner.keys, w.learner.query, 1.0)
    attention = w.learner.past["attention"]
    np.testing.assert_allclose(attention[1], weights.mean(0), atol=1e-5)
    assert attention[0].tolist() == [1.0, 0.0]


def test_old_keys_stay_and_new_ones_and_the_query_train():
    w = world(SAPT(), dropout=0.0)
    keys, queries = [], []
    for task in w.stream.tasks:
        w.learner.learn(task)
        keys.append(w.learner.keys)
        queries.append(dict(w.learner.query))
    assert [k.shape for k in keys] == [(1, 32), (2, 32), (3, 32)]
    assert torch.equal(keys[2][:2], keys[1])
    assert torch.equal(keys[1][:1], keys[0])
    for name in ("down", "up", "scale", "shift"):
        assert not torch.equal(queries[1][name], queries[2][name])
    fresh = world(SAPT())
    assert torch.equal(queries[0]["down"], fresh.learner.query["down"])  # one key: nothing to learn
    again = world(SAPT(), seed=1)
    assert not torch.equal(again.learner.query["down"], fresh.learner.query["down"])


def test_answers_are_those_of_the_mixture():
    w = world(SAPT(), dropout=0.0)
    for task in w.stream.tasks[:2]:
        w.learner.learn(task)
    inputs = [text for task in w.stream.tasks for text in task.test.inputs][::4]
    eye = torch.eye(32)  # scores against the axes are the query itself
    query = w.learner._scores(w.features.features(inputs), eye, w.learner.query)
    apart = 40 * (query[0] - query[-1])  # the features of a tiny backbone differ little
    w.learner.keys = torch.stack([apart, -apart])
    weights = naive_attention(w.features.features(inputs), w.learner.keys, w.learner.query, 1.0)
    assert float(weights.std(0).min()) > 0.01  # they do differ
    modules = [w.learner.tools.bank.get(row) for row in (0, 1)]
    head = w.learner.units[1].head
    answer = w.learner.logits(inputs, np.full(len(inputs), 1))[:, list(head.classes)]
    for text, row, said in zip(inputs, weights.float(), answer, strict=True):
        deltas = {s: sum(v * delta(w, m, s) for v, m in zip(row, modules, strict=True))
                  for s in modules[0]}  # fmt: skip
        with torch.no_grad(), changed(w, deltas):
            torch.testing.assert_close(said, head(pooled(w, [text]))[0], atol=1e-4, rtol=1e-4)


def test_the_name_of_the_unit_covers_keys_query_and_temperature():
    w, kept = world(SAPT(), trainer=Trainer(epochs=1, batch_size=8)), []
    for task in w.stream.tasks[:2]:
        w.learner.learn(task)
        kept.append(w.learner.snapshot())
    state, name = w.learner.state(), w.learner.units[1].fingerprint
    w.learner.load_state(state)
    assert w.learner.units[1].fingerprint == name
    for part in state:
        w.learner.load_state({**state, part: state[part] + 1})
        assert w.learner.units[1].fingerprint != name
    for temperature in (1.0, 2.0):
        other = world(SAPT(temperature=temperature))
        other.learner.restore(dict(enumerate(kept)), w.stream.tasks[:2])
        other.learner.load_state(state)
        assert (other.learner.units[1].fingerprint == name) == (temperature == 1.0)


def test_replay_keeps_old_samples_with_old_modules():
    kept = {}
    for replay in ("none", "gaussian"):
        learner = SAPT(replay=replay, replay_weight=10.0)
        w = world(learner, dropout=0.0, trainer=Trainer(epochs=4, batch_size=8))
        for task in w.stream.tasks:
            w.learner.learn(task)
        features = w.features.features(w.stream.tasks[0].test.inputs)
        weights = w.learner._scores(features, w.learner.keys, w.learner.query).softmax(1)
        kept[replay] = float(weights[:, 0].mean())
    assert kept["gaussian"] > 0.5 > kept["none"]
