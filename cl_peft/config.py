"""The typed schema of a run, checks across axes, the run's identity, and the ``build()`` seam.

Nothing here imports torch: a wrong configuration is answered in about a second.

Two layers check a configuration. Hydra refuses unknown groups and keys while it composes. Then
:func:`validate` checks the resolved result again: it also catches what was added with ``+``, wrong
types, impossible values, and combinations of axes that make no sense.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, ValidationError

from cl_peft.errors import ConfigError, did_you_mean
from cl_peft.schema import class_constant, constructor_model
from cl_peft.streams.checks import protocol_problems

#: Groups whose ``_target_`` names the class that the other keys configure.
AXES = ("stream", "backbone", "module", "router", "learner", "optimizer", "trainer", "tracker")
#: Keys that decide where and on what a run happens, not what it computes: no part of its identity.
NOT_IDENTITY = ("paths", "tracker", "hydra", "group", "fresh", "device", "threads", "cache",
                "bounds", "fail_fast")  # fmt: skip

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class _Closed(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Seeds(_Closed):
    """Three seeds; changing one leaves what the others decide untouched."""

    order: NonNegativeInt = 0  # classes into tasks, task order
    init: NonNegativeInt = 0  # weights of modules, heads and projections; dropout
    data: NonNegativeInt = 0  # few-shot subsets, validation split, shuffles


class Protocol(_Closed):
    """How a source's examples become tasks; the keys of ``stream`` that every source shares.

    Attributes:
        name: Name of the stream.
        scenario: ``class``: disjoint classes, task unknown at test time; ``task``: the same, task
            given; ``domain``: the same classes in other domains.
        tasks: Number of tasks; null: as many as ``sizes``, domains or data sets.
        sizes: Classes of each task; ``random``: drawn by seed.order; null: as even as possible.
        order: Names of classes, domains or data sets; or the number of a published order; null:
            decided by seed.order.
        max_classes: Only so many classes, the first of the order.
        blurry: Share of each task's training examples that moves to the neighbouring tasks.
        repetitions: How often the sequence of tasks comes, each time with examples of its own.
        shots: Training examples per class, before validation examples are cut off.
        test_shots: Test examples per class.
        validation_share: Of training examples, where the source has no validation examples.
    """

    name: str
    scenario: Literal["class", "task", "domain"] = "class"
    tasks: PositiveInt | None = None
    sizes: list[PositiveInt] | Literal["random"] | None = None
    order: list[str] | PositiveInt | None = None
    blurry: Annotated[float, Field(ge=0, lt=1)] = 0.0
    repetitions: PositiveInt = 1
    max_classes: PositiveInt | None = None
    shots: PositiveInt | None = None
    test_shots: PositiveInt | None = None
    validation_share: Annotated[float, Field(ge=0, lt=1)] = 0.1


class Paths(_Closed):
    """Where things are kept."""

    runs: str = "runs"
    cache: str = "~/.cache/cl_peft"
    #: Of tokens, features and modules together; downloads are not bounded.
    cache_gb: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 20.0


class Settings(_Closed):
    """Keys at the top of the configuration that belong to no axis."""

    group: str
    fresh: bool = False
    device: str = "auto"
    threads: PositiveInt | Literal["auto"] = "auto"
    cache: Literal["on", "off"] = "on"
    bounds: Literal["on", "off"] = "off"
    fail_fast: bool = False
    seed: Seeds
    paths: Paths


def plain(cfg: DictConfig | Mapping[str, Any]) -> dict[str, Any]:
    """Resolve interpolations and return nested dicts and lists, without hydra's own node.

    Raises:
        ConfigError: A mandatory value is missing or an interpolation leads nowhere.
    """
    node = cfg if isinstance(cfg, DictConfig) else OmegaConf.create(dict(cfg))
    node = OmegaConf.masked_copy(node, [str(k) for k in node if k != "hydra"])
    try:
        missing = sorted(str(k) for k in OmegaConf.missing_keys(node))
        if missing:
            wanted = " ".join(f"{key}=..." for key in missing)
            raise ConfigError(
                f"{', '.join(missing)}: a value is needed. Add {wanted} to the command."
            )
        result = OmegaConf.to_container(node, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        where = getattr(error, "full_key", None) or "configuration"
        raise ConfigError(f"{where}: {str(error).splitlines()[0]}") from error
    return {str(key): value for key, value in dict(result).items()}  # type: ignore[arg-type]


def validate(cfg: DictConfig | Mapping[str, Any]) -> dict[str, Any]:
    """Check a whole configuration and return it plain, complete and normalised.

    Complete: defaults of constructors are filled in, so that the stored configuration says
    everything. Normalised: a learner that keeps one module consults no router, and one that trains
    none has no module, so those axes become ``none`` and equal runs get equal names.

    Raises:
        ConfigError: Every problem found, one line each, with the nearest allowed name.
    """
    config = plain(cfg)
    problems: list[str] = []
    known = (*AXES, *Settings.model_fields)
    for key in sorted(set(config) - set(known)):
        problems.append(
            f"{key}: there is no such key.{did_you_mean(key, known)}\n"
            f"    keys at the top: {', '.join(known)}"
        )
    for axis in AXES:
        node = config.get(axis)
        if not isinstance(node, dict) or "_target_" not in node:
            problems.append(f"{axis}: choose one, such as {axis}=NAME (see python main.py --help).")
            continue
        config[axis] = _check_axis(axis, node, problems)
    top = {k: v for k, v in config.items() if k in Settings.model_fields}
    config.update(_check_model(Settings, top, "", "the configuration", problems))
    if not problems:
        config = _normalise(config)
        problems += _combinations(config)
    if problems:
        raise ConfigError("configuration: " + "\nconfiguration: ".join(problems))
    return config


def run_id(config: Mapping[str, Any]) -> str:
    """Name a run by what it computes: ``<module>-<router>-<learner>-<seeds>-<hash>``.

    Args:
        config: A configuration as returned by :func:`validate`.
    """
    identity = {k: v for k, v in config.items() if k not in NOT_IDENTITY}
    text = json.dumps(identity, sort_keys=True, default=str)
    digest = hashlib.sha256(text.encode()).hexdigest()[:10]
    seed = config["seed"]
    parts = [config[axis]["name"] for axis in ("module", "router", "learner")]
    return "-".join([*parts, f"s{seed['order']}.{seed['init']}.{seed['data']}", digest])


def build(node: Mapping[str, Any]) -> Any:  # noqa: ANN401 (whatever class the node names)
    """Make the object that a configuration node describes; the only place that does so.

    The class's constructor receives the node's keys. ``name`` is the node's label, and reaches the
    constructor only where it asks for it. What is known only at run time comes to objects later,
    through methods.

    Raises:
        ConfigError: ``_target_`` lies outside cl_peft, or a key does not fit.
    """
    target = str(node["_target_"])
    model = constructor_model(target)
    arguments = {k: v for k, v in node.items() if k != "_target_"}
    if "name" not in model.model_fields:
        arguments.pop("name", None)
    problems: list[str] = []
    _check_model(model, arguments, "", target, problems)
    if problems:
        raise ConfigError("\n".join(problems))
    module, _, cls = target.rpartition(".")
    return getattr(importlib.import_module(module), cls)(**arguments)


def split_stream(node: Mapping[str, Any]) -> tuple[Protocol, dict[str, Any]]:
    """Separate a stream's configuration into its protocol and its source."""
    protocol = {k: v for k, v in node.items() if k in Protocol.model_fields}
    source = {k: v for k, v in node.items() if k not in Protocol.model_fields}
    return Protocol(**protocol), source


