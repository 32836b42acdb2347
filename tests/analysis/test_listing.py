"""Order and wording of lists."""

import pandas as pd

import analysis
from analysis.listing import count, in_order, natural
from cl_peft.errors import some


def test_natural_order():
    ordered = [2, 10.5, "1e3", "[1, 2]", "[1, 10]", "[2]", "ridge 2", "ridge 10", None]
    assert sorted({*ordered}, key=natural) == ordered
    assert natural(float("nan")) == natural(pd.NA) == natural(None)
    assert natural("nan") < natural(None)


def test_rows_by_their_columns():
    rows = pd.DataFrame({"a": ["y", "x", "y", "x"], "b": [10, 9, 9, None]}, index=[5, 6, 7, 8])
    assert in_order(rows, ["a", "b"]).index.tolist() == [6, 8, 7, 5]
    assert in_order(rows, []).index.tolist() == [5, 6, 7, 8]


def test_words():
    assert some(["a", "b"], 2) == "a, b"
    assert some(["a", "b", "c", "d"], 2, "; ") == "a; b and 2 more"
    assert [count(n, "pair") for n in (0, 1, 2, "1 to 2")] == [
        *("0 pairs", "1 pair", "2 pairs", "1 to 2 pairs")
    ]


def test_rows_of_tables_do_not_come_in_the_order_of_folders(tmp_path, write_run):
    names = zip("abcdef", (16, 4, 100, 16, 4, 100), ("x", "x", "x", "b", "b", "b"), strict=True)
    for name, rank, router in names:
        write_run(tmp_path / "g" / name, rank=rank, router=router)
    frame = analysis.load_runs(tmp_path, config=["module.rank"])
    rows = analysis.paper_table(frame).rows
    assert rows.to_numpy().tolist() == [[r, n] for r in ("b", "x") for n in (4, 16, 100)]
    assert analysis.aggregate(frame)["module.rank"].tolist()[:3] == [4, 16, 100]
    scores = analysis.score_table(frame, metric="average_accuracy_routed")
    assert list(scores.columns) == [f"{r}, rank {n}" for r in ("b", "x") for n in (4, 16, 100)]
