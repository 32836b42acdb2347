import logging
import math

import numpy as np
import pytest
import torch
from core_fixtures import same, stream_of, world
from learner_cases import METHODS, check_batches, check_resume, check_run, fit_of
from sklearn.decomposition import PCA

from cl_peft.config import Protocol
from cl_peft.learners.growth import Growth, directions, residual
from cl_peft.learners.isolated import Isolated
from cl_peft.modules.bank import flatten
from cl_peft.streams.protocol import make_stream
from cl_peft.streams.synthetic import Synthetic


def repeated():
    """Three tasks, and the same classes again with other examples."""
    raw = Synthetic(classes=6, train_per_class=40, test_per_class=6).load(None)
    protocol = Protocol(name="made-up", tasks=3, repetitions=2, validation_share=0.1)
    return make_stream(raw, protocol, order_seed=0, data_seed=0)


def told_apart(w):
    """Frozen features in which classes are apart, as a trained backbone's are."""
    table, width = {}, w.backbone.width
    for task in w.stream.tasks:
        for split in (task.train, task.validation, task.test):
            for text, label in zip(split.inputs, split.labels, strict=True):
                own = np.random.default_rng([5, label]).normal(size=width)
                noise = np.random.default_rng([6, len(table)]).normal(size=width)
                table[text] = torch.from_numpy(own + 0.3 * noise).float()
    w.features.features = lambda inputs, layers=None: torch.stack([table[t] for t in inputs])
    return w


def features(count, seed, shift=0.0):
    """Points near a plane of three dimensions in ten."""
    rng = np.random.default_rng(seed)
    plane = np.random.default_rng(9).normal(size=(3, 10))
    points = rng.normal(size=(count, 3)) @ plane + 0.1 * rng.normal(size=(count, 10)) + shift
    return torch.from_numpy(points)


def test_residual_is_that_of_principal_components():
    fitted, asked = features(50, 0), features(20, 1, shift=0.5)
    mean, basis = directions(fitted, 3)
    pca = PCA(3).fit(fitted.numpy())
    back = pca.inverse_transform(pca.transform(asked.numpy()))
    expected = np.linalg.norm(asked.numpy() - back, axis=1)
    np.testing.assert_allclose(residual(asked, mean, basis), expected, rtol=1e-8)
    few = directions(fitted[:2], 5)[1]
    assert few.shape == (5, 10)
    assert not few[2:].any()


def test_novelty_is_near_zero_for_the_same_distribution_and_large_for_another():
    w = world(Growth(components=3))
    learner = w.learner
    width = learner.tools.backbone.width
    pad = torch.zeros(400, width - 10, dtype=torch.float64)
    known, same_kind, other = (
        torch.cat([features(400, seed, shift), pad], 1)
        for seed, shift in ((0, 0.0), (1, 0.0), (2, 1.0))
    )
    learner._remember(known)
    assert abs(float(learner.novelty(same_kind)[0])) < 0.2
    assert float(learner.novelty(other)[0]) > 5
    mean, basis = directions(known, 3)
    mu, sigma = learner.record[0]
    z = [(float((x - mean - basis.T @ (basis @ (x - mean))).norm()) - mu) / sigma for x in other]
    torch.testing.assert_close(learner.novelty(other)[0], torch.stack(z).mean())


def test_the_record_is_of_examples_that_the_directions_were_not_fitted_on():
    w = world(Growth(components=8))
    width = w.learner.tools.backbone.width
    points = torch.randn(16, width, generator=torch.Generator().manual_seed(0)).double()
    w.learner._remember(points)
    halves = points[::2], points[1::2]
    errors = torch.cat(
        [
            residual(halves[1], *directions(halves[0], 8)),
            residual(halves[0], *directions(halves[1], 8)),
        ]
    )
    torch.testing.assert_close(w.learner.record[0, 0], errors.mean())
    torch.testing.assert_close(w.learner.record[0, 1], errors.std(correction=0))
    assert errors.mean() > 1.5 * residual(points, *directions(points, 8)).mean()


