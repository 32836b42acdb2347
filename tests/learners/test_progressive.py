import numpy as np
import pandas as pd
import pytest
import torch
from core_fixtures import same
from prompt_learners import (
    a_fit,
    answers,
    check_gradients,
    check_resume,
    check_samples_answer_alone,
    close,
    copies,
    feature,
    learned,
)
from running import RIDGE, run

from cl_peft.learners.progressive import Progressive
from cl_peft.modules.bank import flatten


def test_prompts_stand_newest_first_before_the_text():
    w = learned(Progressive())
    prompts = [w.learner.tools.bank.get(row)["input"]["tokens"] for row in range(3)]
    for task in w.stream.tasks:
        own = torch.cat([prompts[i] for i in reversed(range(task.index + 1))])
        head = w.learner.units[task.index].head
        ours = w.learner.logits(task.test.inputs, np.full(len(task.test), task.index))
        naive = torch.stack([head(feature(w, text, own)) for text in task.test.inputs])
        close(ours[:, list(head.classes)], naive)


def test_the_loss_is_the_cross_entropy_behind_all_prompts():
    w = learned(Progressive(), tasks=2)
    task, rows = w.stream.tasks[2], np.arange(5)
    module, head = w.learner._fresh(task)
    old = [w.learner.tools.bank.get(row)["input"]["tokens"] for row in (1, 0)]
    own = torch.cat([module["input"]["tokens"], *old])
    naive = torch.stack(
        [
            torch.nn.functional.cross_entropy(
                head(feature(w, task.train.inputs[r], own))[None],
                torch.tensor([head.classes.index(task.train.labels[r])]),
            )
            for r in rows
        ]
    ).mean()
    loss = w.learner._loss(a_fit(w, task, module, head), rows)
    check_gradients(loss, naive, [module["input"]["tokens"], head.weight, head.bias])


@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_finished_prompts_and_their_answers_never_change(method):
    w = learned(Progressive(), tasks=1, method=method)
    bank = w.learner.tools.bank
    rows, before = [copies(flatten(bank.get(0)))], answers(w, 1)
    for task in w.stream.tasks[1:]:
        w.learner.learn(task)
        assert all(same(flatten(bank.get(r)), old) for r, old in enumerate(rows))
        rows.append(copies(flatten(bank.get(task.index))))
        assert not same(rows[-1], rows[-2])
        assert torch.equal(answers(w, 1), before)
    assert [u.others for u in w.learner.units.values()] == [
        (), ((0, 1.0),), ((1, 1.0), (0, 1.0))]  # fmt: skip


def test_earlier_prompts_are_part_of_what_names_a_unit():
    w = learned(Progressive(), tasks=2)
    name, unit = w.learner.units[1].fingerprint, w.learner.units[1]
    bank = w.learner.tools.bank
    bank.replace(0, {"input": {"tokens": bank.get(0)["input"]["tokens"] + 1}})
    assert w.learner._unit(1, unit.head, unit.others).fingerprint != name


@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_samples_of_different_tasks_share_a_batch(method):
    check_samples_answer_alone(learned(Progressive(), method=method))


@pytest.mark.parametrize("method", ["prompt", "prefix"])
@pytest.mark.parametrize("scenario", ["class", "domain"])
def test_it_comes_back_bit_for_bit(method, scenario):
    check_resume(Progressive, method, scenario)


@pytest.mark.parametrize("router", [("router=prototype",), RIDGE, ("router=oracle",)])
def test_it_runs_with_any_router(router, places):
    small = ("debug=smoke", "learner=progressive", "module=prompt", "module.tokens=4")
    folder = run(*small, "optimizer.lr=5e-2", *router, *places)
    rows = pd.read_parquet(folder / "results.parquet")
    last = rows[rows["after_task"] == 3].set_index(["metric", "routing"])["value"]
    assert last["forgetting", "oracle"] == 0.0
    assert last["average_accuracy", "oracle"] > 0.5
    assert last["bank_modules", "none"] == 3
    assert last["module_parameters", "none"] == 4 * 32
