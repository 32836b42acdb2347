import numpy as np
import pytest
import torch
from core_fixtures import stream_of, texts, tiny

from cl_peft.backbones import features as module
from cl_peft.backbones.features import Features
from cl_peft.store import ContentStore


class Counter:
    """Counts examples that pass through a backbone, and texts that are tokenized."""

    def __init__(self, backbone):
        self.passed = self.tokenized = 0
        encode = backbone.encode

        def counted(inputs):
            self.tokenized += len(inputs)
            return encode(inputs)

        backbone.encode = counted
        backbone.model.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, model, args, kwargs):
        self.passed += len(kwargs["input_ids"])


def fresh(folder, batch_size=4, **options):
    backbone = tiny(**options)
    counter = Counter(backbone)
    store = ContentStore(folder) if folder is not None else None
    return Features(backbone, store, batch_size), counter


@pytest.fixture
def inputs():
    return texts(30, seed=8)


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 7)


def test_each_example_is_computed_once(inputs, tmp_path):
    features, counter = fresh(tmp_path)
    whole = features.features(inputs)
    distinct = len(set(inputs))
    assert (counter.passed, counter.tokenized, features.computed) == (distinct,) * 3
    rows = [29, 3, 3, 0]
    again = features.features([inputs[i] for i in rows])
    assert torch.equal(again, whole[rows])
    doubled = features.features(inputs + inputs)
    assert torch.equal(doubled, torch.cat([whole, whole]))
    features.features([*inputs, "a new one"])
    assert counter.passed == distinct + 1


def test_features_are_the_backbones(inputs):
    features, _ = fresh(None)
    backbone = tiny()
    for text, ours in zip(inputs, features.features(inputs), strict=True):
        expected = backbone(backbone.collate(backbone.encode([text])))[0]
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


def test_cached_equals_uncached_bit_for_bit(inputs, tmp_path):
    plain, _ = fresh(None)
    first, _ = fresh(tmp_path)
    second, counter = fresh(tmp_path)
    expected = plain.features(inputs)
    assert torch.equal(first.features(inputs), expected)
    assert torch.equal(second.features(inputs), expected)
    assert (counter.passed, counter.tokenized) == (0, 0)


def test_the_cache_is_hit_whatever_was_tokenized_before(inputs, tmp_path):
    first, _ = fresh(tmp_path)
    first.features(inputs)
    for before in (inputs[:1], ["something else"]):
        again, counter = fresh(tmp_path)
        again.encoded(before)
        again.features(inputs)
        assert counter.passed == 0


def test_tokens_equal_the_tokenizers_in_any_order(inputs, tmp_path):
    features, counter = fresh(tmp_path)
    features.encoded(inputs[:10])
    order = np.random.default_rng(0).permutation(30)
    encoded = features.encoded([inputs[i] for i in order])
    expected = tiny().encode([inputs[i] for i in order])
    assert torch.equal(encoded.values, expected.values)
    assert (encoded.lengths == expected.lengths).all()
    assert counter.tokenized == len(set(inputs))
    assert len(features.encoded([])) == 0
    assert features.features([]).shape == (0, 32)


@pytest.mark.parametrize(
    "change", [{"max_length": 20}, {"seed": 1}, {"heads": 4}, {"batch_size": 5}, {"pooling": "cls"}]
)
def test_what_changes_a_feature_misses_the_cache(inputs, tmp_path, change):
    first, _ = fresh(tmp_path)
    old = first.features(inputs)
    pooling = change.get("pooling")
    second, counter = fresh(tmp_path, **{k: v for k, v in change.items() if k != "pooling"})
    if pooling:
        second.backbone.pooling = pooling
    new = second.features(inputs)
    assert counter.passed == len(set(inputs))
    if "batch_size" not in change:
        assert not torch.allclose(new, old, atol=1e-3)


def test_a_damaged_file_is_computed_again_to_the_same_bits(inputs, tmp_path):
    first, _ = fresh(tmp_path)
    expected = first.features(inputs)
    for path in tmp_path.rglob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:-3])
    again, counter = fresh(tmp_path)
    assert torch.equal(again.features(inputs), expected)
    assert counter.passed == len(set(inputs))


def test_another_order_of_tasks_finds_the_same_features(tmp_path):
    splits = ("train", "test", "validation")
    first, other = stream_of(order=0), stream_of(order=1)
    assert [t.classes for t in first.tasks] != [t.classes for t in other.tasks]
    plain, counter = fresh(tmp_path)
    plain.prefetch(first, splits)
    inputs = [x for t in first.tasks for s in splits for x in getattr(t, s).inputs]
    assert counter.passed == len(set(inputs))
    again, counter = fresh(tmp_path)
    again.prefetch(other, splits)
    assert torch.equal(again.features(inputs), plain.features(inputs))
    assert counter.passed == 0
