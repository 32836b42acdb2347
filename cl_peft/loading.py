"""Bring a run back from its folder: for going on with it, or alone, without the stream's data.

A resumed run uses :func:`wire` and :class:`Stored`; whoever only wants to predict, or to look at a
module, calls :func:`load_run`.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import load
from torch import Tensor

from cl_peft.backbones.base import Backbone, choose_device
from cl_peft.backbones.features import Features
from cl_peft.config import Seeds, build
from cl_peft.console import Console
from cl_peft.errors import ConfigError, DamagedRunError, DataError
from cl_peft.learners.base import Later, Learner, Tools
from cl_peft.memo import Memo, Questions, among_tasks
from cl_peft.modules.bank import Bank
from cl_peft.modules.head import Head
from cl_peft.routers.base import Router
from cl_peft.runs import RunFolder
from cl_peft.schema import class_constant
from cl_peft.store import tensor_fingerprint
from cl_peft.streams.base import Progress, Split, Stream, Task
from cl_peft.tracking import Tracker


def wire(
    config: Mapping[str, Any],
    features: Features,
    class_names: Sequence[str],
    n_tasks: int,
    console: Console,
    tracker: Tracker,
) -> tuple[Learner, Router]:
    """Build learner and router of a configuration around a loaded backbone; both know nothing yet.

    Args:
        config: As returned by :func:`cl_peft.config.validate`.
        features: Frozen features of the backbone.
        class_names: Of the whole stream.
        n_tasks: Of the whole stream.
        console: Where progress is shown.
        tracker: Who mirrors what is measured.
    """
    backbone, seed = features.backbone, Seeds(**config["seed"])
    router: Router = build(config["router"])
    router.start(features.width(router.layers), seed.init)
    learner: Learner = build(config["learner"])
    learner.start(
        Tools(
            backbone=backbone,
            bank=Bank(build(config["module"]), backbone.model, backbone.device),
            features=features,
            trainer=build(config["trainer"]),
            optimizer=build(config["optimizer"]),
            seeds=seed,
            class_names=tuple(class_names),
            n_tasks=n_tasks,
            console=console,
            tracker=tracker,
        )
    )
    return learner, router


@dataclass(frozen=True)
class Stored:
    """What the finished tasks of a run left.

    Attributes:
        units: Module and head by task index: all of them, or the last, as the learner keeps them;
            read, or to be read when something needs them.
        router: The router's state after the last task; empty where it has none.
        learner: What the learner keeps besides units, after the last task.
    """

    units: Mapping[int, dict[str, Tensor] | Later]
    router: dict[str, Tensor]
    learner: dict[str, Tensor]

    @staticmethod
    def read(folder: RunFolder, keeps: Literal["all", "last"], lazy: bool = False) -> Stored:
        """Read from an opened folder; what is read is what its digest says.

        Args:
            folder: The run folder.
            keeps: Which units the learner needs.
            lazy: Let units be read, and compared with their digests, when something needs them.

        Raises:
            DamagedRunError: A file is missing or damaged.
        """
        listed = folder.files()
        tasks = range(folder.done) if keeps == "all" else range(folder.done - 1, folder.done)
        names = {task: f"tasks/{task + 1:03d}/module.safetensors" for task in tasks}
        units = {
            t: _later(folder, name, listed[name]["sha256"]) if lazy else _tensors(folder, name)
            for t, name in names.items()
            if name in listed
        }
        last = [f"tasks/{folder.done:03d}/{who}.safetensors" for who in ("router", "learner")]
        states = [_tensors(folder, name) if folder.has(name) else {} for name in last]
        return Stored(units, *states)

    def put(self, learner: Learner, router: Router, seen: Sequence[Task]) -> None:
        """Bring learner and router to the state after the tasks ``seen``."""
        learner.restore(self.units, seen)
        learner.load_state(self.learner)
        if learner.uses_router:
            router.load(self.router)


@dataclass(frozen=True)
class Answers:
    """Predictions for N inputs.

    Attributes:
        labels: ``(N,)`` int64 global class ids.
        names: Their names.
        tasks: ``(N,)`` int64 task that answered, or whose class it is, from 1; 0 = cannot be told.
        confidence: ``(N,)`` float32 softmax of the label, among what the answering head knows.
        margin: ``(N,)`` float32 margin of the router; NaN where none chose.
    """

    labels: np.ndarray
    names: list[str]
    tasks: np.ndarray
    confidence: np.ndarray
    margin: np.ndarray


@dataclass(frozen=True)
class LoadedRun:
    """What a run folder holds, ready to predict.

    Attributes:
        folder: The run folder.
        config: Its configuration.
        scenario: Of its stream.
        class_names: Names of all classes of its stream.
        tasks: Its finished tasks, without examples.
        learner: Its learner, with all modules in the bank.
        router: Its router.
    """

    folder: Path
    config: dict[str, Any]
    scenario: str
    class_names: tuple[str, ...]
    tasks: tuple[Task, ...]
    learner: Learner
    router: Router

    @property
    def backbone(self) -> Backbone:
        """The frozen backbone, with the bank's hooks."""
        return self.learner.tools.backbone

    @property
    def bank(self) -> Bank:
        """Its modules."""
        return self.learner.tools.bank

    @property
    def rows(self) -> dict[int, int]:
        """Bank row by task, from 1; -1 is the bare backbone.

        A learner with a single module has its last one only.
        """
        return {task + 1: unit.row for task, unit in self.learner.units.items()}

    @property
    def heads(self) -> dict[int, Head]:
        """Head by task, from 1, as :attr:`rows`."""
        return {task + 1: unit.head for task, unit in self.learner.units.items()}

    def predict(self, inputs: Sequence[Any], tasks: Sequence[int] | None = None) -> Answers:
        """Answer as the run's own evaluation did.

        Args:
            inputs: Texts or images, N.
            tasks: The true task of each input, from 1, where it is known: the answer is then by
                that task's module, among that task's classes. Without it the run's router chooses;
                a learner with a single module answers among all classes.

        Raises:
            ConfigError: The run was made for true tasks and there are none, or an unknown one.
        """
        learner, n = self.learner, len(inputs)
        if not n:
            empty = np.zeros(0, dtype=np.int64)
            none = np.zeros(0, dtype=np.float32)
            return Answers(empty, [], empty, none, none)
        margin = torch.full((n,), float("nan"))
        try:
            true = np.zeros(n, dtype=np.int64) if tasks is None else self._given(tasks, n)
            features, rows = learner.tools.features, np.arange(n)
            asked = Questions(learner, Memo(), features, inputs, rows, true, len(self.tasks))
            if tasks is not None:
                chosen, (logits,) = true, asked.ask(true)
            elif self.scenario == "task" or (learner.uses_router and self.router.sees_task):
                raise ConfigError(
                    f"{self.folder}: router={self.config['router']['name']} on a stream of "
                    f"scenario '{self.scenario}' needs the true task of each input. Give tasks=."
                )
            elif learner.uses_router:
                choice, logits = self.router.answer(asked)
                chosen, margin = choice.tasks.numpy(), choice.margin
                by_class = self.router.by_class(choice)
            else:
                (logits,) = asked.ask(np.full(n, self.tasks[-1].index))
                chosen, by_class = np.full(n, -1), True
        finally:
            learner.tools.features.forget()  # a server would keep every input it ever saw
        if tasks is not None:
            mask = among_tasks(self.tasks, len(self.class_names))
            logits = logits + mask[torch.from_numpy(chosen)]
        labels = logits.argmax(1).numpy()
        if tasks is None and by_class:
            owner = self._owners()[labels]
            chosen = np.where(owner < 0, chosen, owner)
        return Answers(
            labels=labels,
            names=[self.class_names[label] for label in labels],
            tasks=chosen + 1,
            confidence=logits.softmax(1).amax(1).numpy(),
            margin=margin.numpy(),
        )

    def _given(self, tasks: Sequence[int], n: int) -> np.ndarray:
        chosen = np.asarray(tasks, dtype=np.int64) - 1
        if chosen.shape != (n,):
            raise ValueError(f"{chosen.size} tasks for {n} inputs")
        if chosen.min() < 0 or chosen.max() >= len(self.tasks):
            raise ConfigError(f"tasks: {self.folder} has finished tasks 1 to {len(self.tasks)}.")
        return chosen

    def _owners(self) -> np.ndarray:
        """``(classes,)`` task that alone owns a class; -1 where several or none do."""
        nothing = Stream("", "class", self.class_names, self.tasks)
        return nothing.owners


