"""Every file under conf/ is walked: composed, validated, and exercised."""

import json

import pytest
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from package_index import PackageIndex
from running import CONF, RIDGE, config, run, warm_command
from tiny_data import tiny_data as make

from cl_peft.config import AXES, Protocol, build, run_id, split_stream, validate
from cl_peft.errors import ConfigError
from cl_peft.schema import class_constant, constructor_model
from cl_peft.streams.protocol import make_stream

SMOKE = ("debug=smoke",)


def names(group):
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def valid(*overrides):
    return validate(config(*SMOKE, *overrides))


@pytest.fixture
def tiny_data(tmp_path, monkeypatch):
    """A function that makes tiny data for a stream's configuration, and returns overrides."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with PackageIndex() as index:
        monkeypatch.setenv("PIP_INDEX_URL", index.url)
        yield lambda stream: make(stream, tmp_path / "data", index)


AXIS_FILES = [(axis, name) for axis in AXES for name in names(axis)]
#: What a file leaves to its user, so that it can be validated.
NEEDED = {
    "stream/files": {"train": "a.csv", "test": "b.csv", "tasks": 2},
    "stream/hub": {"path": "owner/name", "tasks": 2},
    "stream/standard_cl_fewshot": {"path": "somewhere"},
    "backbone/encoder": {"name": "owner/name"},
    "backbone/decoder": {"name": "owner/name"},
}


def raw(axis, name):
    node = OmegaConf.load(CONF / axis / f"{name}.yaml")
    for other in node.pop("defaults", ["_self_"])[:-1]:  # of the form /common/FILE@_here_
        node = OmegaConf.merge(
            OmegaConf.load(CONF / f"{other.strip('/').split('@')[0]}.yaml"), node
        )
    return OmegaConf.to_container(node)


def test_every_group_is_walked():
    groups = {path.name for path in CONF.iterdir() if path.is_dir()}
    assert groups == {*AXES, "cluster", "common", "debug", "experiment", "search", "sweep"}
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
    if axis == "learner":  # one that is made for certain modules gets the first of them
        modules = class_constant(raw(axis, name)["_target_"], "modules")
        overrides += [f"module={module}" for module in modules[:1]]
    checked = valid(*overrides, *fits.get(f"{axis}/{name}", []))
    assert checked[axis]["_target_"] == raw(axis, name)["_target_"]
    if needed:
        missing = config(*SMOKE, f"{axis}={name}")
        with pytest.raises(ConfigError) as error:
            validate(missing)
        assert all(f"{axis}.{key}=..." in str(error.value) for key in needed)


def tasks_of(stream):
    """How many tasks a stream's configuration promises."""
    parts = stream.get("sets") or stream.get("domains")
    each = stream["tasks"] or (len(parts) if parts else 4)  # ratings have four domains
    return each * stream["repetitions"]


@pytest.mark.parametrize("name", names("stream"))
def test_stream_delivers_its_tasks(name, tiny_data, tmp_path):
    """Every stream, with its own source on tiny data, gives the tasks that its file promises."""
    given = [f"stream.{key}={v}" for key, v in NEEDED.get(f"stream/{name}", {}).items()]
    as_written = valid(f"stream={name}", *given)["stream"]
    stream = valid(f"stream={name}", *given, *tiny_data(as_written))["stream"]
    protocol, source = split_stream(stream)
    data = build({**source, "name": name}).load(tmp_path / "cache")
    tasks = make_stream(data, protocol, order_seed=0, data_seed=0).tasks
    parts = stream.get("sets") or stream.get("domains")
    assert len(tasks) == tasks_of(stream)
    if isinstance(stream["order"], int):
        assert [task.name for task in tasks] == stream["orders"][stream["order"]]
        assert all(len(order) == len(parts) for order in stream["orders"].values())
        assert all(set(order) == set(parts) for order in stream["orders"].values())
    assert all(len(task.train) and len(task.validation) and len(task.test) for task in tasks)


# ------------------------------------------------------------------ experiments and sweeps


def test_there_are_experiments_and_sweeps():
    assert names("experiment") == [
        *("banking77", "clinc150", "newsgroups", "standard_cl_fewshot", "with_bounds")
    ]
    assert names("sweep") == [
        *("bounds", "heads", "learners", "orders", "prompt_learners", "routers")
    ]
    assert names("debug") == ["smoke"]  # exercised by the fixture smoke_run


@pytest.mark.parametrize("name", names("experiment"))
def test_experiment_runs(name, tiny_data, places):
    """The whole experiment with its own source, on tiny data and a tiny backbone. An experiment
    whose source has no tiny data here fails."""
    needed = ["stream.path=somewhere"] if name == "standard_cl_fewshot" else []
    as_written = validate(config(f"experiment={name}", *needed))
    shrink = ["backbone=tiny", "trainer.epochs=1", "tracker=disabled", "threads=1"]
    if as_written["router"]["name"] == "ridge":
        shrink.append("router.projection=64")
    folder = run(f"experiment={name}", *shrink, *places, *tiny_data(as_written["stream"]))
    stored = OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"))
    for axis in ("module", "learner", "optimizer"):
        assert stored[axis] == as_written[axis]
    tasks = json.loads((folder / "stream.json").read_text())["tasks"]
    assert len(tasks) == tasks_of(as_written["stream"])
    assert json.loads((folder / "status.json").read_text())["state"] == "finished"


@pytest.mark.parametrize("name", names("sweep"))
def test_sweep_names_different_valid_runs(name):
    composed = config(*SMOKE, f"sweep={name}", return_hydra_config=True)
    assert str(composed.hydra.mode) == "RunMode.MULTIRUN"
    params = [f"{key}={value}" for key, value in composed.hydra.sweeper.params.items()]
    jobs = BasicSweeper.split_arguments(OverridesParser.create().parse_overrides(params), None)[0]
    assert len(jobs) >= 9
    assert len({run_id(valid(f"sweep={name}", *job)) for job in jobs}) == len(jobs)


#: What makes a sweep fit the tiny backbone, or short.
FEWER = {"routers": ["seed.order=0"], "heads": ["seed.order=0", "router.layers=null,[1,2]"]}


@pytest.mark.parametrize("name", names("sweep"))
def test_sweep_runs(name, places, tmp_path):
    small = ["trainer.epochs=1", "stream.tasks=2", *FEWER.get(name, [])]
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
