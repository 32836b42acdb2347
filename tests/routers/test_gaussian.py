import numpy as np
import pytest
import torch
from router_cases import WIDTH, by_class, fitted, queries, tasks
from scipy.stats import multivariate_normal
from sklearn.covariance import oas as sklearn_oas
from sklearn.covariance import shrunk_covariance
from sklearn.discriminant_analysis import (
    LinearDiscriminantAnalysis,
    QuadraticDiscriminantAnalysis,
)

from cl_peft.routers.gaussian import FLOOR, Gaussian, oas


def flat(data):
    """Features, and one target per (task, class)."""
    groups, _ = by_class(data)
    return np.concatenate(groups), np.repeat(np.arange(len(groups)), [len(g) for g in groups])


def uneven(seed=0):
    """Classes of different sizes and shapes."""
    rng = np.random.default_rng(seed)
    data = []
    for t, sizes in enumerate([(40, 25), (60,), (15, 30, 22)]):
        parts = [rng.normal(size=(n, WIDTH)) @ rng.normal(size=(WIDTH, WIDTH)) for n in sizes]
        shifted = [part + 3 * rng.normal(size=WIDTH) for part in parts]
        labels = np.repeat(10 * t + np.arange(len(sizes)), sizes)
        data.append((torch.tensor(np.concatenate(shifted)).float(), torch.tensor(labels)))
    return data


def differences(scores):
    """Scores up to what all classes have in common."""
    scores = np.asarray(scores, dtype=np.float64)
    return scores - scores[:, :1]


@pytest.mark.parametrize("shrinkage", [0.0, 0.3, 1.0])
def test_shared_equals_sklearn_linear_discriminant_analysis(shrinkage):
    data, asked = uneven(), queries()
    choice = fitted(Gaussian(shrinkage=shrinkage), data).choose(asked)
    features, target = flat(data)
    model = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=shrinkage).fit(features, target)
    priors = np.log(np.bincount(target) / len(target))  # it has them; here they are equal
    expected = differences(model.decision_function(asked.double().numpy()) - priors)
    np.testing.assert_allclose(differences(choice.class_scores), expected, rtol=1e-4, atol=1e-3)


def test_shared_is_half_the_squared_mahalanobis_distance():
    data, asked = uneven(), queries()
    choice = fitted(Gaussian(shrinkage=0.0), data).choose(asked)
    groups, _ = by_class(data)
    pooled = sum((g - g.mean(0)).T @ (g - g.mean(0)) for g in groups) / sum(map(len, groups))
    inverse = np.linalg.inv(pooled)
    for c, group in enumerate(groups):
        d = asked.double().numpy() - group.mean(0)
        expected = -0.5 * np.einsum("nh,hk,nk->n", d, inverse, d)
        np.testing.assert_allclose(choice.class_scores[:, c], expected, rtol=1e-4)


def log_density(asked, mean, covariance):
    constant = 0.5 * WIDTH * np.log(2 * np.pi)
    return multivariate_normal(mean, covariance).logpdf(asked.double().numpy()) + constant


