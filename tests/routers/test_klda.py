import math

import numpy as np
import pytest
import torch
from router_cases import WIDTH, by_class, fitted, queries, tasks
from scipy.spatial.distance import pdist
from scipy.special import logsumexp
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.metrics.pairwise import rbf_kernel

from cl_peft.routers.gaussian import Gaussian
from cl_peft.routers.klda import KLDA, median_gamma
from cl_peft.routers.prototype import Prototype


def mapped(router, features, e=0):
    """Random Fourier features, written down from the formula."""
    W, b, gamma = router.W[e].double().numpy(), router.b[e].double().numpy(), float(router.gamma)
    angles = features.double().numpy() @ (W * math.sqrt(2 * gamma)) + b
    return math.sqrt(2 / W.shape[1]) * np.cos(angles)


def test_features_approximate_the_kernel():
    router = KLDA(projection=4000, gamma=0.05)
    router.start(WIDTH, 0)
    points = queries(20)
    h = router._project(points, 0)
    np.testing.assert_allclose(h @ h.T, rbf_kernel(points.double(), gamma=0.05), atol=0.07)
    np.testing.assert_allclose(h, mapped(router, points), atol=1e-9)


@pytest.mark.parametrize("ensemble", [1, 3])
def test_equals_sklearn_on_mapped_features_with_averaged_posteriors(ensemble):
    data, asked = tasks(), queries()
    router = fitted(KLDA(projection=30, gamma=0.05, shrinkage=0.1, ensemble=ensemble), data)
    features = torch.cat([torch.tensor(g) for g in by_class(data)[0]])
    target = np.repeat(np.arange(6), 25)  # equal classes, so sklearn's priors are equal as well
    logs = []
    for e in range(ensemble):
        model = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=0.1)
        model.fit(mapped(router, features, e), target)
        logs.append(model.predict_log_proba(mapped(router, asked, e)))
    expected = logsumexp(logs, axis=0) - math.log(ensemble)
    np.testing.assert_allclose(router.choose(asked).class_scores, expected, rtol=1e-4, atol=1e-4)


def test_scores_are_log_probabilities():
    router = fitted(KLDA(projection=50, ensemble=2), tasks())
    scores = router.choose(queries()).class_scores
    torch.testing.assert_close(scores.exp().sum(1), torch.ones(50))


def test_an_ensemble_begins_with_the_draw_of_a_single_one():
    data = tasks()
    one = fitted(KLDA(projection=30, gamma=0.05), data).state()
    three = fitted(KLDA(projection=30, gamma=0.05, ensemble=3), data).state()
    for name in ("W", "b", "scatter", "means"):
        assert torch.equal(three[name][:1], one[name])
        assert not torch.equal(three[name][1], three[name][0])


def test_gamma_of_the_median_comes_from_the_first_task_alone():
    data = tasks()
    router = KLDA(projection=8)
    router.start(WIDTH, 0)
    router.fit(*data[0], 0)
    expected = 0.5 / np.median(pdist(data[0][0].double()) ** 2)
    assert float(router.gamma) == pytest.approx(expected, rel=0.01)
    before = float(router.gamma)
    router.fit(100 * data[1][0], data[1][1], 1)
    assert float(router.gamma) == before


def test_median_of_many_examples_comes_from_some_of_them():
    rows = torch.randn(4000, WIDTH, generator=torch.Generator().manual_seed(0))
    whole = 0.5 / np.median(pdist(rows[:2000].double()) ** 2)
    assert median_gamma(rows) == pytest.approx(whole, rel=0.05)
    assert median_gamma(torch.ones(5, 3)) == median_gamma(torch.ones(1, 3)) == 1.0


def test_scale_of_features_does_not_matter_with_the_median():
    data, asked = tasks(), queries()
    router = fitted(KLDA(projection=50), data)
    other = fitted(KLDA(projection=50), [(50 * f, y) for f, y in data])
    torch.testing.assert_close(
        other.choose(50 * asked).scores, router.choose(asked).scores, rtol=1e-3, atol=1e-3
    )


def test_separates_rings_that_linear_routers_cannot():
    generator = torch.Generator().manual_seed(0)

    def rings(n):
        angle = 2 * math.pi * torch.rand(2, n, generator=generator)
        radius = torch.tensor([[1.0], [3.0]]) + 0.2 * torch.randn(2, n, generator=generator)
        return torch.stack([radius * angle.cos(), radius * angle.sin()], 2)

    train, test = rings(300), rings(300)

    def accuracy(router):
        router.start(2, 0)
        for t in range(2):
            router.fit(train[t], torch.full((300,), t), t)
        right = [(router.choose(test[t]).tasks == t).float().mean() for t in range(2)]
        return float(np.mean(right))

    assert accuracy(KLDA(projection=200)) > 0.98
    for linear in (Prototype(), Prototype(metric="euclidean"), Gaussian()):
        assert accuracy(linear) < 0.7


def test_state_grows_as_the_head_of_the_file_says():
    router = fitted(KLDA(projection=30, ensemble=3), tasks())  # 6 classes
    draw = 4 * (WIDTH * 30 + 30 + 30 * 30 + 6 * 30)
    assert router.state_bytes() == 3 * draw + 8 + 8 + 16 * 6  # gamma, count, columns
