"""A finished result is not handed out for other data, nor silently for other code."""

import json
import shutil

import pytest
from running import config, digests, rows_of, run, write_csv

from cl_peft import inputs
from cl_peft.config import validate
from cl_peft.errors import DataError

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
    with pytest.raises(DataError, match=r"test\.csv changed since it finished") as error:
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
    shutil.rmtree(tmp_path / "data")
    run(*place)
    assert "warning: the data of this run are gone" in capsys.readouterr().err


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
    with pytest.raises(DataError, match="other data"):
        run(*relative, *places)


@pytest.mark.parametrize("names", [{}, {"train_split": "train"}])
def test_a_folder_counts_with_all_that_lies_in_it(tmp_path, names):
    stream = {"path": str(tmp_path / "set"), **names}
    assert inputs.data_digest(stream) is None
    write_csv(tmp_path / "set/a/train.csv", rows_of(CLASSES, 2))
    first = inputs.data_digest(stream)
    assert first
    write_csv(tmp_path / "set/.hidden", rows_of(CLASSES, 1))
    write_csv(tmp_path / "set/.git/index", rows_of(CLASSES, 1))
    assert inputs.data_digest(stream) == first
    write_csv(tmp_path / "set/b/test.csv", rows_of(CLASSES, 1))
    assert inputs.data_digest(stream) != first


def test_made_up_and_downloaded_data_have_no_files():
    assert inputs.data_digest({"classes": 6}) is None
    assert inputs.data_digest({"path": "owner/name", "train_split": "train"}) is None


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


def test_every_axis_counts():
    valid = validate(config("debug=smoke"))
    names = {inputs.code_digest(valid, (axis,), core=()) for axis in inputs.AXES}
    assert len(names) == len(inputs.AXES)
