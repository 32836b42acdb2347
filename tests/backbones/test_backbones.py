import json
from pathlib import Path

import numpy as np
import pytest
import torch
from core_fixtures import CPU, texts, tiny
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertModel,
    DeiTConfig,
    DeiTModel,
    GPT2Config,
    GPT2Model,
    LlamaConfig,
    LlamaModel,
    RobertaConfig,
    RobertaModel,
    ViTConfig,
    ViTModel,
)

from cl_peft.backbones.base import Encoded
from cl_peft.backbones.decoder import Decoder
from cl_peft.backbones.encoder import Encoder
from cl_peft.backbones.tiny import byte_tokenizer
from cl_peft.backbones.vision import Vision
from cl_peft.batching import by_length
from cl_peft.errors import ConfigError, DataError, DownloadError

SHAPE = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 40,
    "initializer_range": 0.2,
}
WORDS = {**SHAPE, "vocab_size": 260, "max_position_embeddings": 128, "pad_token_id": 0}
PATCHES = {**SHAPE, "image_size": 16, "patch_size": 8}


def save(folder: Path, model, tokenizer=True) -> str:
    model.save_pretrained(folder)
    if tokenizer:
        byte_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("models")
    gpt2 = GPT2Config(
        vocab_size=260, n_embd=24, n_layer=2, n_head=2, n_positions=128, initializer_range=0.2
    )
    return {
        "bert": save(root / "bert", BertModel(BertConfig(**WORDS))),
        "llama": save(root / "llama", LlamaModel(LlamaConfig(**WORDS))),
        "gpt2": save(root / "gpt2", GPT2Model(gpt2)),
        "vit": save(root / "vit", ViTModel(ViTConfig(**PATCHES)), tokenizer=False),
        "deit": save(root / "deit", DeiTModel(DeiTConfig(**PATCHES)), tokenizer=False),
    }


def load(backbone, tmp_path="unused"):
    backbone.load(Path(tmp_path), CPU, 0)
    return backbone


def images(count):
    rng = np.random.default_rng(0)
    shapes = [(16, 16, 3), (20, 11, 3), (9, 30), (40, 40, 3)]
    return [rng.integers(0, 256, shapes[i % 4], dtype=np.uint8) for i in range(count)]


def naive_text(backbone, text, pool):
    """One example, no padding, no mask, no batching."""
    ids = backbone.tokenizer(text)["input_ids"][: backbone.max_length]
    if len(backbone.tokenizer(text)["input_ids"]) > backbone.max_length:
        ids = backbone.tokenizer(text, truncation=True, max_length=backbone.max_length)["input_ids"]
    hidden = backbone.model(input_ids=torch.tensor([ids])).last_hidden_state[0]
    return pool(hidden)


