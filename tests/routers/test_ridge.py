import numpy as np
import pytest
import torch
from router_cases import WIDTH, fitted, queries, tasks
from sklearn.linear_model import Ridge as SklearnRidge

from cl_peft.routers.ridge import STRENGTHS, Projection, Ridge

SUMS = ("G", "C", "G_v", "C_v")


def columns_of(data):
    """Features and one-hot targets, one column per (task, class) by arrival."""
    pairs = [(t, int(c)) for t, (_, y) in enumerate(data) for c in y.unique()]
    features = torch.cat([f for f, _ in data])
    owner = [(t, int(c)) for t, (_, y) in enumerate(data) for c in y]
    target = np.array([[pair == own for pair in pairs] for own in owner], dtype=float)
    return features, target, pairs


def projected(member, features):
    return torch.relu(features @ member.tensors["P"]).double()


def strength(router, member):
    return member.strength(int(router.n_v))


@pytest.mark.parametrize("shared", [False, True])
def test_equals_sklearn_at_the_chosen_strength(shared):
    data, asked = tasks(sizes=(3, 3, 3) if shared else (2, 3, 1), shared=shared), queries()
    router = fitted(Ridge(projection=40), data)
    (member,) = router.members
    features, target, pairs = columns_of(data)
    h = projected(member, features).numpy()
    sklearn = SklearnRidge(alpha=strength(router, member), fit_intercept=False).fit(h, target)
    np.testing.assert_allclose(member.tensors["W"], sklearn.coef_.T, atol=1e-4)
    predicted = sklearn.predict(projected(member, asked).numpy())
    best = np.array([t for t, _ in pairs])[predicted.argmax(1)]
    choice = router.choose(asked)
    np.testing.assert_allclose(choice.class_scores, predicted, atol=1e-3)
    assert (choice.tasks.numpy() == best).mean() == 1.0
    true = np.concatenate([np.full(len(y), t) for t, (_, y) in enumerate(data)])
    assert (router.choose(features).tasks.numpy() == true).mean() > 0.9


def held_out_mask(router, labels):
    """The share of every class that chooses the strength."""
    mask = torch.zeros(len(labels), dtype=torch.bool)
    for c in labels.unique():
        mine = torch.nonzero(labels == c).flatten()
        generator = torch.Generator().manual_seed(router.seed * 1_000_003 + int(c))
        mask[mine[torch.randperm(len(mine), generator=generator)][: int(0.2 * len(mine))]] = True
    return mask


def test_held_out_error_equals_explicit_residuals_for_every_strength():
    data = tasks(per_class=30)
    router = fitted(Ridge(projection=40), data)
    (member,) = router.members
    held = torch.cat([held_out_mask(router, y) for _, y in data]).numpy()
    features, target, _ = columns_of(data)
    h = projected(member, features).numpy()
    assert held.sum() == int(router.n_v) == 6 * 6
    sums = member.tensors
    np.testing.assert_allclose(sums["G"], h[~held].T @ h[~held], rtol=1e-4)
    np.testing.assert_allclose(sums["C"], h[~held].T @ target[~held], rtol=1e-4, atol=1e-4)
    scale = np.trace(h[~held].T @ h[~held]) / 40
    strengths = [s * scale for s in STRENGTHS]
    expected = []
    for s in strengths:
        model = SklearnRidge(alpha=s, fit_intercept=False).fit(h[~held], target[~held])
        expected.append(((model.predict(h[held]) - target[held]) ** 2).sum())
    np.testing.assert_allclose(member.held_out_errors(strengths, 36), expected, rtol=1e-3)
    best = strengths[int(np.argmin(expected))]
    assert strength(router, member) == pytest.approx(best, rel=1e-5)
    assert 0 < int(np.argmin(expected)) < len(STRENGTHS) - 1  # the grid spans the optimum


