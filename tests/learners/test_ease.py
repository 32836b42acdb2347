import math

import numpy as np
import pandas as pd
import pytest
import torch
from core_fixtures import same, stream_of, world
from prompt_learners import (
    check_resume,
    check_samples_answer_alone,
    close,
    copies,
    cosine,
    on_disk,
    prompted,
)
from running import run

from cl_peft.errors import DamagedRunError
from cl_peft.learners.ease import EASE
from cl_peft.modules.bank import flatten
from cl_peft.training import Trainer


def plain(learner, method="lora", **options):
    """The tiny world with a LoRA."""
    return world(learner, **{"trainer": Trainer(epochs=1, batch_size=8), **options})


def learned(tasks=3, **options):
    w = plain(EASE(), **options)
    for task in w.stream.tasks[:tasks]:
        w.learner.learn(task)
    return w


def through(w, texts, row):
    """Features of texts through one module, one text at a time."""
    bank, out = w.learner.tools.bank, []
    with torch.no_grad(), bank.use(bank.get(row)):
        for text in texts:
            out.append(w.learner._pooled([text], np.arange(1))[0])
    return out


def naive_prototypes(w):
    """By class and subspace, as the official code goes through tasks."""
    protos: dict[tuple[int, int], torch.Tensor] = {}
    for task in w.stream.tasks:
        t = task.index
        for i in range(t + 1):
            features = through(w, task.train.inputs, i)
            for c in task.classes:
                mine = [f for f, y in zip(features, task.train.labels, strict=True) if y == c]
                protos[c, i] = sum(mine) / len(mine)
        for old in w.stream.tasks[:t]:
            for c in old.classes:
                likeness = [
                    math.exp(cosine(protos[c, old.index], protos[j, old.index]))
                    for j in task.classes
                ]
                protos[c, t] = sum(
                    s / sum(likeness) * protos[j, t]
                    for s, j in zip(likeness, task.classes, strict=True)
                )
    return protos


def test_prototypes_are_means_and_for_later_subspaces_mixtures_of_new_classes():
    w = learned()
    naive = naive_prototypes(w)
    assert w.learner.prototypes.shape == (6, 3, 32)
    assert w.learner.owners.tolist() == [0, 0, 1, 1, 2, 2]
    for row, c in enumerate(w.learner.classes.tolist()):
        for i in range(3):
            close(w.learner.prototypes[row, i], naive[c, i])


@pytest.mark.parametrize("alpha", [0.1, 0.0, 1.5])
def test_answers_are_cosines_in_all_subspaces_the_own_one_counting_most(alpha):
    w = learned()
    w.learner.alpha = alpha
    protos, texts = naive_prototypes(w), w.stream.tasks[1].test.inputs
    features = [through(w, texts, i) for i in range(3)]
    ours = w.learner.logits(texts, np.full(len(texts), 2))
    for task in w.stream.tasks:
        for c in task.classes:
            for n in range(len(texts)):
                score = 0.0
                for i in range(3):
                    weight = 1.0 if i == task.index else alpha / 2
                    score = score + weight * cosine(features[i][n], protos[c, i])
                close(ours[n, c], score)


def test_after_one_task_it_is_the_nearest_mean():
    w = learned(tasks=1)
    task = w.stream.tasks[0]
    ours = w.learner.logits(task.test.inputs, np.zeros(len(task.test), dtype=int))
    features = torch.stack(through(w, task.test.inputs, 0))
    for row, c in enumerate(task.classes):
        expected = torch.stack([cosine(f, w.learner.prototypes[row, 0]) for f in features])
        close(ours[:, c], expected)
    assert ours[:, [c for c in range(6) if c not in task.classes]].isinf().all()


def test_nothing_that_is_finished_changes():
    w = learned(tasks=1)
    bank = w.learner.tools.bank
    for task in w.stream.tasks[1:]:
        modules = [copies(flatten(bank.get(row))) for row in range(bank.count)]
        prototypes = w.learner.prototypes.clone()
        w.learner.learn(task)
        assert all(same(flatten(bank.get(r)), old) for r, old in enumerate(modules))
        old = w.learner.prototypes[: len(prototypes), : task.index]
        assert torch.equal(old, prototypes)
    assert w.backbone.weights_fingerprint() == w.backbone.fingerprint


def test_a_class_that_comes_again_has_a_prototype_per_visit_and_the_best_counts():
    w = learned(stream=stream_of("domain"))
    learner, texts = w.learner, w.stream.tasks[0].test.inputs
    assert learner.classes.tolist() == [0, 1, 2, 3, 4, 5] * 3
    assert learner.units[2].head.classes == (0, 1, 2, 3, 4, 5)
    ours = learner.logits(texts, np.full(len(texts), 2))
    scores = torch.zeros(len(texts), 18)
    for i in range(3):
        features = torch.stack(through(w, texts, i))
        for row in range(18):
            weight = 1.0 if learner.owners[row] == i else 0.05
            own = torch.stack([cosine(f, learner.prototypes[row, i]) for f in features])
            scores[:, row] += weight * own
    close(ours, scores.view(len(texts), 3, 6).amax(1))


def test_a_sample_alone_answers_as_in_a_batch_and_passes_every_module():
    w = learned()
    passes = w.learner.passes
    texts = w.stream.tasks[0].test.inputs
    w.learner.logits(texts, np.full(len(texts), 2))
    assert w.learner.passes - passes == 3 * len(texts)
    check_samples_answer_alone(w)


def test_its_name_covers_modules_and_prototypes():
    w = learned(tasks=2)
    names = [w.learner.units[1].fingerprint]
    w.learner.prototypes[0, 0, 0] += 1
    w.learner._answer_as_one()
    names.append(w.learner.units[1].fingerprint)
    bank = w.learner.tools.bank
    module = {s: {n: t + 1 for n, t in p.items()} for s, p in bank.get(0).items()}
    bank.replace(0, module)
    w.learner._answer_as_one()
    names.append(w.learner.units[1].fingerprint)
    assert len(set(names)) == 3


@pytest.mark.parametrize("scenario", ["class", "domain"])
def test_it_comes_back_bit_for_bit(scenario):
    check_resume(EASE, "lora", scenario, build=plain)


def test_it_comes_back_bit_for_bit_with_prompts():
    check_resume(EASE, "prompt", build=prompted)


def test_what_does_not_fit_is_refused():
    w = learned(tasks=1)
    whole, state = on_disk(w.learner.snapshot()), on_disk(w.learner.state())
    name = next(iter(whole))
    broken = {n: t for n, t in whole.items() if n != name}
    with pytest.raises(DamagedRunError, match=rf"task 1 .*missing {name}"):
        plain(EASE()).learner.restore({0: broken}, w.stream.tasks[:1])
    del state["owners"]
    with pytest.raises(DamagedRunError, match=r"learner=ease.*missing \['owners'\]"):
        plain(EASE()).learner.load_state(state)


def test_it_runs_without_a_router_and_says_its_size(places):
    folder = run("debug=smoke", "learner=ease", "module=adapter", *places)
    rows = pd.read_parquet(folder / "results.parquet")
    last = rows[rows["after_task"] == 3].set_index(["metric", "routing"])["value"]
    assert last["average_accuracy", "oracle"] > 0.6
    assert last["bank_modules", "none"] == 3
    assert last["learner_state_bytes", "none"] == 6 * 3 * 32 * 4 + 2 * 6 * 8
    assert last["router_state_bytes", "none"] == 0
