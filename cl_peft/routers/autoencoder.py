r"""One undercomplete autoencoder per task (Expert Gate: Aljundi et al. 2017, arXiv:1611.06194).

.. math::
    v = \sigma\bigl((f - \mu) / s\bigr), \qquad
    r_t(v) = \sigma\bigl(D_t \, \mathrm{relu}(E_t v + b_t) + c_t\bigr), \qquad
    e_t(f) = \lVert r_t(v) - v \rVert^2

A task's score is :math:`-e_t`; a soft mixture weighs by :math:`\mathrm{softmax}(-e_t / \tau)`,
:math:`\tau = 2` as in the paper. Trained by cross-entropy, compared by squared error, as
in the authors' code.

- Errors of different tasks compare only under one standardisation. The paper takes the statistics
  of ImageNet; for features of any backbone there is no such set, so :math:`\mu, s` are those of the
  first task's features, and stay.
- Adam in mini-batches, a fixed number of steps; the authors' code uses Adagrad for 100 epochs.
- A task can say that a sample is not its own: its error is more than ``abstain_above`` times what
  its own training examples have on average. Where all tasks say so, the router abstains.

State: ``E (T, H, h)``, ``b (T, h)``, ``D (T, h, H)``, ``c (T, H)``, the mean training error
``own (T,)``, and :math:`\mu, s` ``(H,)``. Classes are not used, and not known.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from cl_peft.routers.base import Choice, Router
from cl_peft.store import require
from cl_peft.training import generator

#: Numbers that an evaluation holds at a time: tasks x samples x width.
HELD = 2**22


class Autoencoder(Router):
    """Expert Gate.

    Args:
        hidden: ``h``, size of the code; below the width of the features.
        steps: Of Adam, for each task.
        batch_size: Examples per step, drawn with replacement.
        learning_rate: Of Adam, constant.
        abstain_above: Abstain where every task's error is more than so many times the mean error of
            its own training examples; null: never.
        temperature: Of a soft mixture over minus the errors.
        common: See :class:`~cl_peft.routers.base.Router`.
    """

    def __init__(
        self,
        hidden: PositiveInt = 100,
        steps: PositiveInt = 1000,
        batch_size: PositiveInt = 32,
        learning_rate: PositiveFloat = 0.001,
        abstain_above: PositiveFloat | None = None,
        temperature: PositiveFloat = 2.0,
        **common: Any,  # noqa: ANN401
    ) -> None:
        super().__init__(temperature=temperature, **common)
        self.hidden, self.steps, self.batch_size = hidden, steps, batch_size
        self.learning_rate, self.abstain_above = learning_rate, abstain_above

    def start(self, width: int, seed: int) -> None:
        """Nothing is known yet."""
        self.seed = seed
        self.mean, self.scale = torch.zeros(width), torch.ones(width)
        shapes = {"E": (width, self.hidden), "b": (self.hidden,)}
        shapes |= {"D": (self.hidden, width), "c": (width,), "own": ()}
        self.experts = {name: torch.zeros(0, *shape) for name, shape in shapes.items()}

    def fit(self, features: Tensor, labels: Tensor, task: int) -> None:
        """Train the task's autoencoder; earlier ones stay as they are.

        Raises:
            ValueError: Tasks do not arrive in order, once each.
        """
        if task != len(self.experts["own"]):
            raise ValueError(f"task {task + 1} was fitted before, or is not the next")
        if task == 0:
            self.mean = features.mean(0)
            scale = features.std(0, correction=0)
            # a dimension that hardly moves is not stretched: its noise would fill the range
            self.scale = torch.where(scale > 1e-4 * scale.mean(), scale, torch.ones(()))
        new = self._train(self._squash(features), task)
        new["own"] = _errors(new, self._squash(features)).mean()
        self.experts = {n: torch.cat([old, new[n][None]]) for n, old in self.experts.items()}

    def _squash(self, features: Tensor) -> Tensor:
        return torch.sigmoid((features - self.mean) / self.scale)

    def _train(self, v: Tensor, task: int) -> dict[str, Tensor]:
        """Weights of one autoencoder for ``v (N, H)``."""
        random, (n, width) = generator(self.seed, task), v.shape
        new = {
            "E": _uniform(width, self.hidden, random),
            "b": torch.zeros(self.hidden),
            "D": _uniform(self.hidden, width, random),
            "c": torch.zeros(width),
        }
        batches = torch.randint(n, (self.steps, self.batch_size), generator=random)
        with torch.enable_grad():
            leaves = [tensor.requires_grad_() for tensor in new.values()]
            optimizer = torch.optim.Adam(leaves, lr=self.learning_rate)
            for rows in batches:
                x = v[rows]
                logits = torch.relu(x @ new["E"] + new["b"]) @ new["D"] + new["c"]
                loss = binary_cross_entropy_with_logits(logits, x, reduction="sum") / len(rows)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        return {name: tensor.detach() for name, tensor in new.items()}

    def choose(self, features: Tensor, tasks: Tensor | None = None) -> Choice:
        """Task of the least reconstruction error."""
        experts = {name: tensor.double() for name, tensor in self.experts.items()}
        rows = max(1, HELD // (len(experts["own"]) * features.shape[1]))
        # float64: float32 products round differently in batches of different size
        parts = [_errors(experts, self._squash(part.double())).T for part in features.split(rows)]
        errors = torch.cat(parts)
        choice = Choice.best(-errors.float())
        if self.abstain_above is None:
            return choice
        abstained = (errors > self.abstain_above * experts["own"]).all(1)
        return dataclasses.replace(choice, abstained=abstained)

    def state(self) -> dict[str, Tensor]:
        """All autoencoders, the standardisation, and the seed of those to come."""
        shared = {"mean": self.mean, "scale": self.scale, "seed": torch.tensor(self.seed)}
        return {**self.experts, **shared}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """The inverse of :meth:`state`."""
        names = {"E", "b", "D", "c", "own"}
        require(state, names | {"mean", "scale", "seed"}, "router=autoencoder")
        self.experts = {name: state[name] for name in self.experts}
        self.mean, self.scale, self.seed = state["mean"], state["scale"], int(state["seed"])


def _uniform(rows: int, columns: int, random: torch.Generator) -> Tensor:
    """Initial weights, uniform in ``+-1 / sqrt(rows)`` as in ``torch.nn.Linear``."""
    return (2 * torch.rand(rows, columns, generator=random) - 1) / rows**0.5


def _errors(experts: dict[str, Tensor], v: Tensor) -> Tensor:
    """Squared reconstruction errors of ``v (N, H)``.

    One autoencoder gives ``(N,)``, a stack of T gives ``(T, N)``.
    """
    e, b, d, c = (experts[name].to(v.dtype) for name in ("E", "b", "D", "c"))
    code = torch.relu(v @ e + b.unsqueeze(-2))
    return (torch.sigmoid(code @ d + c.unsqueeze(-2)) - v).square().sum(-1)
