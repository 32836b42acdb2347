"""Features of made-up tasks, and every statistical router in each of its kinds."""

import numpy as np
import torch

from cl_peft.routers.gaussian import Gaussian
from cl_peft.routers.klda import KLDA
from cl_peft.routers.kmeans import KMeans
from cl_peft.routers.prototype import Prototype
from cl_peft.routers.ridge import Ridge

WIDTH = 10

#: A router, and the axis of each tensor of its state that has a column per (task, class).
KINDS = {
    "prototype": (lambda: Prototype(), {"means": 0}),
    "prototype-euclidean": (lambda: Prototype(metric="euclidean"), {"means": 0}),
    "kmeans": (lambda: KMeans(clusters=3), {"centroids": 0}),
    "gaussian": (lambda: Gaussian(), {"means": 0, "counts": 0}),
    "gaussian-class": (
        lambda: Gaussian(covariance="class"),
        {"means": 0, "counts": 0, "scatter": 0},
    ),
    "klda": (lambda: KLDA(projection=40, gamma=0.03, ensemble=2), {"means": 1}),
    "ridge": (lambda: Ridge(projection=40), {"C": 1, "C_v": 1, "W": 1}),
    "ridge-ensemble": (
        lambda: Ridge(projection=40, ensemble=2),
        {name + suffix: 1 for name in ("C", "C_v", "W") for suffix in ("", ".1")},
    ),
}


def tasks(sizes=(2, 3, 1), per_class=25, seed=0, shared=False):
    """(features, labels) of each task; class ids in no particular order, unless shared by all."""
    rng = np.random.default_rng(seed)
    ids = rng.permutation(sum(sizes)).tolist()
    out = []
    for size in sizes:
        classes = list(range(size)) if shared else [ids.pop() for _ in range(size)]
        labels = np.repeat(classes, per_class)
        centres = {c: rng.normal(size=WIDTH) for c in classes}
        shift = 3 * rng.normal(size=WIDTH) if shared else 0.0
        features = np.stack([centres[c] + shift + 0.6 * rng.normal(size=WIDTH) for c in labels])
        order = rng.permutation(len(labels))
        out.append((torch.tensor(features[order]).float(), torch.tensor(labels[order])))
    return out


def queries(n=50, seed=9):
    return torch.randn(n, WIDTH, generator=torch.Generator().manual_seed(seed))


def started(router):
    router.start(WIDTH, seed=3)
    return router


def fitted(router, data, order=None):
    started(router)
    for index, task in enumerate(order if order is not None else range(len(data))):
        router.fit(*data[task], index)
    return router


def by_class(data):
    """One group of features per (task, class) in the order of a router's columns."""
    pairs = [(t, int(c)) for t, (_, y) in enumerate(data) for c in y.unique()]
    return [data[t][0][data[t][1] == c].double().numpy() for t, c in pairs], pairs