def _check_axis(axis: str, node: dict[str, Any], problems: list[str]) -> dict[str, Any]:
    """Check one axis' node against its class's constructor; return it with defaults filled in."""
    target, name = str(node["_target_"]), node.get("name")
    if not isinstance(name, str) or (axis != "backbone" and not _NAME.fullmatch(name)):
        problems.append(
            f"{axis}.name: {name!r} cannot be used in a folder name. Allowed: letters, digits, "
            "'.', '_' and '-', at most 64."
        )
        return node
    try:
        model = constructor_model(target)
    except ConfigError as error:
        problems.append(f"{axis}.{error}")
        return node
    extra = set(Protocol.model_fields) if axis == "stream" else set()
    if "name" not in model.model_fields:
        extra.add("name")
    own = {k: v for k, v in node.items() if k != "_target_" and k not in extra}
    rest = {k: v for k, v in node.items() if k in extra}
    label = f"{axis}={name}" if axis != "backbone" else "the backbone"
    checked = _check_model(model, own, f"{axis}.", label, problems, also=extra)
    if axis == "stream":
        rest = _check_model(Protocol, rest, "stream.", label, problems)
        if "sets" in model.model_fields and isinstance(checked.get("sets"), dict):
            sets = checked["sets"].items()
            checked["sets"] = {n: _check_set(n, node, problems) for n, node in sets}
    return {"_target_": target, **rest, **checked}


