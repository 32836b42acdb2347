import numpy as np
import pytest
import torch
from core_fixtures import random_module, stream_of, world
from learner_cases import METHODS, check_batches, check_resume, check_run, fit_of, world_with

from cl_peft.errors import DamagedRunError
from cl_peft.learners import ewc
from cl_peft.learners.base import trainable
from cl_peft.learners.ewc import EWC
from cl_peft.learners.sequential import Sequential


def squared_gradients(learner, task):
    """Naive: one example, one backward pass; by name."""
    head = learner.units[task.index].head
    module = trainable(learner.tools.bank.get(0))
    weight, bias = (t.clone().requires_grad_(True) for t in (head.weight, head.bias))
    named = {f"{s}/{n}": t for s, p in module.items() for n, t in p.items()}
    named |= {"head.weight": weight, "head.bias": bias}
    out = {name: torch.zeros_like(t) for name, t in named.items()}
    for text, label in zip(task.train.inputs, task.train.labels, strict=True):
        with learner.tools.bank.use(module):
            f = learner._pooled([text], np.arange(1))
        log_p = (f @ weight.T + bias).log_softmax(1)[0, head.classes.index(int(label))]
        grads = torch.autograd.grad(log_p, list(named.values()), allow_unused=True)
        for name, grad in zip(named, grads, strict=True):
            if grad is not None:
                out[name] += grad.detach() ** 2 / len(task.train)
    return out


@pytest.mark.parametrize("method", METHODS)
def test_importance_is_the_mean_squared_gradient_of_single_examples(method, monkeypatch):
    w = world_with(EWC(), METHODS[method](), stream=stream_of(train=5))
    monkeypatch.setattr(ewc, "COPIES", 4 * w.learner.tools.bank.parameters_per_module())
    task = w.stream.tasks[0]
    w.learner.learn(task)
    expected = squared_gradients(w.learner, task)
    assert set(w.learner.fisher) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(w.learner.fisher[name], value, rtol=1e-3, atol=1e-8)
    assert max(float(v.max()) for v in expected.values()) > 1e-6


@pytest.mark.parametrize("gamma", [1.0, 0.5])
def test_importance_adds_up_and_new_rows_have_their_own_alone(gamma):
    w = world(EWC(gamma=gamma), dropout=0.0, stream=stream_of(train=5))
    first, second = w.stream.tasks[:2]
    w.learner.learn(first)
    before = {n: t.clone() for n, t in w.learner.fisher.items()}
    w.learner.learn(second)
    for name, value in squared_gradients(w.learner, second).items():
        if name.startswith("head"):
            value[:2] += gamma * before[name]
        else:
            value += gamma * before[name]
        torch.testing.assert_close(w.learner.fisher[name], value, rtol=1e-3, atol=1e-8)


def test_loss_is_entropy_plus_a_quadratic_penalty(monkeypatch):
    w = world(EWC(strength=9.0), dropout=0.0)
    learner = w.learner
    first, second = w.stream.tasks[:2]
    learner.learn(first)
    anchor = {n: t.clone() for n, t in learner.snapshot().items()}
    fits = []
    monkeypatch.setattr(learner, "_fit", lambda *args: fits.append(args))
    monkeypatch.setattr(learner, "_fisher", lambda task: learner._values())
    fisher = dict(learner.fisher)
    learner.learn(second)
    learner.fisher = fisher
    module, head = random_module(learner.tools.bank, 2), fits[0][2]
    head.weight.data += 0.1  # old rows moved, too
    rows = np.arange(5)
    loss = learner._loss(fit_of(learner, second, module, head), rows)
    plain = Sequential._loss(learner, fit_of(learner, second, module, head), rows)
    penalty = 0.0
    for site, params in module.items():
        for name, value in params.items():
            key = f"{site}/{name}"
            penalty += float((fisher[key] * (value - anchor[key]) ** 2).sum())
    for name, value in (("head.weight", head.weight), ("head.bias", head.bias)):
        assert len(value) == 4
        for c in range(2):
            penalty += float((fisher[name][c] * (value[c] - anchor[name][c]) ** 2).sum())
    assert penalty > 1e-6
    torch.testing.assert_close(loss, plain + 9.0 / 2 * penalty, atol=1e-5, rtol=1e-5)
    loss.backward()
    assert head.weight.grad is not None


def test_strength_holds_what_matters():
    def moved(strength):
        w = world(EWC(strength=strength), dropout=0.0)
        w.learner.learn(w.stream.tasks[0])
        before, weight = w.learner.snapshot(), dict(w.learner.fisher)
        w.learner.learn(w.stream.tasks[1])
        after = w.learner.snapshot()
        return sum(
            float((weight[n] * (after[n] - before[n]) ** 2).sum())
            for n in weight
            if not n.startswith("head")
        )

    assert moved(1e5) < 0.2 * moved(0.0)


def test_the_backbone_and_the_bank_keep_no_gradients():
    w = world(EWC())
    w.learner.learn(w.stream.tasks[0])
    assert all(p.grad is None for p in w.backbone.model.parameters())
    assert not any(t.requires_grad for t in w.learner.fisher.values())
    assert w.backbone.weights_fingerprint() == w.backbone.fingerprint


@pytest.mark.parametrize("scenario", ["class", "domain"])
def test_resume(scenario):
    check_batches(check_resume(EWC, stream_of(scenario)))


def test_state_that_does_not_fit_is_refused():
    w = world(EWC())
    w.learner.learn(w.stream.tasks[0])
    state = w.learner.state()
    state.pop("head.bias")
    with pytest.raises(DamagedRunError, match=r"learner=ewc.*head.bias"):
        w.learner.load_state(state)


@pytest.mark.parametrize("module", ["lora", "prefix"])
def test_whole_run(module, places):
    small = ["module.tokens=2", "module.hidden=8"] if module == "prefix" else []
    _, values = check_run("learner=ewc", f"module={module}", *small, *places)
    count = values["module_parameters", "none"] + values["head_parameters", "none"]
    assert values["learner_state_bytes", "none"] == 4 * count
