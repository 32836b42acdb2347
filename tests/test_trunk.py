"""Modules in upper layers alone: where they sit, and the frozen layers below, computed once."""

import copy
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from core_fixtures import CPU, random_module, same, stream_of, texts, tiny
from learner_cases import check_resume, fit_of, world_with
from transformers import (
    BertConfig,
    BertModel,
    DeiTConfig,
    DeiTModel,
    DistilBertConfig,
    DistilBertModel,
    LlamaConfig,
    LlamaModel,
    Qwen2Config,
    Qwen2Model,
    RobertaConfig,
    RobertaModel,
    ViTConfig,
    ViTModel,
)

from cl_peft.backbones import trunk as trunks
from cl_peft.backbones.checkpointing import checkpointed
from cl_peft.backbones.decoder import Decoder
from cl_peft.backbones.encoder import Encoder
from cl_peft.backbones.features import Features
from cl_peft.backbones.tiny import byte_tokenizer
from cl_peft.backbones.trunk import Trunk, below, trunk_of
from cl_peft.backbones.vision import Vision
from cl_peft.errors import ConfigError
from cl_peft.learners.isolated import Isolated
from cl_peft.learners.replay import Replay
from cl_peft.learners.seqstar import SeqStar
from cl_peft.modules.adapter import Adapter
from cl_peft.modules.bank import Bank, flatten
from cl_peft.modules.base import layer_of
from cl_peft.modules.bitfit import BitFit
from cl_peft.modules.dora import DoRA
from cl_peft.modules.full import Full
from cl_peft.modules.ia3 import IA3
from cl_peft.modules.lora import LoRA
from cl_peft.modules.prefix import Prefix
from cl_peft.modules.prompt import Prompt
from cl_peft.modules.vera import VeRA
from cl_peft.streams.base import content_id
from cl_peft.training import Trainer

SHAPE = {
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 40,
    "initializer_range": 0.2,
}
WORDS = {**SHAPE, "vocab_size": 260, "max_position_embeddings": 128, "pad_token_id": 0}
PATCHES = {**SHAPE, "image_size": 16, "patch_size": 8}
DISTIL = {"vocab_size": 260, "dim": 24, "n_layers": 3, "n_heads": 2, "hidden_dim": 40}
KINDS = {
    "bert": (lambda: BertModel(BertConfig(**WORDS)), Encoder),
    "bert, cls": (lambda: BertModel(BertConfig(**WORDS)), lambda f: Encoder(f, pooling="cls")),
    "roberta": (lambda: RobertaModel(RobertaConfig(**WORDS)), lambda f: Encoder(f, max_length=99)),
    "distilbert": (lambda: DistilBertModel(DistilBertConfig(**DISTIL)), Encoder),
    "llama": (lambda: LlamaModel(LlamaConfig(**WORDS)), Decoder),
    "qwen2": (lambda: Qwen2Model(Qwen2Config(**WORDS, num_key_value_heads=2)), Decoder),
    "vit": (lambda: ViTModel(ViTConfig(**PATCHES)), Vision),
    "deit, mean": (lambda: DeiTModel(DeiTConfig(**PATCHES)), lambda f: Vision(f, pooling="mean")),
}
GB = 1e9
WAYS = ("once", "every_step")
UPPER = LoRA(rank=2, layers="upper_half")


@pytest.fixture(params=KINDS)
def case(request, tmp_path):
    """A loaded backbone, and examples of very different lengths."""
    model, kind = KINDS[request.param]
    torch.manual_seed(0)
    model().save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    backbone = kind(str(tmp_path))
    backbone.load(Path("unused"), CPU, 0)
    if backbone.modality == "text":
        return backbone, texts(17)
    rng = np.random.default_rng(0)
    return backbone, [rng.integers(0, 256, (16, 16, 3), dtype=np.uint8) for _ in range(17)]


def upper(method, **options):
    """A tiny world of two layers, whose modules sit in the second."""
    return world_with(options.pop("learner", Isolated()), method, **options)


def gradients(features, bank, module, inputs):
    """Pooled features, and the gradient of every tensor of the module."""
    backbone = features.backbone
    with bank.training(module):
        pooled = backbone(backbone.collate(features.encoded(inputs)))
    for params in module.values():
        for tensor in params.values():
            tensor.grad = None
    some = torch.randn(pooled.shape, generator=torch.Generator().manual_seed(0))
    (pooled * some).sum().backward()
    return pooled.detach(), {
        f"{s}/{n}": t.grad.clone() for s, p in module.items() for n, t in p.items()
    }


