import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save
from sklearn.linear_model import Ridge as SklearnRidge
from sklearn.metrics.pairwise import cosine_similarity
from sklearn.neighbors import NearestCentroid

from cl_peft.errors import DamagedRunError
from cl_peft.routers.base import Choice
from cl_peft.routers.none import NoRouter
from cl_peft.routers.oracle import Oracle
from cl_peft.routers.prototype import Prototype
from cl_peft.routers.ridge import STRENGTHS, Ridge

WIDTH = 10


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


def started(kind):
    router = Ridge(projection=40) if kind == "ridge" else Prototype()
    router.start(WIDTH, seed=3)
    return router


def fitted(kind, data, order=None):
    router = started(kind)
    for index, task in enumerate(order if order is not None else range(len(data))):
        router.fit(*data[task], index)
    return router


@pytest.fixture
def queries():
    return torch.randn(50, WIDTH, generator=torch.Generator().manual_seed(9))


def test_prototype_equals_naive_cosine_to_class_means(queries):
    data = tasks()
    router = fitted("prototype", data)
    choice = router.choose(queries)
    scores = np.full((50, 3), -np.inf)
    for t, (features, labels) in enumerate(data):
        for c in labels.unique():
            mean = features[labels == c].numpy().mean(0, keepdims=True)
            scores[:, t] = np.maximum(scores[:, t], cosine_similarity(queries, mean)[:, 0])
    np.testing.assert_allclose(choice.scores, scores, atol=1e-6)
    assert (choice.tasks.numpy() == scores.argmax(1)).all()
    ordered = np.sort(scores, 1)
    np.testing.assert_allclose(choice.margin, ordered[:, -1] - ordered[:, -2], atol=1e-6)


def test_prototype_equals_nearest_centroid_where_means_have_the_same_length(queries):
    data = [(torch.nn.functional.normalize(f, dim=1), y) for f, y in tasks(per_class=1)]
    router = fitted("prototype", data)
    features = torch.cat([f for f, _ in data])
    owner = np.concatenate([np.full(len(y), t) for t, (_, y) in enumerate(data)])
    centroid = NearestCentroid().fit(features, np.arange(len(features)))  # one example per class
    unit = torch.nn.functional.normalize(queries, dim=1)
    assert (router.choose(queries).tasks.numpy() == owner[centroid.predict(unit)]).all()


def columns_of(data):
    """Projected features and one-hot targets, one column per (task, class) by arrival."""
    pairs = [(t, int(c)) for t, (_, y) in enumerate(data) for c in y.unique()]
    features = torch.cat([f for f, _ in data])
    owner = [(t, int(c)) for t, (_, y) in enumerate(data) for c in y]
    target = np.array([[pair == own for pair in pairs] for own in owner], dtype=float)
    return features, target, pairs


@pytest.mark.parametrize("shared", [False, True])
def test_ridge_equals_sklearn_at_the_chosen_strength(queries, shared):
    data = tasks(sizes=(3, 3, 3) if shared else (2, 3, 1), shared=shared)
    router = fitted("ridge", data)
    features, target, pairs = columns_of(data)
    h = torch.relu(features @ router.P).double().numpy()
    strength = router._strength()
    sklearn = SklearnRidge(alpha=strength, fit_intercept=False).fit(h, target)
    np.testing.assert_allclose(router.W, sklearn.coef_.T, atol=1e-4)
    predicted = sklearn.predict(torch.relu(queries @ router.P).double().numpy())
    best = np.array([t for t, _ in pairs])[predicted.argmax(1)]
    choice = router.choose(queries)
    assert (choice.tasks.numpy() == best).mean() == 1.0
    train = torch.cat([f for f, _ in data])
    true = np.concatenate([np.full(len(y), t) for t, (_, y) in enumerate(data)])
    assert (router.choose(train).tasks.numpy() == true).mean() > 0.9


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
    router = fitted("ridge", data)
    held = torch.cat([held_out_mask(router, y) for _, y in data]).numpy()
    features, target, _ = columns_of(data)
    h = torch.relu(features @ router.P).double().numpy()
    assert held.sum() == int(router.n_v) == 6 * 6
    np.testing.assert_allclose(router.sums["G"], h[~held].T @ h[~held], rtol=1e-4)
    np.testing.assert_allclose(router.sums["C"], h[~held].T @ target[~held], rtol=1e-4, atol=1e-4)
    scale = np.trace(h[~held].T @ h[~held]) / 40
    strengths = [s * scale for s in STRENGTHS]
    expected = []
    for strength in strengths:
        model = SklearnRidge(alpha=strength, fit_intercept=False).fit(h[~held], target[~held])
        expected.append(((model.predict(h[held]) - target[held]) ** 2).sum())
    np.testing.assert_allclose(router._held_out_errors(strengths), expected, rtol=1e-3)
    assert router._strength() == pytest.approx(strengths[int(np.argmin(expected))], rel=1e-5)
    assert 0 < int(np.argmin(expected)) < len(STRENGTHS) - 1  # the grid spans the optimum


