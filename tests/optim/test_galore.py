import math

import pytest
import torch
from core_fixtures import CPU, quiet

from cl_peft.errors import ConfigError
from cl_peft.optim.galore import GaLore, ProjectedAdamW, projector
from cl_peft.training import Trainer

SHAPES = [(9, 6), (5, 8), (7, 7)]  # right, left, right


def leaves(shapes, seed=0):
    random = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=random, dtype=torch.float64).requires_grad_() for s in shapes]


def gradients(shapes, steps, seed=1):
    random = torch.Generator().manual_seed(seed)
    return [
        [torch.randn(s, generator=random, dtype=torch.float64) for s in shapes]
        for _ in range(steps)
    ]


def singles(shapes):
    return [t.float().detach().requires_grad_() for t in leaves(shapes)]


def walk(optimizer, tensors, grads):
    for step in grads:
        for tensor, grad in zip(tensors, step, strict=True):
            tensor.grad = grad.clone().to(tensor.dtype)
        optimizer.step()


def dot(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True))


def naive(weight, grads, r, every, scale, lr, betas, eps, decay):
    """Algorithm 2 of the paper, entry by entry; weight decay as in AdamW."""
    w = [[float(v) for v in row] for row in weight]
    rows, columns = len(w), len(w[0])
    right = rows >= columns
    m = v = None
    for t, grad in enumerate(grads):
        if t % every == 0:
            u, s, vh = torch.linalg.svd(grad, full_matrices=False)
            assert (s[:-1] >= s[1:]).all()
            p = vh[:r].tolist() if right else u[:, :r].T.tolist()  # r vectors
        g = grad.tolist()
        if right:
            low = [[dot(g[i], p[k]) for k in range(r)] for i in range(rows)]
        else:
            low = [[dot(p[k], [line[j] for line in g]) for j in range(columns)] for k in range(r)]
        if m is None:
            m = [[0.0] * len(low[0]) for _ in low]
            v = [[0.0] * len(low[0]) for _ in low]
        n = [[0.0] * len(low[0]) for _ in low]
        for a in range(len(low)):
            for b in range(len(low[0])):
                m[a][b] = betas[0] * m[a][b] + (1 - betas[0]) * low[a][b]
                v[a][b] = betas[1] * v[a][b] + (1 - betas[1]) * low[a][b] ** 2
                m_hat = m[a][b] / (1 - betas[0] ** (t + 1))
                v_hat = v[a][b] / (1 - betas[1] ** (t + 1))
                n[a][b] = m_hat / (math.sqrt(v_hat) + eps)
        for i in range(rows):
            for j in range(columns):
                if right:
                    full = sum(n[i][k] * p[k][j] for k in range(r))
                else:
                    full = sum(p[k][i] * n[k][j] for k in range(r))
                w[i][j] = w[i][j] - lr * decay * w[i][j] - lr * scale * full
    return torch.tensor(w, dtype=torch.float64)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_equals_a_naive_twin_across_new_projectors(shape, decay):
    (tensor,) = leaves([shape])
    start = tensor.detach().clone()
    grads = gradients([shape], 20)
    factory = GaLore(3, 6, 0.5, "exact", 0.05, None, [0.8, 0.95], 1e-6, decay)
    optimizer = factory.make([tensor], [])
    first = None
    for number, step in enumerate(grads):
        walk(optimizer, [tensor], [step])
        p = optimizer.state[tensor]["projector"]
        assert (first is not None and torch.equal(p, first)) == (number % 6 != 0)
        first = p.clone()
    expected = naive(start, [g[0] for g in grads], 3, 6, 0.5, 0.05, (0.8, 0.95), 1e-6, decay)
    assert (expected - start).abs().max() > 0.1
    torch.testing.assert_close(tensor.detach(), expected, atol=1e-9, rtol=1e-9)


