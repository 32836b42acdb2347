import math

import numpy as np
import pytest
import torch
from core_fixtures import CPU, quiet

from cl_peft.errors import DivergedError
from cl_peft.optim.adamw import AdamW
from cl_peft.training import Job, Trainer, generator


class SGD:
    """Learning rates one can read off the weights."""

    def __init__(self, lr=1.0):
        self.lr = lr

    def make(self, module, head):
        return torch.optim.SGD([{"params": module}, {"params": head, "lr": 2 * self.lr}], self.lr)


def job(loss=None, n=20, seed=(0, 0), task=0, **options):
    w = torch.ones(3, requires_grad=True)
    b = torch.zeros(2, requires_grad=True)
    x = torch.arange(3.0 * n).reshape(n, 3) / n

    def square(rows):
        return ((x[torch.from_numpy(rows)] @ w).mean() + b.sum() - 1) ** 2

    lengths = np.arange(1, n + 1)
    return Job(task, "task 2/5", [w], [b], lengths, loss or square, seed, **options)


def fit(trainer, j, factory=None):
    return trainer.fit(j, factory or SGD(0.01), CPU, quiet())


@pytest.mark.parametrize("decay", ["linear", "cosine", "constant"])
def test_schedule_formula(decay):
    trainer = Trainer(warmup=0.2, decay=decay)
    total, warm = 25, 5
    for step in range(total):
        s, left = step + 1, (total - step) / (total - warm)
        expected = {
            "linear": left,
            "cosine": 0.5 * (1 + math.cos(math.pi * (step - warm) / (total - warm))),
            "constant": 1.0,
        }[decay]
        if step < warm:
            expected = s / warm
        assert trainer.rate(step, total) == pytest.approx(expected, abs=1e-12)
    assert trainer.rate(warm - 1, total) == trainer.rate(warm, total) == pytest.approx(1.0)
    assert Trainer(warmup=0.0).rate(0, 10) == 1.0
    assert Trainer(warmup=0.5).rate(0, 1) == 1.0


def test_schedule_reaches_every_group_of_the_optimizer():
    seen, rates = [], []
    factory = SGD(0.01)
    make = factory.make

    def spy(module, head):
        optimizer = make(module, head)
        optimizer.register_step_pre_hook(
            lambda o, *_: rates.append([g["lr"] for g in o.param_groups])
        )
        return optimizer

    factory.make = spy
    trainer = Trainer(epochs=3, batch_size=4, warmup=0.2)
    report = fit(trainer, job(on_step=lambda s, v: seen.append((s, v))), factory)
    assert report.steps == len(rates) == len(seen) == 15
    for step, (module, head) in enumerate(rates):
        assert module == pytest.approx(0.01 * trainer.rate(step, 15))
        assert head == pytest.approx(2 * module)
    assert [s for s, _ in seen] == list(range(1, 16))
    assert seen[7][1]["lr"] == pytest.approx(rates[7][0])
    assert report.loss == pytest.approx(np.mean([v["loss"] for _, v in seen[-5:]]))


@pytest.mark.parametrize("clip", [0.5, 0.0])
def test_clipping_equals_torch(clip):
    big = torch.tensor([3.0, -4.0, 0.0])

    def loss(rows):
        return (j.module[0] * big).sum() + 12 * j.head[0].sum()

    j = job(loss)
    norms = []
    j.on_step = lambda s, v: norms.append(v["grad_norm"])
    trainer = Trainer(epochs=1, batch_size=20, warmup=0.0, decay="constant", clip=clip)
    fit(trainer, j, SGD(0.1))
    reference = [torch.ones(3, requires_grad=True), torch.zeros(2, requires_grad=True)]
    ((reference[0] * big).sum() + 12 * reference[1].sum()).backward()
    if clip:
        torch.nn.utils.clip_grad_norm_(reference, clip)
    torch.testing.assert_close(j.module[0].detach(), 1 - 0.1 * reference[0].grad)
    torch.testing.assert_close(j.head[0].detach(), -0.2 * reference[1].grad)
    assert norms == pytest.approx([math.sqrt(25 + 288)])


