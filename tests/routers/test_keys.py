import pytest
import torch
from router_cases import WIDTH, fitted, queries, tasks
from router_laws import every_law
from torch.nn.functional import cosine_similarity, normalize

from cl_peft.routers.keys import Keys
from cl_peft.training import generator


@every_law
def test_law(law):
    law(lambda: Keys(keys_per_task=4, steps=60))


def test_one_key_becomes_the_mean_direction():
    data = tasks()
    router = fitted(Keys(keys_per_task=1, steps=300), data)
    for (features, _), keys in zip(data, router.keys, strict=True):
        best = normalize(normalize(features, dim=1).mean(0), dim=0)
        assert float(keys[0] @ best) > 1 - 1e-5
        # and no direction has a smaller key loss
        losses = 1 - normalize(features, dim=1) @ torch.stack([keys[0], best]).T
        assert float(losses.mean(0)[0]) == pytest.approx(float(losses.mean(0)[1]), abs=1e-5)


def test_several_keys_are_each_the_mean_direction_of_the_features_closest_to_it():
    features, labels = tasks(sizes=(4,), per_class=40)[0]
    (keys,) = fitted(Keys(keys_per_task=4, steps=400), [(features, labels)]).keys
    unit = normalize(features, dim=1)
    closest = (unit @ keys.T).argmax(1)
    assert len(closest.unique()) > 1
    for j in closest.unique():
        mean = normalize(unit[closest == j].mean(0), dim=0)
        assert float(keys[j] @ mean) > 1 - 1e-3


def test_training_equals_a_naive_twin():
    data = tasks()
    router = fitted(Keys(keys_per_task=3, steps=25, learning_rate=0.05), data)
    for t, (features, _) in enumerate(data):
        unit = features / features.norm(dim=1, keepdim=True)
        noise = torch.randn(3, WIDTH, generator=generator(3, t))
        twin = torch.nn.Parameter(unit.mean(0) + unit.std(0, unbiased=False) * noise)
        optimizer = torch.optim.Adam([twin], lr=0.05)
        for _ in range(25):
            each = [cosine_similarity(features, key[None]) for key in twin]
            loss = (1 - torch.stack(each).max(0).values).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        torch.testing.assert_close(
            router.keys[t], normalize(twin.detach(), dim=1), atol=2e-4, rtol=0
        )


def test_a_task_scores_as_its_best_key():
    router, asked = fitted(Keys(keys_per_task=3, steps=20), tasks()), queries()
    choice = router.choose(asked)
    for t in range(3):
        best = max_over(cosine_similarity(asked, key[None]) for key in router.keys[t])
        torch.testing.assert_close(choice.scores[:, t], best, atol=1e-6, rtol=0)
    assert choice.class_scores is None
    assert not router.knows_classes


def max_over(columns):
    return torch.stack(list(columns)).max(0).values


def test_features_of_any_length_give_the_same_keys_and_scores():
    data, asked = tasks(), queries()
    longer = [(f * torch.linspace(0.5, 9, len(f))[:, None], y) for f, y in data]
    one, other = fitted(Keys(keys_per_task=2), data), fitted(Keys(keys_per_task=2), longer)
    torch.testing.assert_close(one.keys, other.keys, atol=1e-4, rtol=0)
    scores = other.choose(asked * 7).scores
    torch.testing.assert_close(one.choose(asked).scores, scores, atol=1e-4, rtol=0)


def test_a_task_leaves_earlier_keys_alone_and_has_keys_of_its_own():
    data = tasks()
    router = fitted(Keys(keys_per_task=2, steps=10), data[:1])
    first = router.keys[0].clone()
    router.fit(*data[0], 1)  # the same features again: another start
    assert torch.equal(router.keys[0], first)
    assert not torch.equal(router.keys[1], first)
    with pytest.raises(ValueError, match="task 4 was fitted before, or is not the next"):
        router.fit(*data[1], 3)
