"""Laws that hold for every method that acts on layers' outputs, on BERT, Llama and ViT."""

import pytest
import torch
from core_fixtures import CPU
from safetensors.torch import load, save
from virtual_cases import B, alone, check_learns, check_mixed, hidden, make, own

from cl_peft.errors import ConfigError
from cl_peft.modules.adapter import Adapter
from cl_peft.modules.bank import Bank, Route, flatten
from cl_peft.modules.bitfit import BitFit
from cl_peft.modules.dora import DoRA
from cl_peft.modules.full import Full
from cl_peft.modules.ia3 import IA3
from cl_peft.modules.lora import LoRA
from cl_peft.modules.mixed import MixedBank
from cl_peft.modules.vera import VeRA

METHODS = {
    "lora": lambda: LoRA(rank=3),
    "rslora": lambda: LoRA(
        rank=3, alpha=4.0, scaling="sqrt_r", rank_pattern={"*down_proj": 2, "*dense": 5}
    ),
    "dora": lambda: DoRA(rank=3),
    "adapter": lambda: Adapter(bottleneck=5, init_scale=0.3),
    "pfeiffer": lambda: Adapter(bottleneck=5, placement="pfeiffer", init_scale=0.3, norms=False),
    "parallel": lambda: Adapter(bottleneck=5, placement="parallel", init_scale=0.3),
    "ia3": IA3,
    "bitfit": BitFit,
    "vera": lambda: VeRA(rank=6),
    "full": Full,
}
#: A fresh module changes nothing, to the bit or to rounding.
IDENTITY = [name for name in METHODS if name not in ("adapter", "pfeiffer", "parallel")]
MERGE = ["lora", "rslora", "dora", "ia3", "vera", "full"]
KINDS = ["bert", "llama", "vit"]


