import copy
import logging
import subprocess
import sys
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from core_fixtures import CPU, random_module, same, texts
from running import run
from scipy.stats import norm
from torch import nn
from transformers import BertConfig, BertModel, GPT2Config, GPT2Model, LlamaConfig, LlamaModel

from cl_peft.backbones import nf4
from cl_peft.backbones.decoder import Decoder
from cl_peft.backbones.encoder import Encoder
from cl_peft.backbones.nf4 import NF4Linear, dequantized, quantized_bits_per_parameter
from cl_peft.backbones.tiny import byte_tokenizer
from cl_peft.errors import ConfigError
from cl_peft.modules.bank import Bank, Route
from cl_peft.modules.base import Site
from cl_peft.modules.dora import DoRA
from cl_peft.modules.full import Full
from cl_peft.modules.lora import LoRA

SHAPE = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "initializer_range": 0.2,
    "vocab_size": 260,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
METHODS = {"lora": lambda: LoRA(rank=4), "dora": lambda: DoRA(rank=4), "full": Full}


# ------------------------------------------------------------------ a reference, from the papers


def quantiles():
    """NF4's 16 values: quantiles of N(0, 1) with an exact zero (QLoRA, appendix E)."""
    most = 0.9677083
    positive = norm.ppf(torch.linspace(most, 0.5, 9, dtype=torch.float64)[:-1].numpy())
    negative = -norm.ppf(torch.linspace(most, 0.5, 8, dtype=torch.float64)[:-1].numpy())
    values = torch.tensor(sorted([*positive, 0.0, *negative]))
    return (values / values.max()).float()


def dynamic():
    """The 256 values of the signed dynamic 8-bit type (Dettmers 2016, arXiv:1511.04561)."""
    values = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1)
        for mean in ((edges[:-1] + edges[1:]) / 2).tolist():
            values += [mean * 10.0 ** (exponent - 6), -mean * 10.0 ** (exponent - 6)]
    return torch.tensor(sorted(values))


def nearest(values, table):
    return (values.unsqueeze(-1) - table).abs().argmin(-1)


def reference(weight):
    """Codes, scales as shares of their own scale, those, and the mean."""
    scales = weight.reshape(-1, 64).abs().amax(1)
    codes = nearest(weight.reshape(-1, 64) / scales[:, None], quantiles())
    mean = scales.mean()
    second = torch.stack([part.abs().max() for part in (scales - mean).split(256)])
    return codes.flatten(), (scales - mean) / second.repeat_interleave(256)[:1200], second, mean


def way_back(codes, eight, second, mean):
    scales = dynamic()[eight] * second.repeat_interleave(256)[: len(eight)] + mean
    return (quantiles()[codes].reshape(-1, 64) * scales[:, None]).reshape(200, 384)


@pytest.fixture(params=["normal", "outliers", "uniform"])
def layer(request):
    torch.manual_seed(0)
    layer = nn.Linear(384, 200)  # 1200 blocks: four full groups of 256 and one part
    if request.param != "uniform":
        layer.weight.data = torch.randn(200, 384) * (0.5 + torch.rand(200, 1))
    if request.param == "outliers":
        layer.weight.data[::7, ::13] *= 30
    return layer


def test_codes_scales_and_values_equal_the_reference_and_bitsandbytes(layer):
    codes, shares, second, mean = reference(layer.weight.data)
    ours = NF4Linear(layer)
    state = ours.weight.quant_state
    packed = ours.weight.data.flatten()
    assert torch.equal(torch.stack([packed >> 4, packed & 15], 1).flatten().long(), codes)
    eight = state.absmax.long()
    exact = nearest(shares, dynamic())
    off = (shares - dynamic()[eight]).abs() - (shares - dynamic()[exact]).abs()
    assert off.max() < 1e-4  # its processor kernel decides what is nearest to 2^-15 or so:
    assert (eight != exact).sum() <= 6  # of 1200, next to the middle between two values
    assert (eight - exact).abs().max() <= 1
    torch.testing.assert_close(state.code, quantiles(), atol=1e-6, rtol=0)
    torch.testing.assert_close(state.state2.code, dynamic(), atol=1e-7, rtol=0)
    torch.testing.assert_close(state.state2.absmax, second, atol=0, rtol=1e-6)
    torch.testing.assert_close(state.offset, mean, atol=0, rtol=1e-6)
    values = way_back(codes, eight, second, mean)
    torch.testing.assert_close(dequantized(ours.weight), values, atol=1e-6, rtol=1e-5)
    theirs = bnb.nn.Linear4bit(384, 200, compress_statistics=True, quant_type="nf4")
    theirs.load_state_dict(layer.state_dict())
    theirs = theirs.to("cpu")  # where bitsandbytes quantizes
    assert torch.equal(ours.weight.data, theirs.weight.data)
    assert same(tensors_of(ours), tensors_of(theirs))
    values = bnb.functional.dequantize_4bit(theirs.weight.data, theirs.weight.quant_state)
    assert torch.equal(dequantized(ours.weight), values)


