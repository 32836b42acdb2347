"""Layers that are computed twice give the same bits, whatever acts in them."""

import pandas as pd
import pytest
import torch
from core_fixtures import CPU, world
from running import run
from virtual_cases import B, H, hidden, make

from cl_peft.backbones.checkpointing import checkpointed
from cl_peft.errors import ConfigError
from cl_peft.modules.adapter import Adapter
from cl_peft.modules.bank import Active, Bank
from cl_peft.modules.bitfit import BitFit
from cl_peft.modules.dora import DoRA
from cl_peft.modules.full import Full
from cl_peft.modules.ia3 import IA3
from cl_peft.modules.lora import LoRA
from cl_peft.modules.prefix import Prefix
from cl_peft.modules.prompt import Prompt
from cl_peft.modules.vera import VeRA
from cl_peft.training import Trainer

METHODS = {
    "lora": lambda: LoRA(rank=3),
    "lora, dropout": lambda: LoRA(rank=3, dropout=0.3),
    "dora": lambda: DoRA(rank=3),
    "dora, dropout": lambda: DoRA(rank=3, dropout=0.3),
    "adapter": lambda: Adapter(bottleneck=5, init_scale=0.3),
    "parallel": lambda: Adapter(bottleneck=5, placement="parallel", init_scale=0.3),
    "prompt": lambda: Prompt(tokens=3),
    "prefix": lambda: Prefix(tokens=3, hidden=7),
    "ia3": IA3,
    "bitfit": BitFit,
    "vera": lambda: VeRA(rank=6),
    "full": Full,
}


def moved(bank, seed=0):
    """A fresh module, moved far enough that everything in it has a gradient."""
    random = torch.Generator().manual_seed(seed)
    module = bank.fresh(random)
    for params in module.values():
        for tensor in params.values():
            tensor.data += 0.1 * torch.randn(tensor.shape, generator=random)
    return module


def leaves(module):
    return [t for params in module.values() for t in params.values()]


def gradients(bank, module, model, batch, target):
    torch.manual_seed(3)
    with bank.training(module):
        states = hidden(model, batch)
    loss = (states.sum(1) - target).square().mean()
    found = torch.autograd.grad(loss, leaves(module))
    return [loss.detach(), *found, torch.rand(3)]  # as many random numbers were drawn


@pytest.mark.parametrize("kind", ["bert", "roberta", "llama", "vit"])
@pytest.mark.parametrize("name", list(METHODS))
def test_gradients_are_the_same_bits(name, kind):
    model, batch = make(kind)
    bank, target = Bank(METHODS[name](), model, CPU), torch.randn(B, H)
    module = moved(bank)
    plain = gradients(bank, module, model, batch, target)
    with checkpointed(model, bank):
        again = gradients(bank, module, model, batch, target)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    assert all(bool(t.any()) for t in plain[1:])
    if "dropout" in name:  # the same masks, not none
        with bank.use(module):
            assert not torch.equal(hidden(model, batch).sum(), plain[0])


@pytest.mark.parametrize("method", [LoRA(rank=3, dropout=0.3), Prompt(3), Prefix(3)])
def test_what_a_learner_composes_per_sample_is_there_again(method):
    model, batch = make("bert")
    bank, target = Bank(method, model, CPU), torch.randn(B, H)
    modules = [moved(bank, seed) for seed in range(2)]
    own = [t for m in modules for t in leaves(m)]
    chosen = torch.tensor([0, 1, 1, 0, 1, 0])

    def found():
        torch.manual_seed(3)
        given = {}
        for site in bank.sites:
            folded = [method.fold(site, m[site.name]) for m in modules]
            if isinstance(method, Prefix):
                folded = [{"tokens": method.tokens(site, m[site.name])} for m in modules]
            stacks = {n: torch.stack([f[n] for f in folded])[chosen, None] for n in folded[0]}
            given[site.name] = Active(stacks, torch.ones(B, 1))
        with bank.give(given, training=True):
            states = hidden(model, batch)
        return torch.autograd.grad((states.sum(1) - target).square().mean(), own)

    plain = found()
    with checkpointed(model, bank):
        again = found()
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_each_pass_comes_back_to_its_own_module():
    model, batch = make("bert")
    bank = Bank(LoRA(rank=3, dropout=0.3), model, CPU)
    modules = [moved(bank, seed) for seed in range(2)]

    def found():
        torch.manual_seed(3)
        total = torch.zeros(())
        for module, scope in zip(modules, (bank.training, bank.use), strict=True):
            with scope(module):
                total = total + hidden(model, batch).square().mean()
        with bank.use(modules[1]):  # open, and still so after the backward pass
            found = torch.autograd.grad(total, [t for m in modules for t in leaves(m)])
            return [*found, hidden(model, batch).detach()]

    plain = found()
    with checkpointed(model, bank):
        again = found()
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    assert bank._scope is None
    assert not bank.method._training