def error(found, expected):
    """Of all gradients together, relative."""
    a, b = (torch.cat([g.flatten().double() for g in x.values()]) for x in (found, expected))
    return float((a - b).norm() / b.norm())


def counted(layers):
    """Examples in every batch that these layers really compute, from now on."""
    calls = []
    for layer in layers:
        inner = next(m for m in layer.modules() if isinstance(m, torch.nn.Linear))
        inner.register_forward_hook(lambda *a: calls.append(len(a[-1])))
    return calls


@pytest.mark.parametrize(("precision", "most"), [("float", 1e-5), ("double", 1e-12)])
def test_gradients_equal_those_of_the_whole_way(case, precision, most):
    """In float32 up to rounding; in float64, where rounding is out of the way, much closer."""
    backbone, inputs = case
    features = Features(backbone, None, 5)
    bank = Bank(LoRA(rank=2, layers=[3]), backbone.model, CPU)
    module = {
        s: {n: (t.data / 3).requires_grad_() for n, t in p.items()}
        for s, p in random_module(bank, 0).items()
    }  # so small that rounding stays it is
    if precision == "double":
        backbone.model.double()
        module = {
            s: {n: t.data.double().requires_grad_() for n, t in p.items()}
            for s, p in module.items()
        }
        inputs = [i / 255 for i in inputs] if backbone.modality == "image" else inputs
    trunk = trunk_of(features, bank.sites, inputs, GB, "task 1/1")
    assert len(trunk.layers) == 2
    calls = counted(trunk.layers)
    for some in (inputs[:6], inputs[4:], [inputs[3]], [inputs[8], inputs[8]]):
        pooled, expected = gradients(features, bank, module, some)
        assert calls
        calls.clear()
        with trunk.given(some):
            own, found = gradients(features, bank, module, some)
        assert not calls
        assert error({"pooled": own}, {"pooled": pooled}) <= most
        assert error(found, expected) <= most


def test_what_is_kept_is_the_models_own_and_no_more(case):
    backbone, inputs = case
    features = Features(backbone, None, 5)
    sites = UPPER.sites(backbone.model)
    trunk = trunk_of(features, sites, [*inputs, inputs[0]], GB, "task 1/1")
    seen = []
    trunk.layers[-1].register_forward_hook(lambda *a: seen.append(a[-1]))
    assert set(trunk.kept) == {content_id(item) for item in inputs}
    with torch.no_grad():
        for item in inputs:
            backbone(backbone.collate(features.encoded([item])))
            torch.testing.assert_close(trunk.kept[content_id(item)], seen[-1][0])
    assert trunk.bytes == sum(t.untyped_storage().nbytes() for t in trunk.kept.values())


def test_backward_stops_at_the_lowest_site():
    backbone = tiny(layers=4)
    bank = Bank(UPPER, backbone.model, CPU)
    entering = []
    for layer in backbone.model.encoder.layer:
        layer.register_forward_hook(lambda *a: entering.append(a[-1].requires_grad))
    with bank.training(random_module(bank, 0)):
        backbone(backbone.collate(backbone.encode(texts(3)))).sum().backward()
    assert entering == [False, False, True, True]


def test_examples_that_are_not_known_go_the_whole_way():
    backbone = tiny()
    features = Features(backbone, None, 5)
    bank = Bank(UPPER, backbone.model, CPU)
    module, inputs, others = random_module(bank, 0), texts(6), texts(6, seed=1)
    trunk = trunk_of(features, bank.sites, inputs, GB, "task 1/1")
    mixed = [others[0], *inputs, others[1]]
    sizes = counted(trunk.layers)
    for some, expected_sizes in ((others, [6]), (mixed, [2]), (inputs, [])):
        expected, slope = gradients(features, bank, module, some)
        sizes.clear()
        with trunk.given(some):
            found, own = gradients(features, bank, module, some)
        assert sizes == expected_sizes
        assert error({"pooled": found}, {"pooled": expected}) <= 1e-5
        assert error(own, slope) <= 1e-5
    assert len(trunk.kept) == len(set(inputs))  # they are not added


def test_layers_are_put_back_after_an_error():
    backbone = tiny()
    features, inputs = Features(backbone, None, 5), texts(6)
    bank = Bank(UPPER, backbone.model, CPU)
    trunk = trunk_of(features, bank.sites, inputs, GB, "task 1/1")
    batch = backbone.collate(features.encoded(inputs))
    before = backbone(batch)
    with pytest.raises(RuntimeError, match="stop"), trunk.given(inputs):
        raise RuntimeError("stop")
    assert torch.equal(backbone(batch), before)
    assert not any("forward" in layer.__dict__ for layer in trunk.layers)