def test_what_is_not_projected_equals_torchs_adamw():
    """Vectors, matrices not larger than the rank on both sides, and heads."""
    module_shapes, head_shapes = [(12,), (4, 30), (30, 4)], [(6, 20), (6,)]
    ours, theirs = singles(module_shapes + head_shapes), singles(module_shapes + head_shapes)
    large = torch.randn(8, 8).requires_grad_()
    factory = GaLore(rank=4, lr=0.03, head_lr=0.02, weight_decay=0.1)
    optimizer = factory.make([*ours[:3], large], ours[3:])
    reference = torch.optim.AdamW(
        [
            {"params": theirs[:3], "lr": 0.03},
            {"params": theirs[3:4], "lr": 0.02},
            {"params": theirs[4:], "lr": 0.02, "weight_decay": 0.0},
        ],
        weight_decay=0.1,
    )
    grads = gradients(module_shapes + head_shapes, 10)
    for step in grads:
        large.grad = torch.randn(8, 8)
        walk(optimizer, ours, [step])
        walk(reference, theirs, [step])
    assert "projector" in optimizer.state[large]
    for mine, other in zip(ours, theirs, strict=True):
        assert "projector" not in optimizer.state[mine]
        torch.testing.assert_close(mine, other, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("shape", [(7, 4), (4, 7)])
def test_a_projection_that_loses_nothing_and_turns_nothing_equals_adamw(shape):
    """Adam looks at single entries, so it differs in a turned basis, and a projection of full rank
    is not AdamW in general. It is where the singular vectors are the axes: here the gradients have
    orthogonal rows or columns of which the last is zero, and three directions hold all of it."""
    tall = shape[0] > shape[1]
    random = torch.Generator().manual_seed(0)
    grads = []
    for _ in range(12):
        q, _ = torch.linalg.qr(torch.randn(7, 4, generator=random, dtype=torch.float64))
        g = q * torch.tensor([3.0, 2.0, 1.0, 0.0], dtype=torch.float64)
        grads.append([g if tall else g.T])
    ours, theirs = leaves([shape])[0], leaves([shape])[0]
    options = {"lr": 0.05, "weight_decay": 0.1}
    walk(GaLore(3, 50, 1.0, **options).make([ours], []), [ours], grads)
    walk(torch.optim.AdamW([theirs], **options), [theirs], grads)
    torch.testing.assert_close(ours.detach(), theirs.detach(), atol=1e-9, rtol=1e-9)
    other = leaves([shape])[0]
    q, _ = torch.linalg.qr(torch.randn(shape[1], shape[1], generator=random).double())
    turned = [[grads[0][0] @ q]]
    walk(torch.optim.AdamW([other], **options), [other], turned)
    mine = leaves([shape])[0]
    walk(GaLore(3, 50, 1.0, **options).make([mine], []), [mine], turned)
    if tall:  # turned columns: the difference is there to be seen
        assert (mine - other).abs().max() > 1e-3


@pytest.mark.parametrize("svd", ["exact", "randomized"])
def test_goes_on_bit_for_bit_from_a_state_on_disk(tmp_path, svd):
    shapes = [(40, 25), (25, 40), (40,)]
    factory = GaLore(rank=8, update_every=4, svd=svd, weight_decay=0.01)
    grads = gradients(shapes, 14)
    whole = singles(shapes)
    walk(factory.make(whole, []), whole, grads)
    part = singles(shapes)
    optimizer = factory.make(part, [])
    walk(optimizer, part, grads[:6])  # between two projectors
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    torch.randn(100)  # the global generator decides nothing
    again = [t.detach().clone().requires_grad_() for t in part]
    resumed = factory.make(again, [])
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    walk(resumed, again, grads[6:])
    assert all(torch.equal(a, b) for a, b in zip(again, whole, strict=True))
    assert not torch.equal(part[0], whole[0])


def test_state_holds_only_tensors_and_numbers():
    tensors = singles([(9, 6), (4,)])
    optimizer = GaLore(rank=3, svd="randomized").make(tensors, [])
    walk(optimizer, tensors, gradients([(9, 6), (4,)], 2))

    def values(node):
        if isinstance(node, dict):
            node = list(node.values())
        if isinstance(node, list | tuple):
            return [v for item in node for v in values(item)]
        return [node]

    found = values(optimizer.state_dict())
    assert all(v is None or isinstance(v, torch.Tensor | int | float) for v in found)
    state = optimizer.state[tensors[0]]
    assert state["step"] == 2
    assert {n for n, v in state.items() if isinstance(v, torch.Tensor)} == {
        "exp_avg",
        "exp_avg_sq",
        "projector",
    }


def elements(optimizer):
    return sum(
        v.numel()
        for s in optimizer.state.values()
        for v in s.values()
        if isinstance(v, torch.Tensor) and v.ndim > 0
    )


def test_states_are_smaller_than_adamws_by_the_formula():
    shapes, r = [(384, 384), (1536, 384), (384, 1536), (384,)], 32
    grads = gradients(shapes, 1)
    ours, theirs = singles(shapes), singles(shapes)
    optimizer = GaLore(rank=r, svd="randomized").make(ours, [])
    reference = torch.optim.AdamW(theirs)
    walk(optimizer, ours, grads)
    walk(reference, theirs, grads)
    formula = sum(r * min(s) + 2 * r * max(s) for s in shapes[:3]) + 2 * 384
    assert elements(optimizer) == formula == 258_816
    assert elements(reference) == 2 * sum(math.prod(s) for s in shapes) == 2_654_976
    assert elements(optimizer) < 0.1 * elements(reference)


@pytest.mark.parametrize("shape", [(60, 40), (40, 60)])
def test_randomized_svd_finds_a_low_rank_gradients_space_without_touching_the_generator(shape):
    random = torch.Generator().manual_seed(0)
    grad = torch.randn(shape[0], 5, generator=random) @ torch.randn(5, shape[1], generator=random)
    grad = grad + 1e-4 * torch.randn(shape, generator=random)
    before = torch.get_rng_state()
    p, same, exact = projector(grad, 5, True, 3), projector(grad, 5, True, 3), projector(grad, 5)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(p, same)
    assert p.shape == exact.shape == ((5, 40) if shape[0] >= shape[1] else (40, 5))
    rows, exact_rows = (p, exact) if shape[0] >= shape[1] else (p.T, exact.T)
    torch.testing.assert_close(rows @ rows.T, torch.eye(5), atol=1e-5, rtol=0)
    torch.testing.assert_close(rows.T @ rows, exact_rows.T @ exact_rows, atol=1e-3, rtol=0)


def test_a_module_without_large_matrices_is_refused():
    small = [torch.zeros(8, 384, requires_grad=True), torch.zeros(384, 8, requires_grad=True)]
    with pytest.raises(ConfigError, match=r"optimizer\.rank=128.*largest shorter side is 8.*full"):
        GaLore().make(small, [])
    only_head = GaLore().make([], [torch.zeros(3, 4, requires_grad=True)])
    assert isinstance(only_head, ProjectedAdamW)


def test_the_trainer_fits_with_it_twice_to_the_same_bits():
    from test_training import job

    def once():
        w = torch.zeros(6, 5, requires_grad=True)
        b = torch.zeros(2, requires_grad=True)
        x = torch.randn(20, 5, generator=torch.Generator().manual_seed(0))
        target = x @ torch.randn(5, 6, generator=torch.Generator().manual_seed(1))

        def loss(rows):
            rows = torch.from_numpy(rows)
            return (x[rows] @ w.T - target[rows]).square().mean() + b.square().sum()

        made = job(loss)
        made.module, made.head = [w], [b]
        factory = GaLore(rank=3, update_every=5, scale=1.0, lr=0.1, svd="randomized")
        report = Trainer(epochs=40, batch_size=5).fit(made, factory, CPU, quiet())
        return report.loss / float(target.square().mean()), w.detach()

    (loss, w), (again, twin) = once(), once()
    assert torch.equal(w, twin)
    assert loss == again < 0.5
