"""Fetch and check everything that a run needs, so that the run itself needs no network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from cl_peft import archives
from cl_peft.config import Seeds, build, validate
from cl_peft.console import Console
from cl_peft.errors import ConfigError
from cl_peft.launch import conf_folder, explain
from cl_peft.view import size

#: Folders of the cache that are filled by downloads; the others hold what runs compute.
_FETCHED = ("archives", "hub", "packages")


def prepare(overrides: Sequence[str], console: Console) -> list[str]:
    """Compose and validate a configuration as a run would; load its stream and its backbone.

    What a run would refuse about configuration, data or model, this refuses too.

    Args:
        overrides: As on the command line of ``main.py``.
        console: Where progress is shown.

    Returns:
        What was checked and fetched, as lines for a person.

    Raises:
        ConfigError: The configuration is wrong.
        DataError: The data does not fit it.
        DownloadError: Something could not be fetched.
    """
    config = configuration(overrides)
    from cl_peft.experiment import describe, load_stream  # torch
    from cl_peft.world import cache_folder, downloading, set_device

    cache = cache_folder(config)
    before = _files(cache)
    stream = load_stream(config, console)
    device = set_device({**config, "device": "cpu"})  # the job's may be elsewhere
    backbone = build(config["backbone"])
    with downloading(console, "model") as progress:
        backbone.load(cache, device, Seeds(**config["seed"]).init, progress)
    about = describe(stream)
    lines = [
        f"stream    {stream.name}: {len(stream.tasks)} tasks, {len(stream.class_names)} classes, "
        f"scenario {stream.scenario}; fingerprint {about['fingerprint'][:16]}"
    ]
    width = max(len(task["name"]) for task in about["tasks"])
    lines += [
        f"  {task['name']:<{width}}  {len(task['classes'])} classes; "
        f"{task['train']:,} training, {task['validation']:,} validation, {task['test']:,} test"
        for task in about["tasks"]
    ]
    count = sum(parameter.numel() for parameter in backbone.model.parameters())
    lines.append(
        f"backbone  {archives.short_name(config['backbone']['name'])}: {count:,} parameters; "
        f"fingerprint {backbone.fingerprint[:16]}"
    )
    after = _files(cache)
    new = {path: after[path] for path in after if path not in before}
    lines.append(
        f"cache     {cache}: {len(new)} files fetched ({size(sum(new.values()))}), "
        f"{len(after)} there now ({size(sum(after.values()))})"
    )
    if _from_hub(config):
        lines.append(
            "For the job, set HF_HUB_OFFLINE=1, so that nothing asks the hub for a newer version."
        )
    return lines


def configuration(overrides: Sequence[str]) -> dict[str, Any]:
    """Compose and validate what these overrides mean on the command line of ``main.py``.

    Raises:
        ConfigError: They name no valid configuration, or several (``KEY=A,B``).
    """
    try:
        with initialize_config_dir(str(conf_folder()), version_base="1.3"):
            return validate(compose("config", list(overrides)))
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(explain(error)) from error


def _files(cache: Path) -> dict[Path, int]:
    """Sizes of all files that were fetched; links count where they lead to."""
    paths = [path for name in _FETCHED for path in (cache / name).rglob("*")]
    return {path: path.stat().st_size for path in paths if path.is_file() and not path.is_symlink()}


def _from_hub(config: Mapping[str, Any]) -> bool:
    """Whether data or model have names on the hub."""
    stream, backbone = config["stream"], config["backbone"]
    joined = {} if stream.get("path") else stream.get("sets", {})  # a folder replaces their names
    nodes = [stream, *joined.values()]
    names = [node["path"] for node in nodes if node["_target_"] == "cl_peft.streams.hub.Hub"]
    if "revision" in backbone and not archives.is_address(backbone["name"]):
        names.append(backbone["name"])
    return any(not Path(name).expanduser().exists() for name in names)
