import shutil
import subprocess
import sys

import pandas as pd
import pytest
from omegaconf import OmegaConf
from running import CONF, ROOT, command, config

from cl_peft import combinations
from cl_peft.config import AXES, build, plain, run_id, validate
from cl_peft.errors import ConfigError

SMOKE = ("debug=smoke", "router=ridge")


def words(text):
    return text.split()


def valid(*overrides):
    return validate(config(*SMOKE, *overrides))


def refused(*overrides):
    with pytest.raises(ConfigError) as error:
        valid(*overrides)
    return str(error.value)


# ------------------------------------------------------------------ unknown keys


@pytest.mark.parametrize(
    ("override", "near"),
    [
        ("+module.rnak=4", "module.rank"),
        ("+stream.shot=4", "stream.shots"),
        ("+stream.clases=4", "stream.classes"),
        ("+trainer.epoch=4", "trainer.epochs"),
        ("+backbone.max_lenght=4", "backbone.max_length"),
        ("+seed.ordr=4", "seed.order"),
        ("+paths.cach=x", "paths.cache"),
        ("+tracker.mod=offline", None),
        ("+devise=cpu", "device"),
        ("+routr.name=x", "router"),
    ],
)
def test_key_added_with_plus_is_refused(override, near):
    text = refused(override)
    assert override.strip("+").split("=")[0].split(".")[0] in text
    if near is not None:
        assert f"Did you mean '{near}'?" in text


def test_dict_in_place_of_a_value_is_refused():
    assert "module.rank" in refused("module.rank={a:1}")
    assert "seed.deep" in refused("+seed.deep={er:1}")


def test_every_problem_is_named_at_once():
    text = refused("+module.rnak=4", "trainer.epochs=0", "stream.tasks=x", "+more=1")
    for key in ("module.rnak", "trainer.epochs", "stream.tasks", "more"):
        assert key in text


# ------------------------------------------------------------------ wrong values


@pytest.mark.parametrize(
    "override",
    [
        "trainer.epochs=0",
        "trainer.epochs=2.5",
        "trainer.epochs=many",
        "trainer.epochs=true",
        "trainer.epochs=null",
        "trainer.warmup=1.0",
        "trainer.clip=-1",
        "trainer.decay=sqrt",
        "trainer.accumulate=0",
        "trainer.checkpointing=true",
        "optimizer.lr=0",
        "optimizer.lr=fast",
        "optimizer.betas=[0.9]",
        "module.rank=-8",
        "module.dropout=1.0",
        "module.sites=query",
        "router.projection=0",
        "router.held_out=1",
        "stream.validation_share=1.0",
        "stream.scenario=blurry",
        "stream.tasks=0",
        "stream.shots=0",
        "stream.order=[1,2]",
        "stream.noise=1",
        "seed.order=-1",
        "seed.init=null",
        "threads=0",
        "threads=all",
        "device=gpu",
        "fresh=maybe",
        "group=a/b",
        "group=..",
        "stream.name='a b'",
        "learner.name=a/b",
    ],
)
def test_wrong_value_is_named(override):
    key = override.split("=")[0]
    assert key in refused(override)


def test_values_in_another_notation_are_the_same_run():
    assert run_id(valid("module.alpha=16")) == run_id(valid("module.alpha=16.0"))
    assert run_id(valid("optimizer.lr=0.005")) == run_id(valid("optimizer.lr=5e-3"))


def test_missing_axis_and_dangling_interpolation():
    assert "router: choose one" in refused("~router")
    with pytest.raises(ConfigError, match="nowhere"):
        plain(config(*SMOKE, "group=${nowhere}"))


