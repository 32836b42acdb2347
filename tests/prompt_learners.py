"""Laws that learners with prompts and with several passes share, on a tiny world."""

import dataclasses

import numpy as np
import torch
from core_fixtures import CPU, same, stream_of, world
from safetensors.torch import load, save

from cl_peft.learners.base import Fit
from cl_peft.modules.bank import Bank
from cl_peft.modules.prefix import Prefix
from cl_peft.modules.prompt import Prompt
from cl_peft.training import Trainer

METHODS = {
    "prompt": lambda: Prompt(tokens=3),
    "prefix": lambda: Prefix(tokens=2, hidden=8),
}


def prompted(learner, method="prompt", **options):
    """A tiny world whose module is a prompt or a prefix."""
    options = {"trainer": Trainer(epochs=1, batch_size=8, eval_batch_size=16), **options}
    w = world(learner, **options)
    w.learner.tools.bank.close()
    bank = Bank(METHODS[method](), w.backbone.model, CPU)
    w.learner.start(dataclasses.replace(w.learner.tools, bank=bank))
    return w


def learned(learner, tasks=3, **options):
    """The same after some tasks."""
    w = prompted(learner, **options)
    for task in w.stream.tasks[:tasks]:
        w.learner.learn(task)
    return w


def scatter_keys(w):
    """Keys where samples are, so that samples choose differently."""
    inputs, _ = questions(w)
    count = len(w.learner.pool["keys"])
    w.learner.pool["keys"] = w.features.features(inputs[:: len(inputs) // count][:count])
    return w


def copies(tensors):
    return {n: t.detach().clone() for n, t in tensors.items()}


def on_disk(tensors):
    """What lands on disk, and back."""
    return load(save({k: v.contiguous() for k, v in tensors.items()})) if tensors else {}


def questions(w):
    """All test inputs and their tasks."""
    inputs = [text for task in w.stream.tasks for text in task.test.inputs]
    return inputs, np.concatenate([np.full(len(t.test), t.index) for t in w.stream.tasks])


def answers(w, done=3):
    """Logits of the test inputs of the first tasks, each by its task's unit."""
    inputs, true = questions(w)
    keep = true < done
    units = np.array([w.learner.unit_for(int(t)) for t in true[keep]])
    return w.learner.logits([i for i, k in zip(inputs, keep, strict=True) if k], units)


def a_fit(w, task, module, head, extra=None):
    """What a loss sees while ``task`` is learned."""
    labels = head.local(torch.from_numpy(task.train.labels))
    return Fit(task, module, head, task.train, labels, extra or {})


def feature(w, text, tokens):
    """Pooled feature ``(H,)`` of one text behind virtual tokens ``(n, H)``, by the model alone."""
    model, encoded = w.backbone.model, w.backbone.encode([text])
    own = model.get_input_embeddings()(encoded.values[None].long())
    x = torch.cat([tokens[None], own], 1)
    out = model(inputs_embeds=x, position_ids=torch.arange(x.shape[1])[None]).last_hidden_state
    return out[0, len(tokens) :].mean(0)


def cosine(a, b):
    return (a @ b) / (a.norm() * b.norm())


def masked_cross_entropy(head, pooled, label, classes):
    """Of one sample, among ``classes`` only."""
    scores = {c: pooled @ head.weight[i] + head.bias[i] for i, c in enumerate(head.classes)}
    kept = torch.stack([scores[c] for c in classes])
    return -(scores[label] - kept.logsumexp(0))


def close(a, b):
    torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)


# ------------------------------------------------------------------ laws


def check_resume(make, method="prompt", scenario="class", build=prompted):
    """Fit a, b, c gives what fit a, b; come back; fit c gives, bit for bit."""
    stream = stream_of(scenario)
    w, stored = build(make(), method, stream=stream), []
    for task in stream.tasks:
        w.learner.learn(task)
        parts = on_disk(w.learner.snapshot()), on_disk(w.learner.state())
        stored.append((*parts, answers(w, task.index + 1)))
    for done in (1, 2, 3):
        seen = stream.tasks[:done]
        again = build(make(), method, stream=stream)
        needed = seen if again.learner.keeps == "all" else seen[-1:]
        again.learner.restore({t.index: stored[t.index][0] for t in needed}, seen)
        again.learner.load_state(stored[done - 1][1])
        assert torch.equal(answers(again, done), stored[done - 1][2])
        assert same(again.learner.snapshot(), stored[done - 1][0])
        for task in stream.tasks[done:]:
            again.learner.learn(task)
            assert same(again.learner.snapshot(), stored[task.index][0])
            assert same(again.learner.state(), stored[task.index][1])
        assert torch.equal(answers(again), stored[2][2])
        prints = [u.fingerprint for u in again.learner.units.values()]
        assert prints == [u.fingerprint for u in w.learner.units.values()]


def check_samples_answer_alone(w):
    """Neither the batch nor the order changes an answer."""
    inputs, true = questions(w)
    units = np.array([w.learner.unit_for(int(t)) for t in true])
    base = w.learner.logits(inputs, units)
    assert float(base.nan_to_num(neginf=0).std(0).max()) > 1e-2  # they do not all say the same
    order = np.random.default_rng(1).permutation(len(inputs))
    for size in (1, 7, 64):
        w.learner.tools.trainer.eval_batch_size = size
        other = w.learner.logits([inputs[i] for i in order], units[order])
        torch.testing.assert_close(other, base[order], atol=1e-5, rtol=1e-5)
        assert torch.equal(other.argmax(1), base[order].argmax(1))


def check_gradients(loss, reference, leaves):
    """Two losses and their gradients agree, and every leaf has one that is not zero."""
    assert float(reference.detach()) > 0
    close(loss.detach(), reference.detach())
    ours = torch.autograd.grad(loss, leaves)
    theirs = torch.autograd.grad(reference, leaves)
    for a, b in zip(ours, theirs, strict=True):
        assert float(b.abs().max()) > 0
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-3)
