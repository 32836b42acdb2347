import copy
import signal

import pytest
import torch
from core_fixtures import CPU, random_module, same, tiny
from peft import PrefixTuningConfig, get_peft_model
from running import FIVE, RIDGE, digests, folder_of, in_child, run
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel, MPNetConfig, MPNetModel
from virtual_cases import (
    KINDS,
    SHAPE,
    TEXTS,
    WORDS,
    B,
    H,
    L,
    alone,
    check_learns,
    check_mixed,
    check_survives_a_failure,
    hidden,
    make,
    own,
    text,
)

from cl_peft.errors import ConfigError, DamagedRunError
from cl_peft.modules.bank import Bank, Route, flatten
from cl_peft.modules.dora import DoRA
from cl_peft.modules.lora import LoRA
from cl_peft.modules.mixed import MixedBank
from cl_peft.modules.prefix import Prefix
from cl_peft.modules.prompt import Prompt

P, LAYERS, MID = 3, 2, 7
NETWORK = {"E": "embedding.weight", "W1": "transform.0.weight", "b1": "transform.0.bias",
           "W2": "transform.2.weight", "b2": "transform.2.bias"}  # fmt: skip


def kv(kind):
    return H // 2 if kind == "llama" else H  # two key-value heads for four


def method(reparameterise=False):
    return Prefix(tokens=P, reparameterise=reparameterise, hidden=MID)


def bank_of(model):
    return Bank(method(), model, CPU)


