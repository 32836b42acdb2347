"""A finished result is not handed out for other data, nor silently for other code."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from running import config, digests, rows_of, run, write_csv

from cl_peft import inputs
from cl_peft.config import build, validate
from cl_peft.errors import DamagedRunError, DataError

CLASSES = ("red", "green", "blue", "grey")
SMALL = ("debug=smoke", "stream=files", "stream.tasks=2", "trainer.epochs=1", "threads=1",
         "tracker=disabled")  # fmt: skip


@pytest.fixture
def place(tmp_path):
    """Options of a run on two files, whose folder is written here."""
    write_csv(tmp_path / "data/train.csv", rows_of(CLASSES, 6))
    write_csv(tmp_path / "data/test.csv", rows_of(CLASSES, 3, "test"))
    return (
        *SMALL,
        *(f"stream.path={tmp_path / 'data'}", "stream.train=train.csv", "stream.test=test.csv"),
        *(f"paths.runs={tmp_path / 'runs'}", f"paths.cache={tmp_path / 'cache'}"),
    )


@pytest.fixture
def code(tmp_path, monkeypatch):
    """A copy of the package's source whose digests count instead; edit it to change the code."""
    copy = tmp_path / "cl_peft"
    shutil.copytree(inputs.PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(inputs, "PACKAGE", copy)
    inputs._source.cache_clear()

    def edit(name, old, new):
        text = (copy / name).read_text()
        assert old in text
        (copy / name).write_text(text.replace(old, new))
        inputs._source.cache_clear()  # as in a new process

    yield edit
    inputs._source.cache_clear()


def test_an_edited_file_is_refused_until_asked_for(place, tmp_path, capsys):
    folder = run(*place)
    before = digests(folder)
    assert run(*place) == folder
    assert "changed" not in capsys.readouterr().err
    write_csv(tmp_path / "data/test.csv", rows_of(CLASSES, 3, "other"))
    with pytest.raises(DataError, match=r"stream=files has now: .*/data/test\.csv\.") as error:
        run(*place)
    assert "fresh=true" in str(error.value)
    assert digests(folder) == before
    run(*place, "fresh=true")
    assert digests(folder)["stream.json"] != before["stream.json"]
    run(*place)


def test_training_examples_among_the_tests_are_told_of(place, tmp_path, capsys):
    run(*place)
    assert "training examples as well" not in capsys.readouterr().err
    rows = rows_of(CLASSES, 3, "test")
    write_csv(tmp_path / "data/test.csv", [*rows, *rows_of(CLASSES[:1], 2)])
    run(*place, "group=leaky")
    assert "warning: 2 of the test examples of stream=files are training" in capsys.readouterr().err


def test_files_that_are_gone_are_said_to_be(place, tmp_path, capsys):
    run(*place)
    (tmp_path / "data/test.csv").unlink()
    run(*place)
    assert "cannot be compared with what is gone: test.csv\n" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "data")
    run(*place)
    assert "what is gone: train.csv, test.csv\n" in capsys.readouterr().err


def test_the_same_words_from_another_folder_are_other_data(place, tmp_path, monkeypatch):
    """Relative names are part of the configuration; what they name is not."""
    for name, words in (("here", "one"), ("there", "two")):
        write_csv(tmp_path / name / "train.csv", rows_of(CLASSES, 6, words))
        write_csv(tmp_path / name / "test.csv", rows_of(CLASSES, 3, words))
    relative = [o if "path=" not in o else "stream.path=." for o in place if "paths" not in o]
    places = [o for o in place if "paths" in o]
    monkeypatch.chdir(tmp_path / "here")
    run(*relative, *places)
    monkeypatch.chdir(tmp_path / "there")
    with pytest.raises(DataError, match=r"there/train\.csv, .*there/test\.csv"):
        run(*relative, *places)


def digests_of(stream, backbone=""):
    node = dict(validate(config("debug=smoke", *stream))["stream"])
    files = inputs.local_files({"stream": node, "backbone": {"name": str(backbone)}})
    return inputs.file_digests(files)


def hub(folder):
    return ("stream=hub", f"stream.path={folder}", "stream.tasks=2")


def test_a_folder_counts_with_the_data_in_it(tmp_path):
    assert digests_of(hub(tmp_path / "set"))["stream"] == {}
    write_csv(tmp_path / "set/a/train.csv", rows_of(CLASSES, 2))
    first = digests_of(hub(tmp_path / "set"))
    assert list(first["stream"]) == ["train.csv"]
    for name in (".hidden.csv", ".git/index.csv", "cache-1.arrow", "README.md"):
        write_csv(tmp_path / "set" / name, rows_of(CLASSES, 1))
    assert digests_of(hub(tmp_path / "set")) == first
    write_csv(tmp_path / "elsewhere/test.csv", rows_of(CLASSES, 1))
    (tmp_path / "set/b").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/loop").symlink_to(tmp_path / "set")
    assert list(digests_of(hub(tmp_path / "set"))["stream"]) == ["a/train.csv", "b/test.csv"]


def test_every_data_set_of_several_counts(tmp_path):
    for name in ("dbpedia", "amazon", "yahoo", "ag_news"):
        for sample in ("seed_42", "seed_142"):
            write_csv(tmp_path / name / sample / "train.tsv", [])
    stream = ("stream=standard_cl_fewshot", f"stream.path={tmp_path}")
    found = digests_of(stream)["stream"]
    assert sorted(found) == [
        f"{n}/seed_42/train.tsv" for n in ("ag_news", "amazon", "dbpedia", "yahoo")
    ]
    write_csv(tmp_path / "yahoo/seed_142/train.tsv", [("a", "b")])
    assert digests_of(stream)["stream"] == found  # another sample's
    write_csv(tmp_path / "yahoo/seed_42/train.tsv", [("a", "b")])
    assert digests_of(stream)["stream"] != found