def test_every_epoch_sees_every_example_once_in_another_order():
    seen = []

    def loss(rows):
        seen.append(rows.tolist())
        return j.module[0].square().sum()

    j = job(loss)
    report = fit(Trainer(epochs=3, batch_size=6), j)
    epochs = [[r for rows in seen[i : i + 4] for r in rows] for i in (0, 4, 8)]
    assert all(sorted(e) == list(range(20)) for e in epochs)
    assert len({tuple(e) for e in epochs}) == 3
    padded = sum(max(rows) + 1 for rows in seen for _ in rows)
    assert report.padding == pytest.approx(1 - 3 * 210 / padded)


def test_early_stopping_keeps_the_best_epoch():
    scores = iter([0.2, 0.7, 0.7, 0.6, 0.9])
    at_best = []
    given = []

    def validate():
        value = 0.7 if len(given) == 4 else next(scores)  # the last call is of what was kept
        given.append(value)
        if len(given) in (2, 5):
            at_best.append([t.detach().clone() for t in j.module + j.head])
        return value

    j = job(validate=validate)
    report = fit(Trainer(epochs=9, batch_size=5, patience=2), j)
    assert (report.epochs, report.steps, report.validation) == (4, 16, 0.7)
    assert len(given) == 5
    assert all(torch.equal(a, b) for a, b in zip(*at_best, strict=True))
    last = job()
    fit(Trainer(epochs=9, batch_size=5), last)
    assert not torch.equal(last.module[0], j.module[0])


def test_without_patience_the_last_epoch_is_kept():
    scores = iter([0.9])
    j, plain = job(validate=lambda: next(scores)), job()
    report = fit(Trainer(epochs=4, batch_size=5), j)
    fit(Trainer(epochs=4, batch_size=5), plain)
    assert (report.epochs, report.validation) == (4, 0.9)
    assert torch.equal(j.module[0], plain.module[0])
    assert math.isnan(fit(Trainer(epochs=1, patience=1), job()).validation)


@pytest.mark.parametrize("bad", [math.nan, math.inf, 51.0])
def test_a_diverged_loss_stops_with_task_epoch_and_step(bad):
    steps = []

    def loss(rows):
        steps.append(1)
        return j.module[0].sum() * 0 + (bad if len(steps) == 7 else 50.0)

    j = job(loss)
    with pytest.raises(DivergedError, match=r"task 2/5.*epoch 2, step 7.*optimizer\.lr"):
        fit(Trainer(epochs=3, batch_size=5, diverged_above=50.0), j)
    assert len(steps) == 7


def test_gradients_that_are_not_finite_stop_before_they_reach_a_weight():
    def loss(rows):
        return (j.module[0] - 1).abs().sqrt().sum()  # finite, with an infinite gradient

    j = job(loss)
    with pytest.raises(DivergedError, match="epoch 1, step 1"):
        fit(Trainer(epochs=1, batch_size=5), j)
    assert torch.equal(j.module[0].detach(), torch.ones(3))


def noisy(seed, task=0, before=0):
    torch.manual_seed(before)
    np.random.seed(before)

    def loss(rows):
        dropped = torch.nn.functional.dropout(j.module[0], 0.5, True)
        return (dropped.sum() - float(rows.mean()) + j.head[0].sum()) ** 2

    j = job(loss, seed=seed, task=task)
    fit(Trainer(epochs=2, batch_size=4), j)
    return j.module[0].detach()


def test_the_same_seeds_give_the_same_bits_whatever_ran_before():
    base = noisy((3, 4))
    assert torch.equal(noisy((3, 4), before=99), base)
    for other in (noisy((3, 5)), noisy((2, 4)), noisy((3, 4), task=1)):
        assert not torch.equal(other, base)
    torch.manual_seed(123)
    state = torch.get_rng_state()
    fit(Trainer(epochs=1, batch_size=4), job())
    assert torch.equal(torch.get_rng_state(), state)  # nobody else's numbers are used up