# ------------------------------------------------------------------ combinations of axes


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["router=none"], "router=none does not fit learner=isolated"),
        (["router=none", "learner=frozen"], "router=none does not fit learner=frozen"),
        (["module=none"], "module=none does not fit learner=isolated"),
        (["module=none", "learner=joint"], "learner=frozen for the backbone without modules"),
        (["stream.scenario=task"], "Use router=oracle, or stream.scenario=class"),
        (["stream.tasks=null"], "stream.tasks: say into how many tasks stream=synthetic"),
        (["trainer.patience=1", "stream.validation_share=0"], "trainer.patience=null"),
        (["trainer.accumulate=2", "learner=derpp"], "does not fit learner=derpp"),
        (["trainer.accumulate=2", "learner=replay"], "Use trainer.accumulate=1; trainer.checkpoin"),
        (["trainer.accumulate=17"], "Use trainer.accumulate=16 or less"),
        (
            words(
                "stream=files stream.train=a stream.test=b stream.tasks=2 stream.scenario=domain"
            ),
            "stream.domain=COLUMN",
        ),
    ],
)
def test_combination_is_refused_with_what_fits(overrides, message):
    assert message in refused(*overrides)


@pytest.mark.parametrize(
    "overrides",
    [
        ["router=none", "learner=sequential"],
        ["module=none", "learner=frozen"],
        ["stream.scenario=task", "router=oracle"],
        ["stream.scenario=task", "learner=joint"],
        ["stream.scenario=domain", "stream.tasks=null"],
        ["trainer.patience=1"],
        ["trainer.accumulate=16", "trainer.checkpointing=on"],
        ["trainer.checkpointing=on", "learner=replay"],
        ["trainer.patience=1", "stream=clinc150", "stream.validation_share=0"],
        ["stream=newsgroups", "stream.scenario=domain", "stream.domain=Newspaper"],
    ],
)
def test_combination_that_makes_sense_is_allowed(overrides):
    valid(*overrides)


def test_text_stream_needs_a_backbone_for_text(monkeypatch):
    real = combinations.class_constant
    monkeypatch.setattr(
        combinations,
        "class_constant",
        lambda target, name: "image" if ".backbones." in target else real(target, name),
    )
    assert "stream=synthetic delivers text, but the backbone Tiny reads image" in refused()


# ------------------------------------------------------------------ identity


@pytest.mark.parametrize("learner", ["sequential", "joint"])
def test_learner_with_one_module_ignores_the_router(learner):
    ids = {
        run_id(valid(f"learner={learner}", f"router={r}"))
        for r in ("ridge", "prototype", "oracle", "none")
    }
    assert len(ids) == 1
    assert valid(f"learner={learner}")["router"]["name"] == "none"


def test_frozen_ignores_the_module():
    ids = {run_id(valid("learner=frozen", f"module={m}")) for m in ("lora", "none")}
    assert len(ids) == 1
    assert len({run_id(valid("learner=frozen", f"router={r}")) for r in ("ridge", "oracle")}) == 2


@pytest.mark.parametrize(
    "override",
    words(
        "paths.runs=x paths.cache=x paths.cache_gb=1 tracker=wandb group=x device=cuda threads=7 "
        "fresh=true"
    ),
)
def test_where_and_how_is_no_part_of_the_identity(override):
    assert run_id(valid(override)) == run_id(valid())


@pytest.mark.parametrize(
    "override",
    words(
        "seed.order=1 seed.init=1 seed.data=1 stream.tasks=2 stream.noise=0.4 stream.name=x "
        "stream.shots=3 backbone.width=64 backbone.name=x module.rank=2 router.projection=3 "
        "router=oracle learner=joint optimizer.lr=1e-4 trainer.epochs=9 trainer.eval_batch_size=7"
    ),
)
def test_what_is_computed_is_the_identity(override):
    assert run_id(valid(override)) != run_id(valid())


def test_identity_survives_its_file(tmp_path):
    text = OmegaConf.to_yaml(OmegaConf.create(valid()))
    (tmp_path / "config.yaml").write_text(text)
    assert run_id(validate(OmegaConf.load(tmp_path / "config.yaml"))) == run_id(valid())


def test_what_is_validated_is_complete_and_stays_valid():
    node = plain(config(*SMOKE))
    del node["module"]["alpha"], node["stream"]["shots"], node["device"]
    assert validate(node) == valid()
    assert validate(valid()) == valid()


# ------------------------------------------------------------------ build


