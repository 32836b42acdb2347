import numpy as np
import pytest
import torch
from router_cases import by_class, fitted, queries, tasks
from sklearn.metrics.pairwise import cosine_similarity, euclidean_distances
from sklearn.neighbors import NearestCentroid

from cl_peft.routers.prototype import Prototype


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_equals_naive_similarity_to_class_means(metric):
    data, asked = tasks(), queries()
    choice = fitted(Prototype(metric=metric), data).choose(asked)
    groups, pairs = by_class(data)
    scores = np.full((50, 3), -np.inf)
    for group, (t, _) in zip(groups, pairs, strict=True):
        mean = group.mean(0, keepdims=True)
        if metric == "cosine":
            score = cosine_similarity(asked, mean)[:, 0]
        else:
            score = -euclidean_distances(asked.double(), mean, squared=True)[:, 0]
        scores[:, t] = np.maximum(scores[:, t], score)
    np.testing.assert_allclose(choice.scores, scores, atol=1e-6, rtol=1e-6)
    assert (choice.tasks.numpy() == scores.argmax(1)).all()
    ordered = np.sort(scores, 1)
    np.testing.assert_allclose(choice.margin, ordered[:, -1] - ordered[:, -2], atol=1e-5)


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_equals_nearest_centroid_where_means_have_the_same_length(metric):
    data = [(torch.nn.functional.normalize(f, dim=1), y) for f, y in tasks(per_class=1)]
    router = fitted(Prototype(metric=metric), data)
    features = torch.cat([f for f, _ in data])
    owner = np.concatenate([np.full(len(y), t) for t, (_, y) in enumerate(data)])
    centroid = NearestCentroid().fit(features, np.arange(len(features)))  # one example per class
    unit = torch.nn.functional.normalize(queries(), dim=1)
    assert (router.choose(unit).tasks.numpy() == owner[centroid.predict(unit)]).all()


def test_euclidean_distances_survive_features_far_from_zero():
    data, asked = tasks(), queries()
    near = fitted(Prototype(metric="euclidean"), data).choose(asked)
    moved = [(f + 1000, y) for f, y in data]
    far = fitted(Prototype(metric="euclidean"), moved).choose(asked + 1000)
    torch.testing.assert_close(far.scores, near.scores, rtol=1e-3, atol=1e-2)
