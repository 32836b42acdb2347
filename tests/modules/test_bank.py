import copy
import os
from pathlib import Path

import pytest
import torch
from core_fixtures import CPU, random_module, texts, tiny

from cl_peft.errors import DamagedRunError
from cl_peft.modules import stacks
from cl_peft.modules.bank import Bank, Route, flatten
from cl_peft.modules.lora import LoRA
from cl_peft.modules.none import NoModule


@pytest.fixture
def backbone():
    return tiny()


@pytest.fixture
def bank(backbone):
    return Bank(LoRA(rank=2, alpha=6.0), backbone.model, CPU)


def filled(bank, count):
    modules = [random_module(bank, seed) for seed in range(count)]
    for module in modules:
        bank.add(module)
    return modules


def merged(backbone, module, scale):
    """A copy of the backbone whose weights are W + s B A: what a module means."""
    copied = copy.copy(backbone)
    copied.model = copy.deepcopy(backbone.model)
    layers = dict(copied.model.named_modules())
    for name, params in module.items():
        layers[name]._forward_hooks.clear()
        layers[name].weight += scale * (params["B"] @ params["A"]).detach()
    return copied


def test_mixed_batch_equals_one_merged_model_per_task(backbone, bank):
    modules = filled(bank, 5)
    inputs = texts(32, seed=3)
    rows = torch.randint(-1, 5, (32,), generator=torch.Generator().manual_seed(0))
    assert set(rows.tolist()) == {-1, 0, 1, 2, 3, 4}
    batch = backbone.collate(backbone.encode(inputs))
    plain = backbone(batch)
    with bank.use(Route.each(rows)):
        ours = backbone(batch)
    models = {i: merged(backbone, m, 3.0) for i, m in enumerate(modules)}
    for i, (text, row) in enumerate(zip(inputs, rows.tolist(), strict=True)):
        alone = backbone.collate(backbone.encode([text]))  # no padding, no other sample
        expected = models[row](alone)[0] if row >= 0 else plain[i]
        torch.testing.assert_close(ours[i], expected, atol=1e-5, rtol=1e-5)
    assert (ours - plain)[rows >= 0].abs().amax(1).min() > 1e-3


def test_soft_routes_equal_merged_mixtures(backbone, bank):
    modules = filled(bank, 3)
    weights = torch.tensor([[0.2, 0.5, 0.3], [1.0, 1.0, 1.0], [0.0, 0.0, 0.0], [0.0, 2.0, 0.0]])
    batch = backbone.collate(backbone.encode(texts(4, seed=5)))
    with bank.use(Route.dense(weights)):
        ours = backbone(batch)
    for i, w in enumerate(weights):
        model = merged(backbone, modules[0], 0.0)
        layers = dict(model.model.named_modules())
        for site in bank.sites:
            for weight, module in zip(w, modules, strict=True):
                p = module[site.name]
                layers[site.name].weight += 3.0 * weight * (p["B"] @ p["A"]).detach()
        torch.testing.assert_close(ours[i], model(batch)[i], atol=1e-5, rtol=1e-5)


def test_one_module_for_the_whole_batch_takes_the_same_values_either_way(backbone, bank):
    filled(bank, 3)
    batch = backbone.collate(backbone.encode(texts(6, seed=6)))
    gathered = Route(torch.full((6, 1), 2), torch.ones(6, 1))
    with bank.use(gathered):
        slow = backbone(batch)
    for route in (Route.each(torch.full((6,), 2)), Route.to(2, 6)):
        assert route.single == 2
        with bank.use(route):
            torch.testing.assert_close(backbone(batch), slow, atol=1e-5, rtol=1e-5)


def test_growing_keeps_earlier_rows_bit_for_bit(bank, monkeypatch):
    monkeypatch.setattr(stacks, "RESERVED", 0)  # as for modules that are huge
    modules = filled(bank, 9)
    capacities = {len(t) for params in bank._stacks.values() for t in params.values()}
    assert (bank.count, capacities) == (9, {16})
    same_rows(bank, modules)


def same_rows(bank, modules):
    for row, module in enumerate(modules):
        for name, tensor in flatten(bank.get(row)).items():
            assert torch.equal(tensor, flatten(module)[name])


def test_nothing_is_copied_while_there_is_room(bank):
    modules = filled(bank, 1)
    before = {s: {n: t.data_ptr() for n, t in p.items()} for s, p in bank._stacks.items()}
    modules += [random_module(bank, seed) for seed in range(1, 40)]
    for module in modules[1:]:
        bank.add(module)
    assert before == {s: {n: t.data_ptr() for n, t in p.items()} for s, p in bank._stacks.items()}
    same_rows(bank, modules)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux' count of pages")
