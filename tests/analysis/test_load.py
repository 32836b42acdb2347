import json
import subprocess
import sys
import warnings

import pandas as pd
import pytest

import analysis
from analysis.load import CONFIG_COLUMNS
from cl_peft.errors import DamagedRunError, DataError

COLUMNS = [
    *("run", "group", "state", "module", "router", "learner", "stream", "backbone"),
    *("seed_order", "seed_init", "seed_data"),
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
