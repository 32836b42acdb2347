import copy

import pandas as pd
import pytest
import torch
from core_fixtures import CPU, random_module
from running import run
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel, LlamaConfig, LlamaModel, ViTConfig, ViTModel

from cl_peft.errors import DamagedRunError
from cl_peft.modules.bank import Bank, Route, flatten
from cl_peft.modules.full import Full
from cl_peft.modules.lora import LoRA
from cl_peft.modules.mixed import MixedBank

SHAPE = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 40,
    "initializer_range": 0.2,
}
B = 6


def tokens():
    mask = torch.ones(B, 7, dtype=torch.long)
    mask[1, 4:] = 0
    return {"input_ids": torch.randint(1, 60, (B, 7)), "attention_mask": mask}


KINDS = {
    "bert": lambda: (BertModel(BertConfig(**SHAPE, vocab_size=60), False), tokens()),
    "llama": lambda: (
        LlamaModel(LlamaConfig(**SHAPE, vocab_size=60, pad_token_id=0)),
        {**tokens(), "use_cache": False},
    ),
    "vit": lambda: (
        ViTModel(ViTConfig(**SHAPE, image_size=16, patch_size=8), False),
        {"pixel_values": torch.randn(B, 3, 16, 16)},
    ),
}


@pytest.fixture(params=list(KINDS))
def case(request):
    torch.manual_seed(0)
    model, batch = KINDS[request.param]()
    return model.eval().requires_grad_(False), batch


def hidden(model, batch):
    return model(**batch).last_hidden_state


def one_of(batch, n):
    return {k: v[n : n + 1] if isinstance(v, torch.Tensor) else v for k, v in batch.items()}


def changed(model, *parts):
    """A plain copy whose own weights are ``W + sum_k w_k dW_k``."""
    twin = copy.deepcopy(model)
    layers = dict(twin.named_modules())
    for weight, module in parts:
        for name, p in module.items():
            layers[name]._forward_hooks.clear()
            layers[name].weight.data += weight * p["dW"].detach()
            if "db" in p:
                layers[name].bias.data += weight * p["db"].detach()
    return twin


def filled(bank, count):
    modules = [random_module(bank, seed) for seed in range(count)]
    for module in modules:
        bank.add(module)
    return modules


def test_a_fresh_module_changes_nothing(case):
    model, batch = case
    plain = hidden(model, batch)
    bank = Bank(Full(), model, CPU)
    fresh = bank.fresh(torch.Generator().manual_seed(1))
    with bank.use(fresh):
        assert torch.equal(hidden(model, batch), plain)
    bank.add(fresh)
    with bank.use(Route.each(torch.zeros(B, dtype=torch.long))):
        assert torch.equal(hidden(model, batch), plain)


def test_forward_and_gradients_are_those_of_the_layers_own_weights(case):
    model, batch = case
    bank = Bank(Full(), model, CPU)
    module = random_module(bank, 2)
    twin = changed(model, (1.0, module)).requires_grad_(True)
    with bank.use(module):
        ours = hidden(model, batch)
    theirs = hidden(twin, batch)
    assert not torch.allclose(ours, hidden(model, batch), atol=1e-2)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    direction = torch.randn(ours.shape)
    (ours * direction).mean().backward()
    (theirs * direction).mean().backward()
    layers = dict(twin.named_modules())
    for name, p in module.items():
        torch.testing.assert_close(p["dW"].grad, layers[name].weight.grad, atol=1e-6, rtol=1e-4)
        assert ("db" in p) == (layers[name].bias is not None)
        if "db" in p:
            torch.testing.assert_close(p["db"].grad, layers[name].bias.grad, atol=1e-6, rtol=1e-4)
    assert all(p.grad is None for p in model.parameters())


