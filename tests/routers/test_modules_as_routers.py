"""Routers that look at modules instead of features, and how a choice is used."""

import numpy as np
import pytest
import torch
from core_fixtures import random_module, same, world
from running import config

from cl_peft.config import validate
from cl_peft.errors import ConfigError
from cl_peft.learners.isolated import Isolated
from cl_peft.memo import Memo, Questions
from cl_peft.routers.arrow import Arrow, main_direction
from cl_peft.routers.base import Choice
from cl_peft.routers.combination import WEIGHTS, best_weight, combine, count_right, opinions
from cl_peft.routers.constant import Constant
from cl_peft.routers.prototype import Prototype
from cl_peft.routers.ridge import Ridge
from cl_peft.routers.uncertainty import Uncertainty


@pytest.fixture(scope="module")
def learned():
    w = world(Isolated(), Prototype(), dropout=0.0)
    for task in w.stream.tasks:
        w.learner.learn(task)
        w.fit_router(task)
    return w


def questions(w, rows=None, memo=None):
    tests = [t.test for t in w.stream.tasks]
    inputs = [item for split in tests for item in split.inputs]
    names = np.concatenate([split.rows for split in tests])
    true = np.concatenate([np.full(len(s), t) for t, s in enumerate(tests)])
    rows = np.arange(len(inputs)) if rows is None else rows
    picked = [inputs[i] for i in rows]
    return Questions(
        w.learner,
        Memo() if memo is None else memo,
        w.features,
        picked,
        names[rows],
        true[rows],
        len(tests),
    )


def started(router, w):
    router.start(w.features.width(router.layers), 0)
    for task in w.stream.tasks:
        features = w.features.features(task.train.inputs, router.layers)
        router.fit(features, torch.from_numpy(task.train.labels), task.index)
    return router


# ------------------------------------------------------------------ asking all modules


@pytest.mark.parametrize("measure", ["entropy", "confidence", "margin", "energy"])
def test_uncertainty_equals_a_loop_over_modules(learned, measure):
    asked = questions(learned)
    choice = Uncertainty(measure).route(asked)
    for task in range(3):
        z = learned.learner.logits(asked.inputs, np.full(len(asked), task))
        z = z[:, list(learned.learner.units[task].head.classes)].double()
        p = torch.softmax(z, 1)
        top = p.sort(1).values
        expected = {
            "entropy": (p * p.log()).sum(1) / np.log(p.shape[1]),
            "confidence": top[:, -1],
            "margin": top[:, -1] - top[:, -2],
            "energy": z.exp().sum(1).log(),
        }[measure]
        torch.testing.assert_close(choice.scores[:, task].double(), expected, atol=1e-5, rtol=1e-4)
    assert (choice.tasks == choice.scores.argmax(1)).all()


def test_uncertainty_costs_one_pass_per_module_and_remembers(learned):
    memo, before = Memo(), learned.learner.passes
    asked = questions(learned, memo=memo)
    Uncertainty().answer(asked)
    assert learned.learner.passes - before == 3 * len(asked)
    Uncertainty("energy").answer(questions(learned, memo=memo))
    assert learned.learner.passes - before == 3 * len(asked)


def test_a_head_with_one_class_is_never_the_surest():
    for measure, worst in (("entropy", -1.0), ("confidence", 0.0), ("margin", 0.0)):
        assert Uncertainty(measure)._score(torch.tensor([[7.0]])).item() == worst


# ------------------------------------------------------------------ mixtures


def naive_mixture(w, inputs, weights):
    """Each sample alone, with dense deltas added to the backbone's own weights."""
    bank, out = w.learner.tools.bank, torch.full((len(inputs), w.learner.tools.n_classes), -np.inf)
    for n, item in enumerate(inputs):
        saved = []
        for site in bank.sites:
            saved.append((site.layer.weight, site.layer.weight.clone()))
            for t, weight in enumerate(weights[n]):
                p = bank.get(w.learner.units[t].row)[site.name]
                site.layer.weight += weight * bank.method.delta(site, p)[0]
        f = w.backbone(w.backbone.collate(w.features.encoded([item])))
        for weight, before in saved:
            weight.copy_(before)
        for t, weight in enumerate(weights[n]):
            if weight > 0:
                head = w.learner.units[t].head
                out[n, list(head.classes)] = (head(f).log_softmax(1) + weight.log())[0]
    return out


