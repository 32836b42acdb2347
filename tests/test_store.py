import errno
import logging
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from cl_peft.errors import DamagedRunError, UserError
from cl_peft.store import ContentStore, require, tensor_fingerprint

KEY = "ab" * 32


class Compute:
    def __init__(self, value=1.0):
        self.calls, self.value = 0, value

    def __call__(self):
        self.calls += 1
        return {"x": torch.full((3, 2), self.value), "empty": torch.zeros(0, 4)}


def file_of(store):
    (path,) = store.folder.rglob("*.safetensors")
    return path


def test_computes_once_and_gives_the_same_bits(tmp_path):
    compute = Compute(0.1)
    first = ContentStore(tmp_path).get("features", KEY, compute)
    second = ContentStore(tmp_path).get("features", KEY, compute)
    assert compute.calls == 1
    assert torch.equal(first["x"], second["x"])
    assert second["empty"].shape == (0, 4)
    ContentStore(tmp_path).get("tokens", KEY, compute)
    ContentStore(tmp_path).get("features", "cd" * 32, compute)
    assert compute.calls == 3  # another kind or key is another value


@pytest.mark.parametrize("damage", ["truncated", "empty", "zeros", "text"])
def test_a_corrupt_file_is_reported_and_computed_again(tmp_path, caplog, damage):
    store, compute = ContentStore(tmp_path), Compute()
    store.get("features", KEY, compute)
    path = file_of(store)
    whole = path.read_bytes()
    bad = {
        "truncated": whole[:-5],
        "empty": b"",
        "zeros": bytes(len(whole)),
        "text": b"<html>not found</html>",
    }
    path.write_bytes(bad[damage])
    with caplog.at_level(logging.WARNING):
        value = store.get("features", KEY, compute)
    assert compute.calls == 2
    assert path.name in caplog.text
    assert "damaged" in caplog.text
    assert value["x"].eq(1.0).all()
    assert path.read_bytes() == whole
    caplog.clear()
    store.get("features", KEY, compute)
    assert compute.calls == 2
    assert not caplog.text


def test_a_failing_computation_or_write_leaves_nothing_behind(tmp_path, monkeypatch):
    store = ContentStore(tmp_path)

    def fail():
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        store.get("features", KEY, fail)
    monkeypatch.setattr(Path, "replace", lambda *_: fail())
    with pytest.raises(RuntimeError):
        store.get("features", KEY, Compute())
    monkeypatch.undo()
    assert not list(tmp_path.rglob(f"{KEY}.safetensors"))
    assert store.get("features", KEY, Compute())["x"].eq(1.0).all()


def test_a_full_disk_is_said_in_words_and_leaves_no_file(tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"no space left on the disk of .*paths\.cache"):
        ContentStore(tmp_path).get("features", KEY, Compute())
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


def test_many_readers_and_writers_see_whole_values_only(tmp_path):
    def job(i):
        value = ContentStore(tmp_path).get("features", KEY, Compute(2.5))
        return bool(value["x"].eq(2.5).all()) and value["x"].shape == (3, 2)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(job, range(64)))
    assert len([p for p in tmp_path.rglob("*") if p.is_file()]) == 1


def test_fingerprint_sees_names_types_shapes_and_single_values():
    base = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.zeros(())}
    variants = [
        {"a": base["a"], "c": base["b"]},
        {"a": base["a"].reshape(3, 2), "b": base["b"]},
        {"a": base["a"].double(), "b": base["b"]},
        {"a": base["a"] + torch.eye(2, 3) * 1e-6, "b": base["b"]},
        {"a": base["a"]},
    ]
    names = [tensor_fingerprint(v) for v in [base, *variants]]
    assert len(set(names)) == 6
    view = base["a"].T.contiguous().T  # same values, other memory layout
    assert tensor_fingerprint({"b": base["b"], "a": view}) == names[0]
    tensor_fingerprint({"x": torch.zeros(0, 3), "y": torch.ones(2, dtype=torch.bfloat16)})


def test_require_names_what_is_missing_and_unknown():
    require({"a": torch.zeros(1)}, {"a"}, "router=x")
    with pytest.raises(DamagedRunError, match=r"router=x.*missing \['b'\], unknown \['a'\]"):
        require({"a": torch.zeros(1)}, {"b"}, "router=x")
