"""Forward and gradients equal an independent implementation: peft, or a twin written here."""

import copy

import pytest
import torch
from core_fixtures import CPU
from peft import IA3Config, LoraConfig, VeraConfig, get_peft_model
from virtual_cases import hidden, make

from cl_peft.modules.adapter import Adapter
from cl_peft.modules.bank import Bank
from cl_peft.modules.dora import DoRA
from cl_peft.modules.ia3 import IA3
from cl_peft.modules.lora import LoRA
from cl_peft.modules.roles import role_of
from cl_peft.modules.vera import VeRA


def moved(bank, seed=0, scale=0.1):
    generator = torch.Generator().manual_seed(seed)
    module = bank.fresh(generator)
    for params in module.values():
        for tensor in params.values():
            tensor.data += scale * torch.randn(tensor.shape, generator=generator)
    return module


def compare(kind, method, config, names, plain_names=()):
    """Copy a module into peft's layers by ``names``; outputs and gradients must agree."""
    model, batch = make(kind)
    reference = copy.deepcopy(model)
    bank = Bank(method, model, CPU)
    module = moved(bank)
    targets = [site.name for site in bank.sites]
    reference = get_peft_model(reference, config(bank, targets)).eval()
    layers = dict(reference.base_model.model.named_modules())

    def theirs(site, name):
        holder = getattr(layers[site.name], names[name])["default"]
        return holder.weight if hasattr(holder, "weight") else holder

    with torch.no_grad():
        for site in bank.sites:
            for name in module[site.name]:
                target = theirs(site, name)
                target.copy_(module[site.name][name].reshape(target.shape))
    with bank.use(module):
        ours = hidden(model, batch)
    expected = hidden(reference, batch)
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)
    weights = torch.randn_like(ours)
    (ours * weights).sum().backward()
    (expected * weights).sum().backward()
    for site in bank.sites:
        for name, tensor in module[site.name].items():
            gradient = theirs(site, name).grad.reshape(tensor.shape)
            torch.testing.assert_close(tensor.grad, gradient, atol=2e-4, rtol=1e-4)
    return ours


@pytest.mark.parametrize("kind", ["bert", "llama", "vit"])
def test_dora_equals_peft(kind):
    compare(
        kind,
        DoRA(rank=3, alpha=7.0),
        lambda _, t: LoraConfig(r=3, lora_alpha=7, use_dora=True, target_modules=t),
        {"A": "lora_A", "B": "lora_B", "m": "lora_magnitude_vector"},
    )


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_rslora_with_patterns_equals_peft(kind):
    ranks, alphas = {"*dense": 5, "*down_proj": 2}, {"*key": 3.0, "*k_proj": 3.0}
    method = LoRA(rank=3, alpha=7.0, scaling="sqrt_r", rank_pattern=ranks, alpha_pattern=alphas)

    def config(bank, targets):
        return LoraConfig(
            r=3,
            lora_alpha=7,
            use_rslora=True,
            target_modules=targets,
            rank_pattern={s.name: method.rank_at(s) for s in bank.sites},
            alpha_pattern={s.name: 3 for s in bank.sites if s.name.endswith(("key", "k_proj"))},
        )

    compare(kind, method, config, {"A": "lora_A", "B": "lora_B"})


def test_lora_at_embeddings_equals_peft():
    compare(
        "bert",
        LoRA(rank=3, alpha=7.0, sites=["word_embeddings"]),
        lambda _, t: LoraConfig(r=3, lora_alpha=7, target_modules=t),
        {"A": "lora_embedding_A", "B": "lora_embedding_B"},
    )


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_ia3_equals_peft(kind):
    def config(bank, targets):
        inner = [s.name for s in bank.sites if role_of(s.name) == "ffn_out"]
        return IA3Config(target_modules=targets, feedforward_modules=inner)

    compare(kind, IA3(), config, {"l": "ia3_l"})


def test_vera_equals_peft():
    """The shared pair included: peft draws the same one from the same seed."""
    compare(
        "bert",
        VeRA(rank=6),
        lambda _, t: VeraConfig(r=6, target_modules=t, projection_prng_key=0),
        {"d": "vera_lambda_d", "b": "vera_lambda_b"},
    )


def test_dora_dropout_acts_on_both_terms():
    """Official code: with dropout the scaled base output comes from the dropped input too."""
    model, _ = make("bert")
    bank = Bank(DoRA(rank=3, alpha=7.0, dropout=0.5, sites=["intermediate.dense"]), model, CPU)
    site, module = bank.sites[0], moved(bank)
    p = module[site.name]
    x = torch.randn(4, 5, site.d_in)
    y = site.layer(x)
    torch.manual_seed(3)
    dropped = torch.nn.functional.dropout(x, 0.5)
    torch.manual_seed(3)
    bank.method.training_mode(True)
    ours = bank.method.one(site, x, y, p)
    s = 7.0 / 3
    ratio = p["m"] / (site.weight + s * p["B"] @ p["A"]).norm(dim=1)
    expected = y + (ratio - 1) * (dropped @ site.weight.T)
    expected = expected + ratio * s * (dropped @ p["A"].T @ p["B"].T)
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)
    bank.method.training_mode(False)
    assert not torch.allclose(bank.method.one(site, x, y, p), expected)


def test_dora_norm_by_the_identity_equals_the_materialised_norm():
    model, _ = make("bert")
    bank = Bank(DoRA(rank=4, alpha=9.0), model, CPU)
    for site in bank.sites:
        start = bank.fresh(torch.Generator().manual_seed(0))[site.name]
        torch.testing.assert_close(start["m"].detach(), site.weight.norm(dim=1))
        p = moved(bank, 4)[site.name]
        whole = (site.weight + 9 / 4 * p["B"] @ p["A"]).norm(dim=1)
        torch.testing.assert_close(bank.method._norm(site, p), whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("placement", ["houlsby", "pfeiffer", "parallel"])
def test_adapter_equals_a_naive_layer(placement):
    """One BERT layer written out by hand, with adapters and the task's norms in their places."""
    model, _ = make("bert")
    method = Adapter(bottleneck=5, placement=placement, init_scale=0.3, scale=2.0)
    bank = Bank(method, model, CPU)
    module = moved(bank)
    layer, name = model.encoder.layer[0], "encoder.layer.0"
    x = torch.randn(3, 7, 24)

    def adapter(where, z):
        p = module[f"{name}.{where}"]
        return torch.nn.functional.gelu(z @ p["W1"].T + p["b1"]) @ p["W2"].T + p["b2"]

    def norm(where, z):
        p = module[f"{name}.{where}.LayerNorm"]
        return torch.nn.functional.layer_norm(z, (24,), p["weight"], p["bias"], 1e-12)

    attended = layer.attention.self(x)[0]
    a = layer.attention.output.dense(attended)
    if placement == "houlsby":
        a = a + adapter("attention.output.dense", a)
    middle = norm("attention.output", a + x)
    f = layer.output.dense(layer.intermediate(middle))
    if placement == "parallel":
        f = f + 2.0 * adapter("output.dense", middle)
    else:
        f = f + adapter("output.dense", f)
    expected = norm("output", f + middle)
    with bank.use(module):
        out = layer(x)
    ours = out[0] if isinstance(out, tuple) else out
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)