def _check_set(name: str, node: object, problems: list[str]) -> object:
    """Check one of the data sets that a stream joins; return it with defaults filled in."""
    where = f"stream.sets.{name}"
    if not _NAME.fullmatch(str(name)):
        problems.append(f"{where}: {name!r} cannot name a folder. Use letters, digits, '.', '_'.")
    if not isinstance(node, dict) or not str(node.get("_target_")).startswith("cl_peft.streams."):
        problems.append(f"{where}: say what it is, as in _target_: cl_peft.streams.hub.Hub.")
        return node
    target = str(node["_target_"])
    try:
        model = constructor_model(target)
        if class_constant(target, "groups"):
            problems.append(f"{where}: {target} joins data sets itself, and cannot be one of them.")
    except ConfigError as error:
        problems.append(f"{where}.{error}")
        return node
    own = {k: v for k, v in node.items() if k != "_target_"}
    return {"_target_": target, **_check_model(model, own, f"{where}.", where, problems)}


def _check_model(
    model: type[BaseModel],
    values: dict[str, Any],
    prefix: str,
    label: str,
    problems: list[str],
    also: set[str] | None = None,
) -> dict[str, Any]:
    """Validate ``values``; append one line per problem; return them with defaults."""
    try:
        return model(**values).model_dump()
    except ValidationError as error:
        for item in error.errors():
            where = prefix + ".".join(str(part) for part in item["loc"] if not _is_branch(part))
            if item["type"] == "extra_forbidden":
                allowed = _fields_at(model, item["loc"]) | (also or set())
                wrong = str(item["loc"][-1])
                near = did_you_mean(wrong, allowed).replace("'", f"'{where[: -len(wrong)]}", 1)
                keys = ", ".join(sorted(allowed)) or "none"
                problems.append(f"{where} is not a key of {label}.{near}\n    keys there: {keys}")
            elif item["type"] == "missing":
                problems.append(f"{where}: a value is needed. Add {where}=... to the command.")
            else:
                problems.append(f"{where}={item['input']!r}: {item['msg']}.")
        return values


def _is_branch(part: int | str) -> bool:
    """Pydantic names union branches in an error's location; people did not write those."""
    return isinstance(part, str) and (
        part in ("int", "str", "float", "bool")
        or part.startswith(("constrained-", "literal["))
        or "[" in part
    )


def _fields_at(model: type[BaseModel], loc: tuple[int | str, ...]) -> set[str]:
    for part in loc[:-1]:
        inner = (
            model.model_fields[str(part)].annotation if str(part) in model.model_fields else None
        )
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            model = inner
    return set(model.model_fields)


def _normalise(config: dict[str, Any]) -> dict[str, Any]:
    learner = config["learner"]["_target_"]
    if not class_constant(learner, "uses_router"):
        config["router"] = {"_target_": "cl_peft.routers.none.NoRouter", "name": "none"}
    if not class_constant(learner, "uses_module"):
        config["module"] = {"_target_": "cl_peft.modules.none.NoModule", "name": "none"}
    return config