def test_it_goes_together_with_checkpointing():
    backbone = tiny(layers=4)
    features, inputs = Features(backbone, None, 5), texts(6)
    bank = Bank(UPPER, backbone.model, CPU)
    module = random_module(bank, 0)
    _, expected = gradients(features, bank, module, inputs)
    trunk = trunk_of(features, bank.sites, inputs, GB, "task 1/1")
    with checkpointed(backbone.model, bank):
        with trunk.given(inputs):
            _, found = gradients(features, bank, module, inputs)
        _, whole = gradients(features, bank, module, inputs)  # the checkpoints are back
    assert error(found, expected) <= 1e-5
    assert error(whole, expected) == 0.0


# ---------------------------------------------------------------------- when nothing is kept


def refusal(caplog, backbone, limit=GB):
    bank = Bank(UPPER, backbone.model, CPU)
    with caplog.at_level(logging.INFO, "cl_peft.backbones.trunk"):
        trunk = trunk_of(Features(backbone, None, 5), bank.sites, texts(9), limit, "task 2/3")
    assert trunk is None
    (record,) = caplog.records
    return record.getMessage()


def test_more_than_the_bound_is_not_kept(caplog):
    backbone = tiny()
    tokens = int(Features(backbone, None, 5).encoded(list(dict.fromkeys(texts(9)))).lengths.sum())
    needed = tokens * backbone.width * 4
    message = refusal(caplog, backbone, needed - 1)
    assert all(words in message for words in ("task 2/3", "in every step", "trainer.trunk_gb"))
    bank = Bank(UPPER, backbone.model, CPU)
    features = Features(backbone, None, 5)
    assert trunk_of(features, bank.sites, texts(9), needed, "task 2/3").bytes == needed


def test_a_model_whose_layers_pass_on_more_is_left_alone(caplog):
    backbone = tiny()
    layers = backbone.model.encoder.layer
    layers[0].register_forward_hook(lambda *a: (a[-1], a[-1].mean()))
    layers[1].register_forward_pre_hook(lambda m, a: (a[0][0], *a[1:]))
    assert "pass on more" in refusal(caplog, backbone)


def test_a_model_that_needs_its_lower_layers_is_left_alone(caplog):
    backbone = tiny(layers=4)
    first, *_, last = backbone.model.encoder.layer
    seen = []
    first.register_forward_hook(lambda *a: seen.append(a[-1]))
    last.register_forward_hook(lambda *a: a[-1] + seen[-1])
    assert "other features" in refusal(caplog, backbone)


def test_nothing_is_kept_where_a_module_is_at_the_input():
    model = tiny().model
    methods = [LoRA(), LoRA(sites=["word_embeddings", "layer.1.*"]), Prompt(), Prefix()]
    for method in methods:
        assert below(model, method.sites(model)) == []
    assert below(model, []) == []
    assert below(model, UPPER.sites(model)) == [model.encoder.layer[0]]


@pytest.mark.parametrize("trainer", [{"trunk": "every_step"}, {"epochs": 1}, {"trunk_gb": 1e-6}])
def test_every_step(monkeypatch, trainer):
    options = {"epochs": 2, "batch_size": 8, "eval_batch_size": 16, **trainer}
    w = upper(UPPER, trainer=Trainer(**options))
    reference = upper(UPPER, trainer=Trainer(**{**options, "trunk": "every_step"}))
    calls = counted([w.backbone.model.encoder.layer[0]])
    full = counted([reference.backbone.model.encoder.layer[0]])
    for world in (w, reference):
        world.learner.learn(world.stream.tasks[0])
    assert same(w.learner.snapshot(), reference.learner.snapshot())
    assert len(calls) - len(full) == ("trunk_gb" in trainer)  # one look at its size


# ---------------------------------------------------------------------- whole trainings


def trained(learner, trunk, **options):
    trainer = Trainer(epochs=3, batch_size=8, eval_batch_size=16, trunk=trunk, **options)
    w = upper(copy.deepcopy(UPPER), learner=learner, trainer=trainer)
    calls = counted([w.backbone.model.encoder.layer[0]])
    steps = []
    for task in w.stream.tasks:
        before = len(calls)
        w.learner.learn(task)
        steps.append(sum(calls[before:]))
    return w, steps