def test_soft_mixture_equals_weights_added_by_hand(learned):
    asked = questions(learned, np.arange(0, 15, 2))
    router = started(Prototype(mix="soft", top_k=2, temperature=0.1), learned)
    choice, logits = router.answer(asked)
    assert choice.weights is not None
    assert ((choice.weights > 0).sum(1) == 2).all()
    torch.testing.assert_close(choice.weights.sum(1), torch.ones(len(asked)))
    two = choice.scores.topk(2, 1)
    expected = torch.softmax(two.values / 0.1, 1)
    torch.testing.assert_close(choice.weights.gather(1, two.indices), expected)
    naive = naive_mixture(learned, asked.inputs, choice.weights)
    torch.testing.assert_close(logits, naive, atol=1e-4, rtol=1e-4)


def test_soft_with_one_module_is_hard(learned):
    hard = started(Prototype(), learned).answer(questions(learned))
    soft = started(Prototype(mix="soft"), learned).answer(questions(learned))
    assert (hard[1].argmax(1) == soft[1].argmax(1)).all()


@pytest.mark.parametrize(("kind", "each"), [("uniform", 1 / 3), ("ones", 1.0)])
def test_constant_mixture(learned, kind, each):
    router = started(Constant(kind), learned)
    asked = questions(learned, np.arange(4))
    choice, logits = router.answer(asked)
    assert torch.equal(choice.weights, torch.full((4, 3), each))
    naive = naive_mixture(learned, asked.inputs, choice.weights)
    torch.testing.assert_close(logits, naive, atol=1e-4, rtol=1e-4)
    again = Constant(kind)
    again.load(router.dump())
    assert same(again.dump(), router.dump())


# ------------------------------------------------------------------ arrow


def test_main_direction_is_the_singular_vector_of_the_product():
    g = torch.Generator().manual_seed(3)
    a, b = torch.randn(4, 9, generator=g), torch.randn(7, 4, generator=g)
    expected = torch.linalg.svd(b @ a).Vh[0]
    assert abs(abs(float(main_direction(a, b) @ expected)) - 1) < 1e-5


def test_arrow_equals_a_loop_over_tokens(learned):
    w = learned
    bank = w.learner.tools.bank
    rows = [w.learner.units[t].row for t in range(3)]
    kept = [{s: {n: t.clone() for n, t in p.items()} for s, p in bank.get(r).items()} for r in rows]
    try:
        for seed, row in enumerate(rows):  # trained ones are almost alike
            bank.replace(row, random_module(bank, seed))
        router, asked = Arrow(top_k=2, temperature=0.7), questions(w, np.arange(5))
        choice, logits = router.answer(asked)
        for n, item in enumerate(asked.inputs):
            seen = []

            def act(layer, args, y, site, seen=seen):
                x, out = args[0][0], y.clone()
                for i, token in enumerate(x):
                    s = []
                    for row in rows:
                        p = bank.get(row)[site.name]
                        s.append(abs(float(token @ torch.linalg.svd(p["B"] @ p["A"]).Vh[0])))
                    best = sorted(range(3), key=lambda t, s=s: -s[t])[:2]
                    e = np.exp(np.array([s[t] for t in best]) / 0.7)
                    weights = np.zeros(3)
                    weights[best] = e / e.sum()
                    seen.append(weights)
                    for t, row in enumerate(rows):
                        p = bank.get(row)[site.name]
                        out[0, i] += (
                            weights[t] * bank.method.scale(site) * p["B"] @ (p["A"] @ token)
                        )
                return out

            hooks = [
                s.layer.register_forward_hook(lambda la, a, y, s=s: act(la, a, y, s))
                for s in bank.sites
            ]
            with torch.no_grad():
                f = w.backbone(w.backbone.collate(w.features.encoded([item])))
            for hook in hooks:
                hook.remove()
            mean = torch.tensor(np.mean(seen, 0), dtype=torch.float32)
            torch.testing.assert_close(choice.scores[n], mean, atol=1e-4, rtol=1e-3)
            for t in range(3):
                head = w.learner.units[t].head
                expected = (head(f).log_softmax(1) + mean[t].log())[0]
                ours = logits[n, list(head.classes)]
                torch.testing.assert_close(ours, expected, atol=1e-3, rtol=1e-3)
    finally:
        for row, module in zip(rows, kept, strict=True):
            bank.replace(row, module)


