"""A module trained here works in real peft, and the other way round."""

import copy
import json
import os
from pathlib import Path

import pytest
import torch
import yaml
from core_fixtures import CPU, random_module
from peft import LoraConfig, PeftModel, get_peft_model
from running import ROOT
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForSequenceClassification
from virtual_cases import TEXTS, WORDS, B, L, hidden, make, own

from cl_peft.config import build
from cl_peft.errors import ConfigError, DamagedRunError, DataError
from cl_peft.modules.bank import Bank, Route, flatten
from cl_peft.modules.dora import DoRA
from cl_peft.modules.head import Head
from cl_peft.modules.huggingface import (
    export,
    head_of,
    import_adapter,
    read_module,
    same_kind,
    write_module,
)
from cl_peft.modules.ia3 import IA3
from cl_peft.modules.lora import LoRA
from cl_peft.modules.prefix import Prefix
from cl_peft.modules.prompt import Prompt

METHODS = {
    "lora": lambda: LoRA(rank=3, alpha=7.0),
    "dora": lambda: DoRA(rank=3, alpha=7.0),
    "rslora": lambda: LoRA(
        rank=3, alpha=2.0, scaling="sqrt_r", rank_pattern={"*dense": 5}, alpha_pattern={"*key": 3.0}
    ),
    "embedding": lambda: LoRA(rank=3, sites=["word_embeddings", "query"]),
}
CASES = [("lora", "bert"), ("lora", "llama"), ("dora", "bert"), ("dora", "llama")]
CASES += [("rslora", "bert"), ("embedding", "bert")]


@pytest.fixture(params=CASES, ids=["-".join(c) for c in CASES])
def exported(request, tmp_path):
    name, kind = request.param
    model, batch = make(kind)
    bank = Bank(METHODS[name](), model, CPU)
    row = bank.add(random_module(bank, 3))
    with bank.use(Route.to(row, 6)):
        ours = hidden(model, batch)
    export(bank, row, tmp_path / "adapter", base_model="tiny")
    bank.close()
    return model, batch, ours, tmp_path / "adapter"


def test_real_peft_computes_the_same(exported):
    model, batch, ours, folder = exported
    theirs = PeftModel.from_pretrained(model, folder).eval()
    torch.testing.assert_close(hidden(theirs, batch), ours, atol=1e-5, rtol=1e-5)
    # peft ignores what it does not find: every tensor of ours must be one of its own
    loaded = {n.replace(".default", "") for n in theirs.state_dict() if "lora" in n}
    names = {
        n.replace("lora_magnitude_vector", "lora_magnitude_vector.weight")
        for n in load_file(folder / "adapter_model.safetensors")
    }
    assert names == loaded


def test_it_comes_back(exported):
    model, batch, ours, folder = exported
    bank, module, _ = import_adapter(folder, model)
    with bank.use(module):
        torch.testing.assert_close(hidden(model, batch), ours, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("method", [Prompt(tokens=3), Prefix(tokens=3, hidden=7)])
@pytest.mark.parametrize("kind", TEXTS)
def test_virtual_tokens_are_prompt_learning_checkpoints(kind, method, tmp_path):
    model, batch = make(kind)
    bank = Bank(method, model, CPU)
    row = bank.add(bank.fresh(torch.Generator().manual_seed(1)))
    with bank.use(Route.to(row, B)):
        ours = hidden(model, batch)
    bank.close()
    export(bank, row, tmp_path, base_model="tiny")
    assert set(load_file(tmp_path / "adapter_model.safetensors")) == {"prompt_embeddings"}
    theirs = PeftModel.from_pretrained(model, tmp_path).eval()
    batch.pop("use_cache", None)
    # behind a prompt stand the text's own tokens; a prefix has no states
    states = own(batch, theirs(**batch).last_hidden_state[:, -L:])
    torch.testing.assert_close(states, ours, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["bert", "llama"])
@pytest.mark.parametrize("dora", [False, True])
def test_an_adapter_of_peft_comes_in(kind, dora, tmp_path):
    model, batch = make(kind)
    config = LoraConfig(
        r=4,
        lora_alpha=6,
        use_dora=dora,
        target_modules=["query", "value", "q_proj", "down_proj"],
        rank_pattern={"value": 2, "down_proj": 2},
        alpha_pattern={"query": 3},
    )
    theirs = get_peft_model(copy.deepcopy(model), config).eval()
    with torch.no_grad():
        for name, tensor in theirs.named_parameters():
            if "lora" in name:
                tensor.add_(0.2 * torch.randn_like(tensor))
    theirs.save_pretrained(tmp_path)
    bank, module, _ = import_adapter(tmp_path, model)
    with bank.use(module):
        ours = hidden(model, batch)
    torch.testing.assert_close(ours, hidden(theirs, batch), atol=1e-5, rtol=1e-5)


def test_wrong_tensors_are_named(exported, tmp_path):
    model, _, _, folder = exported
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    key = next(n for n in tensors if n.endswith(("lora_B.weight", "lora_embedding_B")))
    site = key.removeprefix("base_model.model.").rsplit(".lora", 1)[0]
    for change, match in (
        ({key: None}, f"missing {site}/B"),
        ({key: tensors[key][:-1].clone()}, f"{site}/B has shape"),
        ({"base_model.model.nowhere.lora_A.weight": torch.zeros(3, 3)}, "no layer nowhere"),
        ({"base_model.model.x.strange": torch.zeros(1)}, "unknown tensor"),
        (dict.fromkeys([n for n in tensors if f".{site}." in n]), f"missing {site}, which target"),
    ):
        wrong = {n: t for n, t in {**tensors, **change}.items() if t is not None}
        save_file(wrong, path)
        with pytest.raises(DamagedRunError, match=match):
            import_adapter(folder, model)


def test_what_cannot_be_read(exported, tmp_path):
    model, _, _, folder = exported
    with pytest.raises(DataError, match="is missing"):
        import_adapter(tmp_path / "nowhere", model)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "peft_type": "IA3"}))
    with pytest.raises(ConfigError, match="IA3"):
        import_adapter(folder, model)


