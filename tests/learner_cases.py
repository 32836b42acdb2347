"""Laws that every learner keeps, whatever it does; and worlds with other modules than LoRA."""

import dataclasses
import json

import numpy as np
import pandas as pd
import torch
import yaml
from core_fixtures import CPU, quiet, same, world
from running import run
from safetensors.torch import load, save

from cl_peft.experiment import load_stream
from cl_peft.learners.base import Fit
from cl_peft.loading import load_run
from cl_peft.modules.adapter import Adapter
from cl_peft.modules.bank import Bank
from cl_peft.modules.bitfit import BitFit
from cl_peft.modules.dora import DoRA
from cl_peft.modules.ia3 import IA3
from cl_peft.modules.lora import LoRA
from cl_peft.modules.prefix import Prefix
from cl_peft.modules.prompt import Prompt
from cl_peft.modules.vera import VeRA

METHODS = {
    "lora": lambda: LoRA(rank=2),
    "dora": lambda: DoRA(rank=2),
    "adapter": lambda: Adapter(bottleneck=3),
    "prompt": lambda: Prompt(tokens=2),
    "prefix": lambda: Prefix(tokens=2, hidden=4),
    "ia3": IA3,
    "bitfit": BitFit,
    "vera": lambda: VeRA(rank=4),
}


def world_with(learner, method, **options):
    """A tiny world with another module."""
    w = world(learner, **options)
    w.learner.tools.bank.close()
    bank = Bank(method, w.backbone.model, CPU)
    w.learner.start(dataclasses.replace(w.learner.tools, bank=bank))
    return w


def through_disk(tensors):
    """What lands on disk, and back."""
    return load(save({k: v.detach().contiguous() for k, v in tensors.items()}))


def fit_of(learner, task, module, head):
    """A fit as ``_fit`` makes it."""
    labels = head.local(torch.from_numpy(task.train.labels))
    return Fit(task, module, head, task.train, labels)


def alone(learner, module, head, inputs):
    """Logits of each input in a batch of its own, ``(N, C)``."""
    with learner.tools.bank.use(module):
        return torch.cat([head(learner._pooled([text], np.arange(1))) for text in inputs])


def questions(w):
    """All test inputs of tasks that were learned, and the unit of each."""
    seen = w.stream.tasks[: max(w.learner.units) + 1]
    inputs = [text for task in seen for text in task.test.inputs]
    return inputs, np.concatenate([np.full(len(t.test), w.learner.unit_for(t.index)) for t in seen])


def check_resume(make, stream, method=None, prepare=lambda w: w):
    """Interrupted after any task, it goes on as if it had not been: state, answers, units."""

    def fresh():
        if method is None:
            return prepare(world(make(), stream=stream))
        return prepare(world_with(make(), method(), stream=stream))

    w, snapshots, states, answers = fresh(), {}, [], []
    for task in stream.tasks:
        w.learner.learn(task)
        snapshots[task.index] = through_disk(w.learner.snapshot())
        states.append(through_disk(w.learner.state()))
        answers.append(w.learner.logits(*questions(w)))
    for done in range(1, len(stream.tasks) + 1):
        again, seen = fresh(), stream.tasks[:done]
        needed = seen if again.learner.keeps == "all" else seen[-1:]
        again.learner.restore({t.index: snapshots[t.index] for t in needed}, seen)
        again.learner.load_state(states[done - 1])
        assert torch.equal(again.learner.logits(*questions(again)), answers[done - 1])
        assert same_bits(again.learner.state(), states[done - 1])
        for task in stream.tasks[done:]:
            again.learner.learn(task)
            assert same(again.learner.snapshot(), snapshots[task.index])
            assert same_bits(again.learner.state(), states[task.index])
        assert torch.equal(again.learner.logits(*questions(again)), answers[-1])
        prints = [unit.fingerprint for unit in again.learner.units.values()]
        assert prints == [unit.fingerprint for unit in w.learner.units.values()]
    return w


def same_bits(a, b):
    """Equal names and values, NaN equal to NaN."""
    return set(a) == set(b) and all(torch.equal(_bits(a[n]), _bits(b[n])) for n in a)


def _bits(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def check_batches(w):
    """Answers do not depend on who else is in the batch, nor on the order of tests."""
    inputs, units = questions(w)
    base = w.learner.logits(inputs, units)
    order = np.random.default_rng(1).permutation(len(inputs))
    for size in (1, 7, 64):
        w.learner.tools.trainer.eval_batch_size = size
        other = w.learner.logits([inputs[i] for i in order], units[order])
        torch.testing.assert_close(other, base[order], atol=1e-5, rtol=1e-5)
        assert torch.equal(other.argmax(1), base[order].argmax(1))


def check_run(*overrides):
    """A whole run finishes, its backbone unchanged, and loads from its folder alone.

    Returns:
        Its folder, and its final results by (metric, routing).
    """
    folder = run("debug=smoke", "trainer.epochs=2", *overrides)
    assert json.loads((folder / "status.json").read_text())["state"] == "finished"
    config = yaml.safe_load((folder / "config.yaml").read_text())
    inputs = [t for task in load_stream(config, quiet()).tasks for t in task.test.inputs]
    frame = pd.read_parquet(folder / "tasks" / "003" / "predictions.parquet")
    loaded = load_run(folder)
    if config["router"]["name"] != "oracle":
        np.testing.assert_array_equal(loaded.predict(inputs).labels, frame["routed_prediction"])
    oracle = loaded.predict(inputs, frame["eval_task"].tolist())
    np.testing.assert_array_equal(oracle.labels, frame["oracle_prediction"])
    rows = pd.read_parquet(folder / "results.parquet")
    last = rows[(rows["after_task"] == 3) & rows["eval_task"].isna()]
    return folder, last.set_index(["metric", "routing"])["value"]