CASES = {
    "mean": (lambda f: Encoder(f["bert"], max_length=40), lambda h: h.mean(0)),
    "cls": (lambda f: Encoder(f["bert"], pooling="cls", max_length=40), lambda h: h[0]),
    "llama": (lambda f: Decoder(f["llama"], max_length=40), lambda h: h[-1]),
    "gpt2": (lambda f: Decoder(f["gpt2"], max_length=40), lambda h: h[-1]),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("batch_size", [1, 7, 64])
@torch.no_grad()
def test_text_features_equal_naive_ones_in_any_batch(folders, name, batch_size):
    make, pool = CASES[name]
    backbone = load(make(folders))
    inputs = [*texts(20, seed=1), "", "x" * 100]
    expected = torch.stack([naive_text(backbone, text, pool) for text in inputs])
    for seed in (0, 1):
        shuffled = np.random.default_rng(seed).permutation(len(inputs))
        encoded = backbone.encode([inputs[i] for i in shuffled])
        assert encoded.lengths.max() == 40
        out = torch.zeros_like(expected)
        for rows in by_length(encoded.lengths, batch_size):
            out[shuffled[rows]] = backbone(backbone.collate(encoded.take(rows)))
        torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    assert backbone.width == 24


def pixels(image):
    """Resize, scale, normalise, as PIL would."""
    from PIL import Image

    image = image if image.ndim == 3 else np.repeat(image[..., None], 3, axis=2)
    small = np.asarray(Image.fromarray(image).resize((16, 16), Image.Resampling.BILINEAR))
    return (torch.tensor(small).permute(2, 0, 1).float() / 255 - 0.5) / 0.5


@pytest.mark.parametrize(
    ("folder", "pooling", "first"), [("vit", "cls", None), ("vit", "mean", 1), ("deit", "mean", 2)]
)
@torch.no_grad()
def test_image_features_equal_naive_ones_in_any_batch(folders, folder, pooling, first):
    backbone = load(Vision(folders[folder], pooling=pooling))
    inputs = images(9)
    encoded = backbone.encode(inputs)
    for image, ours in zip(inputs, encoded.values, strict=True):
        assert (ours - pixels(image)).abs().max() < 2 / 255 * 2  # PIL rounds to whole numbers
    expected = []
    for row in range(9):
        hidden = backbone.model(pixel_values=encoded.values[row : row + 1]).last_hidden_state[0]
        expected.append(hidden[0] if first is None else hidden[first:].mean(0))
    for size in (1, 4, 9):
        parts = [
            backbone(backbone.collate(encoded.take(np.arange(i, min(9, i + size)))))
            for i in range(0, 9, size)
        ]
        torch.testing.assert_close(torch.cat(parts), torch.stack(expected), atol=1e-5, rtol=1e-5)


def test_an_image_of_another_shape_is_refused(folders):
    with pytest.raises(DataError, match=r"\(4, 4, 2\).*expected"):
        load(Vision(folders["vit"])).encode([np.zeros((4, 4, 2), np.uint8)])
    assert load(Vision(folders["vit"])).encode([]).values.shape == (0, 3, 16, 16)


def test_loading_freezes_and_gives_the_stored_weights(folders):
    backbone = load(Encoder(folders["bert"]))
    stored = load_file(Path(folders["bert"]) / "model.safetensors")
    ours = dict(backbone.model.named_parameters())
    assert all(torch.equal(ours[name], tensor) for name, tensor in stored.items())
    assert not any(p.requires_grad for p in ours.values())
    assert not backbone.model.training


def test_half_precision_weights_are_computed_in_float32(folders, tmp_path):
    model = BertModel(BertConfig(**WORDS)).to(torch.bfloat16)
    backbone = load(Encoder(save(tmp_path / "half", model)))
    assert {p.dtype for p in backbone.model.parameters()} == {torch.float32}


def test_the_fingerprint_sees_one_weight(folders):
    backbone = load(Encoder(folders["bert"]))
    before, key = backbone.fingerprint, backbone.key()
    assert load(Encoder(folders["bert"])).fingerprint == before
    with torch.no_grad():
        backbone.model.encoder.layer[1].output.dense.weight[3, 4] += 1e-6
    assert backbone.weights_fingerprint() != before
    assert backbone.fingerprint == before  # as loaded: what is compared when a run ends
    assert backbone.key() == key


def test_the_key_names_all_that_a_feature_depends_on(folders, tmp_path):
    base = load(Encoder(folders["bert"]))
    key = base.key()
    base.encode(texts(3))
    assert base.key() == key == load(Encoder(folders["bert"])).key()
    moved = tmp_path / "moved"
    moved.mkdir()
    for path in Path(folders["bert"]).iterdir():
        (moved / path.name).write_bytes(path.read_bytes())
    assert load(Encoder(str(moved))).key() == key  # content, not place
    others = [Encoder(str(moved), pooling="cls"), Encoder(str(moved), max_length=31)]
    keys = {key, *(load(b).key() for b in others)}
    config = json.loads((moved / "config.json").read_text())
    for change in ({"num_attention_heads": 4}, {"hidden_act": "relu"}):
        (moved / "config.json").write_text(json.dumps({**config, **change}))
        keys.add(load(Encoder(str(moved))).key())
    (moved / "config.json").write_text(json.dumps(config))
    tokenizer = (moved / "tokenizer.json").read_text()
    swapped = tokenizer.replace('"a": ', '"?": ', 1).replace('"b": ', '"a": ', 1)
    (moved / "tokenizer.json").write_text(swapped.replace('"?": ', '"b": ', 1))
    keys.add(load(Encoder(str(moved))).key())
    assert len(keys) == 6


def test_a_checkpoint_without_pooler_gives_the_same_fingerprint_each_time(tmp_path):
    torch.manual_seed(0)
    name = save(tmp_path / "mlm", BertForMaskedLM(BertConfig(**WORDS)))
    first = load(Encoder(name)).fingerprint
    torch.manual_seed(99)  # the pooler that is missing is drawn anew
    assert load(Encoder(name)).fingerprint == first
    state = torch.get_rng_state()
    load(Encoder(name))
    assert torch.equal(torch.get_rng_state(), state)


def damaged(folders, tmp_path, kind):
    folder = tmp_path / "model"
    folder.mkdir()
    for path in Path(folders["bert"]).iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    weights = folder / "model.safetensors"
    if kind == "truncated":
        weights.write_bytes(weights.read_bytes()[:-1000])
    elif kind == "no weights":
        weights.unlink()
    elif kind == "no config":
        (folder / "config.json").unlink()
    elif kind == "a weight is missing":
        tensors = load_file(weights)
        del tensors["encoder.layer.1.output.dense.weight"]
        save_file(tensors, weights, {"format": "pt"})
    elif kind == "another shape":
        tensors = load_file(weights)
        tensors["encoder.layer.1.output.dense.weight"] = torch.zeros(3, 3)
        save_file(tensors, weights, {"format": "pt"})
    return str(folder)


@pytest.mark.parametrize(
    "kind", ["truncated", "no weights", "no config", "a weight is missing", "another shape"]
)
def test_a_damaged_model_is_never_used(folders, tmp_path, kind):
    name = damaged(folders, tmp_path, kind)
    with pytest.raises(DownloadError) as error:
        load(Encoder(name))
    text = str(error.value)
    assert f"backbone.name={name}: could not be loaded" in text
    assert "local folder that holds config.json" in text
    if kind == "a weight is missing":
        assert "lacks 1 weights: encoder.layer.1.output.dense.weight" in text


def test_a_name_that_is_nowhere_is_said_in_words(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DownloadError, match=r"backbone\.name=no/such-model: could not be loaded"):
        load(Encoder("no/such-model"), tmp_path)


def test_more_tokens_than_positions_are_refused(folders, tmp_path):
    for name, kind in (("bert", Encoder), ("llama", Decoder), ("gpt2", Decoder)):
        load(kind(folders[name], max_length=128))
        with pytest.raises(ConfigError, match=r"max_length=129: .* has 128 positions.*=128"):
            load(kind(folders[name], max_length=129))
    roberta = RobertaModel(RobertaConfig(**{**WORDS, "pad_token_id": 1}))
    name = save(tmp_path / "roberta", roberta)  # two of its 128 positions are not for tokens
    with pytest.raises(ConfigError, match=r"max_length=127: .* has 126 positions"):
        load(Encoder(name, max_length=127))
    longest = load(Encoder(name, max_length=126))
    assert longest(longest.collate(longest.encode(["x" * 200]))).isfinite().all()


def test_empty_texts_have_a_feature(folders):
    for kind, name in ((Encoder, "bert"), (Decoder, "llama")):
        backbone = load(kind(folders[name]))
        backbone.tokenizer.backend_tokenizer.post_processor = None  # no special tokens either
        encoded = backbone.encode(["", "abc", ""])
        assert encoded.lengths.tolist() == [1, 3, 1]
        features = backbone(backbone.collate(encoded))
        assert features.isfinite().all()
        assert torch.equal(features[0], features[2])
    assert len(backbone.encode([])) == 0


def test_long_texts_are_cut_on_the_right_whatever_the_tokenizer_prefers(tmp_path):
    name = save(tmp_path / "left", BertModel(BertConfig(**WORDS)))
    settings = tmp_path / "left" / "tokenizer_config.json"
    options = {"truncation_side": "left", "padding_side": "left"}
    settings.write_text(json.dumps({**json.loads(settings.read_text()), **options}))
    backbone = load(Encoder(name, max_length=6))
    encoded = backbone.encode(["abcdefghij", "a"])
    assert backbone.tokenizer.decode(encoded.values[:6].tolist()) == "[CLS]abcd[SEP]"
    mask = backbone.collate(encoded)["attention_mask"].tolist()
    assert mask == [[1] * 6, [1, 1, 1, 0, 0, 0]]


def test_byte_tokenizer_has_one_token_per_byte():
    tokenizer = byte_tokenizer()
    assert len(tokenizer) == 260
    for text in ["abc", "é漢 🙂", " two  spaces", "\x00\n", "[PAD"]:
        ids = tokenizer(text)["input_ids"]
        assert len(ids) == len(text.encode()) + 2
        assert (ids[0], ids[-1]) == (tokenizer.cls_token_id, tokenizer.sep_token_id)
        assert tokenizer.decode(ids[1:-1]) == text
        assert tokenizer.unk_token_id not in ids


def test_tiny_weights_are_decided_by_the_seed():
    state = torch.get_rng_state()
    assert tiny(3).fingerprint == tiny(3).fingerprint != tiny(4).fingerprint
    assert torch.equal(torch.get_rng_state(), state)
    assert tiny(heads=2).key() != tiny(heads=4).key()  # equal weights, other features


def test_take_and_concatenate():
    encoded = Encoded(torch.arange(10), np.array([3, 0, 5, 2]))
    taken = encoded.take(np.array([2, 1, 0, 2]))
    assert taken.values.tolist() == [3, 4, 5, 6, 7, 0, 1, 2, 3, 4, 5, 6, 7]
    assert taken.lengths.tolist() == [5, 0, 3, 5]
    assert len(encoded.take(np.zeros(0, dtype=int))) == 0
    whole = Encoded.concatenate([encoded.take(np.array([i])) for i in range(4)])
    assert torch.equal(whole.values, encoded.values)
    assert whole.lengths.tolist() == [3, 0, 5, 2]
