"""Laws of all learners that grow a module per task and keep all of them active together."""

import json
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from core_fixtures import quiet, same, stream_of, world
from running import digests, folder_of, run
from summed_fixtures import rows_of, through_disk

from cl_peft.errors import ConfigError, DamagedRunError, DivergedError
from cl_peft.experiment import load_stream
from cl_peft.learners.inflora import InfLoRA
from cl_peft.learners.olora import OLoRA
from cl_peft.learners.sapt import SAPT
from cl_peft.learners.sdlora import SDLoRA
from cl_peft.loading import load_run
from cl_peft.training import Trainer

LEARNERS = {
    "olora": OLoRA,
    "olora-seen": partial(OLoRA, classes="seen", decay=0.1),
    "inflora": InfLoRA,
    "inflora-few": partial(InfLoRA, examples=5, threshold=0.5),
    "sdlora": SDLoRA,
    "sdlora-keep": partial(SDLoRA, restart="keep"),
    "sapt": SAPT,
    "sapt-gaussian": partial(SAPT, replay="gaussian", hidden=8),
}
DOMAINS = ("olora", "inflora", "sdlora-keep", "sapt-gaussian")
each = pytest.mark.parametrize("name", LEARNERS)


def small(name, stream=None, **options):
    trainer = Trainer(epochs=2, batch_size=8, eval_batch_size=16, **options)
    return world(LEARNERS[name](), stream=stream or stream_of(train=8, test=4), trainer=trainer)


def inputs_of(w, seen=3):
    return [text for task in w.stream.tasks[:seen] for text in task.test.inputs]


def answers(w, inputs):
    return w.learner.logits(inputs, np.full(len(inputs), w.learner.unit_for(0)))


@each
def test_no_row_changes_once_it_is_finished(name):
    w = small(name)
    own = 1 if name.startswith("sdlora") else 0  # its row 0 is always the newest module
    before, names = [], set()
    for task in w.stream.tasks:
        w.learner.learn(task)
        rows = rows_of(w)[own:]
        assert len(rows) == task.index + 1
        assert all(same(a, b) for a, b in zip(before, rows, strict=False))
        before = rows
        assert [w.learner.unit_for(t) for t in range(3)] == [task.index] * 3
        names.add(w.learner.units[task.index].fingerprint)
    assert len(names) == 3
    assert w.backbone.weights_fingerprint() == w.backbone.fingerprint


@each
def test_what_was_trained_is_what_answers(name, monkeypatch):
    w, expected = world(LEARNERS[name]()), {}
    fit = w.learner._fit

    def spy(task, *rest):
        asked = {}
        loss = w.learner._loss

        def remember(current, rows):
            asked["fit"] = current
            return loss(current, rows)

        w.learner._loss = remember
        fit(task, *rest)
        w.learner._loss = loss
        with torch.no_grad():
            texts = task.test.inputs
            pooled = w.learner._feature(asked["fit"], texts, np.arange(len(texts)), training=False)
            expected[task.index] = asked["fit"].head(pooled)

    monkeypatch.setattr(w.learner, "_fit", spy)
    for task in w.stream.tasks:
        w.learner.learn(task)
        head = w.learner.units[task.index].head
        assert set(head.classes) == {c for t in w.stream.seen(task) for c in t.classes}
        known = answers(w, task.test.inputs)[:, list(head.classes)]
        torch.testing.assert_close(known, expected[task.index], atol=1e-4, rtol=1e-4)


@each
def test_answers_do_not_depend_on_batch_or_order(name):
    w = small(name)
    for task in w.stream.tasks[:2]:
        w.learner.learn(task)
    inputs = inputs_of(w)
    base = answers(w, inputs)
    w.learner.tools.trainer.eval_batch_size = 1
    order = np.random.default_rng(1).permutation(len(inputs))
    other = answers(w, [inputs[i] for i in order])
    torch.testing.assert_close(other, base[order], atol=1e-4, rtol=1e-4)
    assert torch.equal(other.argmax(1), base[order].argmax(1))


@pytest.mark.parametrize(
    ("name", "scenario"), [*((n, "class") for n in LEARNERS), *((n, "domain") for n in DOMAINS)]
)
def test_restored_learners_answer_and_go_on_bit_for_bit(name, scenario):
    stream = stream_of(scenario, train=8, test=4)
    w, units, states, said = small(name, stream), {}, [], []
    for task in stream.tasks:
        w.learner.learn(task)
        units[task.index] = through_disk(w.learner.snapshot())
        states.append(through_disk(w.learner.state()))
        said.append(answers(w, inputs_of(w)))
    for done in (1, 2, 3):
        again = small(name, stream)
        again.learner.restore(units, stream.tasks[:done])
        again.learner.load_state(states[done - 1])
        assert torch.equal(answers(again, inputs_of(w)), said[done - 1])
        assert same(again.learner.snapshot(), units[done - 1])
        assert same(again.learner.state(), states[done - 1])
        for task in stream.tasks[done:]:
            again.learner.learn(task)
        assert torch.equal(answers(again, inputs_of(w)), said[-1])
        assert again.learner.units[2].fingerprint == w.learner.units[2].fingerprint
        assert same(again.learner.state(), states[-1])