def test_dropout_draws_other_numbers_for_each_task_and_than_initial_weights_do():
    def drawn(seed, task):
        out = []

        def loss(rows):
            out.append(torch.rand(8).tolist())
            return j.module[0].sum()

        j = job(loss, seed=seed, task=task)
        fit(Trainer(epochs=1, batch_size=20), j)
        return out[0]

    base = drawn((0, 5), 2)
    assert base == drawn((1, 5), 2)  # seed.data decides nothing here
    others = [drawn((0, 5), 3), drawn((0, 6), 2), torch.rand(8, generator=generator(5, 2)).tolist()]
    assert base not in others


@pytest.mark.parametrize("parts", [2, 3, 50])
def test_micro_batches_add_up_to_the_step(parts):
    x, y = torch.randn(20, 3), torch.randn(20)

    def trained(accumulate):
        seen, logged = [], []

        def loss(rows):
            seen.append(rows.tolist())
            index = torch.from_numpy(rows)
            penalty = j.module[0].square().sum()  # once, however many parts there are
            return (x[index] @ j.module[0] + j.head[0].sum() - y[index]).square().mean() + penalty

        j = job(loss, on_step=lambda s, v: logged.append(v))
        # 20 examples in steps of 8, 8 and 4; a clipped norm is that of the whole step
        trainer = Trainer(epochs=2, batch_size=8, clip=0.5, accumulate=accumulate)
        report = fit(trainer, j, SGD(0.1))
        return torch.cat([*j.module, *j.head]).detach(), logged, seen, report

    weights, logged, steps, whole = trained(1)
    split, other, micro, report = trained(parts)
    torch.testing.assert_close(split, weights, atol=1e-6, rtol=1e-5)
    for a, b in zip(logged, other, strict=True):
        assert a == pytest.approx(b, rel=1e-5)
    assert report.steps == whole.steps == 6
    assert report.loss == pytest.approx(whole.loss, rel=1e-5)
    expected = [part for rows in steps for part in np.array_split(rows, min(parts, len(rows)))]
    assert micro == [part.tolist() for part in expected]  # nearly equal, none empty
    assert (report.padding < whole.padding) if parts < 50 else report.padding == 0


@pytest.mark.parametrize("where", [0, 1])
def test_a_micro_batch_that_diverges_stops_the_step(where):
    calls = []

    def loss(rows):
        calls.append(1)
        return j.module[0].sum() * (math.nan if len(calls) == where + 1 else 1.0)

    j = job(loss)
    with pytest.raises(DivergedError, match="epoch 1, step 1"):
        fit(Trainer(epochs=1, batch_size=5, accumulate=2), j)
    assert torch.equal(j.module[0].detach(), torch.ones(3))


def test_adamw_groups():
    module = [torch.ones(2, 3, requires_grad=True)]
    head = [torch.ones(4, 3, requires_grad=True), torch.ones(4, requires_grad=True)]
    made = AdamW(lr=1e-3, head_lr=1e-2, weight_decay=0.1, betas=[0.8, 0.99], eps=1e-6)
    optimizer = made.make(module, head)
    rows = [
        (g["lr"], g["weight_decay"], g["betas"], g["eps"], [p.shape for p in g["params"]])
        for g in optimizer.param_groups
    ]
    assert rows == [
        (1e-3, 0.1, (0.8, 0.99), 1e-6, [(2, 3)]),
        (1e-2, 0.1, (0.8, 0.99), 1e-6, [(4, 3)]),
        (1e-2, 0.0, (0.8, 0.99), 1e-6, [(4,)]),
    ]
    for tensor in module + head:
        tensor.grad = torch.zeros_like(tensor)
    optimizer.step()
    assert (head[1] == 1).all()  # a bias is never decayed
    assert (head[0] < 1).all()
    assert [g["lr"] for g in AdamW(lr=0.5).make([], head).param_groups] == [0.5, 0.5]


def test_bf16_is_used_where_asked_for():
    seen = []

    def loss(rows):
        seen.append((torch.ones(2, 3) @ j.module[0]).dtype)
        return j.module[0].square().sum()

    for precision, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        j = job(loss)
        fit(Trainer(epochs=1, precision=precision), j)
        assert seen.pop() == dtype
        assert j.module[0].dtype == torch.float32
    if not torch.cuda.is_available():
        j = job(loss)
        fit(Trainer(epochs=1), j)
        assert seen.pop() == torch.float32
