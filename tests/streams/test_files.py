import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from cl_peft.errors import ConfigError, DataError
from cl_peft.streams.files import Files
from cl_peft.streams.protocol import Protocol, make_stream

ROWS = [("hello, you", "greet"), ("None", "other"), ("10", "other"), ('say "hi"', "greet")]


def write(path, rows=ROWS, names=("text", "label")):
    """Write rows in the format of the path's ending."""
    table = pd.DataFrame(rows, columns=list(names))
    if path.suffix == ".parquet":
        table.to_parquet(path)
    elif path.suffix == ".jsonl":
        lines = [json.dumps(dict(zip(names, row, strict=True))) for row in rows]
        path.write_text("\n".join(lines))
    else:
        table.to_csv(path, index=False, sep="\t" if path.suffix == ".tsv" else ",")
    return str(path)


def load(train, test=None, **options):
    return Files(str(train), str(test or train), **options).load(Path("unused"))


@pytest.fixture
def csv_of(tmp_path):
    """A function that writes text to a new CSV file."""
    made = []

    def make(text, encoding="utf-8"):
        path = tmp_path / f"made{len(made)}.csv"
        path.write_bytes(text.encode(encoding))
        made.append(path)
        return path

    return make


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "parquet"])
def test_every_format_gives_the_same_examples(tmp_path, suffix):
    data = load(
        write(tmp_path / f"train.{suffix}"),
        write(tmp_path / f"test.{suffix}", ROWS[:1]),
        validation=write(tmp_path / f"valid.{suffix}", ROWS[1:2]),
    )
    assert list(data.train.inputs) == [text for text, _ in ROWS]
    assert data.class_names == ("greet", "other")
    assert data.train.labels.tolist() == [0, 1, 1, 0]
    assert data.train.labels.dtype == np.int64
    assert (data.test.labels.tolist(), data.validation.labels.tolist()) == ([0], [1])
    assert data.train.domains is None


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_integer_labels_sort_as_numbers(tmp_path, suffix):
    data = load(write(tmp_path / f"a.{suffix}", [("a", 10), ("b", 9), ("c", -1), ("d", 10)]))
    assert data.class_names == ("-1", "9", "10")
    assert data.train.labels.tolist() == [2, 1, 0, 2]


def test_names_sort_as_words_even_if_some_are_numbers(csv_of):
    assert load(csv_of("text,label\na,10\nb,9\nc,x\n")).class_names == ("10", "9", "x")


def test_integers_with_gaps_stay_integers(tmp_path):
    path = write(tmp_path / "a.parquet", [("a", 1), ("b", None), (None, None), ("d", 2)])
    assert load(path, drop_empty=True).class_names == ("1", "2")


def test_byte_order_marks_and_windows_line_ends_do_not_matter(csv_of):
    data = load(csv_of("text,label\r\na,x\r\nb,y\r\n", encoding="utf-8-sig"))
    assert data.class_names == ("x", "y")


def test_without_header_columns_are_text_and_label_and_quotes_are_characters(tmp_path):
    path = tmp_path / "a.tsv"
    path.write_text('"open quote\tx\nsay "hi", you\ty\n')
    data = load(path, header=False)
    assert list(data.train.inputs) == ['"open quote', 'say "hi", you']
    assert data.class_names == ("x", "y")


def test_without_header_columns_can_be_named(tmp_path):
    path = tmp_path / "a.tsv"
    path.write_text("x\t1\thello\n")
    data = load(path, header=False, columns=["kind", "n", "said"], text="said", label="kind")
    assert (list(data.train.inputs), data.class_names) == (["hello"], ("x",))
    with pytest.raises(ConfigError, match=r"stream\.header=false"):
        Files("a", "b", columns=["text"])


def test_the_first_candidate_column_that_exists_is_used(csv_of):
    path = csv_of("utterance,text,intent\nhello,other,x\n")
    data = load(path, text=["query", "utterance", "text"], label=["label", "intent"])
    assert (list(data.train.inputs), data.class_names) == (["hello"], ("x",))


def test_domains_are_read(csv_of):
    data = load(csv_of("text,label,source\na,x,books\nb,y,films\n"), domain="source")
    assert data.train.domains == ["books", "films"]


def test_dropped_labels_leave_no_trace(csv_of):
    train = csv_of("text,label\na,x\nb,oos\nc,y\n")
    test = csv_of("text,label\na,x\nb,oos\nc,new\n")
    data = load(train, test, drop_labels=["oos", "new"])
    assert data.class_names == ("x", "y")
    assert list(data.test.inputs) == ["a"]
    with pytest.raises(DataError, match=r"'oss', which no row has\. Did you mean 'oos'"):
        load(train, train, drop_labels=["oss"])


