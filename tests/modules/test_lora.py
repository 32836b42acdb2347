import copy

import pytest
import torch
from core_fixtures import CPU, random_module, texts, tiny
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaModel,
    ViTConfig,
    ViTModel,
)

from cl_peft.errors import ConfigError
from cl_peft.modules.bank import Bank, Route
from cl_peft.modules.base import Site
from cl_peft.modules.lora import LoRA


def bert():
    config = BertConfig(
        vocab_size=60,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=40,
        initializer_range=0.2,
    )
    return BertModel(config, add_pooling_layer=False), tokens()


def llama():
    config = LlamaConfig(
        vocab_size=60,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=40,
        initializer_range=0.2,
        pad_token_id=0,
    )
    return LlamaModel(config), {**tokens(), "use_cache": False}


def vit():
    config = ViTConfig(
        image_size=16,
        patch_size=8,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=40,
        initializer_range=0.2,
    )
    return ViTModel(config, add_pooling_layer=False), {"pixel_values": torch.randn(5, 3, 16, 16)}


def tokens():
    mask = torch.ones(5, 9, dtype=torch.long)
    mask[1, 4:] = 0
    mask[3, 7:] = 0
    return {"input_ids": torch.randint(1, 60, (5, 9)), "attention_mask": mask}


@pytest.fixture(params=[bert, llama, vit], ids=["bert", "llama", "vit"])
def case(request):
    torch.manual_seed(0)
    model, batch = request.param()
    return model.eval().requires_grad_(False), batch


def hidden(model, batch):
    return model(**batch).last_hidden_state


def test_a_fresh_module_changes_nothing(case):
    model, batch = case
    plain = hidden(model, batch)
    bank = Bank(LoRA(rank=3), model, CPU)
    fresh = bank.fresh(torch.Generator().manual_seed(1))
    with bank.use(fresh):
        assert torch.equal(hidden(model, batch), plain)
    assert all(bool(p["A"].any()) for p in fresh.values())
    bank.add(fresh)
    with bank.use(Route.each(torch.zeros(5, dtype=torch.long))):
        assert torch.equal(hidden(model, batch), plain)


@pytest.mark.parametrize("sites", [["all"], ["self_attn.*", "attention.*", "*.attn.*"]])
def test_forward_and_gradients_equal_real_peft(case, sites):
    model, batch = case
    names = {n for n, _ in model.named_modules()}
    sites = [s for s in sites if s == "all" or any(f".{s.split('.')[-2]}." in n for n in names)]
    reference = copy.deepcopy(model)
    bank = Bank(LoRA(rank=3, alpha=7.0, sites=sites), model, CPU)
    module = random_module(bank, 2)
    config = LoraConfig(
        r=3, lora_alpha=7, lora_dropout=0.0, target_modules=[s.name for s in bank.sites]
    )
    reference = get_peft_model(reference, config).eval()
    layers = dict(reference.base_model.model.named_modules())
    with torch.no_grad():
        for site in bank.sites:
            layers[site.name].lora_A["default"].weight.copy_(module[site.name]["A"])
            layers[site.name].lora_B["default"].weight.copy_(module[site.name]["B"])
    with bank.use(module):
        ours = hidden(model, batch)
    theirs = hidden(reference, batch)
    assert not torch.allclose(ours, hidden(model, batch), atol=1e-2)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    direction = torch.randn(ours.shape, generator=torch.Generator().manual_seed(3))
    (ours * direction).mean().backward()
    (theirs * direction).mean().backward()
    for site in bank.sites:
        for ours_name, theirs_name in (("A", "lora_A"), ("B", "lora_B")):
            mine = module[site.name][ours_name].grad
            other = getattr(layers[site.name], theirs_name)["default"].weight.grad
            torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-4)
    assert all(p.grad is None for p in model.parameters())


def test_parameter_formula():
    config = BertConfig(
        vocab_size=10,
        hidden_size=384,
        num_hidden_layers=6,
        num_attention_heads=12,
        intermediate_size=1536,
        max_position_embeddings=8,
    )
    with torch.device("meta"):
        model = BertModel(config)
    bank = Bank(LoRA(rank=8), model, CPU)
    assert bank.parameters_per_module() == 331_776 == 6 * 8 * (4 * 768 + 2 * 1920)
    bank = Bank(LoRA(rank=8, sites=["query", "key", "value", "attention.output.dense"]), model, CPU)
    assert bank.parameters_per_module() == 6 * 4 * 8 * (384 + 384)
    assert sum(t.numel() for p in random_module(bank, 0).values() for t in p.values()) == 147_456


