import copy

import numpy as np
import torch
from core_fixtures import random_module, world
from summed_fixtures import changed, delta, fits, pooled, rows_of, same_gradients

from cl_peft.learners.base import Fit
from cl_peft.learners.sdlora import SDLoRA, direction, size
from cl_peft.modules.head import Head


def unit(change, params):
    return change / (params["A"].norm() * params["B"].norm())


def test_a_direction_has_factors_of_norm_one():
    random = torch.Generator().manual_seed(0)
    a, b = torch.randn(3, 7, generator=random), torch.randn(5, 3, generator=random)
    expected = np.linalg.norm(a) * np.linalg.norm(b)
    np.testing.assert_allclose(size({"A": a, "B": b}), expected, rtol=1e-6)
    found = direction({"A": a, "B": b})
    torch.testing.assert_close(found["A"].norm(), torch.tensor(1.0))
    torch.testing.assert_close(found["B"] @ found["A"], b @ a / expected)
    nothing = direction({"A": a, "B": torch.zeros(5, 3)})
    assert not nothing["B"].any()


def test_loss_is_cross_entropy_of_directions_times_magnitudes_and_all_of_it_trains():
    w = world(SDLoRA(classes="seen"), dropout=0.0)
    bank, task = w.learner.tools.bank, w.stream.tasks[2]
    modules = [random_module(bank, seed) for seed in range(3)]
    bank.add(modules[1])  # row 0, not active
    for module in modules[:2]:
        bank.add({s: direction(p) for s, p in module.items()})
    head = Head.fresh(task.classes, 32, torch.Generator().manual_seed(5), torch.device("cpu"))
    labels = head.local(torch.from_numpy(task.train.labels))
    magnitudes = torch.tensor([0.3, 1.7, -0.6], requires_grad=True)
    rows = np.array([2, 5, 1, 0])
    fit = Fit(task, modules[2], head, task.train, labels, {"magnitudes": magnitudes})
    loss = w.learner._loss(fit, rows)

    deltas = {}
    for site in modules[2]:
        old = [unit(delta(w, m, site), m[site]).detach() for m in modules[:2]]
        deltas[site] = magnitudes[2] * delta(w, modules[2], site)
        for alpha, change in zip(magnitudes[:2], old, strict=True):
            deltas[site] = deltas[site] + alpha * change
    with changed(w, deltas):
        logits = head(pooled(w, [task.train.inputs[r] for r in rows]))
    expected = torch.nn.functional.cross_entropy(logits, labels[torch.from_numpy(rows)])
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    leaves = [magnitudes, *(t for p in modules[2].values() for t in p.values())]
    same_gradients(loss, expected, leaves)


def test_magnitudes_start_anew_or_where_they_ended(monkeypatch):
    for restart in ("constant", "keep"):
        w = world(SDLoRA(magnitude=0.5, restart=restart), dropout=0.0)
        starts, fit = [], w.learner._fit

        def spy(task, module, head, train, held, extra, fit=fit, starts=starts):
            starts.append(extra["magnitudes"].detach().clone())
            fit(task, module, head, train, held, extra)

        monkeypatch.setattr(w.learner, "_fit", spy)
        ends, norms = [], []
        for task in w.stream.tasks:
            w.learner.learn(task)
            ends.append(w.learner.magnitudes.clone())
            norms.append(torch.stack([size(p) for p in w.learner.tools.bank.get(0).values()]))
        assert [len(s) for s in starts] == [1, 2, 3]
        assert [len(e) for e in ends] == [0, 1, 2]
        assert all(not torch.equal(s[:-1], e) for s, e in zip(starts[1:], ends[1:], strict=True))
        if restart == "constant":
            assert all((s == 0.5).all() for s in starts)
        else:
            assert all(s[-1] == 0.5 for s in starts)
            torch.testing.assert_close(starts[1][0], norms[0].mean())
            torch.testing.assert_close(starts[2][:2], torch.stack([ends[1][0], norms[1].mean()]))


def test_the_bank_holds_the_newest_module_and_directions_of_norm_one(monkeypatch):
    w = world(SDLoRA(), dropout=0.0)
    seen = fits(w, monkeypatch)
    learned = []
    for task in w.stream.tasks:
        w.learner.learn(task)
        _, module, _, _, rest = seen[-1]
        alpha = rest[2]["magnitudes"].detach()[-1]
        learned.append(
            {s: {"A": p["A"].detach(), "B": alpha * p["B"].detach()} for s, p in module.items()}
        )
        bank = w.learner.tools.bank
        for site, params in learned[-1].items():
            newest = bank.get(0)[site]
            torch.testing.assert_close(newest["B"] @ newest["A"], params["B"] @ params["A"])
        for row, changes in enumerate(learned):
            for site, params in changes.items():
                found = bank.get(row + 1)[site]
                expected = unit(params["B"] @ params["A"], params)
                torch.testing.assert_close(found["B"] @ found["A"], expected)
        answers = w.learner.units[task.index]
        assert answers.row == 0
        assert [row for row, _ in answers.others] == list(range(1, task.index + 1))
        assert [weight for _, weight in answers.others] == w.learner.magnitudes.tolist()
    before = copy.deepcopy(rows_of(w))
    w.learner.logits(w.stream.tasks[0].test.inputs, np.full(len(w.stream.tasks[0].test), 2))
    assert all(torch.equal(a[n], b[n]) for a, b in zip(before, rows_of(w), strict=True) for n in a)