def test_layers_keep_their_inputs_alone_and_run_twice_where_there_is_a_gradient():
    model, batch = make("bert")
    bank = Bank(LoRA(rank=3), model, CPU)
    module, runs, kept = moved(bank), [], []
    model.encoder.layer[1].output.dense.register_forward_hook(lambda *_: runs.append(1))

    def step():
        runs.clear()
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            with bank.training(module):
                states = hidden(model, batch)
            before = len(runs)
        states.sum().backward()
        return before, len(runs), len(kept)

    once, _, many = step()
    assert (once, len(runs)) == (1, 1)
    with checkpointed(model, bank):
        before, after, few = step()
        assert (before, after) == (1, 2)
        assert few < many / 10
        runs.clear()
        with torch.no_grad(), bank.use(module):
            hidden(model, batch)
        assert len(runs) == 1
    assert step()[:2] == (1, 1)
    assert all("forward" not in m.__dict__ for m in model.modules())


def test_a_learner_computes_layers_again_where_it_is_asked_to():
    runs = {}
    for option in ("off", "on"):
        w = world(trainer=Trainer(epochs=1, batch_size=8, checkpointing=option))
        w.backbone.model.encoder.layer[0].output.dense.register_forward_hook(
            lambda *_, option=option: runs.update({option: runs.get(option, 0) + 1})
        )
        w.learner.learn(w.stream.tasks[0])
    assert runs["on"] == runs["off"] + w.learner.report.steps  # not again where it is evaluated


def test_a_model_without_such_layers_is_refused():
    model = torch.nn.Sequential(torch.nn.Linear(3, 3))
    bank = Bank(LoRA(rank=1, sites=["0"]), model, CPU)
    with (
        pytest.raises(ConfigError, match=r"checkpointing=off; trainer\.accumulate=4"),
        checkpointed(model, bank),
    ):
        pass


def results(*overrides):
    folder = run(
        "debug=smoke",
        "router=ridge",
        "router.projection=48",
        "stream.train_per_class=10",
        "stream.test_per_class=6",
        "trainer.epochs=1",
        "trainer.batch_size=8",
        "threads=1",
        *overrides,
    )
    modules = [path.read_bytes() for path in sorted(folder.glob("tasks/*/module.safetensors"))]
    return modules, pd.read_parquet(folder / "predictions.parquet")


@pytest.mark.parametrize("learner", ["isolated", "olora"])
def test_a_whole_run_with_both_options_predicts_what_a_plain_one_does(learner, tmp_path):
    places = (f"learner={learner}", f"paths.runs={tmp_path / 'runs'}", "cache=off")
    modules, plain = results(*places)
    same, again = results(*places, "trainer.checkpointing=on")
    assert same == modules
    pd.testing.assert_frame_equal(plain, again)
    other, both = results(*places, "trainer.checkpointing=on", "trainer.accumulate=3")
    assert other != modules  # sums in another order
    columns = ["row", "label", "oracle_prediction", "routed_prediction", "routed_task"]
    pd.testing.assert_frame_equal(plain[columns], both[columns])
