"""Which runs can be paired example by example, and what is said of those that cannot."""

import json
import warnings

import pytest
import yaml

import analysis
from analysis.folders import open_run
from analysis.pairing import UNKNOWN, changed_data, in_same_tasks, names_of_tests
from cl_peft.errors import DataError


@pytest.fixture
def two(tmp_path, write_run):
    return write_run(tmp_path / "g" / "a", router="prototype"), write_run(tmp_path / "g" / "b")


def edit(run, **changes):
    """Change stream.json: ``digests``, or any of its keys."""
    stream = json.loads((run / "stream.json").read_text())
    for task, digest in zip(stream["tasks"], changes.pop("digests", ()), strict=False):
        task["test_digest"] = digest
    (run / "stream.json").write_text(json.dumps(stream | changes))


def digests(run):
    return [task["test_digest"] for task in json.loads((run / "stream.json").read_text())["tasks"]]


def configure(run, **keys):
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["stream"] |= keys
    (run / "config.yaml").write_text(yaml.safe_dump(config))


def test_the_same_tests(two):
    assert in_same_tasks(*two)
    # other training examples, so another fingerprint: the tests are what counts
    edit(two[1], fingerprint="0" * 64)
    assert in_same_tasks(*two)


def test_another_order_of_the_tasks_pairs_by_class_and_row(two):
    edit(two[1], digests=digests(two[1])[::-1])
    assert not in_same_tasks(*two)
    assert "Other tasks: 160 of 160 and 160" in analysis.compare_runs(*two).notes[0]
    frame = analysis.load_runs(two[0].parent)
    assert frame["tests"].nunique() == 1
    assert analysis.paired_tests(frame)["n"].tolist() == [1]


def test_data_that_changed_in_between(two):
    edit(two[1], digests=["0" * 16])
    expected = (
        r"g/a and g/b cannot be paired: they were tested on other examples \(160 and 160; tasks 1\)"
        r".*the data have changed in between"
    )
    for pair in (analysis.compare_runs, in_same_tasks):
        with pytest.raises(DataError, match=expected):
            pair(*two)
    frames = [analysis.load_predictions(run, after_task=-1) for run in two]
    with pytest.raises(DataError, match=expected):
        analysis.compare_examples([tuple(frames)])
    with pytest.raises(DataError, match=expected):
        analysis.example_pairs(two[0].parent, {"router": "prototype"}, {"router": "ridge"})
    frame = analysis.load_runs(two[0].parent)
    with pytest.raises(DataError, match="Runs g/a and g/b cannot be paired"):
        analysis.paired_tests(frame)


def test_a_key_of_the_stream_that_differs_is_named(tmp_path, write_run):
    two = [write_run(tmp_path / "g" / name) for name in ("a", "b")]
    for run, shots, digest in zip(two, (15, 30), ("0" * 16, "1" * 16), strict=True):
        configure(run, test_shots=shots)
        edit(run, digests=[digest])
    with pytest.raises(DataError, match=r"They differ in stream.test_shots \(15 and 30\)"):
        analysis.compare_runs(*two)
    frame = analysis.load_runs(two[0].parent, config="varying")
    with pytest.raises(DataError, match=r"They differ in stream.test_shots \(15 and 30\)"):
        analysis.paired_tests(frame)


def test_older_runs_have_the_fingerprint_of_their_stream_only(tmp_path, write_run):
    old, older = (write_run(tmp_path / "g" / name, digests=False) for name in ("a", "b"))
    new = write_run(tmp_path / "g" / "c", router="prototype")
    assert in_same_tasks(old, older)
    assert in_same_tasks(old, new)
    frame = analysis.load_runs(tmp_path)
    assert frame["tests"].nunique() == 1  # the new run knows which tests the fingerprint stands for
    edit(older, fingerprint="0" * 64)
    with pytest.raises(DataError, match=r"older version wrote g/b without .* fingerprints"):
        in_same_tasks(new, older)
    with pytest.raises(DataError, match="older version wrote g/a and g/b without"):
        in_same_tasks(old, older)


def test_names_of_tests():
    def stream(*found, **rest):
        return {"tasks": [{"test_digest": digest} for digest in found], **rest}

    half = "8" + "0" * 15
    assert names_of_tests(
        [
            stream(half, half, fingerprint="f"),
            stream("0" * 15 + "3", "0" * 15 + "4"),
            {"tasks": [{}], "fingerprint": "f"},
            {"tasks": [{}], "fingerprint": "e"},
            {},
        ]
    ) == ["0" * 16, "0" * 15 + "7", "0" * 16, "stream e", UNKNOWN]


def test_a_run_that_does_not_say_what_it_was_tested_on_is_not_paired(two):
    (two[1] / "stream.json").unlink()
    frame = analysis.load_runs(two[0].parent)
    with pytest.raises(DataError, match="it is unknown what examples g/b was tested on"):
        analysis.paired_tests(frame)


def test_training_data_that_changed_in_between(two):
    """Equal tests: only the fingerprints tell that the runs were trained on other examples."""
    edit(two[1], fingerprint="0" * 64)
    said = "runs g/a and g/b have the same stream settings and seeds, but other data"
    for load in (analysis.load_runs, analysis.load_run_table):
        with pytest.warns(UserWarning, match=said):
            load(two[0].parent)
    with pytest.warns(UserWarning, match=said):
        analysis.example_pairs(two[0].parent, {"router": "prototype"}, {"router": "ridge"})
    assert any(said in note for note in analysis.compare_runs(*two).notes)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        analysis.load_runs(two[0].parent, where={"router": "ridge"})
        analysis.load_run_table(two[0].parent, where={"router": "ridge"})


def test_other_settings_seeds_or_unknown_data_are_no_change(tmp_path, write_run):
    names = ("a", "other_key", "other_seed", "nameless", "none")
    runs = {name: write_run(tmp_path / "g" / name, seed=int("seed" in name)) for name in names}
    configure(runs["other_key"], train_shots=4)
    for k, run in enumerate(runs.values()):
        edit(run, fingerprint=str(k))
    edit(runs["nameless"], fingerprint=None)
    (runs["none"] / "stream.json").unlink()
    assert changed_data([open_run(run) for run in runs.values()]) == ""
    edit(write_run(tmp_path / "g" / "b"), fingerprint="9")
    edit(write_run(tmp_path / "g" / "c"), fingerprint="9")
    edit(write_run(tmp_path / "g" / "d", seed=1), fingerprint="8")
    text = changed_data([open_run(run) for run in analysis.run_folders(tmp_path)])
    assert "runs g/a and g/b have the same" in text
    assert "(with other settings or seeds: 1 more)" in text
