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
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, ValidationError

from cl_peft.combinations import NAME, combination_problems
from cl_peft.errors import ConfigError, did_you_mean
from cl_peft.schema import class_constant, constructor_model

#: Groups whose ``_target_`` names the class that the other keys configure.
AXES = ("stream", "backbone", "module", "router", "learner", "optimizer", "trainer", "tracker")
#: Keys that decide where and on what a run happens, not what it computes: no part of its identity.
NOT_IDENTITY = ("paths", "tracker", "hydra", "group", "fresh", "device", "threads", "cache",
                "bounds", "fail_fast")  # fmt: skip


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
        problems += combination_problems(config)
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


def public(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration for others to see: no ``paths``, of absolute ones the last name alone."""

    def clean(value: Any) -> Any:  # noqa: ANN401 (a node of a configuration)
        if isinstance(value, Mapping):
            return {k: clean(v) for k, v in value.items()}
        if isinstance(value, list):
            return [clean(v) for v in value]
        local = isinstance(value, str) and (Path(value).is_absolute() or value.startswith("~"))
        return Path(value).name if local else value

    return {k: clean(v) for k, v in config.items() if k != "paths"}


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
    if not isinstance(name, str) or (axis != "backbone" and not NAME.fullmatch(name)):
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
    if not NAME.fullmatch(str(name)):
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