@pytest.mark.parametrize("options", [{}, {"accumulate": 2, "checkpointing": "on"}])
def test_a_training_ends_where_it_would_have(options):
    w, few = trained(Isolated(), "once", **options)
    other, many = trained(Isolated(), "every_step", **options)
    for row in range(3):
        kept, computed = (flatten(v.learner.tools.bank.get(row)) for v in (w, other))
        for name, tensor in computed.items():
            torch.testing.assert_close(kept[name], tensor, atol=1e-4, rtol=1e-3)
    inputs = [text for task in w.stream.tasks for text in task.test.inputs]
    units = np.concatenate([np.full(len(t.test), t.index) for t in w.stream.tasks])
    answers, others = w.learner.logits(inputs, units), other.learner.logits(inputs, units)
    assert torch.equal(answers.argmax(1), others.argmax(1))
    assert all(a < b for a, b in zip(few, many, strict=True))
    assert w.learner._trunk is None  # its memory is given back


@pytest.mark.parametrize("patience", [3, None])
def test_validation_examples_pass_once_however_often_they_are_asked(patience, caplog):
    """With patience every epoch is validated; without, the last one alone, and nothing is kept."""
    caplog.set_level(logging.INFO, logger="cl_peft")
    w, few = trained(Isolated(), "once", patience=patience)
    other, many = trained(Isolated(), "every_step", patience=patience)
    times = 1 if patience is None else 4
    for task, kept, computed in zip(w.stream.tasks, few, many, strict=True):
        train, validation = (len(set(s.inputs)) for s in (task.train, task.validation))
        looks = 2 * 4 * (1 if patience is None else 2)  # four examples, twice, of each split kept
        assert train + validation <= kept <= train + validation + looks
        assert computed == 3 * len(task.train) + times * len(task.validation)
    assert w.learner.report.validation == other.learner.report.validation
    assert not any("validation" in record.getMessage() for record in caplog.records)


def room_for_training(w, task):
    """Bytes that the task's training examples take, and no more."""
    distinct = list(dict.fromkeys(task.train.inputs))
    return int(w.learner.tools.features.encoded(distinct).lengths.sum()) * w.backbone.width * 4


def test_validation_examples_that_find_no_room_go_the_whole_way(caplog):
    caplog.set_level(logging.INFO, logger="cl_peft")
    options = {"epochs": 2, "patience": 2, "batch_size": 8, "eval_batch_size": 16}
    w, reference = (upper(UPPER, trainer=Trainer(**options, trunk=t)) for t in WAYS)
    task = w.stream.tasks[0]
    room = room_for_training(w, task)
    w.learner.tools.trainer.trunk_gb = (room + 1) / GB
    assert w.learner._trunk_of(task.train, task.validation, "task 1/3").bytes == room
    (said,) = [m for m in map(logging.LogRecord.getMessage, caplog.records) if "validation" in m]
    assert "task 1/3" in said
    assert "trainer.trunk_gb" in said
    for world in (w, reference):
        world.learner.learn(task)
    assert w.learner.report.validation == reference.learner.report.validation


def test_validation_examples_that_are_known_take_no_room(caplog):
    caplog.set_level(logging.INFO, logger="cl_peft")
    w = upper(UPPER, trainer=Trainer(epochs=2, patience=2, batch_size=8, eval_batch_size=16))
    task = w.stream.tasks[0]
    room = room_for_training(w, task)
    w.learner.tools.trainer.trunk_gb = (room + 1) / GB
    assert w.learner._trunk_of(task.train, task.train, "task 1/3").bytes == room
    assert not any("validation" in record.getMessage() for record in caplog.records)


def test_validation_examples_are_kept_as_evaluations_compute_them():
    """In float32, though training computes in bfloat16."""
    options = {"epochs": 2, "patience": 2, "precision": "bf16"}
    w = upper(UPPER, trainer=Trainer(**options))
    task = w.stream.tasks[0]
    kept = w.learner._trunk_of(task.train, task.validation, "task 1/3").kept
    whole = Trunk(w.learner.tools.features, below(w.backbone.model, w.learner.tools.bank.sites))
    assert whole.fill(task.validation.inputs, GB) is None
    known = {content_id(text) for text in task.train.inputs}
    assert set(whole.kept) - known
    for name in set(whole.kept) - known:
        assert torch.equal(kept[name], whole.kept[name])


def test_what_is_refused_leaves_nothing_behind(monkeypatch):
    w = upper(UPPER)
    task = w.stream.tasks[0]
    trunk = Trunk(w.learner.tools.features, below(w.backbone.model, w.learner.tools.bank.sites))
    monkeypatch.setattr(trunks, "AGREES", -1.0)
    assert "other features" in trunk.fill(task.train.inputs, GB)
    assert not trunk.kept