# ------------------------------------------------------------------ classes and heads


def test_opinions_are_those_of_the_best_tasks(learned):
    router, asked = started(Ridge(projection=64), learned), questions(learned)
    choice = router.route(asked)
    scores, heads = opinions(choice, asked, 2)
    for n in range(len(asked)):
        for k, task in enumerate(choice.scores[n].topk(2).indices.tolist()):
            classes = list(learned.stream.tasks[task].classes)
            others = [c for c in range(asked.n_classes) if c not in classes]
            assert torch.isinf(scores[k, n, others]).all()
            assert torch.isinf(heads[k, n, others]).all()
            pairs = [tuple(p) for p in choice.pairs.tolist()]
            for c in classes:
                assert scores[k, n, c] == choice.class_scores[n, pairs.index((task, c))]
            z = learned.learner.logits([asked.inputs[n]], np.array([task]))[0, classes]
            torch.testing.assert_close(heads[k, n, classes], z.log_softmax(0), atol=1e-5, rtol=1e-4)


def test_combination_equals_arithmetic_by_hand():
    inf = float("inf")
    scores = torch.tensor([[[1.0, 0.0, -inf, -inf]], [[-inf, -inf, 0.8, 0.1]]])
    heads = torch.tensor([[[0.1, 0.9, 0.0, 0.0]], [[0.0, 0.0, 0.6, 0.4]]]).log()
    combined = combine(scores, heads, 2.0)[0]
    expected = [2 + np.log(0.1), np.log(0.9), 1.6 + np.log(0.6), 0.2 + np.log(0.4)]
    np.testing.assert_allclose(combined, expected, rtol=1e-6)
    right = count_right(scores, heads, torch.tensor([2]))
    by_hand = [np.argmax(combine(scores, heads, a)[0]) == 2 for a in WEIGHTS]
    assert right.tolist() == [int(b) for b in by_hand]
    assert 0 < sum(by_hand) < len(WEIGHTS)
    assert by_hand[WEIGHTS.index(best_weight(right))]