def test_all_leaves_pooler_and_heads_alone():
    model = BertModel(BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1,
                                 num_attention_heads=2, intermediate_size=12))  # fmt: skip
    assert len(LoRA().sites(model)) == 6
    assert [s.name for s in LoRA(sites=["pooler.dense"]).sites(model)] == ["pooler.dense"]
    mixed = LoRA(sites=["value", "query", "value"]).sites(model)
    assert [s.name.rsplit(".", 1)[1] for s in mixed] == ["query", "value"]  # each once


def test_a_pattern_that_matches_nothing_is_refused_with_names():
    model = tiny().model
    with pytest.raises(ConfigError, match=r"'querry' matches no linear.*Did you mean 'query'") as e:
        LoRA(sites=["key", "querry"]).sites(model)
    assert "dense, key, query, value" in str(e.value)


@pytest.fixture
def site():
    torch.manual_seed(0)
    return Site("here", nn.Linear(6, 5))


def stack(batch, k, rank=3, d_in=6, d_out=5):
    a = torch.randn(batch, k, rank, d_in, requires_grad=True)
    b = torch.randn(batch, k, d_out, rank, requires_grad=True)
    return {"A": a, "B": b}


@pytest.mark.parametrize("k", [1, 3])
def test_mixed_equals_a_loop_over_one(site, k):
    method = LoRA(rank=3, alpha=5.0)
    x = torch.randn(7, 4, 6, requires_grad=True)
    p = stack(7, k)
    weights = torch.rand(7, k)
    weights[2] = 0.0
    weights[3, 0] = -0.5
    y = site.layer(x)
    mixed = method.mixed(site, x, y, p, weights)
    naive = []
    for n in range(7):
        answer = y[n]
        for j in range(k):
            branch = method.one(
                site, x[n], torch.zeros_like(y[n]), {m: t[n, j] for m, t in p.items()}
            )
            answer = answer + weights[n, j] * branch
        naive.append(answer)
    naive = torch.stack(naive)
    torch.testing.assert_close(mixed, naive, atol=1e-5, rtol=1e-5)
    assert torch.equal(mixed[2], y[2])
    leaves = [x, p["A"], p["B"]]
    direction = torch.randn(mixed.shape)
    ours = torch.autograd.grad((mixed * direction).sum(), leaves, retain_graph=True)
    theirs = torch.autograd.grad((naive * direction).sum(), leaves)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-4, rtol=1e-4)
    assert not ours[1][2].any()


def test_dropout_only_on_the_branch_and_only_in_training(site):
    method = LoRA(rank=3, alpha=3.0, dropout=0.5)
    p = {name: t[0, 0].detach() for name, t in stack(1, 1).items()}
    x = torch.randn(2000, 6)
    y = site.layer(x)
    clean = method.one(site, x, y, p)
    assert torch.equal(clean, method.one(site, x, y, p))
    method.training_mode(True)
    torch.manual_seed(0)
    noisy = method.one(site, x, y, p)
    torch.manual_seed(0)
    dropped = nn.functional.dropout(x, 0.5, True)
    torch.testing.assert_close(noisy, y + dropped @ p["A"].T @ p["B"].T)
    assert not torch.allclose(noisy, clean)
    assert torch.allclose((noisy - y).mean(0), (clean - y).mean(0), atol=0.5)  # scaled by 1/(1-p)
    no_branch = {name: torch.zeros_like(t) for name, t in p.items()}
    assert torch.equal(method.one(site, x, y, no_branch), y)
    method.training_mode(False)
    assert torch.equal(method.one(site, x, y, p), clean)


def test_a_bank_switches_dropout_on_for_its_training_scope_alone():
    backbone = tiny()
    bank = Bank(LoRA(rank=2, dropout=0.5), backbone.model, CPU)
    module = random_module(bank, 0)
    batch = backbone.collate(backbone.encode(texts(4, seed=1)))

    def twice(scope):
        with scope(module):
            return backbone(batch), backbone(batch)

    first, second = twice(bank.training)
    assert not torch.equal(first, second)
    first, second = twice(bank.use)
    assert torch.equal(first, second)
    with pytest.raises(RuntimeError), bank.training(module):
        raise RuntimeError
    first, second = twice(bank.use)
    assert torch.equal(first, second)
