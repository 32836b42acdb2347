import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from router_cases import fitted, queries, tasks
from scipy.spatial.distance import cdist
from sklearn.cluster import KMeans as SklearnKMeans

from cl_peft.routers.kmeans import KMeans, lloyd, plus_plus


def unit(features):
    return torch.nn.functional.normalize(features.double(), dim=1)


def inertia(points, centroids):
    return (cdist(points, centroids) ** 2).min(1).sum()


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("k", [1, 3, 7])
def test_lloyd_equals_sklearn_from_the_same_start(k, seed):
    points = torch.cat([f for f, _ in tasks(seed=seed)]).double()
    start = plus_plus(points, k, torch.Generator().manual_seed(seed))
    assert len(start) == k
    model = SklearnKMeans(k, init=start.numpy(), n_init=1, max_iter=300, tol=0).fit(points)
    centroids, error = lloyd(points, start)
    np.testing.assert_allclose(centroids, model.cluster_centers_, atol=1e-8)
    assert error == pytest.approx(model.inertia_)


@given(seed=st.integers(0, 10_000), k=st.integers(1, 6), n=st.integers(1, 40))
@settings(max_examples=40, deadline=None)
def test_lloyd_never_gets_worse_and_ends_where_it_stands_still(seed, k, n):
    generator = torch.Generator().manual_seed(seed)
    points = torch.randn(n, 2, generator=generator, dtype=torch.float64)
    start = plus_plus(points, k, generator)
    assert len(start) == min(k, n)
    centroids, error = lloyd(points, start)
    assert error == pytest.approx(inertia(points, centroids), abs=1e-9)
    assert error <= inertia(points, start) + 1e-9
    again, same = lloyd(points, centroids)
    torch.testing.assert_close(again, centroids)
    assert same == pytest.approx(error, abs=1e-9)


def test_a_centroid_without_points_stays_where_it_is():
    points = torch.tensor([[0.0], [1.0], [2.0]], dtype=torch.float64)
    centroids, _ = lloyd(points, torch.tensor([[1.0], [50.0]], dtype=torch.float64))
    assert centroids.flatten().tolist() == [1.0, 50.0]


def test_starts_are_points_drawn_by_squared_distance():
    points = torch.tensor([[0.0], [0.0], [1.0], [3.0]], dtype=torch.float64)
    second = []
    for seed in range(4000):
        start = plus_plus(points, 2, torch.Generator().manual_seed(seed)).flatten().tolist()
        if start[0] == 0.0:
            second.append(start[1])
    assert set(second) == {1.0, 3.0}
    assert second.count(3.0) / len(second) == pytest.approx(9 / 10, abs=0.03)


def test_centroids_are_as_good_as_those_of_sklearn():
    ours, theirs = 0.0, 0.0
    for seed in range(5):
        data = tasks(sizes=(4, 4), seed=seed)
        router = fitted(KMeans(clusters=4), data)
        for t, (features, _) in enumerate(data):
            mine = router.centroids[[p[0] == t for p in router.columns.pairs]]
            ours += inertia(unit(features), mine)
            model = SklearnKMeans(4, n_init=10, random_state=0).fit(unit(features))
            theirs += model.inertia_
    assert ours <= 1.01 * theirs


@pytest.mark.parametrize(("distance", "name"), [("l1", "cityblock"), ("l2", "euclidean")])
def test_score_is_minus_the_distance_to_the_nearest_centroid(distance, name):
    router = fitted(KMeans(clusters=3, distance=distance), tasks())
    asked = queries()
    distances = cdist(unit(asked), router.centroids, name)
    owner = np.array([t for t, _ in router.columns.pairs])
    expected = np.stack([-distances[:, owner == t].min(1) for t in range(3)], 1)
    choice = router.choose(asked)
    np.testing.assert_allclose(choice.scores, expected, rtol=1e-6)
    assert (choice.tasks.numpy() == expected.argmax(1)).all()


def test_labels_and_lengths_do_not_matter():
    data = tasks()
    router = fitted(KMeans(clusters=3), data)
    scaled = [(f * torch.linspace(0.1, 9, len(f))[:, None], torch.zeros_like(y)) for f, y in data]
    other = fitted(KMeans(clusters=3), scaled)
    torch.testing.assert_close(router.centroids, other.centroids)
    asked = queries()
    torch.testing.assert_close(other.choose(7 * asked).scores, router.choose(asked).scores)


def test_fewer_examples_than_clusters():
    data = tasks(sizes=(1, 2), per_class=2)
    data[0] = (data[0][0][:1].repeat(4, 1), torch.zeros(4, dtype=torch.int64))  # one, four times
    router = fitted(KMeans(clusters=5), data)
    assert [t for t, _ in router.columns.pairs] == [0, 1, 1, 1, 1]
    best = [router.choose(f).scores[:, t] for t, (f, _) in enumerate(data)]
    torch.testing.assert_close(torch.cat(best), torch.zeros(8), atol=1e-6, rtol=0)
