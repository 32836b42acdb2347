import copy
import math

import numpy as np
import pytest
import torch
from core_fixtures import same, stream_of, world
from safetensors.torch import load, save

from cl_peft.errors import DamagedRunError, DivergedError
from cl_peft.learners.frozen import Frozen
from cl_peft.learners.isolated import Isolated
from cl_peft.learners.joint import Joint
from cl_peft.learners.sequential import Sequential
from cl_peft.modules.bank import flatten
from cl_peft.modules.lora import LoRA
from cl_peft.routers.prototype import Prototype
from cl_peft.tracking import Tracker
from cl_peft.training import Trainer

LEARNERS = {"isolated": Isolated, "sequential": Sequential, "joint": Joint, "frozen": Frozen}
SCENARIOS = ["class", "domain"]


def stored(learner):
    """What lands on disk, and back."""
    return load(save({k: v.contiguous() for k, v in learner.snapshot().items()}))


def bank_rows(learner):
    bank = learner.tools.bank
    return [{n: t.clone() for n, t in flatten(bank.get(r)).items()} for r in range(bank.count)]


def queries(w):
    inputs = [text for task in w.stream.tasks for text in task.test.inputs]
    return inputs, np.concatenate([np.full(len(t.test), t.index) for t in w.stream.tasks])


def logits(w):
    inputs, true = queries(w)
    seen = true <= max(w.learner.units)
    inputs = [text for text, keep in zip(inputs, seen, strict=True) if keep]
    units = np.array([w.learner.unit_for(int(t)) for t in true[seen]])
    return w.learner.logits(inputs, units)


def test_isolated_never_touches_an_earlier_unit():
    w = world(Isolated())
    snapshots, rows, answers = [], [], []
    for task in w.stream.tasks:
        w.learner.learn(task)
        for row, before in enumerate(rows):
            assert same(bank_rows(w.learner)[row], before)
        for index, unit in enumerate(snapshots):
            assert w.learner.units[index] is unit
        rows, snapshots = bank_rows(w.learner), list(w.learner.units.values())
        mine = w.learner.logits(task.test.inputs, np.full(len(task.test), task.index))
        answers.append(mine)
    for task, before in zip(w.stream.tasks, answers, strict=True):
        after = w.learner.logits(task.test.inputs, np.full(len(task.test), task.index))
        assert torch.equal(after, before)
    assert len({unit.fingerprint for unit in snapshots}) == 3
    assert w.backbone.weights_fingerprint() == w.backbone.fingerprint


@pytest.mark.parametrize("name", LEARNERS)
def test_what_was_trained_is_what_answers(name, monkeypatch):
    w, trained = world(LEARNERS[name]()), []
    fit = w.learner._fit

    def spy(task, module, head, *rest):
        fit(task, module, head, *rest)
        trained.append({**flatten(module), **head.tensors()})
        with torch.no_grad(), w.learner.tools.bank.use(module):
            trained.append(head(w.learner._pooled(task.test.inputs, np.arange(len(task.test)))))

    monkeypatch.setattr(w.learner, "_fit", spy)
    for task in w.stream.tasks:
        w.learner.learn(task)
        tensors, expected = trained[-2:]
        assert same(w.learner.snapshot(), tensors)
        unit = w.learner.unit_for(task.index)
        answer = w.learner.logits(task.test.inputs, np.full(len(task.test), unit))
        known = answer[:, list(w.learner.units[unit].head.classes)]
        torch.testing.assert_close(known, expected, atol=1e-5, rtol=1e-5)
    if name == "isolated":
        assert [w.learner.units[t].row for t in range(3)] == [0, 1, 2]


def test_logits_answer_with_each_samples_own_unit_and_its_classes_only():
    w = world(Isolated())
    for task in w.stream.tasks:
        w.learner.learn(task)
    inputs, true = queries(w)
    mixed = w.learner.logits(inputs, true)
    for task in w.stream.tasks:
        alone = w.learner.logits(inputs, np.full(len(inputs), task.index))
        torch.testing.assert_close(mixed[true == task.index], alone[true == task.index],
                                   atol=1e-5, rtol=1e-5)  # fmt: skip
        others = [c for c in range(6) if c not in task.classes]
        assert alone[:, others].isinf().all()
        assert alone[:, list(task.classes)].isfinite().all()
    assert w.learner.passes == 4 * len(inputs)


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_answers_do_not_depend_on_the_batch(batch_size):
    w = world(Isolated())
    for task in w.stream.tasks:
        w.learner.learn(task)
    inputs, _ = queries(w)
    units = np.random.default_rng(0).integers(0, 3, len(inputs))
    base = w.learner.logits(inputs, units)
    w.learner.tools.trainer.eval_batch_size = batch_size
    order = np.random.default_rng(1).permutation(len(inputs))
    other = w.learner.logits([inputs[i] for i in order], units[order])
    torch.testing.assert_close(other, base[order], atol=1e-5, rtol=1e-5)
    assert torch.equal(other.argmax(1), base[order].argmax(1))