def test_few_examples_in_a_wide_projection_choose_the_strength_that_residuals_choose():
    data = tasks(sizes=(2, 2), per_class=15)
    router = fitted(Ridge(projection=300), data)  # far more columns than examples
    (member,) = router.members
    scale = float(member.tensors["G"].diagonal().mean())
    strengths = [s * scale for s in STRENGTHS]
    held = torch.cat([held_out_mask(router, y) for _, y in data])
    features, target, _ = columns_of(data)
    h, y = projected(member, features), torch.tensor(target)
    kernel = h[~held] @ h[~held].T
    expected = []
    for s in strengths:  # the dual form, where nothing is rank-deficient
        dual = torch.linalg.solve(kernel + s * torch.eye(len(kernel)), y[~held])
        expected.append(float((h[held] @ h[~held].T @ dual - y[held]).square().sum()))
    errors = member.held_out_errors(strengths, int(router.n_v))
    np.testing.assert_allclose(errors, expected, rtol=0.02)
    chosen = int(np.argmin(np.abs(np.array(strengths) - strength(router, member))))
    assert expected[chosen] <= 1.01 * min(expected)


def test_a_strength_below_the_rounding_of_the_sums_is_not_chosen():
    member = Projection.draw(WIDTH, 5, torch.Generator().manual_seed(0))
    member.tensors["G"] = torch.diag(torch.tensor([1.0, 1.0, 1.0, 1.0, -1e-3]))  # by rounding
    for name in ("C", "C_v"):
        member.tensors[name] = torch.eye(5)[:, :2]
    errors = member.held_out_errors([1e-4, 1e-2], 2)
    assert errors[0] == float("inf")
    assert errors[1] == pytest.approx(2 - 2 * 2 / 1.01)


def test_too_few_examples_to_hold_any_out():
    data = tasks(sizes=(1, 1), per_class=1)
    router = fitted(Ridge(projection=40), data)
    assert int(router.n_v) == 0
    (member,) = router.members
    assert strength(router, member) == pytest.approx(
        0.01 * float(member.tensors["G"].diagonal().mean()), rel=1e-5
    )


def test_projection_is_decided_by_the_seed():
    one, same, other = (Ridge(projection=8) for _ in range(3))
    one.start(WIDTH, 1)
    same.start(WIDTH, 1)
    other.start(WIDTH, 2)
    drawn = [r.members[0].tensors["P"] for r in (one, same, other)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    generator = torch.Generator().manual_seed(1)
    assert torch.equal(drawn[0], torch.randn(WIDTH, 8, generator=generator))


def test_an_ensemble_averages_independent_routers():
    data, asked = tasks(), queries()
    one = fitted(Ridge(projection=30), data)
    three = fitted(Ridge(projection=30, ensemble=3), data)
    alone = one.members[0].tensors
    assert all(torch.equal(alone[n], three.members[0].tensors[n]) for n in alone)
    singles = []
    for member in three.members:  # each by itself is a router with that projection
        router = Ridge(projection=30)
        router.start(WIDTH, seed=3)
        router.members[0].tensors["P"] = member.tensors["P"]
        for index, task in enumerate(data):
            router.fit(*task, index)
        singles.append(router.choose(asked).class_scores)
    assert not torch.allclose(singles[0], singles[1], atol=1e-2)
    assert torch.equal(singles[0], one.choose(asked).class_scores)
    mean = torch.stack(singles).mean(0)
    torch.testing.assert_close(three.choose(asked).class_scores, mean)


def test_state_grows_as_the_head_of_the_file_says():
    one, three = (fitted(Ridge(projection=30, ensemble=n), tasks()) for n in (1, 3))  # 6 classes
    draw = 4 * (WIDTH * 30 + 2 * 30 * 30 + 3 * 30 * 6)
    rest = 8 + 8 + 16 * 6  # n_v, seed, columns
    assert one.state_bytes() == draw + rest
    assert three.state_bytes() == 3 * draw + rest
    assert set(one.state()) == {*SUMS, "P", "W", "n_v", "seed", "columns"}