def bank_with(method, model, count=3, scale=0.1):
    """Modules around the method's own start, moved far enough to matter."""
    bank = Bank(method, model, CPU)
    fresh = bank.fresh

    def moved(generator):
        module = fresh(generator)
        for params in module.values():
            for tensor in params.values():
                tensor.data += scale * torch.randn(tensor.shape, generator=generator)
        return module

    bank.fresh = moved
    for seed in range(count):
        bank.add(bank.fresh(torch.Generator().manual_seed(seed)))
    return bank


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", IDENTITY)
def test_a_fresh_module_changes_nothing(name, kind):
    model, batch = make(kind)
    plain = hidden(model, batch)
    bank = Bank(METHODS[name](), model, CPU)
    fresh = bank.fresh(torch.Generator().manual_seed(1))
    with bank.use(fresh):
        torch.testing.assert_close(hidden(model, batch), plain, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_start_near_the_identity(kind):
    model, batch = make(kind)
    plain = hidden(model, batch)
    for scale, most in ((0.01, 1e-2), (0.0, 1e-6)):
        bank = Bank(Adapter(bottleneck=5, init_scale=scale), model, CPU)
        with bank.use(bank.fresh(torch.Generator().manual_seed(1))):
            assert (hidden(model, batch) - plain).norm() < most * plain.norm()
        bank.close()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", list(METHODS))
def test_mixed_batch_equals_single_forwards(name, kind):
    model, batch = make(kind)
    check_mixed(lambda m: bank_with(METHODS[name](), m, count=0), model, batch)


@pytest.mark.parametrize("name", list(METHODS))
def test_soft_routes_add_up(name):
    """Weight 1 equals the module alone; two half weights of one module equal it as well."""
    model, batch = make("bert")
    bank = bank_with(METHODS[name](), model)
    with bank.use(Route.to(1, B)):
        expected = hidden(model, batch)
    halves = Route(torch.full((B, 2), 1), torch.full((B, 2), 0.5))
    with bank.use(halves):
        torch.testing.assert_close(hidden(model, batch), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", list(METHODS))
def test_every_method_learns(name, kind):
    model, batch = make(kind)
    check_learns(METHODS[name](), model, batch, lr=0.03)


@pytest.mark.parametrize("name", list(METHODS))
def test_round_trip_through_safetensors(name):
    model, batch = make("bert")
    bank = bank_with(METHODS[name](), model)
    with bank.use(Route.to(2, B)):
        expected = hidden(model, batch)
    stored = load(save({k: t.contiguous() for k, t in flatten(bank.get(2)).items()}))
    assert sum(t.numel() for t in stored.values()) == bank.parameters_per_module()
    row = bank.add(bank.check(stored, "the file"))
    with bank.use(Route.to(row, B)):
        assert torch.equal(hidden(model, batch), expected)


@pytest.mark.parametrize("kind", ["bert", "llama"])
@pytest.mark.parametrize("name", MERGE)
def test_merging_equals_routing_and_leaves_no_trace(name, kind):
    model, batch = make(kind)
    bank = bank_with(METHODS[name](), model)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with bank.use(Route.to(1, B)):
        expected = hidden(model, batch)

    def check():
        with bank.merged(1):
            torch.testing.assert_close(hidden(model, batch), expected, atol=2e-5, rtol=2e-5)
            raise KeyError

    with pytest.raises(KeyError):
        check()
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_adapters_cannot_be_merged():
    model, _ = make("bert")
    bank = bank_with(METHODS["adapter"](), model)
    with pytest.raises(ConfigError, match="cannot be merged"), bank.merged(0):
        pass


def test_thirty_two_modules_of_four_methods_in_one_batch():
    model, batch = make("bert")
    big = {k: v[torch.arange(32) % B] for k, v in batch.items()}
    banks = {n: bank_with(METHODS[n](), model, count=0) for n in ("lora", "dora", "adapter", "ia3")}
    mixed = MixedBank(banks)
    for i in range(32):
        name = list(banks)[i % 4]
        mixed.add(name, banks[name].fresh(torch.Generator().manual_seed(100 + i)))
    order = torch.randperm(32, generator=torch.Generator().manual_seed(0))
    with mixed.use(Route.each(order)):
        states = own(big, model(**big).last_hidden_state)
    seen = []
    for n, row in enumerate(order.tolist()):
        one = alone(big, n)
        with mixed.use(Route.each(torch.tensor([row]))):
            expected = hidden(model, one)[0]
        torch.testing.assert_close(states[n, : len(expected)], expected, atol=2e-5, rtol=2e-5)
        seen.append(expected[0])
    assert torch.pdist(torch.stack(seen)).min() > 1e-4  # 32 different answers


@pytest.mark.parametrize(
    ("name", "formula"),
    [
        ("lora", lambda d, f: 4 * 3 * 2 * d + 2 * 3 * (d + f)),
        ("dora", lambda d, f: 4 * 3 * 2 * d + 2 * 3 * (d + f) + 4 * d + d + f),
        ("adapter", lambda d, f: 2 * (2 * d * 5 + d + 5) + 2 * 2 * d),
        ("pfeiffer", lambda d, f: 2 * d * 5 + d + 5),
        ("ia3", lambda d, f: 2 * d + f),
        ("bitfit", lambda d, f: 5 * d + f + 2 * d),
        ("vera", lambda d, f: 6 * 6 + 5 * d + f),
        ("full", lambda d, f: 4 * (d * d + d) + 2 * d * f + d + f),
    ],
)
def test_parameters_per_layer_by_the_formula(name, formula):
    model, _ = make("bert")
    d, f, layers = 24, 40, 2
    assert Bank(METHODS[name](), model, CPU).parameters_per_module() == layers * formula(d, f)


def test_a_backbone_without_the_role_is_refused():
    with pytest.raises(ConfigError, match="has no layer for"):
        IA3().sites(torch.nn.ModuleDict({"0": torch.nn.Linear(3, 3)}))
