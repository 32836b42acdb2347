import numpy as np
import pandas as pd
import pytest
import torch
from core_fixtures import same
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
    on_disk,
    prompted,
    scatter_keys,
)
from running import config, run

from cl_peft.config import validate
from cl_peft.errors import ConfigError, DamagedRunError
from cl_peft.learners.l2p import L2P


def make(**options):
    return L2P(**{"size": 4, "top_k": 2, **options})


def chosen(keys, query, k=2):
    """The nearest keys, nearest first."""
    return sorted(range(len(keys)), key=lambda m: -cosine(keys[m].detach(), query).item())[:k]


@pytest.mark.parametrize("train_mask", [True, False])
def test_the_loss_is_cross_entropy_and_the_pull_of_chosen_keys(train_mask):
    w = learned(make(train_mask=train_mask), tasks=1)
    task, rows, learner = w.stream.tasks[1], np.arange(6), w.learner
    head = learner.units[0].head.widen(task.classes, torch.Generator().manual_seed(0))
    extra = {n: t.requires_grad_(True) for n, t in copies(learner.pool).items()}
    queries = w.features.features(task.train.inputs)
    terms, used = [], set()
    for r in rows:
        best = chosen(extra["keys"], queries[r])
        used |= set(best)
        tokens = torch.cat([extra["prompts"][m] for m in best])
        among = task.classes if train_mask else head.classes
        pooled, label = feature(w, task.train.inputs[r], tokens), int(task.train.labels[r])
        pull = sum(1 - cosine(extra["keys"][m], queries[r]) for m in best)
        terms.append(masked_cross_entropy(head, pooled, label, among) + 0.5 * pull)
    loss = learner._loss(a_fit(w, task, {}, head, extra), rows)
    check_gradients(loss, torch.stack(terms).mean(), [*extra.values(), head.weight, head.bias])


def test_answers_are_by_the_prompts_of_the_nearest_keys():
    w = scatter_keys(learned(make()))
    pool, head = w.learner.pool, w.learner.units[2].head
    texts = w.stream.tasks[0].test.inputs + w.stream.tasks[2].test.inputs
    queries = w.features.features(texts)
    sets = [chosen(pool["keys"], q) for q in queries]
    naive = [
        head(feature(w, text, torch.cat([pool["prompts"][m] for m in best])))
        for text, best in zip(texts, sets, strict=True)
    ]
    assert len({tuple(s) for s in sets}) > 1  # samples do not all choose alike
    ours = w.learner.logits(texts, np.full(len(texts), 2))
    close(ours[:, list(head.classes)], torch.stack(naive))


def test_what_nobody_chooses_does_not_move_and_all_else_is_shared():
    w = learned(make(size=8, top_k=1), tasks=1)
    before, touched = copies(w.learner.pool), set()
    compose = w.learner._compose

    def spy(pool, queries, training):
        if training:
            touched.update(chosen(pool["keys"].detach(), q, 1)[0] for q in queries)
        return compose(pool, queries, training)

    w.learner._compose = spy
    w.learner.learn(w.stream.tasks[1])
    for m in range(8):
        moved = not torch.equal(w.learner.pool["prompts"][m], before["prompts"][m])
        assert moved == (m in touched)
        assert moved == (not torch.equal(w.learner.pool["keys"][m], before["keys"][m]))
    assert 0 < len(touched) < 8


def test_the_mask_leaves_the_rows_of_earlier_classes_alone():
    for train_mask in (True, False):
        w = learned(make(train_mask=train_mask), tasks=1)
        before = w.learner.units[0].head
        w.learner.learn(w.stream.tasks[1])
        after = w.learner.units[1].head
        kept = len(before.classes)
        assert after.classes == before.classes + w.stream.tasks[1].classes
        assert torch.equal(after.weight[:kept], before.weight) == train_mask
        assert torch.equal(after.bias[:kept], before.bias) == train_mask


@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_a_sample_alone_answers_as_in_a_batch(method):
    check_samples_answer_alone(scatter_keys(learned(make(), method=method)))


@pytest.mark.parametrize("method", ["prompt", "prefix"])
@pytest.mark.parametrize("scenario", ["class", "domain"])
def test_it_comes_back_bit_for_bit(method, scenario):
    check_resume(make, method, scenario)


def test_a_stored_pool_that_does_not_fit_is_refused():
    w = learned(make(), tasks=1)
    whole = on_disk(w.learner.snapshot())
    assert set(whole) == {
        "pool.prompts", "pool.keys", "head.weight", "head.bias", "head.classes"}  # fmt: skip
    for name in ("pool.keys", "head.bias"):
        broken = {n: t for n, t in whole.items() if n != name}
        with pytest.raises(DamagedRunError, match=rf"task 1 .*missing.*{name}"):
            prompted(make()).learner.restore({0: broken}, w.stream.tasks[:1])
    for name in ("pool.keys", "pool.prompts"):
        broken = {**whole, name: whole[name][..., :-1]}
        with pytest.raises(DamagedRunError, match=rf"task 1.*{name} has shape"):
            prompted(make()).learner.restore({0: broken}, w.stream.tasks[:1])


def test_every_tensor_of_the_pool_is_part_of_what_names_the_unit():
    w = learned(make(), tasks=1)
    unit, names = w.learner.units[0], [w.learner.units[0].fingerprint]
    for name in ("prompts", "keys"):
        w.learner._put(0, {**w.learner.pool, name: w.learner.pool[name] + 1}, unit.head)
        names.append(w.learner.units[0].fingerprint)
    assert len(set(names)) == 3


def test_a_failed_task_leaves_the_pool_as_it_was():
    w = learned(make(), tasks=1)
    pool, unit = copies(w.learner.pool), w.learner.units[0]
    w.learner.tools.trainer.diverged_above = 1e-9
    with pytest.raises(Exception, match="diverged"):
        w.learner.learn(w.stream.tasks[1])
    assert same(w.learner.pool, pool)
    assert w.learner.units == {0: unit}


def test_impossible_values_are_refused():
    with pytest.raises(ConfigError, match=r"learner.top_k=5: the pool has 4 prompts"):
        L2P(size=4)
    with pytest.raises(ConfigError, match=r"learner=l2p is made for module=prompt or module=pref"):
        validate(config("debug=smoke", "learner=l2p", "module=lora"))


def test_it_runs_without_a_router_and_says_its_size(places):
    small = ("debug=smoke", "learner=l2p", "module=prompt", "module.tokens=2")
    folder = run(*small, "optimizer.lr=5e-2", *places)
    rows = pd.read_parquet(folder / "results.parquet")
    last = rows[rows["after_task"] == 3].set_index(["metric", "routing"])["value"]
    assert last["average_accuracy", "oracle"] > 0.5
    assert last["module_parameters", "none"] == 10 * 2 * 32 + 10 * 32  # prompts and keys
    assert last["head_parameters", "none"] == 6 * 33
    assert last["router_state_bytes", "none"] == 0
