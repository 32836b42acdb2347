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
)
from running import config, run

from cl_peft.config import validate
from cl_peft.errors import ConfigError
from cl_peft.learners.codaprompt import CODAPrompt, orthonormal


def make(**options):
    return CODAPrompt(**{"size": 12, **options})


def weighted(pool, query):
    """The sum of components of one sample, one after another."""
    return sum(
        cosine(query * pool["attention"][m], pool["keys"][m]) * pool["prompts"][m]
        for m in range(len(pool["keys"]))
    )


def penalty(rows):
    """Mean squared distance of the Gram matrix from the identity, entry by entry."""
    flat, total = [row.flatten() for row in rows], 0.0
    for i, a in enumerate(flat):
        for j, b in enumerate(flat):
            total = total + (a @ b - float(i == j)) ** 2
    return total / len(flat) ** 2


@pytest.mark.parametrize("train_mask", [True, False])
def test_the_loss_is_behind_the_weighted_sum_of_old_and_new_components(train_mask):
    w = learned(make(train_mask=train_mask, ortho=0.3), tasks=1)
    task, rows, learner = w.stream.tasks[1], np.arange(6), w.learner
    random = torch.Generator().manual_seed(0)
    head = learner.units[0].head.widen(task.classes, random)
    start = {n: t + 0.1 * torch.randn(t.shape, generator=random)
             for n, t in learner._start(random).items()}  # fmt: skip
    new = {n: t.requires_grad_(True) for n, t in copies(start).items()}
    pool = {n: torch.cat([learner.pool[n], t]) for n, t in new.items()}
    queries, terms = w.features.features(task.train.inputs), []
    among = task.classes if train_mask else head.classes
    for r in rows:
        pooled = feature(w, task.train.inputs[r], weighted(pool, queries[r]))
        label = int(task.train.labels[r])
        terms.append(masked_cross_entropy(head, pooled, label, among))
    naive = torch.stack(terms).mean() + 0.3 * sum(penalty(t) for t in pool.values())
    loss = learner._loss(a_fit(w, task, {}, head, new), rows)
    check_gradients(loss, naive, [*new.values(), head.weight, head.bias])


def test_answers_are_by_the_sum_of_all_components():
    w = learned(make())
    pool, head = w.learner.pool, w.learner.units[2].head
    texts = [text for task in w.stream.tasks for text in task.test.inputs]
    queries = w.features.features(texts)
    naive = [
        head(feature(w, text, weighted(pool, q))) for text, q in zip(texts, queries, strict=True)
    ]
    ours = w.learner.logits(texts, np.full(len(texts), 2))
    close(ours[:, list(head.classes)], torch.stack(naive))


def test_a_prefix_is_the_same_sum_at_every_layer():
    w = learned(make(), method="prefix")
    pool, head = w.learner.pool, w.learner.units[2].head
    for text in w.stream.tasks[1].test.inputs[:4]:
        tokens = weighted(pool, w.features.features([text])[0])
        with torch.no_grad(), w.learner.tools.bank.use({"attention": {"tokens": tokens}}):
            naive = head(w.learner._pooled([text], np.arange(1)))
        ours = w.learner.logits([text], np.array([2]))
        close(ours[:, list(head.classes)], naive)


def test_components_grow_with_the_tasks_and_are_fixed_with_them():
    w = learned(make(size=10), tasks=1)
    assert {len(t) for t in w.learner.pool.values()} == {3}  # 10 // 3
    for task in w.stream.tasks[1:]:
        before = copies(w.learner.pool)
        w.learner.learn(task)
        for name, tensor in w.learner.pool.items():
            assert len(tensor) == 3 * (task.index + 1)
            assert torch.equal(tensor[: len(before[name])], before[name])


def test_a_task_has_at_least_one_component():
    assert {len(t) for t in learned(make(size=1), tasks=1).learner.pool.values()} == {1}


@pytest.mark.parametrize(("old", "count"), [(0, 5), (3, 4), (3, 9), (9, 2)])
def test_components_start_orthonormal_where_there_is_room(old, count):
    width = 8
    random = torch.Generator().manual_seed(0)
    before = torch.randn(old, width, generator=random) if old else None
    new = orthonormal(before, count, width, random)
    room = max(0, min(count, width - old))
    close(new.norm(dim=1), torch.ones(count))
    close(new[:room] @ new[:room].T, torch.eye(room))
    if old:
        close(new[:room] @ before.T, torch.zeros(room, old))
    assert len({tuple(row.tolist()) for row in new}) == count


@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_a_sample_alone_answers_as_in_a_batch(method):
    check_samples_answer_alone(learned(make(), method=method))


@pytest.mark.parametrize("method", ["prompt", "prefix"])
@pytest.mark.parametrize("scenario", ["class", "domain"])
def test_it_comes_back_bit_for_bit(method, scenario):
    check_resume(make, method, scenario)


def test_it_is_not_made_for_other_modules():
    with pytest.raises(ConfigError, match="learner=codaprompt is made for module=prompt or modu"):
        validate(config("debug=smoke", "learner=codaprompt", "module=lora"))


@pytest.mark.parametrize("module", ["prompt", "prefix"])
def test_it_runs_without_a_router_and_says_its_size(module, places):
    small = ("debug=smoke", "learner=codaprompt", f"module={module}", "module.tokens=2")
    folder = run(*small, "learner.size=12", "optimizer.lr=5e-2", *places)
    rows = pd.read_parquet(folder / "results.parquet")
    last = rows[rows["after_task"] == 3].set_index(["metric", "routing"])["value"]
    assert last["average_accuracy", "oracle"] > 0.5
    width = 32 if module == "prompt" else 2 * 2 * 32  # layers, key and value
    assert last["module_parameters", "none"] == 12 * (2 * width + 2 * 32)
