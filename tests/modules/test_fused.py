"""The fused branch equals the plain formula, in value and gradient, wherever it is used."""

import copy
import math

import numpy as np
import pytest
import torch
from core_fixtures import CPU
from scipy import stats
from torch import nn
from virtual_cases import hidden, make

from cl_peft.modules import dropping, fused
from cl_peft.modules.bank import Active, Bank
from cl_peft.modules.base import Site
from cl_peft.modules.dora import DoRA
from cl_peft.modules.lora import LoRA

KINDS = ["bert", "llama", "vit"]
METHODS = {"lora": lambda **o: LoRA(rank=3, alpha=7.0, **o), "dora": lambda **o: DoRA(rank=3, **o)}


def case(name="lora", bias=True, dtype=torch.float64, out=5, **options):
    """A site, its method and parameters that matter."""
    torch.manual_seed(0)
    layer = nn.Linear(6, out, bias=bias, dtype=dtype).requires_grad_(False)
    site, method = Site("here", layer), METHODS[name](**options)
    p = {"A": torch.randn(3, 6), "B": torch.randn(out, 3), "m": torch.rand(out) + 0.5}
    names = "ABm" if name == "dora" else "AB"
    return site, method, {n: p[n].to(dtype).requires_grad_(True) for n in names}


def through_bank(site, method, p):
    """The layer with a bank's hook on it, as a function of its input."""
    bank = Bank(copy.copy(method), nn.ModuleDict({"0": site.layer}), CPU)
    module = {bank.sites[0].name: p}

    def forward(x):
        with bank.use(module):
            return site.layer(x)

    return forward, bank


@pytest.mark.parametrize("bias", [True, False])
def test_mixed_gradients_by_finite_differences(bias):
    site, _, _ = case(bias=bias)
    torch.manual_seed(1)
    kinds = {"x": (3, 4, 6), "a": (3, 2, 6), "b": (3, 5, 2), "w": (3, 2)}
    leaves = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in kinds.values()]

    def forward(x, a, b, w):
        y = nn.functional.linear(x, site.weight, site.bias).detach()
        return fused.MixedLowRank.apply(x, y, a, b, w, site.weight)

    assert torch.autograd.gradcheck(forward, leaves)


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("out", [5, 7])
@pytest.mark.parametrize(("dropout", "small"), [(0.0, 32), (0.0, 2), (0.2, 32)])
def test_mixed_through_the_bank_is_the_plain_formula(k, out, dropout, small, monkeypatch):
    """In value and in every gradient, also of the weights; dropout takes the plain way."""
    monkeypatch.setattr(fused, "SMALL", small)
    calls = []
    real = fused.MixedLowRank.apply
    monkeypatch.setattr(fused.MixedLowRank, "apply", lambda *a: calls.append(1) or real(*a))
    site, method, _ = case(dropout=dropout, out=out)
    bank = Bank(method, nn.ModuleDict({"0": site.layer}), CPU)
    torch.manual_seed(2)
    leaves = {
        "x": torch.randn(3, 4, 6, dtype=torch.float64),
        "A": torch.randn(3, k, 3, 6, dtype=torch.float64),
        "B": torch.randn(3, k, out, 3, dtype=torch.float64),
        "w": torch.rand(3, k, dtype=torch.float64) + 0.1,
    }
    gradients, outputs = [], []
    for fast in (True, False):
        own = {n: t.clone().requires_grad_(True) for n, t in leaves.items()}
        p = {n: own[n] for n in "AB"}
        torch.manual_seed(3)
        if fast:
            with bank.give({bank.sites[0].name: Active(p, own["w"])}, training=True):
                answer = site.layer(own["x"])
        else:
            y = nn.functional.linear(own["x"], site.weight, site.bias)
            method.training_mode(True)
            answer = method.mixed(bank.sites[0], own["x"], y, p, own["w"])
            method.training_mode(False)
        answer.square().sum().backward()
        outputs.append(answer.detach())
        gradients.append({n: t.grad for n, t in own.items()})
    assert len(calls) == (dropout == 0)
    torch.testing.assert_close(*outputs)
    for name in leaves:
        torch.testing.assert_close(gradients[0][name], gradients[1][name], msg=name)


def plain(site, method, p):
    return lambda x: method.one(site, x, nn.functional.linear(x, site.weight, site.bias), p)


@pytest.fixture
def used(monkeypatch):
    """Counts uses of the fused functions."""
    calls = []
    for function in (fused.LowRank, fused.ScaledLowRank):
        real = function.apply
        monkeypatch.setattr(function, "apply", lambda *a, r=real: calls.append(1) or r(*a))
    return calls


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(4, 6), (2, 3, 6), (2, 6, 6)])  # the last: many rows
@pytest.mark.parametrize("name", list(METHODS))
def test_gradients_by_finite_differences(name, shape, bias):
    site, _, p = case(name, bias)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    if name == "lora":

        def forward(x, a, b):
            y = nn.functional.linear(x, site.weight, site.bias).detach()
            return fused.LowRank.apply(x, y, a, b, site.weight, 1.7, None)

        assert torch.autograd.gradcheck(forward, (x, p["A"], p["B"]))
        return

    def scaled(x, a, b, c):
        y = nn.functional.linear(x, site.weight, site.bias).detach()
        bias = torch.zeros(5, dtype=torch.float64) if site.bias is None else site.bias
        return fused.ScaledLowRank.apply(x, y, a, b, c, site.weight, bias, 1.7)

    assert torch.autograd.gradcheck(scaled, (x, p["A"], p["B"], p["m"]))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", list(METHODS))
