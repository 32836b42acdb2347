"""Tiny random models, batches and checks that tests of prompts and prefixes share."""

import pytest
import torch
from core_fixtures import CPU
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaModel,
    RobertaConfig,
    RobertaModel,
    ViTConfig,
    ViTModel,
)

from cl_peft.modules.bank import Bank, Route

B, L, H = 6, 9, 24
SHAPE = {
    "hidden_size": H,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "initializer_range": 0.2,
}
WORDS = {**SHAPE, "vocab_size": 60, "pad_token_id": 0}
PIXELS = {**SHAPE, "image_size": 16, "patch_size": 8}


def text():
    mask = torch.ones(B, L, dtype=torch.long)
    mask[1, 4:] = 0
    mask[4, 1:] = 0  # a text of one token
    return {"input_ids": torch.randint(1, 60, (B, L)) * mask, "attention_mask": mask}


def image():
    return {"pixel_values": torch.randn(B, 3, 16, 16)}


KINDS = {
    "bert": lambda: (BertModel(BertConfig(**WORDS), False), text()),
    "roberta": lambda: (RobertaModel(RobertaConfig(**WORDS), False), text()),
    "llama": lambda: (
        LlamaModel(LlamaConfig(**WORDS, num_key_value_heads=2)),
        {**text(), "use_cache": False},
    ),
    "vit": lambda: (ViTModel(ViTConfig(**PIXELS), False), image()),
}
TEXTS = ["bert", "roberta", "llama"]


def make(kind):
    """A model that asks for no gradient, and a batch."""
    torch.manual_seed(0)
    model, batch = KINDS[kind]()
    return model.eval().requires_grad_(False), batch


def own(batch, hidden):
    """States of the samples' own tokens, without padding."""
    mask = batch.get("attention_mask")
    return hidden if mask is None else hidden * mask[..., None]


def hidden(model, batch):
    """``(B, L, H)``; zero where there is padding."""
    return own(batch, model(**batch).last_hidden_state)


def alone(batch, n):
    """A batch of sample ``n`` only, without padding."""
    mask = batch.get("attention_mask")
    cut = slice(None) if mask is None else slice(int(mask[n].sum()))
    return {
        k: (v[n : n + 1] if v.dim() > 2 else v[n : n + 1, cut]) if torch.is_tensor(v) else v
        for k, v in batch.items()
    }


def check_mixed(make_bank, model, batch):
    """Per-sample routes, with frozen samples among them, give what single forwards give."""
    plain = hidden(model, batch)
    bank = make_bank(model)
    for seed in range(3):
        bank.add(bank.fresh(torch.Generator().manual_seed(seed)))
    rows = torch.tensor([2, 0, -1, 1, 0, -1])
    with bank.use(Route.each(rows)):
        states = model(**batch).last_hidden_state
    assert torch.isfinite(states).all()
    states = own(batch, states)
    for n, row in enumerate(rows.tolist()):
        one = alone(batch, n)
        with bank.use(Route.each(torch.tensor([row]))):
            expected = hidden(model, one)[0]
        torch.testing.assert_close(states[n, : len(expected)], expected, atol=1e-5, rtol=1e-5)
        assert (row < 0) == torch.allclose(states[n], plain[n], atol=1e-5)
    assert torch.equal(hidden(model, batch), plain)  # nothing routed, nothing changed
    with bank.use(Route.each(torch.full((B,), -1))):
        assert torch.equal(hidden(model, batch), plain)
    bank.close()
    assert torch.equal(hidden(model, batch), plain)


def check_learns(method, model, batch, lr):
    """The loss falls, through whatever the module trains through; returns bank and module."""
    bank = Bank(method, model, CPU)
    module = bank.fresh(torch.Generator().manual_seed(0))
    leaves = [t for p in module.values() for t in p.values()]
    optimizer = torch.optim.Adam(leaves, lr=lr)
    target = torch.randn(B, H)
    losses = []
    for _ in range(25):
        optimizer.zero_grad()
        with bank.training(module):
            loss = (hidden(model, batch).sum(1) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]
    assert all(p.grad is None for p in model.parameters())
    return bank, module


def check_survives_a_failure(bank, model, batch):
    """A forward pass that fails half way leaves nothing behind for the next one."""
    plain = hidden(model, batch)
    layers = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList))

    def fail(*_):
        raise MemoryError

    handle = layers[1].register_forward_hook(fail)
    with pytest.raises(MemoryError), bank.use(bank.fresh(torch.Generator())):
        model(**batch)
    handle.remove()
    assert torch.equal(hidden(model, batch), plain)
