import hashlib
import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pandas as pd
import pytest
import yaml
from fake_run import write_sweep

import analysis
from analysis import folders, load
from analysis.cache import ResultCache
from analysis.load import CONFIG_COLUMNS
from cl_peft.errors import DamagedRunError, DataError, UserError

COLUMNS = [
    *("run", "group", "state", "module", "router", "learner", "stream", "backbone"),
    *("seed_order", "seed_init", "seed_data", "tests"),
    *("after_task", "eval_task", "routing", "metric", "value"),
]


def pick(frame, **equal):
    for column, value in equal.items():
        frame = frame[frame[column].isna() if value is None else frame[column] == value]
    return frame


def test_tidy_frame_of_a_sweep(sweep):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        frame = analysis.load_runs(sweep)
    assert list(frame.columns) == COLUMNS
    assert frame["run"].nunique() == 6
    runs = frame.drop_duplicates("run").set_index("run")
    assert runs.loc["sequential-2", "learner"] == "sequential"
    assert runs.loc["sequential-2", list(COLUMNS[8:11])].tolist() == [2, 2, 2]
    assert set(frame["group"]) == {"spine"}
    assert set(frame["state"]) == {"finished"}
    assert set(frame["routing"]) == {"oracle", "routed", "none"}
    assert str(frame["eval_task"].dtype) == "Int32"
    assert str(frame["value"].dtype) == "float64"
    # 4 tasks: 10 cells; each number once per run
    assert len(pick(frame, metric="accuracy", routing="routed")) == 6 * 10
    assert not frame.duplicated(["run", "after_task", "eval_task", "routing", "metric"]).any()


def test_values_are_those_of_the_run(sweep):
    stored = pd.read_parquet(sweep / "spine" / "sequential-1" / "results.parquet")
    frame = analysis.load_runs(sweep / "spine" / "sequential-1")
    pd.testing.assert_frame_equal(
        frame[stored.columns].reset_index(drop=True), stored, check_dtype=False
    )
    assert frame[frame["metric"].eq("forgetting") & frame["after_task"].eq(1)]["value"].isna().all()


def test_filters(sweep):
    frame = analysis.load_runs(
        sweep, metric="average_accuracy", where={"learner": "isolated", "seed_init": [0, 2]}
    )
    assert set(frame["run"]) == {"isolated-0", "isolated-2"}
    assert set(frame["metric"]) == {"average_accuracy"}
    several = analysis.load_runs(sweep, metric=["accuracy", "n"], where={"run": "isolated-1"})
    assert set(several["metric"]) == {"accuracy", "n"}
    assert set(several["run"]) == {"isolated-1"}
    assert analysis.load_runs(sweep, where={"router": "oracle"}).empty


def test_configuration_keys_become_columns(tmp_path, write_run):
    write_run(tmp_path / "g" / "a", rank=4)
    write_run(tmp_path / "g" / "b", rank=16)
    frame = analysis.load_runs(tmp_path, config=["module.rank", "module.sites"])
    ranks = frame.drop_duplicates("run").set_index("run")
    assert ranks["module.rank"].to_dict() == {"a": 4, "b": 16}
    assert ranks.loc["a", "module.sites"] == '["query", "value"]'
    narrowed = analysis.load_runs(tmp_path, config=["module.rank"], where={"module.rank": 16})
    assert set(narrowed["run"]) == {"b"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"metric": "average_acuracy"}, "Did you mean 'average_accuracy'"),
        ({"where": {"ruoter": "ridge"}}, "Did you mean 'router'"),
        ({"config": ["module.rnak"]}, "Did you mean 'module.rank'"),
    ],
)
def test_a_misspelt_name_is_not_an_empty_frame(sweep, arguments, message):
    with pytest.raises(DataError, match=message):
        analysis.load_runs(sweep, **arguments)


def test_unfinished_runs_bring_what_they_committed(tmp_path, write_run):
    write_run(tmp_path / "g" / "running", done=2, state="running")
    write_run(tmp_path / "g" / "failed", done=1, state="failed")
    write_run(tmp_path / "g" / "refused", done=0, state="refused")  # no manifest, no numbers
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        frame = analysis.load_runs(tmp_path)
    latest = frame.groupby("run")["after_task"].max().to_dict()
    assert latest == {"failed": 1, "running": 2}
    assert set(pick(frame, run="running")["state"]) == {"running"}
    predictions = analysis.load_predictions(tmp_path / "g" / "running")
    assert sorted(predictions["after_task"].unique()) == [1, 2]
    assert analysis.load_predictions(tmp_path / "g" / "refused").empty


