import copy
import json
import signal

import pytest
import torch
from core_fixtures import CPU, same, tiny
from peft import PromptTuningConfig, get_peft_model
from running import FIVE, RIDGE, digests, folder_of, in_child, run
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel, ViTConfig, ViTModel
from virtual_cases import (
    KINDS,
    PIXELS,
    TEXTS,
    WORDS,
    B,
    H,
    L,
    alone,
    check_learns,
    check_mixed,
    check_survives_a_failure,
    hidden,
    image,
    make,
    own,
)

from cl_peft.backbones.decoder import Decoder
from cl_peft.errors import ConfigError, DamagedRunError
from cl_peft.modules.bank import Bank, Route, flatten
from cl_peft.modules.prompt import Prompt

P = 3


def bank_of(model):
    return Bank(Prompt(tokens=P), model, CPU)


def fresh(bank, seed=0):
    return bank.fresh(torch.Generator().manual_seed(seed))


def test_real_peft_gives_the_same_and_the_same_gradients():
    for kind in TEXTS:
        model, batch = make(kind)
        reference = copy.deepcopy(model)
        bank = bank_of(model)
        module = fresh(bank)
        config = PromptTuningConfig(num_virtual_tokens=P, task_type="FEATURE_EXTRACTION")
        reference = get_peft_model(reference, config).eval()
        theirs_leaf = reference.prompt_encoder["default"].embedding.weight
        theirs_leaf.data.copy_(module["input"]["tokens"])
        with bank.use(module):
            ours = hidden(model, batch)
        theirs = own(batch, reference(**batch).last_hidden_state[:, P:])
        assert ours.shape == (B, L, H)
        assert not torch.allclose(ours, hidden(model, batch), atol=1e-2)
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
        direction = torch.randn(ours.shape)
        (ours * direction).mean().backward()
        (theirs * direction).mean().backward()
        gradient = module["input"]["tokens"].grad
        assert gradient.abs().max() > 1e-4
        torch.testing.assert_close(gradient, theirs_leaf.grad, atol=1e-6, rtol=1e-4)


def vpt(model, batch, prompt):
    """VPT-shallow, written down: the prompt between CLS and patches, as its authors have it."""
    x = model.embeddings(batch["pixel_values"])
    x = torch.cat([x[:, :1], prompt.expand(len(x), -1, -1), x[:, 1:]], dim=1)
    for layer in model.layers:
        x = layer(x)
    x = model.layernorm(x)
    return torch.cat([x[:, :1], x[:, 1 + prompt.shape[0] :]], dim=1)


