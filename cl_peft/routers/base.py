"""What a router has to do: fit on frozen features as tasks arrive, and choose a task per sample.

A router keeps statistics, never examples. It never sees a task id at test time; the oracle does,
and says so by :attr:`Router.sees_task`.

How a choice is used is the same for all routers, so these are options of every one of them
(``conf/common/router.yaml``): which layers' features it sees, one module or a soft mixture of the
best few, and whether its opinion about classes is combined with the routed head's.
"""

from __future__ import annotations

import dataclasses
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor

from cl_peft.errors import DamagedRunError
from cl_peft.routers.combination import (
    WEIGHTS,
    best_weight,
    classes_alone,
    combine,
    count_right,
    opinions,
)
from cl_peft.store import require

if TYPE_CHECKING:
    from cl_peft.memo import Questions


@dataclass(frozen=True)
class Choice:
    """What a router chose.

    Attributes:
        tasks: ``(N,)`` int64 task index of each sample.
        scores: ``(N, T)`` float32, higher is better.
        margin: ``(N,)`` best score minus second best; NaN with one task.
        class_scores: ``(N, K)`` float32 score of each of the K (task, class) pairs known, higher
            is better; None from a router that knows no classes.
        pairs: ``(K, 2)`` int64 task and global class of each column of :attr:`class_scores`.
        weights: ``(N, T)`` float32 weights over the tasks' modules; None: :attr:`tasks` alone.
        abstained: ``(N,)`` bool, where the router says that no task fits. Such samples are still
            answered by the best task, and counted.
    """

    tasks: Tensor
    scores: Tensor
    margin: Tensor
    class_scores: Tensor | None = None
    pairs: Tensor | None = None
    weights: Tensor | None = None
    abstained: Tensor | None = None

    @staticmethod
    def best(scores: Tensor) -> Choice:
        """The task with the highest score; the earlier one on a tie."""
        margin = torch.full((len(scores),), float("nan"))
        if scores.shape[1] > 1:
            top = scores.topk(2, dim=1).values
            margin = top[:, 0] - top[:, 1]
        return Choice(scores.argmax(1), scores, margin)

    @staticmethod
    def best_class(scores: Tensor, columns: ClassColumns) -> Choice:
        """The task of the class with the highest score.

        Args:
            scores: ``(N, K)`` one column per (task, class) pair.
            columns: What the columns are.
        """
        choice = Choice.best(columns.task_scores(scores))
        return dataclasses.replace(choice, class_scores=scores, pairs=columns.tensor())