def load_run(
    folder: Path,
    *,
    device: str = "cpu",
    cache: Path | None = None,
    progress: Progress | None = None,
    lazy: bool = True,
) -> LoadedRun:
    """Load a run, finished or not, from its folder alone; nothing is written there.

    Args:
        folder: ``runs/GROUP/RUN``. It may be running in another process: its state is that after
            the last finished task.
        device: Where backbone and modules shall live; ``auto`` is a GPU where there is one.
        cache: Folder for downloads; the run's own setting if None.
        progress: Called with (bytes so far, all bytes) if the backbone is downloaded.
        lazy: Read a module when a sample is first routed to it, where the learner asks one module
            per sample; a damaged one is an error then. False: read and check everything now, and
            need the folder no more.

    Raises:
        DataError: It is no run folder, or no task is finished.
        DamagedRunError: A file is missing, damaged, or does not fit; or the backbone is not the one
            that the modules were trained on.
        ConfigError: The device is not there.
    """
    where = choose_device(device)
    config, stream, stored, done = _read(folder, lazy)
    if cache is None:
        cache = Path(config["paths"]["cache"]).expanduser()
    backbone: Backbone = build(config["backbone"])
    backbone.load(cache, where, int(config["seed"]["init"]), progress)
    _check_backbone(folder, backbone)
    features = Features(backbone, None, build(config["trainer"]).eval_batch_size)
    quiet = Console(io.StringIO(), io.StringIO())
    learner, router = wire(
        config, features, stream["class_names"], len(stream["tasks"]), quiet, Tracker()
    )
    nothing = Split(np.zeros(0, dtype=np.int64), [], np.zeros(0, dtype=np.int64))
    tasks = tuple(
        Task(
            *(t["task"] - 1, t["name"], tuple(t["classes"]), nothing, nothing, nothing),
            borrowed=tuple(t.get("borrowed", ())),
        )
        for t in stream["tasks"][:done]
    )
    stored.put(learner, router, tasks)
    names = tuple(stream["class_names"])
    return LoadedRun(folder, config, stream["scenario"], names, tasks, learner, router)