def test_the_routed_head_alone_is_taken_where_all_weights_are_worse():
    counts = torch.full((len(WEIGHTS),), 5)
    assert best_weight(counts) == WEIGHTS[1:][len(WEIGHTS[1:]) // 2]  # a tie
    counts[0] = 6
    assert best_weight(counts) is None
    counts[3] = 6
    assert best_weight(counts) == WEIGHTS[3]


@pytest.mark.parametrize(("weight", "k"), [(0.0, 1), (None, 1), (None, 3)])
def test_what_equals_the_routed_head(learned, weight, k):
    hard, asked = started(Ridge(projection=64), learned), questions(learned)
    alone = combine(*opinions(hard.route(asked), asked, k), weight)
    assert (alone.argmax(1) == hard.answer(asked)[1].argmax(1)).all()


def test_heads_that_mislead_are_not_asked(learned):
    """Where the router finds the task and its classes say nothing, nothing is lost by combining."""
    router, asked = (
        started(Ridge(projection=64, combine="heads", top_k=3), learned),
        questions(learned),
    )
    choice = router.route(asked)
    scores, heads = opinions(choice, asked, 3)
    labels = heads[0].argmax(1)
    router.right = router.right + count_right(scores, heads, labels)
    _, logits = router.answer(asked)
    assert (logits.argmax(1) == labels).all()


def test_router_classes_alone_need_no_head(learned):
    router, asked = started(Prototype(combine="classes"), learned), questions(learned)
    before = learned.learner.passes
    choice, logits = router.answer(asked)
    assert learned.learner.passes == before
    best = choice.pairs[choice.class_scores.argmax(1)]
    assert (logits.argmax(1) == best[:, 1]).all()
    assert (choice.tasks == best[:, 0]).all()


def test_combination_is_tuned_on_validation_and_stored(learned):
    router = started(Ridge(projection=64, combine="heads", top_k=2), learned)
    task = learned.stream.tasks[1]
    held = task.validation
    asked = Questions(
        *(learned.learner, Memo(), learned.features, held.inputs, held.rows),
        *(np.full(len(held), 1), 3),
    )
    router.tune(asked, torch.from_numpy(held.labels))
    scores, heads = opinions(router.route(asked), asked, 2)
    assert torch.equal(router.right, count_right(scores, heads, torch.from_numpy(held.labels)))
    assert int(router.right.max()) > 0
    again = Ridge(projection=64, combine="heads", top_k=2)
    again.start(learned.backbone.width, 0)
    again.load(router.dump())
    assert same(again.dump(), router.dump())
    ours, theirs = router.answer(questions(learned))[1], again.answer(questions(learned))[1]
    assert torch.equal(ours, theirs)


# ------------------------------------------------------------------ laws for all of them


ROUTERS = {
    "entropy": Uncertainty,
    "uniform": Constant,
    "arrow": Arrow,
    "soft": lambda: Prototype(mix="soft", top_k=2, temperature=0.1),
    "heads": lambda: Ridge(projection=64, combine="heads", top_k=3),
    "layers": lambda: Ridge(projection=64, layers=[1, 2]),
}


@pytest.mark.parametrize("name", ROUTERS)
def test_an_answer_depends_on_its_own_sample_alone(learned, name):
    router = started(ROUTERS[name](), learned)
    whole = questions(learned)
    choice, logits = router.answer(whole)
    order = np.random.default_rng(0).permutation(len(whole))
    for part in np.array_split(order, 5):
        ours, answer = router.answer(questions(learned, part))
        torch.testing.assert_close(answer, logits[part], atol=1e-4, rtol=1e-4)
        assert torch.equal(ours.tasks, choice.tasks[part])


def test_features_of_layers_are_pooled_layers_side_by_side(learned):
    inputs = learned.stream.tasks[0].test.inputs[:5]
    both = learned.features.features(inputs, [1, 2])
    last = learned.features.features(inputs)
    torch.testing.assert_close(both[:, learned.backbone.width :], last, atol=1e-5, rtol=1e-5)
    batch = learned.backbone.collate(learned.features.encoded(inputs))
    states = learned.backbone.model(**batch, output_hidden_states=True).hidden_states
    first = learned.backbone.pool(states[1], batch)
    torch.testing.assert_close(both[:, : learned.backbone.width], first, atol=1e-5, rtol=1e-5)
    with pytest.raises(ConfigError, match="layers 1 to 2, not 3"):
        learned.features.features(["x"], [3])


def test_best_class_of_no_scores_is_refused_early():
    refused = {
        ("router=entropy", "router.combine=heads"): "knows classes",
        ("router=ridge", "router.combine=heads", "router.mix=soft"): "exclude each other",
        ("router=ridge", "router.combine=heads", "stream.validation_share=0"): "validation",
        ("router=ridge", "router.top_k=2"): "no effect",
        ("router=ridge", "router.mix=soft", "module=prompt"): "cannot be mixed",
        ("router=ridge", "router.mix=soft"): "top_k=1 the choice is a hard one",
        ("router=ridge", "router.layers=[]"): "at least one layer",
        ("router=ridge", "router.layers=[1,1]"): "each once",
        ("router=entropy", "router.layers=[1]"): "looks at no frozen features",
        ("router=uniform", "module=prefix"): "cannot be mixed",
        ("router=arrow", "module=dora"): "made for module=lora",
    }
    for overrides, words in refused.items():
        with pytest.raises(ConfigError, match=words):
            validate(config("debug=smoke", *overrides))
    assert validate(config("debug=smoke", "router=ridge", "router.mix=soft", "router.top_k=3"))


def test_choice_best_class_names_pairs():
    router = Prototype()
    router.start(2, 0)
    router.fit(torch.eye(2), torch.tensor([5, 3]), 0)
    choice = router.choose(torch.tensor([[1.0, 0.0]]))
    assert isinstance(choice, Choice)
    assert choice.pairs.tolist() == [[0, 3], [0, 5]]
    assert choice.class_scores.argmax(1).item() == 1