def test_a_method_that_peft_lacks_is_refused(tmp_path):
    model, _ = make("bert")
    bank = Bank(IA3(), model, CPU)
    bank.add(bank.fresh(torch.Generator()))
    with pytest.raises(ConfigError, match="no equivalent"):
        export(bank, 0, tmp_path / "x", base_model="tiny")
    assert not (tmp_path / "x").exists()


def test_the_head_lies_beside(tmp_path):
    model, _ = make("bert")
    bank = Bank(LoRA(rank=2), model, CPU)
    row = bank.add(random_module(bank, 1))
    head = Head.fresh((4, 7), 24, torch.Generator().manual_seed(0), CPU).frozen()
    names = {4: "four", 7: "seven", 9: "nine"}
    export(bank, row, tmp_path, base_model="tiny", head=head, class_names=names)
    back, classes = head_of(tmp_path, CPU)
    assert classes == {4: "four", 7: "seven"}
    assert torch.equal(back.weight, head.weight)
    assert back.classes == (4, 7)


# ------------------------------------------------------------------ adapters made by peft


@pytest.fixture
def from_peft(tmp_path):
    """A function that saves a random peft adapter of a model, which it changes; returns it."""

    def save(model, **options):
        config = LoraConfig(**{"r": 4, "target_modules": ["query"], **options})
        theirs = get_peft_model(model, config)
        with torch.no_grad():
            for name, tensor in theirs.named_parameters():
                if "lora" in name:
                    tensor.add_(0.2 * torch.randn_like(tensor))
        theirs.save_pretrained(tmp_path)
        return theirs.eval()

    return save


def change(folder, **options):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **options}))


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": "all-linear"},
        {"target_modules": r".*layer\.1\..*(query|dense)"},
        {"target_modules": ["query", "key"], "layers_to_transform": [1]},
        {"target_modules": ["query", "dense"], "exclude_modules": ["intermediate.dense"]},
        {"use_rslora": True, "lora_alpha": 3, "rank_pattern": {r"layer\.0\..*query": 2}},
        {"init_lora_weights": "gaussian", "alpha_pattern": {"1.attention.self.query": 5}},
        {"target_modules": ["word_embeddings"]},
    ],
    ids=lambda options: "-".join(options),
)
def test_what_peft_calls_targets(options, from_peft, tmp_path):
    model, batch = make("bert")
    theirs = hidden(from_peft(copy.deepcopy(model), **options), batch)
    bank, module, _ = import_adapter(tmp_path, model)
    with bank.use(module):
        torch.testing.assert_close(hidden(model, batch), theirs, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(hidden(model, batch), theirs, atol=1e-3)


def test_ranks_that_differ_from_the_configuration_are_named(from_peft, tmp_path):
    model, _ = make("bert")
    from_peft(copy.deepcopy(model))
    change(tmp_path, r=8)
    with pytest.raises(DamagedRunError, match=r"query/A has shape \(4, 24\), expected \(8, 24\)"):
        import_adapter(tmp_path, model)
    assert not any(m._forward_hooks for m in model.modules())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"init_lora_weights": "pissa"}, "starts by 'pissa', which changes the backbone"),
        ({"lora_bias": True}, "lora_bias is set"),
        ({"layer_replication": [[0, 1]]}, "layer_replication is set"),
    ],
)
def test_what_computes_something_else_is_refused(options, words, from_peft, tmp_path):
    model, _ = make("bert")
    from_peft(copy.deepcopy(model))
    change(tmp_path, **options)
    with pytest.raises(ConfigError, match=words):
        import_adapter(tmp_path, model)