def test_replayed_examples_are_right():
    w, few = trained(Replay(size=15), "once")
    other, many = trained(Replay(size=15), "every_step")
    kept, computed = (flatten(v.learner.tools.bank.get(0)) for v in (w, other))
    for name, tensor in computed.items():
        torch.testing.assert_close(kept[name], tensor, atol=1e-3, rtol=1e-2)
    assert few[1] < many[1]


def test_replay_sends_what_it_remembers_the_whole_way():
    """New examples from what is kept, old ones through all layers: the loss is the same."""
    w = upper(UPPER, learner=Replay(size=30))
    learner, (first, second, _) = w.learner, w.stream.tasks
    learner.learn(first)
    learner._tasks[1] = second
    head = learner.units[0].head.widen(second.classes, torch.Generator().manual_seed(0))
    fit = fit_of(learner, second, random_module(learner.tools.bank, 1), head)
    layer = w.backbone.model.encoder.layer[0]

    def loss():
        learner._filling, learner._random = learner.buffer.copy(), np.random.default_rng(3)
        calls = counted([layer])
        return learner._loss(fit, np.arange(8)), sum(calls)

    expected, whole = loss()
    learner._trunk = learner._trunk_of(second.train, second.validation, "task 2/3")
    assert learner._trunk is not None
    found, partly = loss()
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert (whole, partly) == (16, 8)


@pytest.mark.parametrize("learner", [Isolated, lambda: Replay(size=15)])
def test_a_resumed_run_ends_with_the_same_bits(monkeypatch, learner):
    used = []
    given = trunks.Trunk.given
    monkeypatch.setattr(trunks.Trunk, "given", lambda *a: (used.append(1), given(*a))[1])
    check_resume(learner, stream_of(), method=lambda: LoRA(rank=2, layers="upper_half"))
    assert used


def test_a_head_alone_needs_no_trunk(caplog):
    w = upper(UPPER, learner=SeqStar())
    with caplog.at_level(logging.INFO, "cl_peft.backbones.trunk"):
        for task in w.stream.tasks:
            w.learner.learn(task)
    assert [r.getMessage()[:8] for r in caplog.records] == ["task 1/3"]  # its warm-up


# ---------------------------------------------------------------------- module.layers

METHODS = {
    "lora": LoRA,
    "dora": DoRA,
    "full": Full,
    "vera": lambda **o: VeRA(rank=4, **o),
    "ia3": IA3,
    "bitfit": BitFit,
    "adapter": Adapter,
    "parallel": lambda **o: Adapter(placement="parallel", **o),
}


@pytest.mark.parametrize("name", METHODS)
def test_layers_of_every_method(name):
    model = tiny(layers=5).model
    every = METHODS[name]().sites(model)
    for layers, expected in [
        (None, {0, 1, 2, 3, 4}),
        ("upper_half", {2, 3, 4}),
        ("upper_third", {3, 4}),
        ([1, 5], {0, 4}),
    ]:
        sites = METHODS[name](layers=layers).sites(model)
        assert [s.name for s in sites] == [s.name for s in every if layer_of(s.name)[1] in expected]
        assert {layer_of(s.name)[1] for s in sites} == expected


def test_layers_restrict_only_what_lies_in_layers():
    model = tiny(layers=4).model
    sites = LoRA(sites=["word_embeddings", "query"], layers=[4]).sites(model)
    assert [s.name for s in sites] == [
        "embeddings.word_embeddings",
        "encoder.layer.3.attention.self.query",
    ]
    with_pooler = BertModel(BertConfig(**WORDS))
    sites = LoRA(sites=["pooler.dense", "key"], layers=[3]).sites(with_pooler)
    assert [s.name for s in sites] == ["encoder.layer.2.attention.self.key", "pooler.dense"]
    assert below(with_pooler, sites) == []  # nothing is said of what lies in no layer


@pytest.mark.parametrize(
    ("layers", "words"),
    [([5], "layers 1 to 4, not 5"), ([4, 9, 0], "not 9, 0"), ([], "not none at all")],
)
@pytest.mark.parametrize("method", [LoRA, IA3, BitFit])
def test_layers_that_do_not_exist(method, layers, words):
    with pytest.raises(ConfigError, match=rf"module\.layers: .*{words}"):
        method(layers=layers).sites(tiny(layers=4).model)


def test_patterns_that_match_nothing_in_these_layers():
    with pytest.raises(ConfigError, match=r"'layer\.0\.\*' matches nothing in module\.layers"):
        LoRA(sites=["layer.0.*"], layers="upper_half").sites(tiny().model)