def test_repeated_tasks_reuse_their_modules_and_new_ones_grow():
    w = told_apart(world(Growth(components=8), stream=repeated()))
    rows, banks = [], []
    for task in w.stream.tasks:
        if task.index >= 3:
            before = [flatten(w.learner.tools.bank.get(r)) for r in range(3)]
            before = [{n: t.clone() for n, t in m.items()} for m in before]
        w.learner.learn(task)
        rows.append(w.learner.units[task.index].row)
        banks.append(w.learner.tools.bank.count)
    assert rows == [0, 1, 2, 0, 1, 2]
    assert banks == [1, 2, 3, 3, 3, 3]
    assert all(same(flatten(w.learner.tools.bank.get(r)), before[r]) for r in range(3))
    assert w.learner.mean.shape[0] == w.learner.basis.shape[0] == 3
    heads = [unit.head.weight for unit in w.learner.units.values()]
    assert len({h.sum().item() for h in heads}) == 6  # each task has a head of its own
    assert len({unit.fingerprint for unit in w.learner.units.values()}) == 6


def test_thresholds_at_the_ends():
    w = world(Growth(threshold=-1e9))
    other = world(Isolated())
    for task in w.stream.tasks:
        w.learner.learn(task)
        other.learner.learn(task)
        assert same(w.learner.snapshot(), other.learner.snapshot())  # always grows: isolated
    w = world(Growth(threshold=1e9))
    for task in w.stream.tasks:
        w.learner.learn(task)
    assert w.learner.tools.bank.count == 1


def test_a_reusing_task_trains_a_head_on_the_frozen_modules_features(monkeypatch):
    w = world(Growth(threshold=1e9), dropout=0.5)
    learner, fits = w.learner, []
    learner.learn(w.stream.tasks[0])
    fit = learner._fit

    def spy(task, module, head, *rest):
        rows = np.arange(6)
        plain = fit_of(learner, task, module, head)
        first, again = learner._loss(plain, rows), learner._loss(plain, rows)
        assert torch.equal(first, again)  # nothing is dropped
        with torch.no_grad(), learner.tools.bank.use(learner.tools.bank.get(0)):
            z = head(learner._pooled(task.train.inputs, rows))
        expected = torch.nn.functional.cross_entropy(z, plain.targets(rows))
        torch.testing.assert_close(first, expected, atol=1e-5, rtol=1e-5)
        fits.append(module)
        fit(task, module, head, *rest)

    monkeypatch.setattr(learner, "_fit", spy)
    learner.learn(w.stream.tasks[1])
    assert fits == [{}]
    assert learner.report.epochs == 40
    assert learner.tools.trainer.epochs == 2


def test_the_decision_is_logged_and_stored(caplog):
    caplog.set_level(logging.INFO, logger="cl_peft.learners.growth")
    w = told_apart(world(Growth(components=8), stream=repeated()))
    for task in w.stream.tasks[:4]:
        w.learner.learn(task)
    state = w.learner.state()
    assert state["rows"].tolist() == [0, 1, 2, 0]
    assert math.isnan(state["z"][0])
    z = state["z"].tolist()
    assert z[1] > 1
    assert z[3] <= 1
    assert caplog.messages == [
        "task 1: first, grows module 1",
        f"task 2: z = {z[1]:.2f}, threshold 1: grows module 2",
        f"task 3: z = {z[2]:.2f}, threshold 1: grows module 3",
        f"task 4: z = {z[3]:.2f}, threshold 1: reuses module 1",
    ]


@pytest.mark.parametrize("method", [None, "prefix"])
def test_resume(method):
    method = METHODS[method] if method else None
    w = check_resume(lambda: Growth(components=8), repeated(), method, told_apart)
    assert w.learner.tools.bank.count == 3
    check_batches(w)


def test_resume_of_domains():
    check_batches(check_resume(lambda: Growth(threshold=1e9), stream_of("domain")))


@pytest.mark.parametrize("router", ["prototype", "oracle", "ridge"])
def test_whole_run(router, places):
    more = ["router.projection=64"] if router == "ridge" else []
    run = ["learner=growth", "learner.threshold=1e9", "learner.components=4", f"router={router}"]
    folder, values = check_run(*run, *more, *places)
    assert values["bank_modules", "none"] == 1
    assert values["module_parameters", "none"] == 0  # the last task added a head alone
    assert values["head_parameters", "none"] > 0
    assert "threshold 1e+09: reuses module 1" in (folder / "run.log").read_text()