def _combinations(config: dict[str, Any]) -> Iterator[str]:
    """What no single axis can see: yields one line per combination that makes no sense."""
    stream, backbone = config["stream"], config["backbone"]
    router, learner, module = config["router"], config["learner"], config["module"]
    if not _NAME.fullmatch(config["group"]):
        yield f"group={config['group']!r}: letters, digits, '.', '_' and '-', at most 64."
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", config["device"]):
        yield f"device={config['device']!r}: allowed are auto, cpu, cuda, cuda:N and mps."
    if class_constant(learner["_target_"], "uses_router"):
        sees_task = class_constant(router["_target_"], "sees_task")
        if router["name"] == "none":
            yield (
                f"router=none does not fit learner={learner['name']}: it grows one module per task "
                "and something must choose between them. Try router=ridge."
            )
        elif not sees_task and (problem := _use_of_choice(config)):
            yield problem
        elif stream["scenario"] == "task" and not sees_task:
            yield (
                f"stream.scenario=task gives the task at test time, so router={router['name']} has "
                "nothing to choose. Use router=oracle, or stream.scenario=class."
            )
    if class_constant(learner["_target_"], "uses_module") and module["name"] == "none":
        yield (
            f"module=none does not fit learner={learner['name']}, which trains a module. Try "
            "module=lora, or learner=frozen for the backbone without modules."
        )
    fitting = class_constant(learner["_target_"], "modules")
    if fitting and module["name"] not in fitting:
        yield (
            f"learner={learner['name']} is made for {' or '.join(f'module={m}' for m in fitting)}, "
            f"not module={module['name']}."
        )
    source_modality = class_constant(stream["_target_"], "modality")
    backbone_modality = class_constant(backbone["_target_"], "modality")
    if source_modality != backbone_modality:
        yield (
            f"stream={stream['name']} delivers {source_modality}, but the backbone "
            f"{backbone['_target_'].rsplit('.', 1)[1]} reads {backbone_modality}. Choose a "
            f"backbone for {source_modality}, such as backbone=minilm for text."
        )
    if stream["scenario"] == "domain" and stream.get("domain", "") is None:
        yield (
            "stream.scenario=domain needs to know each example's domain. Add "
            "stream.domain=COLUMN, or use stream.scenario=class."
        )
    yield from protocol_problems(stream)
    yield from _accumulation(config)
    if config["trainer"].get("patience") is not None and not _has_validation(stream):
        yield (
            "trainer.patience stops on validation accuracy, but there are no validation examples. "
            "Set stream.validation_share=0.1, or trainer.patience=null."
        )


def _accumulation(config: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with splitting steps, if they are to be split."""
    trainer, learner = config["trainer"], config["learner"]
    parts, batch = trainer.get("accumulate", 1), trainer.get("batch_size", 1)
    if parts > 1 and not class_constant(learner["_target_"], "splits"):
        yield (
            f"trainer.accumulate={parts} does not fit learner={learner['name']}: its loss draws "
            "from a buffer once a step, so a step cannot be split. Use trainer.accumulate=1; "
            "trainer.checkpointing=on or a smaller trainer.batch_size saves memory as well."
        )
    elif parts > batch:
        yield (
            f"trainer.accumulate={parts}: a step has trainer.batch_size={batch} examples, and "
            f"cannot be split into more. Use trainer.accumulate={batch} or less."
        )


def _has_validation(stream: Mapping[str, Any]) -> bool:
    nodes = [stream, *(stream.get("sets") or {}).values()]
    return stream["validation_share"] > 0 or any(
        node.get(key) is not None for node in nodes for key in ("validation", "validation_split")
    )


def _use_of_choice(config: Mapping[str, Any]) -> str | None:
    """What is wrong with how a router's choice is to be used, if anything."""
    router, module = config["router"], config["module"]
    name, soft = router["name"], router.get("mix") == "soft"
    combines, heads = router.get("combine", "none") != "none", router.get("combine") == "heads"
    if combines and not class_constant(router["_target_"], "knows_classes"):
        return (
            f"router.combine={router['combine']} needs a router that knows classes, which router="
            f"{name} does not. Try router=ridge."
        )
    if combines and soft:
        return f"router.combine={router['combine']} and router.mix=soft exclude each other."
    if heads and not _has_validation(config["stream"]):
        return (
            "router.combine=heads chooses its weight on validation examples, and there are none. "
            "Set stream.validation_share=0.1."
        )
    mixes = soft or class_constant(router["_target_"], "mixes")
    fitting = class_constant(router["_target_"], "modules")
    if fitting and module["name"] not in fitting:
        wanted = " or ".join(f"module={m}" for m in fitting)
        return f"router={name} is made for {wanted}, not module={module['name']}."
    if mixes and not class_constant(module["_target_"], "weightable"):
        return (
            f"module={module['name']} cannot be mixed by weights, as router={name} would: its "
            "virtual tokens are there or not. Use router.mix=hard with a router that chooses, or "
            "module=lora."
        )
    if router.get("top_k", 1) > 1 and not (mixes or heads):
        return (
            f"router.top_k={router['top_k']} has no effect with a hard choice. Add "
            "router.mix=soft or router.combine=heads, or set router.top_k=1."
        )
    return None
