import numpy as np
import pandas as pd
import pytest
import torch
from prompt_learners import (
    a_fit,
    check_gradients,
    check_resume,
    check_samples_answer_alone,
    close,
    copies,
    cosine,
    feature,
    learned,
    masked_cross_entropy,
    prompted,
    scatter_keys,
)
from running import config, run

from cl_peft.config import validate
from cl_peft.errors import ConfigError
from cl_peft.learners.dualprompt import DualPrompt


@pytest.mark.parametrize("train_mask", [True, False])
def test_the_loss_is_behind_the_general_prompt_and_the_tasks_own(train_mask):
    w = learned(DualPrompt(pull=0.7, train_mask=train_mask), tasks=1)
    task, rows, learner = w.stream.tasks[1], np.arange(6), w.learner
    random = torch.Generator().manual_seed(0)
    head = learner.units[0].head.widen(task.classes, random)
    new = {n: t.requires_grad_(True) for n, t in copies(learner._start(random)).items()}
    queries, terms = w.features.features(task.train.inputs), []
    tokens = torch.cat([new["general"][0], new["experts"][0]])
    among = task.classes if train_mask else head.classes
    for r in rows:
        pooled, label = feature(w, task.train.inputs[r], tokens), int(task.train.labels[r])
        pull = 1 - cosine(new["keys"][0], queries[r])
        terms.append(masked_cross_entropy(head, pooled, label, among) + 0.7 * pull)
    loss = learner._loss(a_fit(w, task, {}, head, new), rows)
    check_gradients(loss, torch.stack(terms).mean(), [*new.values(), head.weight, head.bias])


def test_answers_are_by_the_expert_of_the_nearest_key():
    w = scatter_keys(learned(DualPrompt()))
    pool, head = w.learner.pool, w.learner.units[2].head
    texts = [text for task in w.stream.tasks for text in task.test.inputs]
    best = [
        max(range(3), key=lambda t: cosine(pool["keys"][t], q).item())
        for q in w.features.features(texts)
    ]
    assert len(set(best)) > 1
    naive = [
        head(feature(w, text, torch.cat([pool["general"][0], pool["experts"][t]])))
        for text, t in zip(texts, best, strict=True)
    ]
    close(w.learner.logits(texts, np.full(len(texts), 2))[:, list(head.classes)],
          torch.stack(naive))  # fmt: skip


def test_validation_answers_as_at_test_time():
    w = scatter_keys(learned(DualPrompt()))
    pool, texts = w.learner.pool, w.stream.tasks[0].test.inputs
    last = {"general": pool["general"], "experts": pool["experts"][2:], "keys": pool["keys"][2:]}
    w.learner.pool = {n: t[:2] for n, t in pool.items()}  # as while task 3 is learned
    fit = a_fit(w, w.stream.tasks[2], {}, w.learner.units[2].head, last)
    rows = np.arange(len(texts))
    held = w.learner._logits(fit, w.learner._feature(fit, texts, rows, training=False))
    w.learner.pool = pool
    asked = w.learner.logits(texts, np.full(len(texts), 2))
    close(held, asked[:, list(fit.head.classes)])


def test_experts_and_keys_are_fixed_with_their_task_and_the_general_prompt_is_not():
    w = learned(DualPrompt(), tasks=1)
    for task in w.stream.tasks[1:]:
        before = copies(w.learner.pool)
        w.learner.learn(task)
        assert len(w.learner.pool["experts"]) == len(w.learner.pool["keys"]) == task.index + 1
        for name in ("experts", "keys"):
            assert torch.equal(w.learner.pool[name][: task.index], before[name])
        assert not torch.equal(w.learner.pool["general"], before["general"])


@pytest.mark.parametrize("copy_last", [True, False])
def test_an_expert_starts_as_the_last_one_or_afresh(copy_last):
    w = learned(DualPrompt(copy_last=copy_last), tasks=2)
    start = w.learner._start(torch.Generator().manual_seed(3))
    assert torch.equal(start["general"], w.learner.pool["general"])
    assert torch.equal(start["experts"], w.learner.pool["experts"][1:]) == copy_last
    first = prompted(DualPrompt(copy_last=copy_last))
    drawn = first.learner._start(torch.Generator().manual_seed(3))
    assert not torch.equal(drawn["general"], drawn["experts"])
    assert torch.equal(start["experts"], drawn["experts"]) != copy_last


@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_a_sample_alone_answers_as_in_a_batch(method):
    check_samples_answer_alone(scatter_keys(learned(DualPrompt(), method=method)))


@pytest.mark.parametrize("method", ["prompt", "prefix"])
@pytest.mark.parametrize("scenario", ["class", "domain"])
def test_it_comes_back_bit_for_bit(method, scenario):
    check_resume(DualPrompt, method, scenario)


def test_it_is_not_made_for_other_modules():
    with pytest.raises(ConfigError, match="learner=dualprompt is made for module=prompt or modu"):
        validate(config("debug=smoke", "learner=dualprompt", "module=lora"))


@pytest.mark.parametrize("module", ["prompt", "prefix"])
def test_it_runs_without_a_router_and_says_its_size(module, places):
    small = ("debug=smoke", "learner=dualprompt", f"module={module}", "module.tokens=2")
    folder = run(*small, "optimizer.lr=5e-2", *places)
    rows = pd.read_parquet(folder / "results.parquet")
    last = rows[rows["after_task"] == 3].set_index(["metric", "routing"])["value"]
    assert last["average_accuracy", "oracle"] > 0.5
    width = 32 if module == "prompt" else 2 * 2 * 32  # layers, key and value
    assert last["module_parameters", "none"] == (1 + 3) * 2 * width + 3 * 32