def tensors_of(layer):
    return dict(layer.state_dict())


def test_the_number_of_threads_decides_nothing():
    torch.manual_seed(3)
    layer = nn.Linear(4096, 1024, bias=False)
    scales = layer.weight.detach().reshape(-1, 64).abs().amax(1)
    results, means = [], set()
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        try:
            results.append(tensors_of(NF4Linear(layer)))
            means.add(float(scales.mean()))
            assert torch.get_num_threads() == threads
        finally:
            torch.set_num_threads(1)
    assert len(means) > 1  # otherwise this layer shows nothing
    assert same(results[0], results[1])
    assert same(results[0], results[2])


# ------------------------------------------------------------------ the layer


def test_forward_and_gradient_are_those_of_the_dequantized_weight(layer):
    quantized = NF4Linear(layer).eval()
    before = copy.deepcopy(tensors_of(quantized))
    weight = dequantized(quantized.weight)
    x = torch.randn(5, 3, 384)
    for _ in range(2):  # a pass without gradients must not change the next one with them
        with torch.no_grad():
            first = quantized(x)
        ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
        out = quantized(ours)
        assert torch.equal(out, first)
        expected = nn.functional.linear(theirs, weight, layer.bias)
        torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
        direction = torch.randn(out.shape)
        (out * direction).sum().backward()
        (expected * direction).sum().backward()
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-4, rtol=1e-5)
        assert same(tensors_of(quantized), before)


@pytest.mark.parametrize("native", [True, False])
def test_autocast_lowers_precision_only_where_the_device_multiplies_in_it(
    layer, monkeypatch, native
):
    monkeypatch.setattr(nf4, "native_bf16", lambda device: native)
    quantized = NF4Linear(layer)
    x = torch.randn(8, 384)
    exact = quantized(x).detach()
    assert exact.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        lowered = quantized(x).detach()
    assert lowered.dtype == torch.float32
    assert torch.equal(lowered, exact) == (not native)
    torch.testing.assert_close(lowered, exact, atol=0.02 * float(exact.abs().max()), rtol=0.02)
    assert torch.equal(quantized(x), exact)
    with torch.autocast("cpu", torch.bfloat16):
        assert quantized(x.bfloat16()).dtype == torch.bfloat16


def test_a_site_gives_the_weight_that_the_codes_stand_for(layer):
    plain, quantized = Site("a", layer), Site("a", NF4Linear(layer))
    assert plain.weight is layer.weight
    assert (plain.quantized, quantized.quantized) == (False, True)
    assert (quantized.d_in, quantized.d_out) == (384, 200)
    assert torch.equal(quantized.weight, dequantized(quantized.layer.weight))
    assert torch.equal(quantized.bias, layer.bias)


# ------------------------------------------------------------------ backbones


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("models")
    models = {
        "encoder": BertModel(BertConfig(**SHAPE)),
        "decoder": LlamaModel(LlamaConfig(**SHAPE)),
    }
    models["narrow"] = BertModel(BertConfig(**{**SHAPE, "hidden_size": 32}))
    models["gpt2"] = GPT2Model(GPT2Config(vocab_size=260, n_embd=64, n_layer=1, n_head=2))
    for name, model in models.items():
        model.save_pretrained(root / name)
        byte_tokenizer().save_pretrained(root / name)
    return {name: str(root / name) for name in models}


def load(folders, kind, quantize="nf4"):
    cls = Encoder if kind == "encoder" else Decoder
    backbone = cls(folders[kind], max_length=32, quantize=quantize)
    backbone.load(Path("unused"), CPU, 0)
    return backbone


@pytest.fixture(params=["encoder", "decoder"])
def kind(request):
    return request.param