def test_a_naive_vpt_gives_the_same_and_the_same_gradients():
    model, batch = make("vit")
    bank = bank_of(model)
    module = fresh(bank)
    with bank.use(module):
        ours = hidden(model, batch)
    leaf = module["input"]["tokens"].detach().clone().requires_grad_(True)
    theirs = vpt(copy.deepcopy(model), batch, leaf)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(ours, hidden(model, batch), atol=1e-2)
    direction = torch.randn(ours.shape)
    (ours * direction).mean().backward()
    (theirs * direction).mean().backward()
    gradient = module["input"]["tokens"].grad
    torch.testing.assert_close(gradient, leaf.grad, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_failed_forward_leaves_nothing_behind(kind):
    model, batch = make(kind)
    check_survives_a_failure(bank_of(model), model, batch)


@pytest.mark.parametrize("kind", KINDS)
def test_a_mixed_batch_equals_single_forwards(kind):
    check_mixed(bank_of, *make(kind))


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_of_one_sample_stand_one_after_another(kind):
    model, batch = make(kind)
    bank = bank_of(model)
    modules = [fresh(bank, seed) for seed in range(3)]
    for module in modules:
        bank.add(module)
    # modules are laid out in the bank's order; the second sample has none in the middle
    weights = torch.tensor([[1, 1, 1], [1, 0, 1], [0, 0, 0], [0, 1, 0], [1, 1, 0], [0, 0, 1]])
    with bank.use(Route.dense(weights)):
        ours = hidden(model, batch)
    bank.close()
    for n, row in enumerate(weights.tolist()):
        one = alone(batch, n)
        parts = [m["input"]["tokens"] for m, on in zip(modules, row, strict=True) if on]
        if not parts:
            expected = hidden(model, one)[0]
        else:
            longer = Bank(Prompt(tokens=P * len(parts)), model, CPU)
            with longer.use({"input": {"tokens": torch.cat(parts)}}):
                expected = hidden(model, one)[0]
            longer.close()
        torch.testing.assert_close(ours[n, : len(expected)], expected, atol=1e-5, rtol=1e-5)


def test_a_weight_between_is_refused():
    model, batch = make("bert")
    bank = bank_of(model)
    bank.add(fresh(bank))
    with (
        bank.use(Route.dense(torch.full((B, 1), 0.25))),
        pytest.raises(ConfigError, match=r"Prompt: .* must be 0 or 1, not 0\.25"),
    ):
        model(**batch)
    with bank.use(Route.each(torch.tensor([0, -1]))), pytest.raises(ValueError, match="2 rows"):
        model(**batch)


def test_pooling_sees_the_texts_own_tokens():
    backbone = tiny()
    bank = Bank(Prompt(tokens=P), backbone.model, CPU)
    module = fresh(bank)
    batch = backbone.collate(backbone.encode(["one text", "another, longer text"]))
    with bank.use(module):
        for pooling in ("mean", "cls"):
            backbone.pooling = pooling
            states = hidden(backbone.model, batch)
            mean = states.sum(1) / batch["attention_mask"].sum(1, keepdim=True)
            expected = mean if pooling == "mean" else states[:, 0]
            torch.testing.assert_close(backbone(batch), expected)
    model, batch = make("llama")
    batch.pop("use_cache")
    decoder = Decoder("none")
    decoder.model = model
    bank = bank_of(model)
    with bank.use(fresh(bank)):
        pooled = decoder(batch)
        for n in range(B):
            torch.testing.assert_close(
                pooled[n], hidden(model, alone(batch, n))[0, -1], atol=1e-5, rtol=1e-5
            )


def test_no_virtual_token_is_given_out_as_the_poolers():
    torch.manual_seed(0)
    for model, batch in (
        (ViTModel(ViTConfig(**PIXELS)), image()),
        (BertModel(BertConfig(**WORDS)), make("bert")[1]),
    ):
        bank = bank_of(model.eval())
        with bank.use(fresh(bank)):
            assert model(**batch).pooler_output is None
        assert model(**batch).pooler_output is not None


def test_learns():
    for kind in KINDS:
        bank, module = check_learns(Prompt(tokens=P), *make(kind), lr=0.1)
        bank.add(module)
        assert same(flatten(bank.get(0)), flatten(module))


def test_starts_from_distinct_rows_of_the_vocabulary():
    torch.manual_seed(0)
    model = BertModel(BertConfig(**{**WORDS, "vocab_size": 6000}), False)
    table = model.embeddings.word_embeddings.weight
    (site,) = Prompt().sites(model)
    tokens = Prompt(tokens=900).init(site, torch.Generator().manual_seed(0))["tokens"]
    rows = torch.cdist(tokens, table).argmin(1)
    assert torch.equal(table[rows], tokens)
    assert len(rows.unique()) == 900
    assert 4000 < rows.max() < 5000
    again = Prompt(tokens=900).init(site, torch.Generator().manual_seed(0))["tokens"]
    other = Prompt(tokens=900).init(site, torch.Generator().manual_seed(1))["tokens"]
    assert torch.equal(tokens, again)
    assert not torch.equal(tokens, other)
    with pytest.raises(ConfigError, match=r"module\.tokens=5001: the vocabulary has 5000 rows"):
        Prompt(tokens=5001).sites(model)


def test_starts_uniform():
    text, vision = make("bert")[0], make("vit")[0]
    bounds = [
        (text, "uniform", 0.5),
        (vision, "uniform", 0.5),
        (vision, "vocabulary", (6 / (3 * 8 * 8 + H)) ** 0.5),
    ]
    for model, start, bound in bounds:
        method = Prompt(tokens=500, init=start)
        (site,) = method.sites(model)
        tokens = method.init(site, torch.Generator().manual_seed(0))["tokens"]
        assert 0.99 * bound < tokens.abs().max() <= bound
        assert abs(float(tokens.mean())) < 0.02


def test_parameter_formula_and_the_way_to_disk_and_back(tmp_path):
    model, _ = make("bert")
    bank = bank_of(model)
    assert bank.parameters_per_module() == P * H
    modules = [fresh(bank, seed) for seed in range(4)]
    for module in modules[:3]:
        bank.add(module)
    bank.replace(1, modules[3])
    save_file(flatten(bank.get(1)), tmp_path / "m")
    back = bank.check(load_file(tmp_path / "m"), "m")
    assert same(flatten(back), flatten(modules[3]))
    assert same(flatten(bank.get(2)), flatten(modules[2]))
    with pytest.raises(DamagedRunError, match="missing input/tokens; unknown input/token"):
        bank.check({"input/token": torch.zeros(P, H)}, "m")
    with pytest.raises(DamagedRunError, match=r"has shape \(4, 24\), expected \(3, 24\)"):
        bank.check({"input/tokens": torch.zeros(P + 1, H)}, "m")
    with pytest.raises(ConfigError, match="Prompt modules cannot be merged"), bank.merged(0):
        pass


def test_what_does_not_fit_the_positions_is_refused_with_a_way_out():
    for kind, cut in (("bert", 0), ("roberta", 1)):  # RoBERTa's first position is 1 here
        torch.manual_seed(0)
        model, batch = make(kind)
        limit = L + P + cut
        small = type(model)(
            type(model.config)(**WORDS, max_position_embeddings=limit), False
        ).eval()
        with Bank(Prompt(tokens=P), small, CPU).use(fresh(bank_of(small))):
            small(**batch)
        bank = Bank(Prompt(tokens=P + 1), small, CPU)
        match = f"a text of {L} tokens and 4 virtual ones need 13 positions; the backbone has 12"
        with bank.use(fresh(bank)), pytest.raises(ConfigError, match=match) as error:
            small(**batch)
        assert f"backbone.max_length={L - 1} or less" in str(error.value)
        short = {k: v[:, : L - 1] for k, v in batch.items()}
        with bank.use(fresh(bank)):
            small(**short)


def test_starts_from_the_names_of_the_classes():
    torch.manual_seed(0)
    bank = Bank(Prompt(tokens=4, init="labels"), make("bert")[0], CPU)
    table = bank.sites[0].layer.get_input_embeddings().weight
    names = [torch.tensor([7]), torch.tensor([], dtype=torch.long), torch.tensor([3, 9, 9])]
    generator = torch.Generator().manual_seed(1)
    tokens = bank.fresh(generator, names)["input"]["tokens"]
    torch.testing.assert_close(tokens[0], table[7])
    torch.testing.assert_close(tokens[1], (table[3] + 2 * table[9]) / 3)
    plain = Bank(Prompt(tokens=4), bank.sites[0].layer, CPU)
    drawn = plain.fresh(torch.Generator().manual_seed(1), names)["input"]["tokens"]
    assert torch.equal(tokens[2:], drawn[2:])  # more tokens than names: rows of the vocabulary
    assert not torch.equal(tokens[:2], drawn[:2])
    many = [torch.tensor([i]) for i in range(1, 9)]
    assert torch.equal(bank.fresh(generator, many)["input"]["tokens"], table[1:5])
    assert tokens.requires_grad
    assert tokens.is_leaf
    nameless = bank.fresh(torch.Generator().manual_seed(1), names[1:2])["input"]["tokens"]
    assert torch.equal(nameless, drawn)


def test_a_run_starts_its_prompts_from_its_own_classes():
    model = tiny()
    (ids,) = model.words(["card_arrival"])
    assert torch.equal(ids, model.words(["card arrival"])[0])
    # with a rate of almost nothing a finished prompt is its start
    args = ("debug=smoke", "module=prompt", "module.tokens=2", "module.init=labels")
    folder = run(*args, "optimizer.lr=1e-12", "trainer.epochs=1", "backbone=tiny")
    stream = json.loads((folder / "stream.json").read_text())
    table = model.model.get_input_embeddings().weight
    for task in stream["tasks"]:
        stored = load_file(folder / f"tasks/{task['task']:03d}/module.safetensors")
        names = [stream["class_names"][c] for c in task["classes"]][:2]
        starts = torch.stack([table[ids].mean(0) for ids in model.words(names)])
        torch.testing.assert_close(stored["input/tokens"], starts, atol=1e-6, rtol=0)


def test_too_many_virtual_tokens_are_refused_before_training(capsys):
    args = ("debug=smoke", "module=prompt", "module.tokens=50", "backbone.max_length=64")
    for learner, virtual in (("progressive", 150), ("l2p", 250)):
        with pytest.raises(ConfigError, match=f"up to {virtual} virtual") as error:
            run(*args, f"learner={learner}")
        assert "smaller module.tokens" in str(error.value)
    with pytest.raises(ConfigError, match=r"Use backbone.max_length=\d+ or less"):
        run(*args, "learner=progressive", "module.tokens=40")
    assert "epoch" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "learner",
    [("learner=isolated", *RIDGE), ("learner=sequential",)],
    ids=["isolated", "sequential"],
)
def test_a_run_killed_and_resumed_ends_with_the_same_bits(learner, tmp_path, cache):
    args = ("debug=smoke", "cache=off", *FIVE, "module=prompt", *learner, f"paths.cache={cache}")
    whole, part = ((*args, f"paths.runs={tmp_path / name}") for name in "ab")
    run(*whole)
    assert in_child("while task 3 trains", part) == -signal.SIGKILL
    run(*part)
    expected, got = (digests(folder_of(*a)) for a in (whole, part))
    for name in ("results.parquet", "predictions.parquet", "tasks/005/module.safetensors"):
        assert got[name] == expected[name]
    tensors = load_file(folder_of(*part) / "tasks/005/module.safetensors")
    assert tensors["input/tokens"].shape == (20, 32)


def test_the_other_learner_runs(places):
    run("debug=smoke", "module=prompt", "learner=joint", "trainer.epochs=1", *places)
