import os
import subprocess
import sys
from pathlib import Path

import pytest

from cl_peft.errors import DataError, DownloadError
from cl_peft.streams.files import Files
from cl_peft.streams.hub import Hub

datasets = pytest.importorskip("datasets")
REPO = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    # the libraries read the environment once, when they are imported
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture
def saved(tmp_path):
    """A data set saved to disk, with class labels and a third split."""
    features = datasets.Features(
        {
            "utterance": datasets.Value("string"),
            "intent": datasets.ClassLabel(names=["zebra", "apple", "oos"]),
        }
    )

    def split(rows):
        columns = {"utterance": [r[0] for r in rows], "intent": [r[1] for r in rows]}
        return datasets.Dataset.from_dict(columns, features=features)

    data = datasets.DatasetDict(
        train=split([("a", 0), ("b", 1), ("c", 2)]),
        test=split([("d", 1), ("e", 0)]),
        validation=split([("f", 0)]),
        unlabelled=split([("g", -1)]),
    )
    data.save_to_disk(tmp_path / "saved")
    return str(tmp_path / "saved")


@pytest.fixture
def folder(tmp_path):
    """A folder of CSV files."""
    made = tmp_path / "my_data"
    made.mkdir()
    (made / "train.csv").write_text('text,label\n"a, b",10\nc,9\n')
    (made / "test.csv").write_text("text,label\nd,9\n")
    return made


def columns(**options):
    return {"text": ["text", "utterance"], "label": ["label", "intent"]} | options


def test_saved_to_disk_with_class_labels(saved, tmp_path):
    data = Hub(saved, **columns()).load(tmp_path / "cache")
    assert data.class_names == ("apple", "oos", "zebra")  # in the order that local files give too
    assert data.train.labels.tolist() == [2, 0, 1]
    assert list(data.test.inputs) == ["d", "e"]
    assert data.validation.labels.tolist() == [2]


def test_labels_can_be_dropped_and_validation_left_out(saved, tmp_path):
    options = columns(drop_labels=["oos"], validation_split=None)
    data = Hub(saved, **options).load(tmp_path / "cache")
    assert data.class_names == ("apple", "zebra")
    assert data.validation is None


def test_a_split_without_labels_is_refused(saved, tmp_path):
    with pytest.raises(DataError, match=r"'unlabelled' of .*'intent' is empty in 1 row"):
        Hub(saved, test_split="unlabelled", **columns()).load(tmp_path / "cache")


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_a_folder_of_files_reads_like_the_files_themselves(folder, tmp_path, suffix):
    for split in ("train", "test"):
        table = folder / f"{split}.csv"
        data = datasets.Dataset.from_csv(str(table), cache_dir=str(tmp_path / "csv"))
        if suffix == "jsonl":
            data.to_json(folder / f"{split}.jsonl")
        elif suffix == "parquet":
            data.to_parquet(folder / f"{split}.parquet")
        if suffix != "csv":
            table.unlink()
    by_hub = Hub(str(folder)).load(tmp_path / "cache")
    files = (str(folder / f"train.{suffix}"), str(folder / f"test.{suffix}"))
    by_files = Files(*files).load(tmp_path)
    assert by_hub.class_names == by_files.class_names == ("9", "10")
    assert list(by_hub.train.inputs) == list(by_files.train.inputs) == ["a, b", "c"]
    assert by_hub.train.labels.tolist() == by_files.train.labels.tolist()
    assert by_hub.validation is None


def test_a_local_folder_is_read_quietly_and_into_the_given_cache(folder, tmp_path):
    code = (
        "import sys, pathlib; from cl_peft.streams.hub import Hub; "
        "print(len(Hub(sys.argv[1]).load(pathlib.Path(sys.argv[2])).train), 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder), str(tmp_path / "cache")],
        cwd=REPO,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")},
        capture_output=True,
        text=True,
    )
    assert (done.stdout.strip(), done.stderr) == ("2 False", "")
    assert list((tmp_path / "cache" / "hub").rglob("*.arrow"))
    assert not list((tmp_path / "home").rglob("*.arrow"))


def test_a_changed_file_is_read_anew(folder, tmp_path):
    Hub(str(folder)).load(tmp_path / "cache")
    (folder / "train.csv").write_text("text,label\nx,9\ny,9\nz,9\n")
    assert len(Hub(str(folder)).load(tmp_path / "cache").train) == 3


def test_progress_bars_are_left_as_they_were(folder, tmp_path):
    before = datasets.are_progress_bars_disabled()
    with pytest.raises(DataError):
        Hub(str(folder), test_split="tests").load(tmp_path / "cache")
    assert datasets.are_progress_bars_disabled() == before


def test_offline_says_what_to_do(tmp_path):
    with pytest.raises(DownloadError, match="'owner/name' from the hub") as caught:
        Hub("owner/name").load(tmp_path / "cache")
    assert "stream.path=/local/folder" in str(caught.value)


def test_wrong_places_are_explained(folder, saved, tmp_path):
    cache = tmp_path / "cache"
    with pytest.raises(DataError, match=r"no split 'tests'. Did you mean 'test'.*train, test"):
        Hub(str(folder), test_split="tests").load(cache)
    with pytest.raises(DataError, match=r"there is no folder .*nowhere"):
        Hub(str(tmp_path / "nowhere")).load(cache)
    with pytest.raises(DataError, match="stream=files"):
        Hub(str(folder / "train.csv")).load(cache)
    # a configuration belongs to the hub's copy: one override of the path is enough
    assert len(Hub(str(folder), config_name="plus").load(cache).train)
    with pytest.raises(DataError, match="single split"):
        Hub(f"{saved}/train").load(cache)
    with pytest.raises(DataError, match=r"no column 'txt'\. Did you mean 'text'"):
        Hub(str(folder), text="txt").load(cache)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="any data files"):
        Hub(str(tmp_path / "empty")).load(cache)


def test_a_broken_file_is_explained(folder, tmp_path):
    (folder / "train.csv").write_text('text,label\na,b\n"a,b\nc,d,e,f\n')
    with pytest.raises(DataError, match="my_data' cannot be loaded"):
        Hub(str(folder)).load(tmp_path / "cache")


def test_texts_of_several_columns_are_joined(tmp_path):
    made = tmp_path / "pairs"
    made.mkdir()
    (made / "train.csv").write_text("q,body,answer,label\nwhy,,so,1\nhow,by,doing,0\n,only,,0\n")
    (made / "test.csv").write_text("q,body,answer,label\nwho,a,b,1\n")
    data = Hub(str(made), text="q", more_text=["body", "answer"]).load(tmp_path)
    assert list(data.train.inputs) == ["why so", "how by doing", "only"]
    assert list(data.test.inputs) == ["who a b"]
    with pytest.raises(DataError, match=r"no column 'bdy'\. Did you mean 'body'.*more_text"):
        Hub(str(made), text="q", more_text=["bdy"]).load(tmp_path)
    with pytest.raises(DataError, match="int values where texts are expected"):
        Hub(str(made), text="q", more_text=["label"]).load(tmp_path)