class Router(ABC):
    """Chooses a task for each sample.

    Args:
        layers: Layers of the backbone whose pooled outputs, side by side, are the features; from 1.
            Null: the pooled output of the whole backbone.
        mix: ``hard``: the best task's module alone; ``soft``: the ``top_k`` best, weighted by
            ``softmax(score / temperature)`` over them.
        top_k: Number of tasks that answer a sample: modules of a soft mixture, or heads that are
            combined with the router's classes.
        temperature: Of the softmax.
        combine: ``heads``: log-linear combination of the router's class scores with the log
            posterior of the heads of the ``top_k`` best tasks, or the routed head alone: which, and
            with which weight, is chosen on validation examples of each task as it arrives.
            ``classes``: the router's best class answers, and no head is asked: what frozen features
            alone can tell.

    Attributes:
        sees_task: Whether the true task is handed to it at test time (the oracle alone).
        needs_features: Whether it looks at frozen features.
        knows_classes: Whether its choices have class scores.
        modules: Names of the modules that it fits; empty: any.
        mixes: Whether its choices are weights over several modules by themselves.
    """

    sees_task: ClassVar[bool] = False
    needs_features: ClassVar[bool] = True
    knows_classes: ClassVar[bool] = False
    mixes: ClassVar[bool] = False
    modules: ClassVar[tuple[str, ...]] = ()
    # for a router with an __init__ of its own that does not offer them
    layers: list[int] | None = None
    mix: Literal["hard", "soft"] = "hard"
    combine: Literal["none", "heads", "classes"] = "none"
    # how long choosing took, features given, and for how many samples; see timing.json
    seconds = 0.0
    samples = 0

    def __init__(
        self,
        layers: list[PositiveInt] | None = None,
        mix: Literal["hard", "soft"] = "hard",
        top_k: PositiveInt = 1,
        temperature: PositiveFloat = 1.0,
        combine: Literal["none", "heads", "classes"] = "none",
    ) -> None:
        self.layers, self.mix, self.top_k = layers, mix, top_k
        self.temperature, self.combine = temperature, combine
        self.right = torch.zeros(len(WEIGHTS), dtype=torch.int64)  # per weight of a combination

    def start(self, width: int, seed: int) -> None:  # noqa: B027 (an option, not a duty)
        """Prepare for features of size ``width``; called once, before anything else."""

    def answer(self, questions: Questions) -> tuple[Choice, Tensor]:
        """What it chooses, and the logits ``(N, classes)`` that answer by its choice."""
        choice = self.route(questions)
        if choice.weights is not None:
            return choice, questions.mixture(choice.weights)
        if self.combine == "classes":
            return choice, classes_alone(choice, questions.n_classes)
        if self.combine == "heads":
            return choice, combine(
                *opinions(choice, questions, self.top_k), best_weight(self.right)
            )
        return choice, questions.ask(choice.tasks.numpy())[0]

    def by_class(self, choice: Choice) -> bool:
        """Whether the class that answers may belong to another task than the chosen one."""
        return choice.weights is not None or self.combine != "none"

    def route(self, questions: Questions) -> Choice:
        r"""Choose for samples, and turn scores into weights where a soft mixture is wanted.

        .. math:: w_t = \mathrm{softmax}_{t \in \mathrm{top}_k}(s_t / \tau)
        """
        choice = self._choose(questions)
        if self.mix == "hard" or choice.weights is not None:
            return choice
        k = min(self.top_k, choice.scores.shape[1])
        best = choice.scores.topk(k, dim=1)
        weights = torch.zeros_like(choice.scores)
        weights.scatter_(1, best.indices, (best.values / self.temperature).softmax(1))
        return dataclasses.replace(choice, weights=weights)

    def tune(self, questions: Questions, labels: Tensor) -> None:
        """Count which weight of a combination with the heads is right how often.

        Args:
            questions: A new task's validation examples, its module being learned.
            labels: ``(N,)`` their global classes.
        """
        opinions_ = opinions(self.route(questions), questions, self.top_k)
        self.right = self.right + count_right(*opinions_, labels)

    def dump(self) -> dict[str, Tensor]:
        """Everything to be stored: its own state, and that of a combination."""
        more = {"combine.right": self.right} if self.combine == "heads" else {}
        return {**self.state(), **more}

    def load(self, state: dict[str, Tensor]) -> None:
        """The inverse of :meth:`dump`.

        Raises:
            DamagedRunError: Tensors are missing.
        """
        if self.combine == "heads":
            state = dict(state)
            right = {n: state.pop(n) for n in tuple(state) if n == "combine.right"}
            require(right, {"combine.right"}, "router.combine=heads")
            if right["combine.right"].shape != self.right.shape:
                raise DamagedRunError(
                    f"router.combine=heads: {len(right['combine.right'])} candidates were stored, "
                    f"and there are {len(self.right)} now: another version wrote this run. Use "
                    "fresh=true to start over."
                )
            self.right = right["combine.right"]
        self.load_state(state)

    @contextmanager
    def timed(self, samples: int) -> Iterator[None]:
        """Count the time spent inside as that of choosing for so many samples."""
        started = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - started
        self.samples += samples

    def _choose(self, questions: Questions) -> Choice:
        """What the router looks at; one that looks at modules overrides this."""
        features, tasks = torch.zeros(len(questions), 0), None
        if self.sees_task:
            tasks = questions.true_tasks()
        elif self.needs_features:
            features = questions.features(self.layers)
        with self.timed(len(questions)):
            return self.choose(features, tasks)

    @abstractmethod
    def fit(self, features: Tensor, labels: Tensor, task: int) -> None:
        """Learn a new task; earlier ones are not available any more.

        Args:
            features: ``(N, H)`` frozen features of its training examples.
            labels: ``(N,)`` global class ids.
            task: Index of the task.
        """

    @abstractmethod
    def choose(self, features: Tensor, tasks: Tensor | None = None) -> Choice:
        """Choose a task per sample; each row depends on that row alone.

        Args:
            features: ``(N, H)``.
            tasks: ``(N,)`` true tasks, given only to a router that :attr:`sees_task`.
        """

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """Everything it learned, as named tensors."""

    @abstractmethod
    def load_state(self, state: dict[str, Tensor]) -> None:
        """The inverse of :meth:`state`.

        Raises:
            DamagedRunError: Tensors are missing.
        """

    def state_bytes(self) -> int:
        """Size of its state; counted as part of what grows with tasks."""
        return sum(t.numel() * t.element_size() for t in self.dump().values())


class ClassColumns:
    """Bookkeeping for routers that know classes: one column per (task, class) pair, by arrival.

    A pair, not a class, since tasks of a domain-incremental stream share their classes.
    """

    def __init__(self) -> None:
        self.pairs: list[tuple[int, int]] = []

    def extend(self, labels: Tensor, task: int) -> tuple[int, int]:
        """Add columns for a new task's classes; returns their range ``(first, end)``."""
        if any(t == task for t, _ in self.pairs):
            raise ValueError(f"task {task + 1} was fitted before")
        first = len(self.pairs)
        self.pairs += [(task, int(c)) for c in labels.unique()]
        return first, len(self.pairs)

    def one_hot(self, labels: Tensor, task: int) -> Tensor:
        """``(N, columns)`` float32 indicator of each example's column."""
        column = {c: i for i, (t, c) in enumerate(self.pairs) if t == task}
        index = torch.tensor([column[int(c)] for c in labels])
        return torch.nn.functional.one_hot(index, len(self.pairs)).to(torch.float32)

    def task_scores(self, scores: Tensor) -> Tensor:
        """Best column per task: ``(N, columns)`` to ``(N, T)``."""
        tasks = torch.tensor([t for t, _ in self.pairs])
        index = tasks.expand(len(scores), -1)
        out = scores.new_full((len(scores), int(tasks.max()) + 1), float("-inf"))
        return out.scatter_reduce(1, index, scores, "amax")

    def tensor(self) -> Tensor:
        """``(columns, 2)`` int64."""
        return torch.tensor(self.pairs, dtype=torch.int64).reshape(-1, 2)

    @staticmethod
    def from_tensor(pairs: Tensor) -> ClassColumns:
        """The inverse of :meth:`tensor`."""
        columns = ClassColumns()
        columns.pairs = [(int(t), int(c)) for t, c in pairs]
        return columns
