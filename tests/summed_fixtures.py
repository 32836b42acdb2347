"""For tests of learners that keep all their modules active: a naive twin of what sites compute."""

from contextlib import contextmanager

import torch
from safetensors.torch import load, save

from cl_peft.modules.bank import flatten


def delta(w, module, site: str) -> torch.Tensor:
    """``s B A`` of one module at one site, ``(out, in)``."""
    (where,) = [s for s in w.learner.tools.bank.sites if s.name == site]
    params = module[site]
    return w.learner.tools.bank.method.scale(where) * params["B"] @ params["A"]


@contextmanager
def changed(w, deltas):
    """Inside, every site adds ``delta x``; deltas are ``(out, in)``, or ``(B, out, in)``."""

    def hook(change):
        def act(layer, args, y):
            return y + args[0] @ (change.T if change.ndim == 2 else change.transpose(1, 2))

        return act

    sites = {s.name: s.layer for s in w.learner.tools.bank.sites}
    handles = [sites[name].register_forward_hook(hook(d)) for name, d in deltas.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def pooled(w, inputs) -> torch.Tensor:
    """What the backbone says, with whatever hooks are on it and no open scope."""
    return w.backbone(w.backbone.collate(w.features.encoded(inputs)))


def rows_of(w) -> list[dict[str, torch.Tensor]]:
    bank = w.learner.tools.bank
    return [{n: t.clone() for n, t in flatten(bank.get(r)).items()} for r in range(bank.count)]


def through_disk(tensors) -> dict[str, torch.Tensor]:
    return load(save({n: t.contiguous() for n, t in tensors.items()}))


def fits(w, monkeypatch) -> list:
    """A list that receives every fit's arguments, with values as they are when it begins."""
    seen, fit = [], w.learner._fit

    def spy(task, module, head, *rest):
        before = {n: t.clone() for n, t in {**flatten(module), **head.tensors()}.items()}
        fit(task, module, head, *rest)
        seen.append((task, module, head, before, rest))

    monkeypatch.setattr(w.learner, "_fit", spy)
    return seen


def same_gradients(loss, expected, leaves) -> None:
    """Both losses pull every leaf the same way, up to float32."""
    ours, theirs = torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, leaves)
    for a, b in zip(ours, theirs, strict=True):
        assert b.norm() > 0
        assert (a - b).norm() < 5e-3 * b.norm()
