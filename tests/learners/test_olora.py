import numpy as np
import pytest
import torch
from core_fixtures import random_module, same, world
from summed_fixtures import changed, delta, fits, pooled, rows_of, same_gradients

from cl_peft.learners.base import Fit
from cl_peft.learners.olora import OLoRA
from cl_peft.modules.head import Head
from cl_peft.training import Trainer


@pytest.mark.parametrize("classes", ["task", "seen"])
@pytest.mark.parametrize("old", [0, 1, 2])
def test_loss_is_the_formula(old, classes):
    w = world(OLoRA(orthogonal=0.7, decay=0.3, classes=classes), dropout=0.0)
    bank, task = w.learner.tools.bank, w.stream.tasks[1]
    modules = [random_module(bank, seed) for seed in range(old + 1)]
    for module in modules[:old]:
        bank.add(module)
    new = modules[old]
    both = w.stream.tasks[0].classes + task.classes
    head = Head.fresh(both, 32, torch.Generator().manual_seed(5), torch.device("cpu"))
    labels = head.local(torch.from_numpy(task.train.labels))
    rows = np.array([3, 0, 7])
    loss = w.learner._loss(Fit(task, new, head, task.train, labels), rows)

    with changed(w, {s: sum(delta(w, m, s) for m in modules) for s in new}):
        logits = head(pooled(w, [task.train.inputs[r] for r in rows]))
    expected = torch.tensor(0.0)
    for row, x in zip(rows, logits, strict=True):
        among = [i for i, c in enumerate(both) if classes == "seen" or c in task.classes]
        expected = expected - x[labels[row]] / 3 + torch.logsumexp(x[among], 0) / 3
    for site, params in new.items():
        for before in modules[:old]:
            for a in params["A"]:
                for b in before[site]["A"]:
                    expected = expected + 0.7 * (a * b).sum().abs()
        expected = expected + 0.3 * (params["A"].square().sum() ** 0.5)
        expected = expected + 0.3 * (params["B"].square().sum() ** 0.5)
    torch.testing.assert_close(loss, expected, atol=1e-4, rtol=1e-5)
    same_gradients(loss, expected, [t for p in new.values() for t in p.values()])


def overlap(w) -> float:
    """Mean absolute cosine between rows of A of the last module and of those before."""
    *old, new = [w.learner.tools.bank.get(r) for r in range(w.learner.tools.bank.count)]
    values = []
    for site, params in new.items():
        a = torch.nn.functional.normalize(params["A"], dim=1)
        b = torch.nn.functional.normalize(torch.cat([m[site]["A"] for m in old]), dim=1)
        values.append((a @ b.T).abs().mean())
    return float(torch.stack(values).mean())


def test_the_penalty_makes_new_modules_orthogonal():
    overlaps = {}
    for weight in (0.0, 0.5):
        trainer = Trainer(epochs=12, batch_size=8)
        w = world(OLoRA(orthogonal=weight), trainer=trainer, dropout=0.0)
        for task in w.stream.tasks[:2]:
            w.learner.learn(task)
        overlaps[weight] = overlap(w)
    assert overlaps[0.5] < 0.02 < 0.1 < overlaps[0.0]


def test_new_modules_are_fresh_and_the_first_is_trained_alone(monkeypatch):
    w = world(OLoRA())
    seen = fits(w, monkeypatch)
    for task in w.stream.tasks[:2]:
        w.learner.learn(task)
    starts = [before for *_, before, _ in seen]
    for start in starts:
        assert not any(t.any() for n, t in start.items() if n.endswith("/B"))
    assert not torch.equal(*(next(t for n, t in s.items() if n.endswith("/A")) for s in starts))
    plain = world(OLoRA(orthogonal=100.0))  # nothing to be orthogonal to
    plain.learner.learn(plain.stream.tasks[0])
    assert same(rows_of(plain)[0], rows_of(w)[0])