def twin_of(backbone):
    """The same backbone in float32, whose weights are what the codes stand for."""
    twin = copy.copy(backbone)
    twin.model = copy.deepcopy(backbone.model)
    for name, module in list(twin.model.named_modules()):
        if isinstance(module, NF4Linear):
            plain = nn.Linear(module.in_features, module.out_features, module.bias is not None)
            plain.weight.data = dequantized(module.weight)
            if module.bias is not None:
                plain.bias.data = module.bias.data.clone()
            parent, _, child = name.rpartition(".")
            setattr(twin.model.get_submodule(parent), child, plain.requires_grad_(False))
    return twin


def batch_of(backbone, count=6):
    return backbone.collate(backbone.encode(texts(count, seed=4)))


def test_the_layers_of_the_transformer_are_quantized_and_nothing_else(folders, kind):
    plain, quantized = load(folders, kind, "none"), load(folders, kind)
    linears = {n for n, m in plain.model.named_modules() if isinstance(m, nn.Linear)}
    found = {n for n, m in quantized.model.named_modules() if isinstance(m, NF4Linear)}
    assert found == {n for n in linears if "pooler" not in n}
    assert len(found) == {"encoder": 12, "decoder": 14}[kind]
    own, other = dict(plain.model.named_parameters()), dict(quantized.model.named_parameters())
    assert set(own) == set(other)
    for name, tensor in other.items():
        assert not tensor.requires_grad
        if name.removesuffix(".weight") not in found:
            assert torch.equal(tensor, own[name])
    near, far = plain(batch_of(plain)), quantized(batch_of(quantized))
    assert 0 < (near - far).norm() / near.norm() < 0.5


def test_the_fingerprint_is_stable_and_sees_the_codes(folders, kind):
    first, again = load(folders, kind), load(folders, kind)
    assert first.fingerprint == again.fingerprint == first.weights_fingerprint()
    assert first.key() == again.key()
    assert first.fingerprint != load(folders, kind, "none").fingerprint
    with torch.no_grad():
        first(batch_of(first))
    first(batch_of(first))
    assert first.weights_fingerprint() == first.fingerprint
    layer = next(m for m in first.model.modules() if isinstance(m, NF4Linear))
    layer.weight.data[0] ^= 1
    assert first.weights_fingerprint() != first.fingerprint
    layer.weight.data[0] ^= 1
    assert first.weights_fingerprint() == first.fingerprint
    layer.weight.quant_state.absmax[0] ^= 1
    assert first.weights_fingerprint() != first.fingerprint


def test_bits_per_parameter_are_measured(folders, kind):
    backbone = load(folders, kind, "none")
    assert quantized_bits_per_parameter(backbone.model) is None
    model = BertModel(BertConfig(**{**SHAPE, "hidden_size": 384, "intermediate_size": 1536,
                                    "num_hidden_layers": 1}))  # fmt: skip
    nf4.quantize(model)
    layers = [m for m in model.modules() if isinstance(m, NF4Linear)]
    values = sum(m.in_features * m.out_features for m in layers)
    assert values == 4 * 384 * 384 + 2 * 384 * 1536
    blocks = values // 64
    expected = 8 * (values / 2 + blocks + 4 * blocks / 256 + 4 * len(layers)) / values
    assert quantized_bits_per_parameter(model) == pytest.approx(expected)
    assert expected == pytest.approx(4.1271, abs=1e-4)
    stored = sum(
        t.numel() * t.element_size()
        for m in layers
        for n, t in m.state_dict().items()
        if n != "bias"
    )
    assert 8 * stored / values < 4.2  # with the format's tables and description, per layer


# ------------------------------------------------------------------ modules on top