def test_value_and_gradients_equal_the_plain_formula(name, bias, used):
    site, method, p = case(name, bias)
    forward, _ = through_bank(site, method, p)
    x = torch.randn(2, 4, 6, dtype=torch.float64, requires_grad=True)
    direction = torch.randn(2, 4, 5, dtype=torch.float64)
    ours, theirs = forward(x), plain(site, method, p)(x)
    assert len(used) == 1
    torch.testing.assert_close(ours, theirs)
    leaves = [x, *p.values()]
    mine = torch.autograd.grad((ours * direction).sum(), leaves)
    for a, b in zip(mine, torch.autograd.grad((theirs * direction).sum(), leaves), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", list(METHODS))
@pytest.mark.parametrize("kind", KINDS)
def test_a_whole_model_equals_the_plain_formula(kind, name, used, monkeypatch):
    model, batch = make(kind)
    bank = Bank(METHODS[name](), model, CPU)
    module = bank.fresh(torch.Generator().manual_seed(0))
    for params in module.values():
        params["B"].data.normal_(std=0.1)
    leaves = [t for params in module.values() for t in params.values()]

    def run():
        with bank.use(module):
            out = hidden(model, batch)
        weights = torch.linspace(-1, 1, out.numel()).view(out.shape)
        return [out.detach(), *torch.autograd.grad((out * weights).sum(), leaves)]

    ours = run()
    assert len(used) == len(bank.sites)
    monkeypatch.setattr(fused, "fits", lambda *_: False)
    theirs = run()
    assert len(used) == len(bank.sites)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=2e-4, rtol=1e-4)


def mask(keep, x):
    """Bits as bools, shaped like ``x``."""
    bits = np.unpackbits(keep.numpy(), count=x.numel())
    return torch.from_numpy(bits.astype(bool)).view(x.shape)


@pytest.mark.parametrize("cached", [dropping.CACHED, 100, 1])
def test_dropout_drops_the_branch_alone(cached, used, monkeypatch):
    """Given what is kept, the naive twin is ``y + s/(1-p) (x keep) A^T B^T``, in any pieces."""
    monkeypatch.setattr(dropping, "CACHED", cached)
    site, method, p = case(dropout=0.25)
    forward, bank = through_bank(site, method, p)
    x = torch.randn(50, 6, dtype=torch.float64, requires_grad=True)
    bank.method.training_mode(True)
    torch.manual_seed(3)
    ours = forward(x)
    torch.manual_seed(3)
    keep, share = dropping.kept(x, 0.25)
    keep = mask(keep, x)
    assert share == 0.75
    assert len(used) == 1
    y = nn.functional.linear(x, site.weight, site.bias)
    theirs = y + 7 / 3 / share * (x * keep) @ p["A"].T @ p["B"].T
    torch.testing.assert_close(ours, theirs)
    leaves, direction = [x, *p.values()], torch.randn(50, 5, dtype=torch.float64)
    mine = torch.autograd.grad((ours * direction).sum(), leaves)
    for a, b in zip(mine, torch.autograd.grad((theirs * direction).sum(), leaves), strict=True):
        torch.testing.assert_close(a, b)
    assert not torch.equal(forward(x), ours)  # drawn anew every time


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [0, 1, 50])
def test_dropout_of_any_rows_and_precision(rows, dtype):
    site, _, p = case(dropout=0.25, dtype=dtype)
    x = torch.randn(rows, 6, dtype=dtype, requires_grad=True)
    keep, share = dropping.kept(x, 0.25)
    with torch.no_grad():
        y = nn.functional.linear(x, site.weight, site.bias)
    ours = fused.LowRank.apply(x, y.clone(), p["A"], p["B"], site.weight, 1 / share, keep)
    branch = (x * mask(keep, x)) @ p["A"].T @ p["B"].T / share
    loose = {"atol": 0.3, "rtol": 0.1} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(ours, y + branch, **loose)
    leaves = [x, p["A"], p["B"]]
    mine = torch.autograd.grad(ours.sum(), leaves)
    theirs = torch.autograd.grad((x @ site.weight.T + branch).sum(), leaves)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, **loose)


@pytest.mark.parametrize("p", [0.001, 0.1, 0.5, 0.9])
def test_what_dropout_keeps(p):
    torch.manual_seed(0)
    x = torch.ones(400, 501)
    keep, share = dropping.kept(x, p)
    assert abs(share - (1 - p)) <= 2**-17
    assert len(keep) == 400 * 501 / 8
    assert keep.dtype == torch.uint8
    again, keep = keep, mask(keep, x).double()
    error = 4.5 * (p * (1 - p)) ** 0.5
    assert abs(float(keep.mean()) - share) < error / keep.numel() ** 0.5
    for lag in (1, 2, 3, 4, 501):  # neighbours know nothing of one another
        flat = keep.flatten() - share
        together = float((flat[lag:] * flat[:-lag]).mean())
        assert abs(together) < 4.5 * p * (1 - p) / keep.numel() ** 0.5, lag
    torch.manual_seed(0)
    assert torch.equal(dropping.kept(x, p)[0], again)


