import numpy as np
import pytest
import torch
from core_fixtures import CPU, quiet, stream_of, tiny, world
from summed_fixtures import changed, delta, fits, pooled

from cl_peft.backbones.features import Features
from cl_peft.config import Seeds
from cl_peft.errors import ConfigError
from cl_peft.learners.base import Tools
from cl_peft.learners.inflora import InfLoRA, Memory, principal
from cl_peft.modules.bank import Bank
from cl_peft.modules.lora import LoRA
from cl_peft.optim.adamw import AdamW
from cl_peft.tracking import Tracker
from cl_peft.training import Trainer


def moment(seed, width=12, rank=12, scale=None):
    """A second moment with a known spectrum and directions."""
    random = np.random.default_rng(seed)
    q = np.linalg.qr(random.normal(size=(width, width)))[0][:, :rank]
    values = np.array(scale if scale is not None else 2.0 ** -np.arange(rank))
    return torch.from_numpy(q * values @ q.T), q


def share(memory, c):
    """What the memory says is used of ``c``."""
    return 1 - float(memory.left(c).square().sum() / c.square().sum())


# ------------------------------------------------------------------ the memory


def test_principal_is_the_singular_value_decomposition():
    x = torch.from_numpy(np.random.default_rng(0).normal(size=(9, 14)))
    u, s, _ = np.linalg.svd(x.numpy(), full_matrices=False)
    ours, squares = principal(x)
    np.testing.assert_allclose(squares.numpy(), s**2, rtol=1e-9)
    np.testing.assert_allclose(np.abs((ours.numpy() * u).sum(0)), 1, rtol=1e-9)


@pytest.mark.parametrize("threshold", [0.5, 0.95, 0.99])
def test_a_first_task_takes_the_fewest_leading_directions(threshold):
    c, q = moment(0)
    memory = Memory(torch.zeros(12, 0)).update(c, threshold)
    squares = (2.0 ** -np.arange(12)) ** 2
    count = int(np.searchsorted(np.cumsum(squares) / squares.sum(), threshold) + 1)
    assert not memory.retain
    assert memory.basis.shape == (12, count)
    projector = q[:, :count] @ q[:, :count].T
    np.testing.assert_allclose(memory.basis @ memory.basis.T, projector, atol=1e-5)


def naive_update(basis, retain, c, threshold):
    """The official update_DualGPM, with whole decompositions, for one site."""
    total = (np.linalg.svd(c)[1] ** 2).sum()
    used = basis @ basis.T @ c
    u, s, _ = np.linalg.svd(used if retain else c - used)
    count, now = 0, 1 - (s**2).sum() / total
    for value in s**2 / total:
        if now >= threshold:
            break
        now, count = now + value, count + 1
    if not retain:
        return np.hstack([basis, u[:, :count]])
    rest = basis - u[:, :count] @ u[:, :count].T @ basis
    return np.linalg.svd(rest)[0][:, : basis.shape[1] - count]


@pytest.mark.parametrize("threshold", [0.7, 0.95, 0.999])
def test_updates_equal_the_official_ones_task_after_task(threshold):
    memory, basis, kinds = Memory(torch.zeros(12, 0)), np.zeros((12, 0)), []
    for task in range(6):
        c, _ = moment(task, scale=3.0 ** -np.arange(12))
        basis = naive_update(basis, memory.retain, c.numpy(), threshold)
        before, memory = memory, memory.update(c, threshold)
        if memory.retain and not before.retain:  # official: by the complement of a full SVD
            basis = np.linalg.svd(basis)[0][:, basis.shape[1] :]
        assert memory.basis.shape == basis.shape
        np.testing.assert_allclose(memory.basis @ memory.basis.T, basis @ basis.T, atol=1e-4)
        assert share(memory, c) >= threshold - 1e-5
        kinds.append(memory.retain)
        identity = torch.eye(memory.basis.shape[1])
        torch.testing.assert_close(memory.basis.T @ memory.basis, identity, atol=1e-5, rtol=0)
        assert memory.basis.shape[1] <= 6
    assert kinds == sorted(kinds)  # once it retains, it retains
    if threshold > 0.99:
        assert kinds[-1]
        assert not kinds[0]


def test_what_was_used_stays_used():
    memory = Memory(torch.zeros(12, 0))
    old = []
    for task in range(6):
        c, _ = moment(task)
        memory = memory.update(c, 0.9)
        old.append(c)
        assert all(share(memory, before) >= 0.9 - 1e-5 for before in old)


def test_a_site_that_saw_nothing_takes_nothing():
    memory = Memory(torch.zeros(12, 0))
    assert memory.update(torch.zeros(12, 12, dtype=torch.float64), 0.9) is memory
    full = memory.update(torch.eye(12, dtype=torch.float64), 1.0)
    assert full.retain
    assert full.basis.shape == (12, 0)
    assert not full.left(torch.eye(12)).any()


# ------------------------------------------------------------------ the learner