@each
def test_stored_tensors_that_do_not_fit_are_refused(name):
    w = small(name)
    w.learner.learn(w.stream.tasks[0])
    whole, state = w.learner.snapshot(), w.learner.state()
    again = small(name, w.stream)
    lost = next(iter(whole))
    with pytest.raises(DamagedRunError, match=rf"task 1 .*missing.*{lost}"):
        again.learner.restore(
            {0: {n: t for n, t in whole.items() if n != lost}}, w.stream.tasks[:1]
        )
    again = small(name, w.stream)
    again.learner.restore({0: whole}, w.stream.tasks[:1])
    for damaged in ({**state, "odd": torch.zeros(1)}, dict(list(state.items())[1:])):
        if damaged != state:  # some keep nothing
            with pytest.raises(DamagedRunError, match=r"state of learner=.* does not fit"):
                again.learner.load_state(damaged)


@each
def test_a_diverging_task_leaves_everything_as_it_was(name):
    w = small(name, clip=0.0)
    w.learner.learn(w.stream.tasks[0])
    rows, units, state = rows_of(w), dict(w.learner.units), w.learner.state()
    state = {n: t.clone() for n, t in state.items()}
    w.learner.tools.optimizer.lr = w.learner.tools.optimizer.head_lr = 1e9
    with pytest.raises(DivergedError):
        w.learner.learn(w.stream.tasks[1])
    assert all(same(a, b) for a, b in zip(rows, rows_of(w), strict=True))
    assert w.learner.units == units
    assert same(w.learner.state(), state)


@pytest.mark.parametrize("classes", ["task", "seen"])
def test_only_the_tasks_own_rows_of_the_head_train_unless_all_are_compared(classes):
    w = world(OLoRA(classes=classes))
    heads = []
    for task in w.stream.tasks[:2]:
        w.learner.learn(task)
        heads.append(w.learner.units[task.index].head)
    kept = torch.equal(heads[1].weight[:2], heads[0].weight)
    assert kept == (classes == "task")
    assert heads[1].classes[:2] == heads[0].classes


RUNS = {
    "olora": (),
    "inflora": ("learner.examples=6",),
    "sdlora": (),
    "sapt": ("learner.replay=gaussian",),
}


@pytest.mark.parametrize("name", RUNS)
def test_runs_from_end_to_end(name, tmp_path):
    """A run, the same from what the cache knows, and predictions from its folder alone."""
    args = ("debug=smoke", f"learner={name}", *RUNS[name], "trainer.epochs=1")
    args += (f"paths.runs={tmp_path / 'runs'}", f"paths.cache={tmp_path / 'cache'}")
    folder = run(*args)
    assert json.loads((folder / "status.json").read_text())["state"] == "finished"
    assert "-none-" in folder.name  # no router is consulted
    first = digests(folder)
    results = pd.read_parquet(folder / "results.parquet")
    last = results[results["after_task"] == 3].set_index("metric")["value"]
    assert last["module_bytes"] == 4 * last["module_parameters"] > 0
    assert last["bank_modules"] == (4 if name == "sdlora" else 3)
    assert run(*args, "fresh=true") == folder == folder_of(*args)
    timing = json.loads((folder / "timing.json").read_text())
    assert [t["reused"] for t in timing["tasks"]] == [True] * 3
    again = digests(folder)
    files = ("results.parquet", "predictions.parquet", "tasks/003/module.safetensors")
    for file in (*files, *(n for n in first if n.endswith("learner.safetensors"))):
        assert again[file] == first[file], file
    table = pd.read_parquet(folder / "predictions.parquet").query("after_task == 3")
    loaded = load_run(folder, cache=tmp_path / "cache")
    stream = load_stream(loaded.config, quiet())
    inputs = [text for task in stream.tasks for text in task.test.inputs]
    assert (loaded.predict(inputs).labels == table["routed_prediction"].to_numpy()).all()


@pytest.mark.parametrize("name", RUNS)
def test_other_kinds_of_module_are_refused(name):
    with pytest.raises(ConfigError, match=f"learner={name} is made for module=lora"):
        folder_of("debug=smoke", f"learner={name}", "module=dora")