def test_few_examples_in_a_wide_projection_choose_the_strength_that_residuals_choose():
    data = tasks(sizes=(2, 2), per_class=15)
    router = Ridge(projection=300)  # far more columns than examples: most eigenvalues are zero
    router.start(WIDTH, 0)
    for index, task in enumerate(data):
        router.fit(*task, index)
    scale = float(router.sums["G"].diagonal().mean())
    strengths = [s * scale for s in STRENGTHS]
    held = torch.cat([held_out_mask(router, y) for _, y in data])
    features, target, _ = columns_of(data)
    h, y = torch.relu(features @ router.P).double(), torch.tensor(target)
    kernel = h[~held] @ h[~held].T
    expected = []
    for s in strengths:  # the dual form, where nothing is rank-deficient
        dual = torch.linalg.solve(kernel + s * torch.eye(len(kernel)), y[~held])
        expected.append(float((h[held] @ h[~held].T @ dual - y[held]).square().sum()))
    np.testing.assert_allclose(router._held_out_errors(strengths), expected, rtol=0.02)
    chosen = int(np.argmin(np.abs(np.array(strengths) - router._strength())))
    assert expected[chosen] <= 1.01 * min(expected)


def test_too_few_examples_to_hold_any_out():
    router = fitted("ridge", tasks(sizes=(1, 1), per_class=1))
    assert int(router.n_v) == 0
    assert router.W.isfinite().all()
    features, _ = tasks(sizes=(1, 1), per_class=1)[0]
    assert router.choose(features).tasks.tolist() == [0]


@pytest.mark.parametrize("kind", ["ridge", "prototype"])
@given(order=st.permutations(range(4)), seed=st.integers(0, 10_000))
@settings(max_examples=15, deadline=None)
def test_the_final_state_does_not_depend_on_the_order_of_tasks(kind, order, seed):
    data = tasks(sizes=(2, 1, 3, 2), per_class=12, seed=seed)
    one, other = fitted(kind, data), fitted(kind, data, order)
    classes = [[(order[t], c) for t, c in other.columns.pairs], list(one.columns.pairs)]
    columns = [classes[0].index(pair) for pair in classes[1]]
    if kind == "ridge":
        for name in ("G", "G_v"):
            torch.testing.assert_close(one.sums[name], other.sums[name], rtol=1e-4, atol=1e-3)
        for name in ("C", "C_v"):
            mine = other.sums[name][:, columns]
            torch.testing.assert_close(one.sums[name], mine, rtol=1e-4, atol=1e-3)
        assert one.n_v == other.n_v
    else:
        torch.testing.assert_close(one.means, other.means[columns])
    queries = torch.randn(30, WIDTH, generator=torch.Generator().manual_seed(seed))
    scores = other.choose(queries).scores[:, [order.index(t) for t in range(4)]]
    torch.testing.assert_close(one.choose(queries).scores, scores, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("kind", ["ridge", "prototype"])
def test_a_stored_router_goes_on_bit_for_bit(kind, queries):
    data = tasks()
    whole = fitted(kind, data)
    before = fitted(kind, data[:2])
    stored = load(save({k: v.contiguous() for k, v in before.state().items()}))
    back = started(kind)
    back.load_state(stored)
    for name in ("tasks", "scores", "margin"):
        assert torch.equal(
            getattr(back.choose(queries), name), getattr(before.choose(queries), name)
        )
    back.fit(*data[2], 2)
    states = back.state(), whole.state()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][n], states[1][n]) for n in states[0])
    assert torch.equal(back.choose(queries).scores, whole.choose(queries).scores)
    assert whole.state_bytes() == sum(t.nbytes for t in states[1].values()) > 0