def test_a_mixed_batch_equals_single_forwards(case):
    model, batch = case
    plain = hidden(model, batch)
    bank = Bank(Full(), model, CPU)
    modules = filled(bank, 3)
    rows = torch.tensor([2, -1, 0, 1, 1, 2])
    with bank.use(Route.each(rows)):
        ours = hidden(model, batch)
    for n, row in enumerate(rows.tolist()):
        alone = one_of(batch, n)
        expected = hidden(changed(model, (1.0, modules[row])), alone)[0] if row >= 0 else plain[n]
        torch.testing.assert_close(ours[n], expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(ours[1], plain[1])
    assert torch.equal(hidden(model, batch), plain)  # nothing routed, nothing changed
    weights = torch.tensor([[0.2, 0.5, 0.3], [0.0, -1.0, 0.0], [1.0, 1.0, 1.0]] * 2)
    with bank.use(Route.dense(weights)):
        soft = hidden(model, batch)
    for n, row in enumerate(weights):
        twin = changed(model, *zip(row.tolist(), modules, strict=True))
        torch.testing.assert_close(soft[n], hidden(twin, one_of(batch, n))[0], atol=1e-4, rtol=1e-4)


def test_lives_in_one_batch_with_lora(case):
    model, batch = case
    plain = hidden(model, batch)
    banks = {"full": Bank(Full(), model, CPU), "lora": Bank(LoRA(rank=2), model, CPU)}
    mixed = MixedBank(banks)
    names = ["lora", "full", "lora", "full"]
    modules = [random_module(banks[name], i) for i, name in enumerate(names)]
    for name, module in zip(names, modules, strict=True):
        mixed.add(name, module)
    rows = torch.tensor([0, 1, 2, 3, 1, 0])
    with mixed.use(Route.each(rows)):
        ours = hidden(model, batch)
    for n, row in enumerate(rows.tolist()):
        with banks[names[row]].use(modules[row]):
            alone = hidden(model, one_of(batch, n))[0]
        torch.testing.assert_close(ours[n], alone, atol=1e-4, rtol=1e-4)
        assert not torch.allclose(ours[n], plain[n], atol=1e-2)


def test_learns(case):
    model, batch = case
    bank = Bank(Full(), model, CPU)
    module = bank.fresh(torch.Generator())
    leaves = [t for p in module.values() for t in p.values()]
    optimizer = torch.optim.Adam(leaves, lr=1e-2)
    target = torch.randn(B, 24)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        with bank.training(module):
            loss = (hidden(model, batch).mean(1) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]


def test_merges_and_restores_the_same_bits(case):
    model, batch = case
    bank = Bank(Full(), model, CPU)
    filled(bank, 2)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with bank.use(Route.to(1, B)):
        beside = hidden(model, batch)
    with bank.merged(1):
        merged = hidden(model, batch)
    torch.testing.assert_close(merged, beside, atol=1e-4, rtol=1e-4)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_joins_is_replaced_and_comes_back_from_disk(tmp_path):
    model, _ = KINDS["llama"]()
    bank = Bank(Full(sites=["q_proj", "down_proj"]), model, CPU)
    modules = filled(bank, 3)
    new = random_module(bank, 9)
    bank.replace(1, new)
    save_file({n: t.contiguous() for n, t in flatten(bank.get(1)).items()}, tmp_path / "m")
    back = bank.check(load_file(tmp_path / "m"), "m")
    assert all(torch.equal(t, flatten(new)[n]) for n, t in flatten(back).items())
    for row in (0, 2):
        kept = flatten(bank.get(row))
        assert all(torch.equal(t, flatten(modules[row])[n]) for n, t in kept.items())
    tensors = flatten(back)
    name = next(iter(tensors))
    with pytest.raises(DamagedRunError, match=f"missing {name}"):
        bank.check({n: t for n, t in tensors.items() if n != name}, "m")


def test_parameter_formula():
    config = BertConfig(vocab_size=10, hidden_size=384, num_hidden_layers=6,
                        num_attention_heads=12, intermediate_size=1536)  # fmt: skip
    with torch.device("meta"):
        model = BertModel(config)
    bank = Bank(Full(), model, CPU)
    attention, feed_forward = 4 * (384 * 384 + 384), 2 * 384 * 1536 + 1536 + 384
    assert bank.parameters_per_module() == 6 * (attention + feed_forward) == 10_637_568


def test_a_run_reports_its_size_and_learns_with_galore(places):
    galore = ("optimizer=galore", "optimizer.rank=8", "optimizer.lr=2e-2")
    folder = run("debug=smoke", "module=full", *galore, "trainer.epochs=8", *places)
    rows = pd.read_parquet(folder / "results.parquet")
    last = rows[(rows.after_task == 3) & rows.eval_task.isna()].set_index(["metric", "routing"])
    layer = 4 * (32 * 32 + 32) + 2 * 32 * 128 + 128 + 32
    assert last.loc[("module_parameters", "none"), "value"] == 2 * layer
    assert last.loc[("module_bytes", "none"), "value"] == 4 * 2 * layer
    assert last.loc[("average_accuracy", "oracle"), "value"] > 0.9