@pytest.mark.parametrize("deterministic", [True, False])
def test_reserved_memory_is_not_touched(bank, deterministic):
    """Runs ask for deterministic kernels, with which torch fills new memory unless told not to."""

    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    try:
        started = resident()
        filled(bank, 20)
        assert resident() - started < stacks.RESERVED / 20
        assert torch.utils.deterministic.fill_uninitialized_memory
    finally:
        torch.use_deterministic_algorithms(before, warn_only=True)
    held = sum(t.numel() * t.element_size() for p in bank._stacks.values() for t in p.values())
    assert 0.99 * stacks.RESERVED < held <= stacks.RESERVED


@pytest.mark.parametrize("room", [1000, 12, 9])
def test_a_system_that_promises_less_gets_asked_for_less(bank, monkeypatch, room):
    empty = torch.Tensor.new_empty

    def strict(self, shape, **options):
        if shape[0] > room:
            raise RuntimeError("not enough memory: you tried to allocate")
        return empty(self, shape, **options)

    monkeypatch.setattr(torch.Tensor, "new_empty", strict)
    modules = filled(bank, 9)
    same_rows(bank, modules)
    for _ in range(room - bank.count):
        bank.add(modules[0])
    with pytest.raises(RuntimeError, match="not enough memory"):
        bank.add(modules[0])
    assert bank.count == room
    same_rows(bank, modules)


# ------------------------------------------------------------------ modules that wait


def waiting(bank, modules):
    """Modules that are not loaded yet, and which were asked for, in order."""
    asked = []

    def later(i):
        return lambda: asked.append(i) or modules[i]

    for i in range(len(modules)):
        bank.add_later(later(i))
    return asked


def test_a_module_is_loaded_once_when_something_routes_to_it():
    one, other = tiny(), tiny()
    eager, lazy = (Bank(LoRA(rank=2, alpha=6.0), b.model, CPU) for b in (one, other))
    modules = filled(eager, 6)
    asked = waiting(lazy, modules)
    assert (lazy.count, asked) == (6, [])
    batch = one.collate(one.encode(texts(3, seed=1)))
    steps = [
        (torch.tensor([-1, -1, -1]), []),
        (torch.tensor([4, 4, 4]), [4]),
        (torch.tensor([4, 1, 1]), [4, 1]),
        (torch.tensor([1, -1, 1]), [4, 1, 0]),  # a row with weight 0 must hold numbers, too
    ]
    for rows, expected in steps:
        with lazy.use(Route.each(rows)), eager.use(Route.each(rows)):
            assert torch.equal(other(batch), one(batch))
        assert asked == expected
    lazy.get(5)
    lazy.compose([0, 5], torch.ones(2))
    assert asked == [4, 1, 0, 5]
    with lazy.merged(2):
        pass
    lazy.replace(3, modules[0])
    assert asked == [4, 1, 0, 5, 2]
    same_rows(lazy, [*modules[:3], modules[0], *modules[4:]])
    assert len(asked) == 5


def test_a_module_that_cannot_be_loaded_is_an_error_each_time(bank):
    modules = filled(bank, 2)

    def broken():
        raise DamagedRunError("no")

    bank.add_later(broken)
    for _ in range(2):
        with pytest.raises(DamagedRunError, match="no"), bank.use(Route.to(2, 1)):
            pass
    bank.add(modules[0])
    assert bank.count == 4
    same_rows(bank, modules)
    bank.replace(2, modules[1])
    same_rows(bank, [*modules, modules[1], modules[0]])


def test_whoever_loads_first_may_be_in_inference_mode(bank):
    modules = [random_module(bank, seed) for seed in range(2)]
    asked = waiting(bank, modules)
    with torch.inference_mode():
        bank.get(0)
    bank.get(1)
    bank.replace(0, modules[0])
    assert asked == [0, 1]
    same_rows(bank, modules)


def test_the_bank_keeps_a_copy_not_the_leaf_in_training(bank):
    module = random_module(bank, 0)
    bank.add(module)
    before = {n: t.clone() for n, t in flatten(bank.get(0)).items()}
    for params in module.values():
        for tensor in params.values():
            tensor.data.add_(1.0)
    after = flatten(bank.get(0))
    assert all(torch.equal(before[n], after[n]) for n in before)
    assert not any(t.requires_grad for t in after.values())


def test_replace_changes_one_row(bank):
    filled(bank, 3)
    others = {r: {n: t.clone() for n, t in flatten(bank.get(r)).items()} for r in (0, 2)}
    new = random_module(bank, 77)
    bank.replace(1, new)
    assert all(torch.equal(t, flatten(new)[n]) for n, t in flatten(bank.get(1)).items())
    for row, tensors in others.items():
        assert all(torch.equal(t, tensors[n]) for n, t in flatten(bank.get(row)).items())