@pytest.mark.parametrize("kind", ["ridge", "prototype"])
def test_a_state_that_does_not_fit_is_refused_by_name(kind):
    state = dict(fitted(kind, tasks()).state())
    name = sorted(state)[0]
    tensor = state.pop(name)
    with pytest.raises(DamagedRunError, match=rf"router={kind}.*missing \['{name}'\]"):
        started(kind).load_state(state)
    with pytest.raises(DamagedRunError, match=r"unknown \['more'\]"):
        started(kind).load_state({**state, name: tensor, "more": tensor})


@pytest.mark.parametrize("kind", ["ridge", "prototype"])
def test_each_row_depends_on_itself_alone(kind, queries):
    router = fitted(kind, tasks())
    whole = router.choose(queries)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(1))
    shuffled = router.choose(queries[order])
    torch.testing.assert_close(shuffled.scores, whole.scores[order], atol=1e-5, rtol=1e-5)
    assert torch.equal(shuffled.tasks, whole.tasks[order])
    alone = [router.choose(queries[i : i + 1]) for i in range(50)]
    assert torch.equal(torch.cat([c.tasks for c in alone]), whole.tasks)


@pytest.mark.parametrize("kind", ["ridge", "prototype"])
def test_tasks_that_share_classes_are_told_apart(kind):
    data = tasks(sizes=(3, 3, 3), per_class=30, shared=True)
    router = fitted(kind, data)
    assert len(router.columns.pairs) == 9
    features = torch.cat([f for f, _ in data])
    true = torch.cat([torch.full((90,), t) for t in range(3)])
    choice = router.choose(features)
    assert choice.scores.shape == (270, 3)
    assert (choice.tasks == true).float().mean() > 0.9


@pytest.mark.parametrize("kind", ["ridge", "prototype"])
def test_one_task_leaves_nothing_to_choose_and_no_margin(kind, queries):
    data = tasks()
    router = fitted(kind, data[:1])
    choice = router.choose(queries)
    assert not choice.tasks.any()
    assert choice.margin.isnan().all()
    with pytest.raises(ValueError, match="task 1 was fitted before"):
        router.fit(*data[0], 0)


def test_margin_and_ties():
    choice = Choice.best(torch.tensor([[1.0, 3.0, 2.5], [2.0, 2.0, 1.0], [0.0, 5.0, 5.0]]))
    assert choice.tasks.tolist() == [1, 0, 1]
    assert choice.margin.tolist() == [0.5, 0.0, 0.0]


def test_ridge_keeps_sums_of_a_size_that_examples_do_not_change():
    few, many = fitted("ridge", tasks(per_class=5)), fitted("ridge", tasks(per_class=50))
    assert few.state_bytes() == many.state_bytes()


def test_ridge_projection_is_decided_by_the_seed():
    one, same, other = (Ridge(projection=8) for _ in range(3))
    one.start(WIDTH, 1)
    same.start(WIDTH, 1)
    other.start(WIDTH, 2)
    assert torch.equal(one.P, same.P)
    assert not torch.equal(one.P, other.P)


def test_oracle_and_none():
    oracle, none = Oracle(), NoRouter()
    assert oracle.choose(torch.zeros(3, 0), torch.tensor([2, 0, 1])).tasks.tolist() == [2, 0, 1]
    with pytest.raises(ValueError, match="needs the true tasks"):
        oracle.choose(torch.zeros(3, 0))
    with pytest.raises(RuntimeError, match="cannot choose"):
        none.choose(torch.zeros(3, 0))
    assert [r.sees_task for r in (oracle, none, Ridge(), Prototype())] == [
        True,
        False,
        False,
        False,
    ]
    assert oracle.state_bytes() == none.state_bytes() == 0
