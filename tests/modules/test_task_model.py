"""A head goes inside an adapter only where transformers' classification model computes the same."""

import copy
import json

import numpy as np
import pytest
import torch
from core_fixtures import CPU, random_module, texts
from peft import PeftModel
from transformers import (
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaModel,
    RobertaConfig,
    RobertaModel,
    ViTConfig,
    ViTModel,
)
from virtual_cases import PIXELS, SHAPE

from cl_peft.backbones.decoder import Decoder
from cl_peft.backbones.encoder import Encoder
from cl_peft.backbones.tiny import byte_tokenizer
from cl_peft.backbones.vision import Vision
from cl_peft.errors import ConfigError
from cl_peft.modules.bank import Bank, Route
from cl_peft.modules.dora import DoRA
from cl_peft.modules.head import Head
from cl_peft.modules.huggingface import export
from cl_peft.modules.lora import LoRA
from cl_peft.modules.prefix import Prefix
from cl_peft.modules.task_model import head_place

WORDS = {**SHAPE, "vocab_size": 260, "pad_token_id": 0}
MODELS = {
    "bert": lambda: BertModel(BertConfig(**WORDS)),
    "roberta": lambda: RobertaModel(RobertaConfig(**WORDS), False),
    "llama": lambda: LlamaModel(LlamaConfig(**WORDS, num_key_value_heads=2)),
    "vit": lambda: ViTModel(ViTConfig(**PIXELS), False),
}
BACKBONES = {"bert": Encoder, "roberta": Encoder, "llama": Decoder, "vit": Vision}


def backbone_of(kind, tmp_path, **options):
    torch.manual_seed(0)
    MODELS[kind]().save_pretrained(tmp_path / kind)
    if kind != "vit":
        byte_tokenizer().save_pretrained(tmp_path / kind)
    backbone = BACKBONES[kind](str(tmp_path / kind), **options)
    backbone.load(tmp_path, CPU, 0)
    return backbone


def head_of_three(bias):
    random = torch.Generator().manual_seed(5)
    weight = torch.randn(3, SHAPE["hidden_size"], generator=random)
    return Head(weight, torch.tensor([0.5, -1.0, 0.25]) * bias, (2, 4, 9))


def inputs_for(backbone):
    if backbone.modality == "text":
        return [*texts(5, seed=2), "x"]
    return list(np.random.default_rng(1).integers(0, 256, (6, 20, 20), dtype=np.uint8))


@pytest.mark.parametrize("method", [LoRA(rank=3), DoRA(rank=3)], ids=["lora", "dora"])
@pytest.mark.parametrize(("kind", "bias"), [("vit", 1), ("llama", 0)])
@torch.no_grad()
def test_real_peft_gives_our_logits(kind, bias, method, tmp_path):
    backbone, head = backbone_of(kind, tmp_path), head_of_three(bias)
    batch = backbone.collate(backbone.encode(inputs_for(backbone)))
    bank = Bank(method, backbone.model, CPU)
    row = bank.add(random_module(bank, 1))
    place = head_place(backbone, head)
    with bank.use(Route.to(row, 6)):
        ours = head(backbone(batch))
    assert not torch.allclose(ours, head(backbone(batch)), atol=1e-2)
    bank.close()
    export(bank, row, tmp_path / "out", base_model="tiny", head=head, place=place)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["modules_to_save"] == [place.layer]
    kinds = {"vit": AutoModelForImageClassification, "llama": AutoModelForSequenceClassification}
    model = kinds[kind].from_pretrained(tmp_path / kind, num_labels=3)
    assert type(model).__name__ == place.model_class
    theirs = PeftModel.from_pretrained(model, tmp_path / "out").eval()
    torch.testing.assert_close(theirs(**batch).logits, ours, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("kind", "options", "bias", "why"),
    [
        ("llama", {}, 1, "layer 'score' has no bias, and this head's is up to 1"),
        ("bert", {}, 1, "a linear layer on backbone.pooling=mean"),
        ("bert", {"pooling": "cls"}, 1, "a linear layer on backbone.pooling=cls"),
        ("roberta", {"pooling": "cls"}, 1, "its head is classifier, not one linear layer"),
        ("vit", {"pooling": "mean"}, 1, "a linear layer on backbone.pooling=mean"),
    ],
)
def test_where_it_computes_something_else_it_is_refused(kind, options, bias, why, tmp_path):
    backbone = backbone_of(kind, tmp_path, **options)
    with pytest.raises(ConfigError, match=why):
        head_place(backbone, head_of_three(bias))


def test_the_backbone_is_left_as_it_was(tmp_path):
    backbone = backbone_of("vit", tmp_path)
    config = copy.deepcopy(backbone.model.config.to_dict())
    head_place(backbone, head_of_three(1))
    assert backbone.weights_fingerprint() == backbone.fingerprint
    assert backbone.model.config.to_dict() == config
    assert not backbone.model.training


def test_a_prefix_carries_no_head(tmp_path):
    backbone, head = backbone_of("llama", tmp_path), head_of_three(0)
    place = head_place(backbone, head)
    bank = Bank(Prefix(tokens=2), backbone.model, CPU)
    row = bank.add(bank.fresh(torch.Generator()))
    with pytest.raises(ConfigError, match="cannot carry a head"):
        export(bank, row, tmp_path / "out", base_model="tiny", head=head, place=place)
    assert not (tmp_path / "out").exists()