def test_build_makes_the_object_that_the_node_names():
    router = build({"_target_": "cl_peft.routers.ridge.Ridge", "name": "x", "projection": 5})
    assert (type(router).__name__, router.projection) == ("Ridge", 5)
    with pytest.raises(ConfigError, match="projection=0"):
        build({"_target_": "cl_peft.routers.ridge.Ridge", "name": "x", "projection": 0})


@pytest.mark.parametrize(
    "target",
    words(
        "os.system subprocess.Popen cl_peft cl_peft_evil.x.Y builtins.eval cl_peft.runs.os "
        "cl_peft.runs.subprocess.Popen cl_peft..x cl_peft.routers.nope.X "
        "cl_peft.routers.ridge.Rigde cl_peft.streams.base.content_id"
    ),
)
def test_build_reaches_classes_of_cl_peft_only(target):
    with pytest.raises(ConfigError, match="_target_"):
        build({"_target_": target, "name": "x"})
    node = plain(config(*SMOKE))
    node["router"] = {"_target_": target, "name": "x"}
    with pytest.raises(ConfigError, match="router"):
        validate(node)


def test_nested_target_builds_nothing(tmp_path):
    evil = {"_target_": "pathlib.Path.touch", "self": str(tmp_path / "touched")}
    node = plain(config(*SMOKE))
    for place in ("rank", "extra"):
        with pytest.raises(ConfigError, match=place):
            build({**node["module"], place: evil})
        with pytest.raises(ConfigError, match=f"module.{place}"):
            validate({**node, "module": {**node["module"], place: evil}})
    assert not (tmp_path / "touched").exists()


def test_schemas_are_read_without_torch():
    files = [path for axis in AXES for path in (CONF / axis).glob("*.yaml")]
    # a preset has the class of the file that it builds on
    targets = sorted({OmegaConf.load(path).get("_target_") for path in files} - {None})
    assert len(targets) >= 18
    code = (
        "import sys\nfrom cl_peft.schema import constructor_model\n"
        f"for target in {targets}:\n    constructor_model(target)\n"
        "print(sorted({'torch', 'transformers', 'datasets', 'wandb'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (done.stdout.strip(), done.returncode) == ("[]", 0), done.stderr


ROUTER = '''
"""Always the newest task."""

from pydantic import PositiveInt
from torch import Tensor
import torch

from cl_peft.routers.base import Choice, Router


class Newest(Router):
    """Always the newest task.

    Args:
        bonus: How sure it is.
    """

    needs_features = False

    def __init__(self, bonus: PositiveInt = 1) -> None:
        self.bonus, self.tasks = bonus, 0

    def fit(self, features: Tensor, labels: Tensor, task: int) -> None:
        self.tasks = task + 1

    def choose(self, features: Tensor, tasks: Tensor | None = None) -> Choice:
        scores = torch.zeros(len(features), self.tasks)
        scores[:, -1] = float(self.bonus)
        return Choice.best(scores)

    def state(self) -> dict[str, Tensor]:
        return {"tasks": torch.tensor(self.tasks)}

    def load_state(self, state: dict[str, Tensor]) -> None:
        self.tasks = int(state["tasks"])
'''


def test_new_router_is_one_file_and_one_config(tmp_path, cache):
    for name in ("cl_peft", "analysis", "conf"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "main.py", tmp_path)
    (tmp_path / "cl_peft" / "routers" / "newest.py").write_text(ROUTER)
    (tmp_path / "conf" / "router" / "newest.yaml").write_text(
        "_target_: cl_peft.routers.newest.Newest\nname: newest\nbonus: 1\n"
    )
    args = [*SMOKE, "router=newest", f"paths.cache={cache}"]
    wrong = command(*args, "+router.bonsu=2", cwd=tmp_path)
    assert "Did you mean 'router.bonus'?" in wrong.stderr
    done = command(*args, "router.bonus=2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "runs" / "smoke").glob("lora-newest-isolated-*")
    predictions = pd.read_parquet(folder / "predictions.parquet")
    assert (predictions["routed_task"] == predictions["after_task"]).all()