def _read(folder: Path, lazy: bool) -> tuple[dict[str, Any], dict[str, Any], Stored, int]:
    """Configuration, stream, tensors, and the number of finished tasks."""
    run = RunFolder(folder)
    while True:
        if not run.look():
            raise DataError(
                f"{folder} is no run folder with a finished task: it has no manifest.json."
            )
        done = run.done
        try:
            config = dict(yaml.safe_load(run.content("config.yaml")))
            stream = dict(json.loads(run.content("stream.json")))
            keeps = class_constant(config["learner"]["_target_"], "keeps")
            stored = Stored.read(run, keeps, lazy) if done else Stored({}, {}, {})
        except DamagedRunError:
            run.look()
            if run.done == done:
                raise
            continue  # the run went on meanwhile, and took the older router state away
        if not stored.units:
            raise DataError(f"{folder}: no task has stored a module yet.")
        return config, stream, stored, done


def _tensors(folder: RunFolder, name: str) -> dict[str, Tensor]:
    try:
        return dict(load(folder.content(name)))
    except SafetensorError as error:  # written so: its digest is right
        raise DamagedRunError(f"{folder.path / name} is no safetensors file: {error}") from error


def _later(folder: RunFolder, name: str, digest: str) -> Later:
    """Map a stored unit into memory and read its head alone."""

    def read() -> dict[str, Tensor]:
        tensors = _tensors(folder, name)
        if tensor_fingerprint({n: t for n, t in tensors.items() if n in head}) != known:
            raise DamagedRunError(f"{path}: its head changed since the run was loaded.")
        return tensors

    path = folder.path / name
    try:
        with safe_open(path, "pt") as file:
            own = [n for n in file.keys() if n.startswith("head.")]  # noqa: SIM118 (no mapping)
            head = {n: file.get_tensor(n).clone() for n in own}
    except (SafetensorError, OSError):  # what is read whole says what is wrong with it
        head = {n: t for n, t in _tensors(folder, name).items() if n.startswith("head.")}
    known = tensor_fingerprint(head)
    return Later(digest, head, read)


def _check_backbone(folder: Path, backbone: Backbone) -> None:
    path = folder / "provenance.json"
    stored = json.loads(path.read_text()) if path.exists() else {}
    known = stored.get("backbone_fingerprint")
    if known is not None and known != backbone.fingerprint:
        raise DamagedRunError(
            f"{folder}: its modules were trained on a backbone with fingerprint {known[:12]}, but "
            f"what was loaded has {backbone.fingerprint[:12]}. Bring the old one back, or pin "
            "backbone.revision when you run it again."
        )