@pytest.mark.parametrize("shape", [(1, 1), (9, 7), (50, 6), (3, 70_001), (400, 333)])
def test_pieces_are_the_rows_and_their_bits(shape):
    """Of any width, also where a row has more values than a piece, or a byte ends within one."""
    x = torch.arange(math.prod(shape), dtype=torch.float64).view(shape)
    keep, _ = dropping.kept(x, 0.5)
    parts = [(part.clone(), numbers.clone()) for _, part, numbers in dropping.pieces(x, keep)]
    assert torch.equal(torch.cat([part for part, _ in parts]), x)
    assert torch.equal(torch.cat([numbers for _, numbers in parts]), mask(keep, x).double())


def test_bools_do_as_well():
    """As other devices have them."""
    x, a, v = torch.randn(9, 7), torch.randn(3, 7), torch.randn(9, 3)
    keep, _ = dropping.kept(x, 0.5)
    torch.testing.assert_close(dropping.product(x, mask(keep, x), a), dropping.product(x, keep, a))
    ours = dropping.gradients(x, mask(keep, x), a, v, True, True)
    for one, other in zip(ours, dropping.gradients(x, keep, a, v, True, True), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("p", [1e-9, 1e-5, 0.001, 0.1, 0.5, 0.9, 0.999999, 1 - 1e-9])
def test_eight_values_are_dropped_independently(p):
    """How many of eight are dropped is binomial, at every place alike, but for rounding."""
    table, share = dropping.patterns(p)
    rows = np.unpackbits(table[:, None], axis=1).astype(bool)
    assert len(rows) == 2**16
    assert 0 < share <= 1
    assert abs(share - (1 - p)) <= 2**-17
    dropped = np.bincount(8 - rows.sum(1), minlength=9) / len(rows)
    np.testing.assert_allclose(dropped, stats.binom.pmf(np.arange(9), 8, p), atol=2**-16)
    np.testing.assert_allclose(rows.mean(0), 1 - p, atol=2**-12)
    both = rows[:, :, None] & rows[:, None, :]
    apart = ~np.eye(8, dtype=bool)
    np.testing.assert_allclose(both.mean(0)[apart], (1 - p) ** 2, atol=2**-11)


def test_only_what_asks_gets_a_gradient():
    site, method, p = case()
    forward, _ = through_bank(site, method, p)
    p["A"].requires_grad_(False)
    x = torch.randn(4, 6, dtype=torch.float64)
    forward(x).sum().backward()
    assert p["A"].grad is None
    assert x.grad is None
    torch.testing.assert_close(p["B"].grad, (7 / 3 * (x @ p["A"].T).sum(0)).expand(5, 3))


def test_an_output_that_someone_else_holds_is_not_overwritten(used):
    """A hook that came first keeps the frozen output, and may have changed it."""
    site, method, p = case()
    held = []

    def first(layer, args, y):
        held.append(y)
        return 2 * y

    site.layer.register_forward_hook(first)
    forward, _ = through_bank(site, method, p)
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    out = forward(x)
    assert not used
    frozen = nn.functional.linear(x, site.weight, site.bias)
    assert torch.equal(held[0], frozen)
    branch = 7 / 3 * x @ p["A"].T @ p["B"].T
    torch.testing.assert_close(out, 2 * frozen + branch)
    (mine,) = torch.autograd.grad(out.sum(), x, retain_graph=True)
    torch.testing.assert_close(mine, torch.autograd.grad((2 * frozen + branch).sum(), x)[0])


def test_a_hook_that_comes_later_sees_the_result():
    site, method, p = case()
    forward, _ = through_bank(site, method, p)
    site.layer.register_forward_hook(lambda layer, args, y: y * y)
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    expected = plain(site, method, p)(x) ** 2
    torch.testing.assert_close(forward(x), expected)
    (mine,) = torch.autograd.grad(forward(x).sum(), x)
    torch.testing.assert_close(mine, torch.autograd.grad(expected.sum(), x)[0])


def test_what_does_not_fit_takes_the_plain_way(used):
    site, method, p = case(dtype=torch.float32)
    forward, _ = through_bank(site, method, p)
    x = torch.randn(4, 6)
    with torch.autocast("cpu", torch.bfloat16):
        assert forward(x).dtype == torch.bfloat16
    site.layer.requires_grad_(True)
    forward(x)
    site, method, p = case("dora")
    p["m"].data[1] = 0.0  # c would divide by zero in the gradient
    forward, _ = through_bank(site, method, p)
    assert torch.isfinite(torch.autograd.grad(forward(x.double()).sum(), p["m"])[0]).all()
    assert not used