@pytest.mark.parametrize("pooled", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("shrinkage", [0.0, 0.4, "auto"])
def test_class_equals_scipy_density_of_shrunk_covariances(pooled, shrinkage):
    data, asked = uneven(), queries()
    router = fitted(Gaussian(covariance="class", shrinkage=shrinkage, pooled=pooled), data)
    groups, _ = by_class(data)
    centred = [g - g.mean(0) for g in groups]
    everything = np.concatenate(centred)

    def shrunk(rows):
        if shrinkage == "auto":
            return sklearn_oas(rows, assume_centered=True)[0]
        return shrunk_covariance(rows.T @ rows / len(rows), shrinkage)

    floor = FLOOR * everything.var(0).mean() * np.eye(WIDTH)
    expected = [
        log_density(
            asked, g.mean(0), (1 - pooled) * shrunk(c) + pooled * shrunk(everything) + floor
        )
        for g, c in zip(groups, centred, strict=True)
    ]
    scores = router.choose(asked).class_scores
    np.testing.assert_allclose(scores, np.stack(expected, 1), rtol=1e-3, atol=1e-3)


def test_class_equals_sklearn_quadratic_discriminant_analysis():
    data, asked = tasks(per_class=40), queries()
    model = QuadraticDiscriminantAnalysis(store_covariance=True).fit(*flat(data))
    expected = model.decision_function(asked.double().numpy())
    ratio = np.trace(model.covariance_[0]) / by_class(data)[0][0].var(0).sum()
    assert ratio in (pytest.approx(1), pytest.approx(40 / 39))  # n or n - 1: by its version
    wider = []
    for features, labels in data:
        features = features.clone()
        for c in labels.unique():
            mean = features[labels == c].mean(0)
            features[labels == c] = mean + (features[labels == c] - mean) * ratio**0.5
        wider.append((features, labels))
    router = fitted(Gaussian(covariance="class", shrinkage=0.0, pooled=0.0), wider)
    scores = router.choose(asked).class_scores
    np.testing.assert_allclose(differences(scores), differences(expected), rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("n", [2, 7, 40, 2000])
@pytest.mark.parametrize("spread", [0.0, 1.0, 5.0])
def test_oas_equals_sklearn(n, spread):
    rng = np.random.default_rng(n)
    rows = rng.normal(size=(n, WIDTH)) * np.exp(spread * np.linspace(0, 1, WIDTH))
    _, expected = sklearn_oas(rows, assume_centered=True)
    assert oas(torch.tensor(rows.T @ rows / n), n) == pytest.approx(expected)
    assert oas(torch.zeros(WIDTH, WIDTH), n) == 1.0  # nothing known: all target
    assert oas(2 * torch.eye(WIDTH), n) == 1.0


def test_full_shrinkage_is_the_nearest_mean():
    data, asked = uneven(), queries()
    means = np.stack([g.mean(0) for g in by_class(data)[0]])
    nearest = ((asked.double().numpy()[:, None] - means) ** 2).sum(2).argmin(1)
    choice = fitted(Gaussian(shrinkage=1.0), data).choose(asked)
    assert (choice.class_scores.argmax(1).numpy() == nearest).all()


@pytest.mark.parametrize("covariance", ["shared", "class"])
def test_linear_maps_of_features_change_no_choice(covariance):
    data, asked = uneven(), queries()
    mix = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(0)) + torch.eye(WIDTH)
    mapped = [(f @ mix + 5, y) for f, y in data]

    def tasks_of(rows, x):
        router = fitted(Gaussian(covariance=covariance, shrinkage=0.0), rows)
        return router.choose(x).tasks

    same = tasks_of(data, asked) == tasks_of(mapped, asked @ mix + 5)
    assert same.float().mean() >= 0.98  # not by shrinkage 0, but by rounding and the floor


def test_a_covariance_per_class_sees_shape_that_a_shared_one_cannot():
    generator = torch.Generator().manual_seed(0)

    def draw(n):
        narrow = 0.2 * torch.randn(n, WIDTH, generator=generator)
        wide = 2.0 * torch.randn(n, WIDTH, generator=generator)
        return narrow, wide

    data = [(f, torch.full((200,), t)) for t, f in enumerate(draw(200))]
    test = draw(200)
    right = {
        kind: np.mean(
            [
                (fitted(Gaussian(covariance=kind), data).choose(f).tasks == t).float().mean()
                for t, f in enumerate(test)
            ]
        )
        for kind in ("shared", "class")
    }
    assert right["class"] > 0.95
    assert right["shared"] < 0.9


def test_state_grows_as_the_head_of_the_file_says():
    data = tasks()  # 6 classes
    shared, own = (fitted(Gaussian(covariance=kind), data) for kind in ("shared", "class"))
    columns = 6 * (8 * WIDTH + 8 + 16)  # means, counts, and the task and class of each
    assert shared.state_bytes() == 8 * WIDTH**2 + columns
    assert own.state_bytes() == 6 * 4 * WIDTH**2 + columns