def test_of_many_and_of_large_files_a_part_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(inputs, "LARGE", 100)
    monkeypatch.setattr(inputs, "END", 10)
    monkeypatch.setattr(inputs, "MANY", 2)
    path = tmp_path / "set/train.txt"
    path.parent.mkdir()

    def named(text):
        path.write_text(text)
        return digests_of(hub(tmp_path / "set"))["stream"]

    text = "x" * 200
    assert named(text) == named("x" * 100 + "y" + "x" * 99)  # said in runs/README.md
    assert len({repr(named(t)) for t in (text, text + "x", "y" + text[1:], text[1:] + "y")}) == 4
    for name in "ab":
        write_csv(tmp_path / f"set/{name}.csv", [])
    (only,) = named(text)
    assert only == "3 files"
    assert named(text) != named("other")


def test_a_file_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "not allowed")

    path = write_csv(tmp_path / "train.csv", [])
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(DataError, match=r"train\.csv cannot be read: not allowed"):
        inputs.file_digests({"stream": [path]})


def test_other_weights_are_refused(place, tmp_path):
    """Of a backbone that lies in a local folder."""
    model = tmp_path / "model"

    def small_bert(folder, seed):
        tiny = build({**config("debug=smoke")["backbone"]})
        tiny.load(tmp_path / "cache", torch.device("cpu"), seed)
        tiny.model.save_pretrained(folder)
        tiny.tokenizer.save_pretrained(folder)

    small_bert(model, 0)
    local = (*place, "backbone=encoder", f"backbone.name={model}")
    folder = run(*local)
    run(*local)
    small_bert(model, 1)
    with pytest.raises(DataError, match=r"other files than backbone=.*model\.safetensors"):
        run(*local)
    assert folder.is_dir()


def test_refused_bounds_leave_a_finished_run_as_it_was(place, tmp_path):
    folder = run(*place)
    before = digests(folder)
    write_csv(tmp_path / "data/train.csv", rows_of(CLASSES, 6, "other"))
    with pytest.raises(DataError, match="other files"):
        run(*place, "bounds=on")
    assert digests(folder) == before


def test_a_run_that_says_nothing_of_its_data_is_shown_with_a_warning(place, capsys):
    path = run(*place) / "provenance.json"
    facts = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in facts.items() if k != "files"}))
    run(*place)
    assert "does not say which state of its data" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["", "{", "7"])
def test_what_was_stored_may_be_damaged(place, content):
    path = run(*place) / "provenance.json"
    path.write_text(content)
    with pytest.raises(DamagedRunError, match=r"provenance\.json: missing or damaged"):
        run(*place)


def test_made_up_and_downloaded_data_have_no_files():
    nothing = {"stream": {}, "backbone": {}}
    assert digests_of(()) == nothing
    assert digests_of(hub("owner/name")) == nothing
    assert digests_of(hub("owner/name"), "owner/model") == nothing


@pytest.mark.parametrize(
    ("name", "old", "new", "warned"),
    [
        ("learners/isolated.py", "Isolated: one module", "Alone: a module", False),
        ("evaluation.py", "import numpy as np", "import numpy as np  # why", False),
        ("console.py", "def message", "def message_", False),
        ("learners/lwf.py", "class ", "class Other", False),  # not used by this run
        ("training.py", "def ", "def other_", True),
        ("evaluation.py", "def ", "def other_", True),
        ("streams/frames.py", "def ", "def other_", True),
    ],
)
def test_changed_code_is_told_of(place, code, capsys, name, old, new, warned):
    folder = run(*place)
    code(name, old, new)
    capsys.readouterr()
    assert run(*place) == folder
    shown = capsys.readouterr().err
    assert ("warning: the code of this run's parts changed" in shown) is warned
    assert "already finished" in shown


def test_changed_training_is_not_looked_up(place, code):
    """The cache of modules knows the code that made them."""

    def reused(folder):
        tasks = json.loads((folder / "timing.json").read_text())["tasks"]
        return [bool(task["reused"]) for task in tasks]

    run(*place)
    code("evaluation.py", "def ", "def other_")
    assert reused(run(*place, "group=second")) == [True, True]
    code("training.py", "def ", "def other_")
    assert reused(run(*place, "group=third")) == [False, False]


def test_changed_pooling_is_not_looked_up(place, code):
    """Nor are frozen features and tokens."""
    from cl_peft.backbones.tiny import Tiny

    keys = [Tiny.made_by(Tiny.__new__(Tiny))]
    code("evaluation.py", "def ", "def other_")
    keys.append(Tiny.made_by(Tiny.__new__(Tiny)))
    code("backbones/encoder.py", "def ", "def other_")
    keys.append(Tiny.made_by(Tiny.__new__(Tiny)))
    assert keys[0] == keys[1] != keys[2]


def test_sources_inside_a_stream_count(code):
    valid = validate(config("debug=smoke", "stream=standard_cl_fewshot", "stream.path=x"))
    before = inputs.code_digest(valid)
    code("streams/files.py", "def ", "def other_")
    assert inputs.code_digest(valid) != before


def test_every_axis_counts():
    valid = validate(config("debug=smoke"))
    names = {inputs.code_digest(valid, (axis,), core=()) for axis in inputs.AXES}
    assert len(names) == len(inputs.AXES)
