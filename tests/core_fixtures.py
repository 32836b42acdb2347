"""Tiny worlds for tests of the core: random backbones, made-up streams, everything wired."""

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from cl_peft.backbones.base import Backbone
from cl_peft.backbones.features import Features
from cl_peft.backbones.tiny import Tiny
from cl_peft.config import Protocol, Seeds
from cl_peft.console import Console
from cl_peft.evaluation import Evaluator
from cl_peft.learners.base import Learner, Tools
from cl_peft.learners.frozen import Frozen
from cl_peft.learners.isolated import Isolated
from cl_peft.modules.bank import Bank
from cl_peft.modules.lora import LoRA
from cl_peft.modules.none import NoModule
from cl_peft.optim.adamw import AdamW
from cl_peft.routers.base import Router
from cl_peft.routers.ridge import Ridge
from cl_peft.streams.base import Examples, RawData, Stream
from cl_peft.streams.protocol import make_stream
from cl_peft.streams.synthetic import Synthetic
from cl_peft.tracking import Tracker
from cl_peft.training import Trainer

CPU = torch.device("cpu")
torch.set_num_threads(1)  # on models this small, threads only wait for each other


def tiny(seed=0, **options) -> Tiny:
    backbone = Tiny(**{"max_length": 48, **options})
    backbone.load(Path("unused"), CPU, seed)
    return backbone


def quiet() -> Console:
    return Console(stdout=io.StringIO(), stderr=io.StringIO())


def stream_of(scenario="class", tasks=3, classes=6, train=14, test=6, order=0) -> Stream:
    raw = Synthetic(classes=classes, train_per_class=train, test_per_class=test).load(Path("none"))
    if scenario == "domain":
        parts = [raw.train, raw.test]
        names = [[f"domain{i % tasks}" for i in range(len(part))] for part in parts]
        split = [Examples(p.inputs, p.labels, n) for p, n in zip(parts, names, strict=True)]
        raw = RawData(split[0], split[1], raw.class_names)
    protocol = Protocol(name="made-up", scenario=scenario, tasks=tasks, validation_share=0.15)
    return make_stream(raw, protocol, order_seed=order, data_seed=0)


@dataclass
class World:
    stream: Stream
    backbone: Backbone
    features: Features
    learner: Learner
    router: Router
    evaluator: Evaluator

    def fit_router(self, task):
        features = self.features.features(task.train.inputs)
        self.router.fit(features, torch.from_numpy(task.train.labels), task.index)

    def step(self, task):
        self.learner.learn(task)
        if self.learner.uses_router:
            self.fit_router(task)
        return self.evaluator.after(task, {})


def world(
    learner=None, router=None, stream=None, trainer=None, lr=1e-2, dropout=0.1, seed=0, tracker=None
) -> World:
    stream = stream or stream_of()
    learner, router = learner or Isolated(), router or Ridge(projection=64)
    trainer = trainer or Trainer(epochs=2, batch_size=8, eval_batch_size=16)
    backbone = tiny()
    features = Features(backbone, None, trainer.eval_batch_size)
    method = NoModule() if isinstance(learner, Frozen) else LoRA(rank=2, dropout=dropout)
    learner.start(
        Tools(
            backbone=backbone,
            bank=Bank(method, backbone.model, CPU),
            features=features,
            trainer=trainer,
            optimizer=AdamW(lr=lr),
            seeds=Seeds(init=seed),
            class_names=stream.class_names,
            n_tasks=len(stream.tasks),
            console=quiet(),
            tracker=tracker or Tracker(),
        )
    )
    router.start(backbone.width, seed)
    if learner.needs_features:  # as experiment.py does
        features.prefetch(stream, ("train", "test", "validation"))
    evaluator = Evaluator("run", stream, learner, router, features)
    return World(stream, backbone, features, learner, router, evaluator)


def texts(count, seed=0, longest=40) -> list[str]:
    """Texts of very different lengths."""
    rng = np.random.default_rng(seed)
    letters = np.array(list("abcdefghij klmnop é"))
    return ["".join(rng.choice(letters, rng.integers(0, longest))) for _ in range(count)]


def random_module(bank: Bank, seed: int):
    """A module whose B is not zero, so that it does something."""
    generator = torch.Generator().manual_seed(seed)
    module = bank.fresh(generator)
    for params in module.values():
        for tensor in params.values():
            tensor.data = 0.3 * torch.randn(tensor.shape, generator=generator)
    return module


def same(a: dict, b: dict) -> bool:
    """Equal names and equal bits."""
    return set(a) == set(b) and all(torch.equal(a[n], b[n]) for n in a)