@pytest.mark.parametrize("row", [3, -1])
def test_a_row_that_is_not_there_is_refused(backbone, bank, row):
    filled(bank, 3)  # row 3 exists in memory, and belongs to nobody
    batch = backbone.collate(backbone.encode(["abc", "de"]))
    with pytest.raises(IndexError, match="3 modules"):
        bank.get(row)
    with pytest.raises(IndexError, match="3 modules"):
        bank.replace(row, random_module(bank, 0))
    routes = [Route.to(row, 2), Route(torch.tensor([[0], [row]]), torch.ones(2, 1))]
    for route in routes:
        with pytest.raises(IndexError, match=f"row {row}; the bank has 3"), bank.use(route):
            backbone(batch)
    with (
        pytest.raises(ValueError, match="route has 3 rows"),
        bank.use(Route.dense(torch.rand(3, 3))),
    ):
        backbone(batch)
    assert bank._scope is None


def test_an_empty_bank_can_route_to_the_frozen_backbone(backbone, bank):
    batch = backbone.collate(backbone.encode(["abc", "de"]))
    plain = backbone(batch)
    with bank.use(Route.each(torch.tensor([-1, -1]))):
        assert torch.equal(backbone(batch), plain)
    with pytest.raises(IndexError, match="0 modules"), bank.use(Route.to(0, 2)):
        backbone(batch)


def test_scopes_nest_and_restore_also_after_an_exception(backbone, bank):
    filled(bank, 2)
    batch = backbone.collate(backbone.encode(["abcdef", "ghi"]))
    plain = backbone(batch)

    def through(row):
        with bank.use(Route.to(row, 2)):
            return backbone(batch)

    first, second = through(0), through(1)
    assert not torch.allclose(first, second, atol=1e-3)
    with bank.use(Route.to(0, 2)):
        assert torch.equal(through(1), second)
        assert torch.equal(backbone(batch), first)
        with pytest.raises(KeyError), bank.use(Route.to(1, 2)):
            raise KeyError
        assert torch.equal(backbone(batch), first)
        with pytest.raises(IndexError), bank.use(Route.to(9, 2)):
            pass
        assert torch.equal(backbone(batch), first)
        with bank.use(Route.each(torch.tensor([-1, -1]))):
            assert torch.equal(backbone(batch), plain)
    assert torch.equal(backbone(batch), plain)


def test_nothing_is_active_outside_a_scope_and_after_close(backbone):
    batch = backbone.collate(backbone.encode(["abcdef"]))
    plain = backbone(batch)
    bank = Bank(LoRA(), backbone.model, CPU)
    filled(bank, 2)
    assert torch.equal(backbone(batch), plain)
    bank.close()
    with bank.use(Route.to(0, 1)):
        assert torch.equal(backbone(batch), plain)


def test_training_one_module_changes_no_other_row_nor_the_backbone(backbone, bank):
    filled(bank, 3)
    rows = {r: {n: t.clone() for n, t in flatten(bank.get(r)).items()} for r in range(3)}
    module = random_module(bank, 50)
    start = {n: t.clone() for n, t in flatten(module).items()}
    leaves = [t for params in module.values() for t in params.values()]
    optimizer = torch.optim.AdamW(leaves, lr=0.1)
    batch = backbone.collate(backbone.encode(texts(4, seed=2)))
    for _ in range(3):
        optimizer.zero_grad()
        with bank.training(module):
            backbone(batch).square().sum().backward()
        optimizer.step()
    assert all(not torch.equal(t, start[n]) for n, t in flatten(module).items())
    assert backbone.weights_fingerprint() == backbone.fingerprint
    for row, tensors in rows.items():
        assert all(torch.equal(t, tensors[n]) for n, t in flatten(bank.get(row)).items())


def test_check_names_what_does_not_fit(bank):
    good = flatten(random_module(bank, 0))
    assert flatten(bank.check(good, "file")).keys() == good.keys()
    first, second = list(good)[:2]
    bad = {n: t for n, t in good.items() if n != first}
    bad[second] = torch.zeros(2, 2)
    bad["nowhere/A"] = torch.zeros(1)
    with pytest.raises(DamagedRunError) as error:
        bank.check(bad, "tasks/001/module.safetensors")
    text = str(error.value)
    assert "tasks/001/module.safetensors" in text
    assert f"missing {first}" in text
    assert f"{second} has shape (2, 2)" in text
    assert "unknown nowhere/A" in text


def test_no_module_has_no_sites(backbone):
    bank = Bank(NoModule(), backbone.model, CPU)
    batch = backbone.collate(backbone.encode(["abcdef"]))
    plain = backbone(batch)
    assert (bank.fresh(torch.Generator()), bank.parameters_per_module()) == ({}, 0)
    with bank.use(Route.to(-1, 1)):
        assert torch.equal(backbone(batch), plain)
    with pytest.raises(DamagedRunError, match="unknown a/A"):
        bank.check({"a/A": torch.zeros(1)}, "file")
