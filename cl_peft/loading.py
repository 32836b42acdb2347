"""Bring a run back from its folder alone: backbone, bank and heads, without the stream's data."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file

from cl_peft.backbones.base import Backbone
from cl_peft.config import build
from cl_peft.errors import DamagedRunError, DataError
from cl_peft.modules.bank import Bank
from cl_peft.modules.head import Head
from cl_peft.runs import RunFolder
from cl_peft.schema import class_constant


@dataclass(frozen=True)
class LoadedRun:
    """What a run folder holds, ready for forward passes.

    Attributes:
        folder: The run folder.
        config: Its configuration.
        class_names: Names of all classes of its stream.
        backbone: The frozen backbone, with the bank's hooks.
        bank: Its modules.
        rows: Bank row by task, from 1. A learner with a single module has its last one only.
        heads: Head by task, from 1.
    """

    folder: Path
    config: dict[str, Any]
    class_names: tuple[str, ...]
    backbone: Backbone
    bank: Bank
    rows: Mapping[int, int]
    heads: Mapping[int, Head]


def load_run(folder: Path, device: str = "cpu", cache: Path | None = None) -> LoadedRun:
    """Load a run, finished or not; every file is checked against its digest.

    Args:
        folder: ``runs/GROUP/RUN``.
        device: Where backbone and modules shall live.
        cache: Folder for downloads; the run's own setting if None.

    Raises:
        DataError: It is no run folder, or no task is finished.
        DamagedRunError: A file is missing, damaged, or does not fit.
    """
    if not (folder / "manifest.json").exists():
        raise DataError(f"{folder} is no run folder with a finished task: it has no manifest.json.")
    config = dict(yaml.safe_load((folder / "config.yaml").read_text()))
    run = RunFolder(folder)
    run.open(config)
    stream = json.loads((folder / "stream.json").read_text())
    kept = class_constant(config["learner"]["_target_"], "keeps")
    tasks = range(1, run.done + 1) if kept == "all" else range(run.done, run.done + 1)
    files = {t: f"tasks/{t:03d}/module.safetensors" for t in tasks}
    files = {t: name for t, name in files.items() if run.has(name)}
    if not files:
        raise DataError(f"{folder}: no task has stored a module yet.")
    backbone: Backbone = build(config["backbone"])
    where = Path(config["paths"]["cache"]).expanduser() if cache is None else cache
    backbone.load(where, torch.device(device), int(config["seed"]["init"]))
    bank = Bank(build(config["module"]), backbone.model, device)
    rows, heads = {}, {}
    for task, name in files.items():
        tensors = load_file(run.read(name))
        own = {n: t for n, t in tensors.items() if not n.startswith("head.")}
        try:
            heads[task] = Head.from_tensors(tensors, backbone.device)
        except KeyError as error:
            raise DamagedRunError(f"{folder / name} has no {error}") from error
        rows[task] = bank.add(bank.check(own, str(folder / name)))
    names = tuple(stream["class_names"])
    return LoadedRun(folder, config, names, backbone, bank, rows, heads)