def test_files_that_the_manifest_does_not_list_are_not_read(tmp_path, write_run):
    """A task folder that was being written when the run was killed is not a result."""
    run = write_run(tmp_path / "g" / "killed", done=3, state="running")
    manifest = json.loads((run / "manifest.json").read_text())
    manifest["tasks"].pop()
    (run / "manifest.json").write_text(json.dumps(manifest))
    assert analysis.load_runs(run)["after_task"].max() == 2


def test_runs_are_found_at_any_depth_but_not_inside_runs(tmp_path, write_run):
    write_run(tmp_path / "one")
    write_run(tmp_path / "a" / "b" / "c" / "two")
    write_run(tmp_path / ".trash" / "three")
    found = [path.name for path in analysis.run_folders(tmp_path)]
    assert sorted(found) == ["one", "two"]


def damage_digest(run):
    data = bytearray((run / "results.parquet").read_bytes())
    data[len(data) // 2] ^= 1
    (run / "results.parquet").write_bytes(data)


def damage_lost_results(run):
    (run / "results.parquet").unlink()


def damage_truncated_status(run):
    (run / "status.json").write_text('{"state": "fin')


def damage_lost_config(run):
    (run / "config.yaml").unlink()


def damage_config(run):
    (run / "config.yaml").write_text("a: [1, 2")


def damage_lost_manifest(run):
    (run / "manifest.json").unlink()


def damage_manifest_format(run):
    manifest = json.loads((run / "manifest.json").read_text())
    (run / "manifest.json").write_text(json.dumps(manifest | {"format": 2}))


@pytest.mark.parametrize(
    ("damage", "file"),
    [
        (damage_digest, "results.parquet differs from the digest"),
        (damage_lost_results, "results.parquet cannot be read"),
        (damage_truncated_status, "status.json cannot be read"),
        (damage_lost_config, "config.yaml cannot be read"),
        (damage_config, "config.yaml cannot be read"),
        (damage_lost_manifest, "manifest.json cannot be read"),
        (damage_manifest_format, "manifest.json has format 2"),
    ],
)
def test_a_damaged_run_is_named_and_skipped(tmp_path, write_run, damage, file):
    write_run(tmp_path / "g" / "good")
    damage(write_run(tmp_path / "g" / "bad"))
    with pytest.warns(UserWarning, match=file) as caught:
        frame = analysis.load_runs(tmp_path)
    assert len(caught) == 1
    assert str(tmp_path / "g" / "bad") in str(caught[0].message)
    assert set(frame["run"]) == {"good"}


def test_damaged_predictions_are_never_used(tmp_path, write_run):
    run = write_run(tmp_path / "g" / "bad")
    (run / "predictions.parquet").write_bytes(b"PAR1")
    with pytest.raises(DamagedRunError, match=r"predictions\.parquet differs"):
        analysis.load_predictions(run)


def test_no_folder_and_no_runs(tmp_path):
    with pytest.raises(DataError, match="There is no folder"):
        analysis.load_runs(tmp_path / "nowhere")
    with pytest.warns(UserWarning, match="no run folder under"):
        frame = analysis.load_runs(tmp_path)
    assert frame.empty
    assert list(frame.columns) == COLUMNS


# ---------------------------------------------------------------- the table of runs


def test_run_table_says_what_each_run_is_and_how_far_it_came(tmp_path, write_run):
    write_run(tmp_path / "g" / "a", rank=4)
    write_run(tmp_path / "g" / "b", done=1, state="failed", seed=3)
    write_run(tmp_path / "g" / "c", done=0, state="refused")
    table = analysis.load_run_table(tmp_path).set_index("run")
    assert table["finished"].to_dict() == {"a": True, "b": False, "c": False}
    assert table["tasks_done"].tolist() == [4, 1, 0]
    assert table["tasks"].tolist() == [4, 4, 4]
    assert table.loc["b", ["seed_init", "seed.init"]].tolist() == [3, 3]
    assert table["module.rank"].tolist() == [4, 8, 8]
    assert table.loc["a", "module.sites"] == '["query", "value"]'
    assert table.loc["a", "folder"] == str(tmp_path / "g" / "a")
    for key, value in analysis.load_config(tmp_path / "g" / "a").items():
        assert key in table.columns or key == "group"
        assert isinstance(value, list) or key == "group" or table.loc["a", key] in (value, None)
    chosen = analysis.load_run_table(tmp_path, where={"module.rank": 8, "finished": False})
    assert chosen["run"].tolist() == ["b", "c"]


def test_run_table_opens_no_table_of_numbers(tmp_path, write_run):
    run = write_run(tmp_path / "g" / "a")
    for path in run.rglob("*.parquet"):
        path.unlink()
    assert analysis.load_run_table(tmp_path)["run"].tolist() == ["a"]


def test_runs_that_where_excludes_are_not_opened(tmp_path, write_run):
    write_run(tmp_path / "g" / "a", router="ridge")
    (write_run(tmp_path / "g" / "b", router="oracle") / "results.parquet").unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert set(analysis.load_runs(tmp_path, where={"router": "ridge"})["run"]) == {"a"}


def test_a_run_found_twice_counts_once(tmp_path, write_run):
    write_run(tmp_path / "one" / "g" / "a")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    with pytest.warns(UserWarning, match="the same run as") as caught:
        frame = analysis.load_runs(tmp_path)
    assert str(tmp_path / "two" / "g" / "a") in str(caught[0].message)
    assert not frame.duplicated(["run", "after_task", "eval_task", "routing", "metric"]).any()


def rewrite(run, **changes):
    """Change keys of a run's configuration, given with ``__`` for the dot."""
    config = yaml.safe_load((run / "config.yaml").read_text())
    for key, value in changes.items():
        axis, name = key.split("__")
        config.setdefault(axis, {})[name] = value
    (run / "config.yaml").write_text(yaml.safe_dump(config))


def test_varying_keys_are_all_but_the_seeds(tmp_path, write_run):
    for k, (router, rank) in enumerate([("ridge", 4), ("ridge", 8), ("oracle", 4), ("oracle", 8)]):
        run = write_run(tmp_path / "g" / f"{k}", router=router, rank=rank, seed=k)
        target = f"cl_peft.routers.{router}"
        rewrite(run, router___target_=target, paths__runs=str(k), module__scale=2 * rank)
    jobs = analysis.load_run_table(tmp_path)
    # _target_ follows the name, scale the rank; paths change nothing that is computed
    assert analysis.varying_keys(jobs) == ["module.rank", "router.name"]
    assert analysis.varying_keys(jobs, ignore=["module.rank"]) == ["module.scale", "router.name"]
    frame = analysis.load_runs(tmp_path, config="varying")
    assert list(frame.columns) == [*COLUMNS[:12], "module.rank", *COLUMNS[12:]]
    assert analysis.varying_keys(frame) == ["router", "module.rank"]
    assert analysis.varying_keys(jobs.head(1)) == []


def test_grouping_by_varying_keys_separates_every_configuration(tmp_path, write_run):
    """A key that only some modules have, and one that varies within one module only."""
    settings = [("lora", 4), ("lora", 8), ("prompt", None), ("prompt", None)]
    for k, (module, rank) in enumerate(settings):
        run = write_run(tmp_path / "g" / f"{k}", seed=k)
        config = yaml.safe_load((run / "config.yaml").read_text())
        config["module"] = {"name": module} | ({"rank": rank} if rank else {"length": 10})
        (run / "config.yaml").write_text(yaml.safe_dump(config))
    jobs = analysis.load_run_table(tmp_path)
    keys = analysis.varying_keys(jobs)
    assert keys == ["module.name", "module.rank"]  # the length is that of every prompt
    assert len(jobs.groupby(keys, dropna=False)) == 3


# ---------------------------------------------------------------- the cache


def cached(root, **options):
    """Load with the cache, and check that it changes nothing."""
    frame = analysis.load_runs(root, cache=True, **options)
    pd.testing.assert_frame_equal(frame, analysis.load_runs(root, **options))
    return frame


@pytest.fixture
def opened(monkeypatch):
    """Names of the runs whose numbers were read from their folder."""
    names = []

    def reading(run):
        names.append(run.path.name)
        return folders.results_table(run)

    monkeypatch.setattr(load, "results_table", reading)
    return names


def test_unchanged_runs_come_from_the_cache(sweep, opened):
    first = analysis.load_runs(sweep, cache=True)
    assert len(opened) == 6
    again = analysis.load_runs(sweep, cache=True)
    assert len(opened) == 6
    pd.testing.assert_frame_equal(first, again)
    pd.testing.assert_frame_equal(first, analysis.load_runs(sweep))
    assert (sweep / ".analysis.parquet").is_file()
    assert len(analysis.run_folders(sweep)) == 6


@pytest.mark.parametrize(
    "options",
    [
        {"metric": "accuracy"},
        {"where": {"learner": "isolated", "seed_init": [0, 2]}},
        {"metric": ["n", "forgetting"], "where": {"run": "sequential-1"}, "config": "varying"},
        {"where": {"router": "oracle"}},
    ],
)
def test_the_cache_answers_every_question_alike(sweep, options):
    cached(sweep)
    cached(sweep, **options)
    (sweep / ".analysis.parquet").unlink()
    cached(sweep, **options)  # and when it is written by that question
    cached(sweep)


def test_changed_new_and_removed_runs(sweep, write_run, opened):
    cached(sweep)
    shutil.rmtree(sweep / "spine" / "isolated-0")
    shutil.rmtree(sweep / "spine" / "isolated-1")
    write_run(sweep / "spine" / "isolated-1", seed=9)
    write_run(sweep / "spine" / "new", seed=5)
    opened.clear()
    analysis.load_runs(sweep, cache=True)
    assert sorted(opened) == ["isolated-1", "new"]
    assert set(cached(sweep)["run"]) >= {"new", "isolated-1"}
    assert "isolated-0" not in set(cached(sweep)["run"])


def test_a_run_that_goes_on_is_read_again(tmp_path, write_run):
    write_run(tmp_path / "g" / "other")
    run = write_run(tmp_path / "g" / "a", done=2, state="running")
    assert cached(tmp_path, where={"run": "a"})["after_task"].max() == 2
    shutil.rmtree(run)
    write_run(run, done=3, state="running")
    assert cached(tmp_path, where={"run": "a"})["after_task"].max() == 3
    shutil.rmtree(run)
    write_run(run)
    assert set(cached(tmp_path, where={"run": "a"})["state"]) == {"finished"}


def test_damage_is_seen_through_the_cache(sweep):
    cached(sweep)
    damage_digest(sweep / "spine" / "isolated-0")
    for _ in range(2):
        with pytest.warns(UserWarning, match=r"isolated-0/results\.parquet differs"):
            frame = analysis.load_runs(sweep, cache=True)
        assert frame["run"].nunique() == 5


def test_new_numbers_of_equal_size_and_time_are_seen(sweep):
    """Not the clock decides but the manifest, which holds the digest of every table."""
    cached(sweep)
    run = sweep / "spine" / "isolated-0"
    path = run / "results.parquet"
    before = path.stat()
    table = pd.read_parquet(path)
    table.assign(value=table["value"][::-1].to_numpy()).to_parquet(path)
    data = path.read_bytes()
    manifest = json.loads((run / "manifest.json").read_text())
    manifest["final"]["results.parquet"] = {
        "sha256": hashlib.sha256(data).hexdigest(),
        "bytes": len(data),
    }
    (run / "manifest.json").write_text(json.dumps(manifest))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    real_stat = Path.stat

    def same_size(self, **options):
        return before if self == path else real_stat(self, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "stat", same_size)
        cached(sweep)


def test_no_bit_of_the_cache_is_trusted(sweep):
    cached(sweep)
    path = sweep / ".analysis.parquet"
    data = path.read_bytes()
    good = ResultCache(path)
    names = list(good.keys)
    whole, sizes = good.read(names)
    for at in range(4, len(data), len(data) // 60):
        bad = bytearray(data)
        bad[at] ^= 0x10
        path.write_bytes(bytes(bad))
        cache = ResultCache(path)
        if cache.keys == good.keys:
            found = cache.read(names)
            assert found is None or (found[0].equals(whole) and found[1] == sizes)


def test_a_damaged_or_foreign_cache_is_written_anew(sweep):
    whole = cached(sweep)
    path = sweep / ".analysis.parquet"
    data = path.read_bytes()
    middle = bytearray(data)
    middle[len(data) // 3] ^= 0xFF  # in a page of numbers: keys still read well
    for bad in (b"", b"PAR1", data[: len(data) // 2], bytes(middle)):
        path.write_bytes(bad)
        pd.testing.assert_frame_equal(cached(sweep), whole)
        assert ResultCache(path).keys
    other = pd.DataFrame({"a": [1]})
    other.to_parquet(path)
    pd.testing.assert_frame_equal(cached(sweep), whole)


def test_the_cache_goes_where_it_is_told(sweep, tmp_path, monkeypatch):
    place = tmp_path / "elsewhere" / "numbers.parquet"
    frame = analysis.load_runs(sweep, cache=place)
    assert place.is_file()
    assert not (sweep / ".analysis.parquet").exists()
    pd.testing.assert_frame_equal(frame, analysis.load_runs(sweep, cache=str(place)))
    one = sweep / "spine" / "isolated-0"
    analysis.load_runs(one, cache=True)
    assert not (one / ".analysis.parquet").exists()  # a run folder holds what its run wrote

    def full(*_):
        raise UserError("no space left")

    monkeypatch.setattr("analysis.cache.write_atomic", full)
    with pytest.warns(UserWarning, match=r"was not written: no space left"):
        pd.testing.assert_frame_equal(
            analysis.load_runs(sweep, cache=tmp_path / "c.parquet"), frame
        )


def test_many_runs(tmp_path):
    """Two hundred folders as a sweep leaves them; the numbers are those of each folder."""
    written = write_sweep(tmp_path, 200, tasks=4)
    frame = cached(tmp_path, config="varying")
    assert frame["run"].nunique() == 200
    assert analysis.varying_keys(frame) == ["router", "module.rank"]
    for folder in (written[0], written[57], written[-1]):
        stored = pd.read_parquet(folder / "results.parquet")
        mine = pick(frame, run=folder.name)
        assert mine["value"].to_numpy() == pytest.approx(stored["value"].to_numpy(), nan_ok=True)
        config = yaml.safe_load((folder / "config.yaml").read_text())
        assert set(mine["module.rank"]) == {config["module"]["rank"]}
        assert set(mine["seed_order"]) == {config["seed"]["order"]}


# ---------------------------------------------------------------- single files


def test_predictions_of_one_evaluation(tmp_path, write_run):
    for state in ("finished", "running"):
        run = write_run(tmp_path / state, state=state)
        whole = analysis.load_predictions(run)
        for after, at in ((2, 2), (-1, 4)):
            part = analysis.load_predictions(run, after_task=after, columns=["row", "margin"])
            expected = whole[whole["after_task"] == at][["row", "margin"]].reset_index(drop=True)
            pd.testing.assert_frame_equal(part, expected)


def test_load_config_is_flat(tmp_path, write_run):
    config = analysis.load_config(write_run(tmp_path / "g" / "a", rank=4))
    assert config["module.rank"] == 4
    assert config["module.sites"] == ["query", "value"]
    assert config["router.alpha"] is None
    assert set(CONFIG_COLUMNS.values()) <= set(config)


def test_reading_runs_imports_neither_torch_nor_matplotlib(sweep):
    code = (
        "import sys, analysis\n"
        "assert 'pandas' not in sys.modules\n"
        f"frame = analysis.load_runs({str(sweep)!r})\n"
        "analysis.summary(frame)\n"
        "heavy = {'torch', 'matplotlib', 'transformers', 'wandb'} & set(sys.modules)\n"
        "print(len(frame), sorted(heavy))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    count, heavy = done.stdout.split(maxsplit=1)
    assert int(count) > 0
    assert heavy.strip() == "[]"


def test_every_public_name_resolves():
    for name in analysis.__all__:
        assert callable(getattr(analysis, name))
    with pytest.raises(AttributeError, match="no attribute 'load_run'"):
        analysis.load_run  # noqa: B018 (the lookup is the test)


def test_a_run_that_lost_its_stream_is_damaged(sweep):
    run = sweep / "spine" / "isolated-1"
    manifest = json.loads((run / "manifest.json").read_text())
    (run / "manifest.json").write_text(json.dumps(manifest | {"fixed": {"stream.json": {}}}))
    assert len(analysis.load_run_table(sweep)) == 6
    (run / "stream.json").unlink()
    with pytest.warns(UserWarning, match=r"skipped a damaged run: .*stream\.json is missing"):
        assert len(analysis.load_run_table(sweep)) == 5
