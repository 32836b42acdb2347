"""Which learners' losses may be split: checked on the losses and gradients of their own steps."""

import numpy as np
import pytest
import torch
import yaml
from core_fixtures import stream_of, world
from learner_cases import world_with
from running import CONF

from cl_peft.config import build
from cl_peft.modules.lora import LoRA
from cl_peft.modules.prompt import Prompt
from cl_peft.training import Trainer

NAMES = sorted(path.stem for path in (CONF / "learner").glob("*.yaml"))
PROMPTS = ("codaprompt", "dualprompt", "l2p", "progressive")


class Watched(Trainer):
    """Before every step: its loss and gradients, whole and in three parts."""

    def __init__(self):
        super().__init__(epochs=1, batch_size=8, accumulate=3)
        self.wrong = []  # relative to the whole step's, by step; a copy of the trainer shares it

    def _step(self, job, rows, optimizer, tensors, device):
        def found(parts):
            shares = [len(part) / len(rows) for part in parts]
            losses = [job.loss(p) * s for p, s in zip(parts, shares, strict=True)]
            total = torch.stack(losses).sum()
            asked = torch.autograd.grad(total, tensors, allow_unused=True)
            flat = [torch.zeros_like(t) if g is None else g
                    for g, t in zip(asked, tensors, strict=True)]  # fmt: skip
            return torch.cat([total.detach()[None], *(t.flatten() for t in flat)])

        whole, split = found([rows]), found(np.array_split(rows, 3))
        self.wrong.append(float((whole - split).norm() / whole.norm()))
        return super()._step(job, rows, optimizer, tensors, device)


@pytest.mark.parametrize("name", [n for n in NAMES if n != "frozen"])
def test_a_loss_is_a_mean_over_examples_where_the_learner_says_so(name):
    learner = build(yaml.safe_load((CONF / "learner" / f"{name}.yaml").read_text()))
    trainer, stream = Watched(), stream_of(tasks=2, classes=4, train=8, test=2)
    method = Prompt(tokens=1) if name in PROMPTS else LoRA(rank=2)
    w = world_with(learner, method, stream=stream, trainer=trainer)
    for task in stream.tasks:
        w.learner.learn(task)
    assert len(trainer.wrong) >= 4
    assert (max(trainer.wrong) < 1e-4) == learner.splits


@pytest.mark.parametrize("name", ["sequential", "isolated"])
def test_a_learner_ends_where_it_would_have_without(name):
    """Modules, heads and answers agree but for rounding."""

    def learned(accumulate):
        node = yaml.safe_load((CONF / "learner" / f"{name}.yaml").read_text())
        stream = stream_of(tasks=2, classes=4, train=8, test=4)
        trainer = Trainer(epochs=2, batch_size=8, accumulate=accumulate)
        w = world(build(node), stream=stream, trainer=trainer, dropout=0.0)
        for task in stream.tasks:
            w.learner.learn(task)
        inputs = [text for task in stream.tasks for text in task.test.inputs]
        units = np.full(len(inputs), w.learner.unit_for(1))
        return w.learner.logits(inputs, units), w.learner.snapshot()

    logits, tensors = learned(1)
    split, other = learned(3)
    torch.testing.assert_close(split, logits, atol=1e-3, rtol=1e-3)
    for key, tensor in tensors.items():
        torch.testing.assert_close(other[key], tensor, atol=1e-3, rtol=1e-3)