def test_moments_are_those_of_the_inputs_without_padding():
    w = world(InfLoRA(), dropout=0.5)
    w.learner.learn(w.stream.tasks[0])
    task, module = w.stream.tasks[1], w.learner.tools.bank.get(0)
    found = w.learner._seconds(task, module)  # module 0 twice
    expected = {site: torch.zeros_like(c) for site, c in found.items()}

    def add(site):
        def hook(layer, args):
            x = args[0].reshape(-1, args[0].shape[-1]).double()
            expected[site] += x.T @ x

        return hook

    layers = {s.name: s.layer for s in w.learner.tools.bank.sites}
    handles = [layers[site].register_forward_pre_hook(add(site)) for site in expected]
    with torch.no_grad(), changed(w, {s: 2 * delta(w, module, s) for s in module}):
        for text in task.train.inputs:
            pooled(w, [text])  # alone: no padding
    for handle in handles:
        handle.remove()
    for site, c in found.items():
        torch.testing.assert_close(c, expected[site], atol=1e-2, rtol=1e-4)


def test_a_is_the_leading_part_of_what_old_tasks_leave_and_stays_fixed(monkeypatch):
    w = world(InfLoRA(threshold=0.6, threshold_end=0.6), dropout=0.0)
    seen = fits(w, monkeypatch)
    for task in w.stream.tasks:
        memory = dict(w.learner.memory)
        count = w.learner.tools.bank.count
        w.learner.learn(task)
        _, module, _, before, _ = seen[-1]
        # as it began: B is zero, so the model is that of the rows before
        again = {s: {**p, "B": torch.zeros_like(p["B"])} for s, p in module.items()}
        bank = w.learner.tools.bank
        bank.count = count  # look at the state before this task
        moments = w.learner._seconds(task, again)
        bank.count = count + 1
        for site, params in module.items():
            assert torch.equal(params["A"], before[f"{site}/A"])
            assert not before[f"{site}/B"].any()
            assert params["B"].any()
            assert not params["A"].requires_grad
            left = memory[site].left(moments[site])
            u = np.linalg.svd(left.numpy())[0][:, :2]
            projector = 3 * params["A"].T @ params["A"]
            np.testing.assert_allclose(projector, u @ u.T, atol=1e-3)


def test_new_modules_do_not_act_on_what_old_tasks_used():
    w = world(InfLoRA(), dropout=0.0)
    for task in w.stream.tasks:
        memory = dict(w.learner.memory)
        w.learner.learn(task)
        newest = w.learner.tools.bank.get(w.learner.tools.bank.count - 1)
        for site, m in memory.items():
            change = delta(w, newest, site)
            assert change.norm() > 0.01
            if m.retain:
                outside = change - change @ m.basis @ m.basis.T
                assert outside.norm() < 1e-4 * change.norm()
            elif m.basis.shape[1]:
                assert (change @ m.basis).norm() < 1e-4 * change.norm()
    assert all(m.basis.shape[1] for m in w.learner.memory.values())


def test_where_less_than_a_rank_is_left_rows_of_a_are_zero():
    w = world(InfLoRA(), dropout=0.0)
    sites = w.learner.tools.bank.sites
    w.learner.memory = {s.name: Memory(torch.eye(s.d_in)[:, :1], True) for s in sites}
    w.learner.learn(w.stream.tasks[0])
    for params in w.learner.tools.bank.get(0).values():
        assert params["A"][:, 1:].abs().max() < 1e-6
        np.testing.assert_allclose(params["A"][:, 0].abs(), [3**-0.5, 0], atol=1e-6)


def test_thresholds_rise_from_task_to_task(monkeypatch):
    asked = []
    update = Memory.update
    monkeypatch.setattr(Memory, "update", lambda self, c, t: asked.append(t) or update(self, c, t))
    w = world(InfLoRA(threshold=0.7, threshold_end=1.0))
    for task in w.stream.tasks:
        w.learner.learn(task)
    assert sorted({round(t, 6) for t in asked}) == [0.7, 0.8, 0.9]


def test_few_examples_are_a_seeded_part_of_the_training_set():
    def moments(examples):
        w = world(InfLoRA(examples=examples))
        task = w.stream.tasks[0]
        return w.learner._seconds(task, w.learner._begin(task)[0])

    some, again, more = moments(3), moments(3), moments(10**6)
    every = moments(len(stream_of().tasks[0].train))
    site = next(iter(some))
    assert all(torch.equal(some[s], again[s]) for s in some)
    assert all(torch.equal(every[s], more[s]) for s in some)
    assert 0 < some[site].trace() < every[site].trace()


def test_embeddings_are_refused():
    backbone, stream = tiny(), stream_of()
    tools = Tools(
        backbone=backbone,
        bank=Bank(LoRA(rank=2, sites=["word_embeddings"]), backbone.model, CPU),
        features=Features(backbone, None, 16),
        trainer=Trainer(),
        optimizer=AdamW(),
        seeds=Seeds(),
        class_names=stream.class_names,
        n_tasks=3,
        console=quiet(),
        tracker=Tracker(),
    )
    with pytest.raises(ConfigError, match="word_embeddings reads token ids"):
        InfLoRA().start(tools)