def test_rows_are_those_of_the_file(csv_of):
    train = csv_of("text,label\na,x\nb,oos\n\nc,y\nd,x\n")
    data = load(train, csv_of("text,label\nq,oos\nr,x\ns,y\n"), drop_labels=["oos"])
    assert data.train.rows.tolist() == [0, 3, 4]
    stream = make_stream(
        data, Protocol(name="made", scenario="class", tasks=2), order_seed=0, data_seed=0
    )
    texts = {
        int(r): t
        for task in stream.tasks
        for r, t in zip(task.train.rows, task.train.inputs, strict=True)
    }
    assert texts == {0: "a", 3: "c", 4: "d"}
    assert sorted(int(r) for task in stream.tasks for r in task.test.rows) == [1, 2]


def test_labels_that_look_alike_are_told_of(csv_of, caplog):
    load(csv_of("text,label\na,Sport\nb,news\nc,sport \n"))
    assert "the labels 'Sport' and 'sport ' are taken as different classes" in caplog.text
    caplog.clear()
    load(csv_of("text,label\na,sport\nb,sports\n"))
    assert caplog.text == ""


def test_blank_rows_are_skipped_and_counted_in_row_numbers(csv_of):
    data = load(csv_of("text,label\na,x\n\n,\n  ,\nb,y\n\n"))
    assert list(data.train.inputs) == ["a", "b"]
    with pytest.raises(DataError, match=r"'text' is empty in 2 row\(s\): 3, 4 "):
        load(csv_of("text,label\na,x\n\n,y\n ,y\n"))


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_empty_cells_are_named_by_row(tmp_path, suffix):
    rows = [("a", "x")] + [(None, "x")] * 7
    with pytest.raises(DataError, match=r"'text' is empty in 7 row.*2, 3, 4, 5, 6 and 2 more"):
        load(write(tmp_path / f"a.{suffix}", rows))
    with pytest.raises(DataError, match=r"b\.\w+: column 'label' is empty in 1 row\(s\): 2"):
        load(write(tmp_path / f"b.{suffix}", [("a", "x"), ("b", None)]))
    kept = load(str(tmp_path / f"a.{suffix}"), drop_empty=True)
    assert list(kept.train.inputs) == ["a"]


def test_labels_that_train_lacks_are_named(csv_of):
    train, other = csv_of("text,label\na,alarm\n"), csv_of("text,label\na,alarms\nb,alarm\n")
    with pytest.raises(DataError, match=f"{other}: 1 label.*{train} lacks: alarms.*'alarm'"):
        load(train, other)
    with pytest.raises(DataError, match=f"{other}: 1 label"):
        load(train, train, validation=str(other))


def test_a_missing_column_lists_the_columns(csv_of):
    with pytest.raises(DataError) as caught:
        load(csv_of("txt,label\na,x\n"))
    for part in ("no column 'text'", "Did you mean 'txt'?", "txt, label", "stream.text="):
        assert part in str(caught.value)
    with pytest.raises(DataError, match=r"no column 'y' or 'z'.*stream\.label="):
        load(csv_of("text,label\na,x\n"), label=["y", "z"])


def test_columns_that_hold_no_text_are_refused(tmp_path):
    path = write(tmp_path / "a.parquet", [("a", 1)], names=("label", "text"))
    with pytest.raises(DataError, match=r"row 1: column 'text' holds int values.*stream\.text="):
        load(path)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.csv", b"", "holds no rows"),
        ("a.csv", b"text,label\n", "holds no rows"),
        ("a.csv", b"text,label\n\n,\n", "holds no rows"),
        ("a.jsonl", b"", "holds no rows|no column"),
        ("a.csv", b"text,label\na,x\nhello, world,x\n", "cannot be read as csv.*line 3"),
        ("a.csv", b"text,label\nhello, world,x\n", "more fields than there are columns"),
        ("a.csv", b'text,label\n"never closed,x\n', "cannot be read as csv"),
        ("a.csv", b"text,label\n\xff,x\n", "not UTF-8"),
        ("a.jsonl", b'{"text": "a", "label": "x"}\n{"text": \n', "line 2: no JSON"),
        ("a.jsonl", b'["a", "x"]\n', "line 1: one object per line"),
        ("a.jsonl", b'{"text": "\xff"}\n', "not UTF-8"),
        ("a.parquet", b"no parquet", "cannot be read as parquet"),
        ("a.xlsx", b"", r"unknown kind of file.*\.csv"),
    ],
)
def test_unreadable_files_are_named_with_the_reason(tmp_path, name, content, said):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=said) as caught:
        load(path)
    assert str(path) in str(caught.value)


def test_a_missing_file_suggests_its_neighbour(tmp_path):
    write(tmp_path / "train.csv")
    with pytest.raises(DataError, match=r"no file .*trian\.csv.*Did you mean 'train\.csv'"):
        load(tmp_path / "trian.csv")
    with pytest.raises(DataError, match="no file"):
        load(tmp_path / "nowhere" / "a.csv")


def test_names_may_start_from_a_folder(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.csv").write_text("text,label\nx,1\n")
    data = Files("a.csv", str(tmp_path / "b.csv"), path=str(tmp_path)).load(tmp_path)
    assert (len(data.train), len(data.test)) == (1, 1)  # absolute names stay what they are
    with pytest.raises(DataError, match=r"There is no file a\.csv"):
        Files("a.csv", "b.csv").load(tmp_path)