def test_an_adapter_with_a_head_comes_in_without_it(from_peft, tmp_path):
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(**WORDS)).eval()
    _, batch = make("bert")
    bare = copy.deepcopy(model.bert)
    theirs = from_peft(model, task_type="SEQ_CLS")
    with pytest.raises(ConfigError, match="trained together with classifier, score"):
        import_adapter(tmp_path, bare)
    bank, module, _ = import_adapter(tmp_path, bare, without_head=True)
    assert len(bank.sites) == 2
    with bank.use(module):
        ours = hidden(bare, batch)
    inside = theirs.base_model.model.bert
    torch.testing.assert_close(ours, hidden(inside, batch), atol=1e-5, rtol=1e-5)


def test_an_imported_module_is_kept_in_one_file(exported, tmp_path):
    model, batch, ours, folder = exported
    bank, module, node = import_adapter(folder, model)
    bank.close()
    write_module(tmp_path / "m.safetensors", node, module)
    back, again = read_module(tmp_path / "m.safetensors", model)
    assert same_kind(back, bank)
    assert all(torch.equal(flatten(again)[n], t) for n, t in flatten(module).items())
    with back.use(Route.to(back.add(again), B)):
        torch.testing.assert_close(hidden(model, batch), ours, atol=1e-5, rtol=1e-5)
    with pytest.raises(DataError, match="is no module written by"):
        read_module(folder / "adapter_model.safetensors", model)


def test_banks_of_the_same_kind():
    model, _ = make("bert")

    def kind(method):
        return Bank(method, model, CPU)

    one = kind(LoRA(rank=4, alpha=8.0))
    assert same_kind(one, kind(LoRA(rank=2, alpha=8.0, rank_pattern={"*": 4}, dropout=0.5)))
    for other in (
        LoRA(rank=4, alpha=9.0),
        LoRA(rank=4, alpha=8.0, scaling="sqrt_r"),
        LoRA(rank=4, alpha=8.0, sites=["query"]),
        LoRA(rank=4, alpha=8.0, rank_pattern={"query": 5}),
        DoRA(rank=4, alpha=8.0),
        IA3(),
    ):
        assert not same_kind(one, kind(other))
    assert not same_kind(kind(IA3()), kind(IA3()))


# ------------------------------------------------------------------ a real backbone


@pytest.mark.network
@pytest.mark.parametrize("kind", [LoRA, DoRA])
@torch.no_grad()
def test_minilm_both_ways(kind, tmp_path):
    cache = Path(os.environ.get("CL_PEFT_CACHE", tmp_path / "cache"))
    backbone = build(yaml.safe_load((ROOT / "conf" / "backbone" / "minilm.yaml").read_text()))
    backbone.load(cache, CPU, 0)
    batch = backbone.collate(backbone.encode(["a text", "another text, a longer one"]))
    bank = Bank(kind(rank=8), backbone.model, CPU)
    module = bank.fresh(torch.Generator().manual_seed(0))
    for params in module.values():
        params["B"].data.normal_(std=0.02)
        if "m" in params:
            params["m"].data *= 1.1
    row = bank.add(module)
    head = Head.fresh((0, 1, 2), 384, torch.Generator().manual_seed(1), CPU).frozen()
    with bank.use(Route.to(row, 2)):
        ours = head(backbone(batch))
    assert not torch.allclose(ours, head(backbone(batch)), atol=1e-2)
    bank.close()
    export(bank, row, tmp_path / "ours", base_model=backbone.name)
    model = copy.deepcopy(backbone.model)
    theirs = PeftModel.from_pretrained(model, tmp_path / "ours").eval()
    mask = batch["attention_mask"].unsqueeze(-1)
    states = theirs(**batch).last_hidden_state
    logits = head((states * mask).sum(1) / mask.sum(1))
    torch.testing.assert_close(logits, ours, atol=1e-5, rtol=0)
    theirs.save_pretrained(tmp_path / "theirs")
    back, again, _ = import_adapter(tmp_path / "theirs", backbone.model)
    with back.use(again):
        torch.testing.assert_close(head(backbone(batch)), ours, atol=1e-5, rtol=0)
