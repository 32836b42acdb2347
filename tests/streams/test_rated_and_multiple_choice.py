"""Sources that read other people's archives as they are: rated texts, and BIG-bench tasks."""

import os
from pathlib import Path

import numpy as np
import pytest
from package_index import PackageIndex, sdist
from tiny_data import RATED_FILES, choices, rated, serve

from cl_peft import archives
from cl_peft.errors import ConfigError, DataError
from cl_peft.streams.bigbench import BigBench
from cl_peft.streams.ratings import Ratings


@pytest.fixture
def index(monkeypatch):
    monkeypatch.setattr(archives, "_PAUSE", 0.01)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with PackageIndex() as index:
        monkeypatch.setenv("PIP_INDEX_URL", index.url)
        yield index


# ------------------------------------------------------------------ rated texts


def lines(count=20, ratings=(-3, -0.5, 0.5, 3), start=1):
    """As published: some domains number documents, others snippets of documents."""
    for file in RATED_FILES:
        for i in range(start, start + count):
            name = f"{i}_{i % 3}" if file.startswith(("amazon", "nyt")) else str(i)
            yield f"{file}_GroundTruth.txt", f'{name}\t{ratings[i % 4]}\t{file} "{i}'


@pytest.fixture
def load(index, tmp_path):
    def load(rows, **options):
        address = serve(index, "extra/rated.tar.gz", rated(rows))
        return Ratings(address, **options).load(tmp_path / "cache")

    return load


def test_mean_ratings_become_labels(load):
    data = load(lines())
    assert data.class_names == ("negative", "neutral", "positive")
    assert set(data.train.domains) == {"tweets", "movies", "products", "news"}
    for part in (data.train, data.test):
        for text, label in zip(part.inputs, part.labels, strict=True):
            wanted = (0, 1, 1, 2)[int(text.partition('"')[2]) % 4]  # 0.5 itself is neutral
            assert label == wanted
    assert load(lines(), labels="binary").class_names == ("negative", "positive")
    low = load(lines(), threshold=0.4)
    assert np.bincount(low.train.labels).tolist()[1:] == [32]  # no neutral: negative, positive


def test_every_fifth_document_is_tested_with_all_its_snippets(load):
    rows = [*lines(count=18), *lines(count=18)]  # two snippets of each document
    data = load(rows)
    tested = {int(text.partition('"')[2]) for text in data.test.inputs}
    assert tested == {5, 10, 15}
    assert not tested & {int(text.partition('"')[2]) for text in data.train.inputs}
    assert len(data.test) == 4 * 3 * 2


def test_damaged_ratings_are_explained(load, index, tmp_path):
    with pytest.raises(DataError, match=r"tweets_GroundTruth\.txt, line 1: expected ID, mean"):
        load([("tweets_GroundTruth.txt", "1\tgood\ttext"), *lines()])
    with pytest.raises(DataError, match=r"holds no nytEditorialSnippets_GroundTruth\.txt"):
        load([row for row in lines() if not row[0].startswith("nyt")])
    address = serve(index, "extra/rated.tar.gz", b"no archive")
    with pytest.raises(DataError, match="cannot be read"):
        Ratings(address).load(tmp_path / "cache")
    with pytest.raises(ConfigError, match="exact version"):
        Ratings("package:x/y#sha256=1")


@pytest.mark.network
def test_the_real_ratings(tmp_path):
    cache = Path(os.environ.get("CL_PEFT_CACHE", tmp_path))
    archive = (
        "package:vaderSentiment==3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
        "#sha256=5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
    )
    data = Ratings(archive).load(cache)
    domains = [*data.train.domains, *data.test.domains]
    sizes = {"tweets": 4_200, "movies": 10_605, "products": 3_708, "news": 5_190}  # as published
    assert {d: domains.count(d) for d in sizes} == sizes
    assert len(data.test) == 4_695


# ------------------------------------------------------------------ multiple choice


def bigbench(index, **tasks):
    members = {f"bench/{name}/task.json": content for name, content in tasks.items()}
    digest = index.add("tiny-1.0.tar.gz", sdist("tiny-1.0", members))
    return f"package:tiny==1.0/bench#sha256={digest}"


def rows(language, count=10):
    return [(f"{language} {i}", ("bad", "good", "odd")[i % 3]) for i in range(count)]


def test_tasks_become_domains_and_the_last_fifth_is_tested(index, tmp_path):
    archive = bigbench(index, en=choices(rows("en")), de=choices(rows("de", 11)))
    source = BigBench(archive, {"english": "en", "german": "de"})
    data = source.load(tmp_path)
    assert data.class_names == ("bad", "good", "odd")
    assert list(data.test.inputs) == ["en 8", "en 9", "de 9", "de 10"]
    assert data.test.domains == ["english"] * 2 + ["german"] * 2
    assert data.test.labels.tolist() == [2, 0, 0, 1]
    assert len(data.train) == 8 + 9
    two = BigBench(archive, {"english": "en"}, drop_labels=["odd"]).load(tmp_path)
    assert two.class_names == ("bad", "good")
    assert list(two.test.inputs) == ["en 9"]  # the same examples, less those left out


def test_what_is_no_such_task_is_explained(index, tmp_path):
    archive = bigbench(index, good=choices(rows("x")), free=b'{"examples": [{"input": "a"}]}')
    with pytest.raises(DataError, match=r"no task goood .*Did you mean 'good'"):
        BigBench(archive, {"a": "goood"}).load(tmp_path)
    with pytest.raises(DataError, match="no multiple-choice task of BIG-bench"):
        BigBench(archive, {"a": "free"}).load(tmp_path)