def test_sequential_trains_one_module_on_and_widens_the_head(monkeypatch):
    w = world(Sequential())
    starts = []
    fit = w.learner._fit

    def spy(task, module, head, *rest):
        starts.append((copy.deepcopy(flatten(module)), head.tensors(), head.classes))
        starts[-1][1].update({n: t.clone() for n, t in starts[-1][1].items()})
        fit(task, module, head, *rest)

    monkeypatch.setattr(w.learner, "_fit", spy)
    units = []
    for task in w.stream.tasks:
        w.learner.learn(task)
        units.append((bank_rows(w.learner)[0], w.learner.units[task.index]))
    assert w.learner.tools.bank.count == 1
    classes = ()
    for task, (module, head, start_classes) in zip(w.stream.tasks, starts, strict=True):
        classes += task.classes
        assert start_classes == classes
        if task.index:
            before, unit = units[task.index - 1]
            assert same(module, before)  # goes on from where the last task ended
            count = len(unit.head.classes)
            assert torch.equal(head["head.weight"][:count], unit.head.weight)
            assert torch.equal(head["head.bias"][:count], unit.head.bias)
            assert not head["head.bias"][count:].any()
            assert not same(units[task.index][0], before)
            assert not torch.equal(units[task.index][1].head.weight[:count], unit.head.weight)
    assert [w.learner.unit_for(t) for t in range(3)] == [2, 2, 2]


def test_sequential_domains_share_one_head():
    w = world(Sequential(), stream=stream_of("domain"))
    for task in w.stream.tasks:
        w.learner.learn(task)
    assert w.learner.units[2].head.classes == tuple(range(6))


def test_joint_starts_afresh_on_all_that_was_seen(monkeypatch):
    w = world(Joint())
    trained = []
    fit = w.learner._fit

    def spy(task, module, head, train, validation):
        trained.append((len(train), len(validation), head.classes))
        assert not any(p["B"].any() for p in module.values())
        fit(task, module, head, train, validation)

    monkeypatch.setattr(w.learner, "_fit", spy)
    tasks = w.stream.tasks
    for task in tasks:
        w.learner.learn(task)
        assert w.learner.tools.bank.count == 1
        assert [w.learner.unit_for(t) for t in range(3)] == [task.index] * 3
    for k, (train, validation, classes) in enumerate(trained):
        assert train == sum(len(t.train) for t in tasks[: k + 1])
        assert validation == sum(len(t.validation) for t in tasks[: k + 1])
        assert classes == tuple(c for t in tasks[: k + 1] for c in t.classes)


def test_joint_at_the_end_leaves_earlier_rows_empty():
    w = world(Joint(when="last"))
    results = [w.step(task) for task in w.stream.tasks]
    for result in results[:2]:
        values = result.rows[result.rows["metric"].isin(["accuracy", "average_accuracy", "n"])]
        assert len(values) > 2
        assert values["value"].isna().all()
        assert len(result.predictions) == len(result.memo) == result.passes == 0
        assert list(result.predictions.columns) == list(results[2].predictions.columns)
    last = results[2].rows.set_index(["metric", "routing"])["value"]
    assert last["average_accuracy", "routed"] > 0
    assert math.isnan(last["forgetting", "routed"])  # it needs cells that do not exist
    assert np.isnan(w.evaluator.routed[:2]).all()
    assert np.isfinite(w.evaluator.routed[2]).all()


def test_frozen_passes_the_backbone_for_features_alone():
    w = world(Frozen(), router=Prototype())
    passed = []
    w.backbone.model.register_forward_pre_hook(
        lambda m, a, k: passed.append(len(k["input_ids"])), with_kwargs=True
    )
    results = [w.step(task) for task in w.stream.tasks]
    distinct = {
        text
        for t in w.stream.tasks
        for split in (t.train, t.validation, t.test)
        for text in split.inputs
    }
    assert passed == []  # all that it needs was there
    assert w.features.computed == len(distinct)
    assert [r.passes for r in results] == [0, 0, 0]
    assert w.learner.tools.bank.count == 0
    routed = results[2].rows.query("metric == 'average_accuracy' and routing == 'oracle'")
    assert float(routed["value"].iloc[0]) > 0.5