@pytest.mark.parametrize("method", METHODS)
def test_forward_and_gradients_equal_float32_on_dequantized_weights(folders, kind, method):
    backbone = load(folders, kind)
    twin = twin_of(backbone)
    batch = batch_of(backbone)
    banks = [Bank(METHODS[method](), b.model, CPU) for b in (backbone, twin)]
    modules = [random_module(bank, 3) for bank in banks]
    fresh = [bank.fresh(torch.Generator().manual_seed(0)) for bank in banks]
    for name, p in fresh[0].items():  # such as DoRA's magnitudes
        for key, tensor in p.items():
            torch.testing.assert_close(tensor, fresh[1][name][key], atol=1e-5, rtol=1e-5)
    outputs = []
    for b, bank, module in zip((backbone, twin), banks, modules, strict=True):
        with torch.no_grad():
            b(batch)
        with bank.training(module):
            outputs.append(b(batch))
        (outputs[-1] * torch.arange(64)).mean().backward()
    torch.testing.assert_close(*outputs, atol=1e-4, rtol=1e-4)
    for name, p in modules[0].items():
        for key, tensor in p.items():
            assert tensor.grad.any()
            expected = modules[1][name][key].grad
            torch.testing.assert_close(tensor.grad, expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_a_mixed_batch_equals_single_forwards(folders, kind, method):
    backbone = load(folders, kind)
    bank = Bank(METHODS[method](), backbone.model, CPU)
    modules = [random_module(bank, seed) for seed in range(3)]
    for module in modules:
        bank.add(module)
    inputs, rows = texts(8, seed=2), [0, 2, -1, 1, 1, 0, 2, -1]
    batch = backbone.collate(backbone.encode(inputs))
    with torch.no_grad():
        plain = backbone(batch)
        with bank.use(Route.each(torch.tensor(rows))):
            ours = backbone(batch)
        for n, row in enumerate(rows):
            alone = backbone.collate(backbone.encode([inputs[n]]))
            with bank.use(Route.each(torch.tensor([row]))):
                torch.testing.assert_close(ours[n], backbone(alone)[0], atol=1e-4, rtol=1e-4)
        assert torch.equal(ours[[2, 7]], plain[[2, 7]])


@pytest.mark.parametrize("method", METHODS)
def test_learns_and_the_backbone_stays(folders, kind, method):
    backbone = load(folders, kind)
    batch = batch_of(backbone)
    bank = Bank(METHODS[method](), backbone.model, CPU)
    module = bank.fresh(torch.Generator().manual_seed(0))
    optimizer = torch.optim.Adam([t for p in module.values() for t in p.values()], lr=1e-2)
    with torch.no_grad():
        target = backbone(batch) + 0.5 * torch.randn(6, 64)
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        with bank.training(module):
            loss = (backbone(batch) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
    assert backbone.weights_fingerprint() == backbone.fingerprint


@pytest.mark.parametrize("method", METHODS)
def test_merging_into_four_bits_is_refused(folders, kind, method):
    backbone = load(folders, kind)
    bank = Bank(METHODS[method](), backbone.model, CPU)
    bank.add(random_module(bank, 0))
    batch = batch_of(backbone)
    with bank.use(Route.to(0, 6)):
        beside = backbone(batch)
        with pytest.raises(ConfigError, match=r"is quantized: .*4-bit.*beside it"), bank.merged(0):
            raise AssertionError("was merged")
        assert torch.equal(backbone(batch), beside)
    assert backbone.weights_fingerprint() == backbone.fingerprint


# ------------------------------------------------------------------ what is refused, and a run


def test_rows_that_are_no_whole_blocks_are_refused(folders, places):
    narrow = Encoder(folders["narrow"], max_length=32, quantize="nf4")
    with pytest.raises(ConfigError, match=r"quantize=nf4: encoder\.layer\.0\S* reads 32 .*of 64"):
        narrow.load(Path("unused"), CPU, 0)
    with pytest.raises(ConfigError, match="reads 32 values"):
        run("debug=smoke", "backbone.quantize=nf4", *places)
    with pytest.raises(ConfigError, match=r"GPT2Model has no torch\.nn\.Linear"):
        load(folders, "gpt2")


def test_without_bitsandbytes_the_extra_is_named():
    code = (
        "import sys; sys.modules['bitsandbytes'] = None\n"
        "from pathlib import Path; import torch\n"
        "from cl_peft.backbones.encoder import Encoder\n"
        "from cl_peft.errors import ConfigError\n"
        "try: Encoder('nowhere/at-all', quantize='nf4').load(Path('x'), torch.device('cpu'), 0)\n"
        "except ConfigError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install 'cl_peft[qlora]'" in done.stdout
    assert logging.getLogger("bitsandbytes.backends.cpu.ops").level != logging.ERROR


def test_a_whole_run_on_four_bits_ends_with_its_backbone_unchanged(places):
    small = ("debug=smoke", "backbone.width=64", "trainer.epochs=2")
    four, full = (run(*small, f"backbone.quantize={q}", *places) for q in ("nf4", "none"))
    assert four != full
    for folder in (four, full):
        assert '"state": "finished"' in (folder / "status.json").read_text()
    facts = [(folder / "provenance.json").read_text() for folder in (four, full)]
    assert facts[0] != facts[1]