def fresh(bank, seed=0):
    return bank.fresh(torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("reparameterise", [False, True])
def test_real_peft_gives_the_same_and_the_same_gradients(reparameterise):
    for kind in TEXTS:
        model, batch = make(kind)
        reference = copy.deepcopy(model)
        bank = Bank(method(reparameterise), model, CPU)
        (module,) = fresh(bank).values()
        config = PrefixTuningConfig(
            num_virtual_tokens=P,
            task_type="FEATURE_EXTRACTION",
            prefix_projection=reparameterise,
            encoder_hidden_size=MID,
        )
        reference = get_peft_model(reference, config).eval()
        theirs_leaves = dict(reference.prompt_encoder["default"].named_parameters())
        names = NETWORK if reparameterise else {"tokens": "embedding.weight"}
        assert set(names) == set(module)
        assert set(names.values()) == set(theirs_leaves)
        for mine, other in names.items():
            theirs_leaves[other].data.copy_(module[mine].detach().view_as(theirs_leaves[other]))
        with bank.use({"attention": module}):
            ours = hidden(model, batch)
        batch.pop("use_cache", None)  # their way in
        theirs = own(batch, reference(**batch).last_hidden_state)
        assert ours.shape == (B, L, H)
        assert not torch.allclose(ours, hidden(model, batch), atol=1e-2)
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
        direction = torch.randn(ours.shape)
        (ours * direction).mean().backward()
        (theirs * direction).mean().backward()
        for mine, other in names.items():
            gradient = module[mine].grad
            assert gradient.abs().max() > 1e-5
            expected = theirs_leaves[other].grad.view_as(gradient)
            torch.testing.assert_close(gradient, expected, atol=1e-6, rtol=1e-4)
        assert all(p.grad is None for p in model.parameters())


def heads(x):
    return x.unflatten(-1, (4, H // 4)).transpose(1, 2)


def naive_attention(q, k, v, prefix, mask):
    """Softmax attention with a prefix ``(P, 2, H)``, from ``(B, L, H)``; mask ``(B, L)``."""
    k = torch.cat([prefix[:, 0].expand(len(k), -1, -1), k], 1)
    v = torch.cat([prefix[:, 1].expand(len(v), -1, -1), v], 1)
    mask = torch.cat([torch.ones(len(k), P), mask], 1)
    scores = heads(q) @ heads(k).transpose(2, 3) / (H // 4) ** 0.5
    scores = scores.masked_fill(mask[:, None, None] == 0, -torch.inf)
    return (scores.softmax(-1) @ heads(v)).transpose(1, 2).flatten(2)


def naive_bert(model, batch, prefix):
    """BERT written down; its tokens stand at positions P, P + 1, ..."""
    x = model.embeddings(batch["input_ids"], position_ids=torch.arange(P, P + L)[None])
    for i, layer in enumerate(model.encoder.layer):
        a, out = layer.attention.self, layer.attention.output
        seen = naive_attention(
            a.query(x), a.key(x), a.value(x), prefix[:, i], batch["attention_mask"]
        )
        x = out.LayerNorm(out.dense(seen) + x)
        inner = layer.output.dense(torch.nn.functional.gelu(layer.intermediate.dense(x)))
        x = layer.output.LayerNorm(inner + x)
    return own(batch, x)


def naive_vit(model, batch, prefix):
    x = model.embeddings(batch["pixel_values"])
    for i, layer in enumerate(model.layers):
        a, z = layer.attention, layer.layernorm_before(x)
        seen = naive_attention(
            a.q_proj(z), a.k_proj(z), a.v_proj(z), prefix[:, i], torch.ones(z.shape[:2])
        )
        x = x + a.o_proj(seen)
        x = x + layer.mlp(layer.layernorm_after(x))
    return model.layernorm(x)


@pytest.mark.parametrize(("kind", "naive"), [("bert", naive_bert), ("vit", naive_vit)])
def test_a_naive_twin_gives_the_same_and_the_same_gradients(kind, naive):
    model, batch = make(kind)
    bank = bank_of(model)
    module = fresh(bank)
    with bank.use(module):
        ours = hidden(model, batch)
    leaf = module["attention"]["tokens"].detach().clone().requires_grad_(True)
    theirs = naive(model, batch, leaf)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(ours, hidden(model, batch), atol=1e-2)
    direction = torch.randn(ours.shape)
    (ours * direction).mean().backward()
    (theirs * direction).mean().backward()
    gradient = module["attention"]["tokens"].grad
    torch.testing.assert_close(gradient, leaf.grad, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_failed_forward_leaves_nothing_behind(kind):
    model, batch = make(kind)
    check_survives_a_failure(bank_of(model), model, batch)


@pytest.mark.parametrize("kind", KINDS)
def test_a_mixed_batch_equals_single_forwards(kind):
    check_mixed(bank_of, *make(kind))


def test_without_any_padding_a_causal_model_stays_causal():
    """Then there is no mask to extend, only a flag."""
    model, batch = make("llama")
    batch["attention_mask"] = torch.ones(B, L, dtype=torch.long)
    check_mixed(bank_of, model, batch)
    bank = bank_of(model)
    later = {**batch, "input_ids": batch["input_ids"].clone()}
    later["input_ids"][:, 5:] = 1
    with bank.use(fresh(bank)):
        before, after = hidden(model, batch), hidden(model, later)
    torch.testing.assert_close(before[:, :5], after[:, :5], atol=1e-6, rtol=1e-6)
    assert not torch.allclose(before[:, 5:], after[:, 5:], atol=1e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_prefixes_of_one_sample_stand_one_after_another(kind):
    model, batch = make(kind)
    bank = bank_of(model)
    modules = [fresh(bank, seed) for seed in range(3)]
    for module in modules:
        bank.add(module)
    weights = torch.tensor([[1, 1, 1], [1, 0, 1], [0, 0, 0], [0, 1, 0], [1, 1, 0], [0, 0, 1]])
    with bank.use(Route.dense(weights)):
        ours = hidden(model, batch)
    bank.close()
    for n, row in enumerate(weights.tolist()):
        one = alone(batch, n)
        parts = [m["attention"]["tokens"] for m, on in zip(modules, row, strict=True) if on]
        expected = hidden(model, one)[0]
        if parts:
            longer = Bank(Prefix(tokens=P * len(parts), reparameterise=False), model, CPU)
            with longer.use({"attention": {"tokens": torch.cat(parts)}}):
                expected = hidden(model, one)[0]
            longer.close()
        torch.testing.assert_close(ours[n, : len(expected)], expected, atol=1e-5, rtol=1e-5)


def test_a_weight_between_is_refused():
    model, batch = make("vit")
    bank = bank_of(model)
    bank.add(fresh(bank))
    with (
        bank.use(Route.dense(torch.full((B, 1), 0.5))),
        pytest.raises(ConfigError, match=r"Prefix: .* must be 0 or 1, not 0\.5"),
    ):
        model(**batch)


@pytest.mark.parametrize("kind", ["bert", "llama", "vit"])
def test_32_samples_of_four_methods_equal_32_single_forwards(kind):
    """And two of each method's banks beside each other, of different sizes."""
    model, batch = make(kind)
    batch = {k: torch.cat([v] * 6)[:32] if torch.is_tensor(v) else v for k, v in batch.items()}
    banks = {
        "lora": Bank(LoRA(rank=2), model, CPU),
        "prompt": Bank(Prompt(tokens=P), model, CPU),
        "prefix": Bank(method(), model, CPU),
        "dora": Bank(DoRA(rank=2), model, CPU),
        "more prompt": Bank(Prompt(tokens=P + 2), model, CPU),
        "more prefix": Bank(Prefix(tokens=P + 2, reparameterise=False), model, CPU),
    }
    plain = hidden(model, batch)
    mixed, names = MixedBank(banks), (list(banks)[:4] * 7 + list(banks)[4:] * 2)
    for seed, name in enumerate(names):
        bank = banks[name]
        virtual = name.split()[-1] in ("prompt", "prefix")
        mixed.add(name, fresh(bank, seed) if virtual else random_module(bank, seed))
    rows = torch.randperm(32, generator=torch.Generator().manual_seed(0))
    with mixed.use(Route.each(rows)):
        ours = hidden(model, batch)
    for n, row in enumerate(rows.tolist()):
        one = alone(batch, n)
        name, local = mixed.rows[row]
        with banks[name].use(Route.to(local, 1)):
            expected = hidden(model, one)[0]
        torch.testing.assert_close(ours[n, : len(expected)], expected, atol=1e-4, rtol=1e-4)
        assert not torch.allclose(ours[n], plain[n], atol=1e-2)
    # one sample may have a prompt and a prefix
    pair = torch.tensor([[names.index("prompt"), names.index("prefix")]] * 32)
    with mixed.use(Route(pair, torch.ones(32, 2))):
        both = hidden(model, batch)
    with banks["prompt"].use(Route.to(0, 32)), banks["prefix"].use(Route.to(0, 32)):
        torch.testing.assert_close(both, hidden(model, batch), atol=1e-5, rtol=1e-5)
    for bank in banks.values():
        bank.close()
    assert torch.equal(hidden(model, batch), plain)


def test_learns_through_the_network_and_on_from_its_folded_form():
    for kind in KINDS:
        model, batch = make(kind)
        bank, module = check_learns(method(reparameterise=True), model, batch, lr=0.05)
        (trained,) = module.values()
        assert set(trained) == set(NETWORK)
        with bank.use(module):
            expected = hidden(model, batch)
        row = bank.add(module)
        folded = bank.get(row)
        assert {n: t.shape for n, t in folded["attention"].items()} == {
            "tokens": (P, LAYERS, 2, kv(kind))
        }
        with bank.use(Route.to(row, B)):
            assert torch.equal(hidden(model, batch), expected)
        # what the sequential learner does
        leaf = folded["attention"]["tokens"].detach().clone().requires_grad_(True)
        with bank.training({"attention": {"tokens": leaf}}):
            states = hidden(model, batch)
        assert torch.equal(states, expected)
        states.square().sum().backward()
        assert leaf.grad.abs().max() > 0
        bank.close()
        check_learns(method(), model, batch, lr=0.3)


def test_starts_like_torch_layers():
    model, _ = make("bert")
    wide = Prefix(tokens=40, hidden=300)
    (site,) = wide.sites(model)
    p = wide.init(site, torch.Generator().manual_seed(0))
    assert {n: tuple(t.shape) for n, t in p.items()} == {
        "E": (40, H), "W1": (300, H), "b1": (300,), "W2": (LAYERS * 2 * H, 300), "b2": (96,)
    }  # fmt: skip
    assert abs(float(p["E"].std()) - 1) < 0.1
    for name, into in (("W1", H), ("b1", H), ("W2", 300), ("b2", 300)):
        assert 0.9 * into**-0.5 < p[name].abs().max() <= into**-0.5
    direct = Prefix(tokens=40, reparameterise=False).init(site, torch.Generator().manual_seed(0))
    assert abs(float(direct["tokens"].std()) - 1) < 0.1
    again = wide.init(site, torch.Generator().manual_seed(0))
    assert same(p, again)


def test_parameter_formula_and_the_way_to_disk_and_back(tmp_path):
    for kind in KINDS:
        model, _ = make(kind)
        bank = Bank(method(reparameterise=True), model, CPU)
        assert bank.parameters_per_module() == 2 * LAYERS * P * kv(kind)
    modules = [fresh(bank, seed) for seed in range(4)]
    for module in modules[:3]:
        bank.add(module)
    kept = bank.get(2)["attention"]["tokens"].clone()
    bank.replace(1, modules[3])
    stored = flatten(bank.get(1))
    save_file({n: t.contiguous() for n, t in stored.items()}, tmp_path / "m")
    back = bank.check(load_file(tmp_path / "m"), "m")
    assert same(flatten(back), stored)
    assert same(flatten(bank.get(bank.add(back))), stored)
    assert torch.equal(bank.get(2)["attention"]["tokens"], kept)
    with pytest.raises(DamagedRunError, match="missing attention/tokens; unknown attention/E"):
        bank.check({"attention/E": torch.zeros(P, H)}, "m")
    with pytest.raises(ConfigError, match="Prefix modules cannot be merged"), bank.merged(0):
        pass


def test_the_models_attention_is_switched_and_put_back():
    backbone = tiny()
    model = backbone.model
    key, fingerprint = backbone.key(), backbone.weights_fingerprint()
    first, second = bank_of(model), bank_of(model)
    assert model.config._attn_implementation == "cl_peft"
    assert (backbone.key(), backbone.weights_fingerprint()) == (key, fingerprint)
    second.close()
    batch = backbone.collate(backbone.encode(["a", "some text"]))
    plain = backbone(batch)
    with first.use(fresh(first)):
        assert not torch.allclose(backbone(batch), plain, atol=1e-3)
    first.close()
    assert model.config._attn_implementation == "sdpa"
    assert not any("_prefixes" in m.__dict__ for m in model.modules())


def test_other_attention_is_refused():
    eager = BertModel(BertConfig(**WORDS, attn_implementation="eager"))
    with pytest.raises(ConfigError, match=r"BertModel does not use .* 'eager', 2 of 2 layers"):
        method().sites(eager)
    with pytest.raises(ConfigError, match=r"MPNetModel does not use .* 0 of 2 layers"):
        method().sites(MPNetModel(MPNetConfig(**SHAPE, vocab_size=60)))


def test_what_does_not_fit_the_positions_is_refused_with_a_way_out():
    torch.manual_seed(0)
    model = BertModel(BertConfig(**WORDS, max_position_embeddings=L + P - 1), False).eval()
    bank, batch = bank_of(model), text()
    match = f"a text of {L} tokens and 3 virtual ones need 12 positions; the backbone has 11"
    with bank.use(fresh(bank)):
        with pytest.raises(ConfigError, match=match):
            model(**batch)
        model(**{k: v[:, : L - 1] for k, v in batch.items()})
    model(**batch)


@pytest.mark.parametrize(
    "learner", [("learner=isolated", *RIDGE), ("learner=sequential",)], ids=lambda a: a[0][8:]
)
def test_a_run_killed_and_resumed_ends_with_the_same_bits(learner, tmp_path, cache):
    small = ("module=prefix", "module.hidden=16")
    args = ("debug=smoke", "cache=off", *FIVE, *small, *learner, f"paths.cache={cache}")
    whole, part = ((*args, f"paths.runs={tmp_path / name}") for name in "ab")
    run(*whole)
    assert in_child("while task 3 trains", part) == -signal.SIGKILL
    run(*part)
    expected, got = (digests(folder_of(*a)) for a in (whole, part))
    for name in ("results.parquet", "predictions.parquet", "tasks/005/module.safetensors"):
        assert got[name] == expected[name]
    tensors = load_file(folder_of(*part) / "tasks/005/module.safetensors")
    assert tensors["attention/tokens"].shape == (10, 2, 2, 32)


def test_the_other_learner_runs(places):
    run("debug=smoke", "module=prefix", "learner=joint", "trainer.epochs=1", *places)
