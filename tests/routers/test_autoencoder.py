import numpy as np
import pytest
import torch
from router_cases import WIDTH, fitted, queries, tasks
from router_laws import every_law
from torch import nn

from cl_peft.routers import autoencoder
from cl_peft.routers.autoencoder import Autoencoder
from cl_peft.training import generator


def small(**options):
    return Autoencoder(**{"hidden": 6, "steps": 80, "learning_rate": 0.02, **options})


def twins(router):
    """Each task's autoencoder as plain modules."""
    out = []
    for e, b, d, c in zip(*(router.experts[name] for name in "EbDc"), strict=True):
        net = nn.Sequential(nn.Linear(WIDTH, len(b)), nn.ReLU(), nn.Linear(len(b), WIDTH))
        net.load_state_dict({"0.weight": e.T, "0.bias": b, "2.weight": d.T, "2.bias": c})
        out.append(net)
    return out


def squashed(features, first):
    """Standardised by the first task, through a sigmoid."""
    mean, std = first.double().numpy().mean(0), first.double().numpy().std(0)
    return torch.tensor(1 / (1 + np.exp(-(features.double().numpy() - mean) / std)))


@every_law
def test_law(law):
    law(small)


def test_errors_equal_a_naive_loop_whatever_is_held_at_a_time(monkeypatch):
    data, asked = tasks(), queries()
    router = fitted(small(), data)
    expected = np.zeros((50, 3))
    for t, net in enumerate(twins(router)):
        for i, v in enumerate(squashed(asked, data[0][0]).float()):
            expected[i, t] = ((torch.sigmoid(net(v)) - v) ** 2).sum().item()
    choice = router.choose(asked)
    np.testing.assert_allclose(choice.scores, -expected, atol=1e-5)
    assert (choice.tasks.numpy() == expected.argmin(1)).all()
    assert choice.class_scores is None
    monkeypatch.setattr(autoencoder, "HELD", 7 * 3 * WIDTH)
    torch.testing.assert_close(router.choose(asked).scores, choice.scores, atol=1e-6, rtol=0)


def test_training_equals_a_naive_twin():
    data = tasks()
    router = fitted(small(steps=40, batch_size=8), data)
    for t, (features, _) in enumerate(data):
        random = generator(3, t)
        net = nn.Sequential(nn.Linear(WIDTH, 6), nn.ReLU(), nn.Linear(6, WIDTH), nn.Sigmoid())
        encoder = (2 * torch.rand(WIDTH, 6, generator=random) - 1) / WIDTH**0.5
        decoder = (2 * torch.rand(6, WIDTH, generator=random) - 1) / 6**0.5
        start = {"0.weight": encoder.T, "2.weight": decoder.T}
        start |= {"0.bias": torch.zeros(6), "2.bias": torch.zeros(WIDTH)}
        net.load_state_dict(start)
        optimizer = torch.optim.Adam(net.parameters(), lr=0.02)
        v = squashed(features, data[0][0]).float()
        for rows in torch.randint(len(v), (40, 8), generator=random):
            loss = nn.BCELoss(reduction="none")(net(v[rows]), v[rows]).sum(1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        for mine, its in (("E", net[0].weight.T), ("b", net[0].bias), ("D", net[2].weight.T)):
            torch.testing.assert_close(router.experts[mine][t], its.detach(), atol=1e-4, rtol=0)
        error = (net(v).detach() - v).square().sum(1).mean()
        assert float(router.experts["own"][t]) == pytest.approx(float(error), rel=1e-3)


def test_training_lowers_the_error_and_most_of_all_on_its_own_task():
    data = tasks(per_class=60)
    untrained, trained = fitted(small(steps=1), data), fitted(small(steps=200), data)
    assert (trained.experts["own"] < 0.6 * untrained.experts["own"]).all()
    errors = torch.stack([-trained.choose(f).scores.mean(0) for f, _ in data])
    assert (errors.argmin(1) == torch.arange(3)).all()
    torch.testing.assert_close(errors.diagonal(), trained.experts["own"], rtol=1e-4, atol=1e-5)


def test_abstains_where_all_tasks_have_a_larger_error_than_their_own_examples_allow():
    data = tasks(per_class=60)
    router = fitted(small(steps=200, abstain_above=3.0), data)
    far = 8 * queries()
    choice = router.choose(far)
    errors = -choice.scores.double().numpy()
    expected = (errors > 3.0 * router.experts["own"].double().numpy()).all(1)
    assert (choice.abstained.numpy() == expected).all()
    assert choice.abstained.float().mean() > 0.9
    assert router.choose(data[1][0]).abstained.float().mean() < 0.1
    assert torch.equal(choice.tasks, choice.scores.argmax(1))  # answered all the same
    never = fitted(small(steps=200), data)
    assert never.choose(far).abstained is None


def test_a_soft_mixture_is_the_softmax_of_minus_the_errors_at_temperature_two():
    class Asked:
        def __len__(self):
            return len(queries())

        def features(self, layers):
            return queries()

    router = fitted(small(mix="soft", top_k=3), tasks())
    choice = router.route(Asked())
    exact = np.exp(choice.scores.double().numpy() / 2)
    np.testing.assert_allclose(choice.weights, exact / exact.sum(1, keepdims=True), atol=1e-6)


def test_the_standardisation_of_the_first_task_stays():
    data = tasks()
    router = fitted(small(steps=5), data[:1])
    mean, scale = router.mean.clone(), router.scale.clone()
    np.testing.assert_allclose(mean, data[0][0].numpy().mean(0), atol=1e-6)
    np.testing.assert_allclose(scale, data[0][0].numpy().std(0), atol=1e-6)
    router.fit(5 * data[1][0] + 3, data[1][1], 1)
    assert torch.equal(router.mean, mean)
    assert torch.equal(router.scale, scale)
    with pytest.raises(ValueError, match="task 4 was fitted before, or is not the next"):
        router.fit(*data[2], 3)
