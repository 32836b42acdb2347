"""A module trained here works in real peft, and the other way round."""

import json

import pytest
import torch
from core_fixtures import CPU, random_module
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from virtual_cases import hidden, make

from cl_peft.errors import ConfigError, DamagedRunError, DataError
from cl_peft.modules.bank import Bank
from cl_peft.modules.dora import DoRA
from cl_peft.modules.head import Head
from cl_peft.modules.huggingface import export, head_of, import_adapter
from cl_peft.modules.ia3 import IA3
from cl_peft.modules.lora import LoRA

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
    from cl_peft.modules.bank import Route

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
    bank, module = import_adapter(folder, model)
    with bank.use(module):
        torch.testing.assert_close(hidden(model, batch), ours, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("kind", ["bert", "llama"])
@pytest.mark.parametrize("dora", [False, True])
def test_an_adapter_of_peft_comes_in(kind, dora, tmp_path):
    import copy

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
    bank, module = import_adapter(tmp_path, model)
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