@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize("name", LEARNERS)
def test_restored_learners_answer_and_go_on_bit_for_bit(name, scenario):
    make, stream = LEARNERS[name], stream_of(scenario)
    w, snapshots, answers = world(make(), stream=stream), {}, []
    for task in stream.tasks:
        w.learner.learn(task)
        snapshots[task.index] = stored(w.learner)
        answers.append(logits(w))
    for done in (1, 2, 3):
        seen = stream.tasks[:done]
        again = world(make(), stream=stream)
        needed = seen if again.learner.keeps == "all" else seen[-1:]
        again.learner.restore({t.index: snapshots[t.index] for t in needed}, seen)
        assert torch.equal(logits(again), answers[done - 1])
        assert same(again.learner.snapshot(), snapshots[done - 1])
        for task in stream.tasks[done:]:
            again.learner.learn(task)
            assert same(again.learner.snapshot(), snapshots[task.index])
        assert torch.equal(logits(again), answers[-1])
        prints = [u.fingerprint for u in again.learner.units.values()]
        assert prints == [u.fingerprint for u in w.learner.units.values()]


def test_joint_at_the_end_can_be_resumed_before_it_trained():
    stream = stream_of()
    w = world(Joint(when="last"), stream=stream)
    for task in stream.tasks:
        w.learner.learn(task)
    again = world(Joint(when="last"), stream=stream)
    again.learner.restore({}, stream.tasks[:2])
    assert again.learner.snapshot() == {}
    again.learner.learn(stream.tasks[2])
    assert same(again.learner.snapshot(), w.learner.snapshot())


@pytest.mark.parametrize("name", LEARNERS)
def test_a_stored_unit_that_does_not_fit_is_refused(name):
    w = world(LEARNERS[name]())
    w.learner.learn(w.stream.tasks[0])
    whole = stored(w.learner)
    for missing in [next(iter(whole)), "head.bias"]:
        broken = {n: t for n, t in whole.items() if n != missing}
        again = world(LEARNERS[name](), stream=w.stream)
        with pytest.raises(DamagedRunError, match=rf"task 1 .*missing.*{missing}"):
            again.learner.restore({0: broken}, w.stream.tasks[:1])


@pytest.mark.parametrize("name", LEARNERS)
def test_a_diverging_rate_stops_and_leaves_the_bank_as_it_was(name):
    w = world(LEARNERS[name](), trainer=Trainer(epochs=2, batch_size=8, clip=0.0))
    first, second = w.stream.tasks[:2]

    def diverge(task):
        lr, w.learner.tools.optimizer.lr = w.learner.tools.optimizer.lr, 1e9
        w.learner.tools.optimizer.head_lr = 1e9
        with pytest.raises(DivergedError) as error:
            w.learner.learn(task)
        w.learner.tools.optimizer.lr = w.learner.tools.optimizer.head_lr = lr
        return str(error.value)

    text = diverge(first)
    assert f"task {first.index + 1}/3: training diverged in epoch 1, step " in text
    assert w.learner.tools.bank.count == 0
    if name != "joint":  # it remembers its tasks, and may not be shown one twice
        w.learner.learn(first)
        rows, unit = bank_rows(w.learner), w.learner.units[0]
        assert "task 2/3" in diverge(second)
        assert len(rows) == w.learner.tools.bank.count == len(bank_rows(w.learner))
        assert all(same(a, b) for a, b in zip(rows, bank_rows(w.learner), strict=True))
        assert w.learner.units == {0: unit}


class Recorder(Tracker):
    def __init__(self):
        self.calls = []

    def log_training(self, task, step, values):
        self.calls.append((task, step, values))


def test_training_is_logged_with_steps_counted_over_the_run():
    tracker = Recorder()
    w = world(tracker=tracker)
    for task in w.stream.tasks[:2]:
        w.learner.learn(task)
    steps = [step for _, step, _ in tracker.calls]
    assert steps == list(range(1, w.learner.steps + 1))
    assert {task for task, _, _ in tracker.calls} == {1, 2}
    assert set(tracker.calls[0][2]) == {"train/loss", "train/lr", "train/grad_norm"}


def test_seeds_and_nothing_else_decide_what_is_learned():
    def learned(before=0, **options):
        torch.manual_seed(before)
        w = world(**options)
        w.learner.learn(w.stream.tasks[1])  # as if task 1 had been learned elsewhere
        return w.learner.snapshot()

    base = learned()
    assert same(learned(before=5), base)
    assert not same(learned(seed=1), base)


def test_early_stopping_validates_without_dropout_and_on_held_out_examples(monkeypatch):
    dropped = set()
    fused = LoRA.fused

    def spy(self, *args):
        dropped.add((torch.is_grad_enabled(), self._training))
        return fused(self, *args)

    monkeypatch.setattr(LoRA, "fused", spy)
    w = world(trainer=Trainer(epochs=4, batch_size=8, patience=1), dropout=0.5, lr=3e-2)
    task = w.stream.tasks[0]
    w.learner.learn(task)
    assert dropped == {(True, True), (False, False)}
    unit = np.full(len(task.validation), 0)
    predicted = w.learner.logits(task.validation.inputs, unit).argmax(1).numpy()
    assert w.learner.report.validation == (predicted == task.validation.labels).mean()
