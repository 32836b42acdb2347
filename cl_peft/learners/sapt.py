r"""SAPT: a shared attention over all modules, per sample (Zhao et al. 2024, arXiv:2401.08295).

A sample's frozen feature ``f (H,)`` gives a query, each task has a key ``kappa_k (H,)``:

.. math::
    q = \mathrm{LayerNorm}(\mathrm{SiLU}(W_2 W_1 f)), \qquad
    w = \mathrm{softmax}_k \Big( \frac{\kappa_k \cdot q}{\tau \sqrt H} \Big), \qquad
    h(x) = W x + b + s \sum_k w_k B_k A_k x

with the same weights at every site, while a task trains and at test time. New module, new key and
the query projection train by cross-entropy; finished modules and keys stay. Each sample has its own
weights, which depend on it alone. Shapes: ``W_1 (h, H)``, ``W_2 (H, h)``, keys uniform in
``(-1, 1)``.

Stored: module and head per task; keys and query projection (state). Source: ``T5Stack`` in
src/t5_prompt.py of github.com/circle-hit/SAPT (``h`` 100); ``replay_weight``: ``kl_ratio`` in its
gen_script_long_t5.py.

**No pseudo-samples by default.** The paper's SAPT-LoRA also keeps old tasks' attention in place
(Attentive Reflection Module) with texts that a module trained for it generates. Without this the
projection drifts and old samples come to attend to new modules. ``replay=gaussian`` stands in for
the generator: per old task j the mean and covariance of its frozen features and its mean attention
:math:`\bar w_j` are kept (state), and with features drawn from the Gaussian, a batch per step,

.. math:: L = \mathrm{CE} + \lambda \sum_{j < t} \mathrm{KL}(\bar w_j \,\|\, w(\tilde f)), \quad
          \tilde f \sim N(\mu_j, \Sigma_j)

Other differences: the query starts from the pooled feature, in the code from the maximum over token
embeddings; gradients flow through finished modules to earlier layers, which the code cuts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor, nn

from cl_peft.learners.base import Fit, Tools, Unit
from cl_peft.learners.summed import Summed
from cl_peft.modules.bank import Active, Given, Route
from cl_peft.store import require, tensor_fingerprint
from cl_peft.streams.base import Task
from cl_peft.training import generator

#: Tensors of the query projection.
QUERY = ("down", "up", "scale", "shift")
#: What ``replay=gaussian`` keeps: ``(t, H)``, ``(t, H, H)`` and ``(t, t)``.
REPLAY = ("means", "factors", "attention")


class SAPT(Summed):
    """A module per task, mixed for each sample by attention.

    Args:
        hidden: ``h``, the narrow width of the query projection.
        temperature: ``tau``.
        replay: Keep old tasks' attention in place by features drawn from a ``gaussian`` per task.
        replay_weight: ``lambda``.
        common: See :class:`~cl_peft.learners.summed.Summed`.
    """

    needs_features: ClassVar[bool] = True

    def __init__(
        self,
        hidden: PositiveInt = 100,
        temperature: PositiveFloat = 1.0,
        replay: Literal["none", "gaussian"] = "none",
        replay_weight: NonNegativeFloat = 0.1,
        **common: Any,  # noqa: ANN401
    ) -> None:
        super().__init__(**common)
        self.hidden, self.temperature = hidden, temperature
        self.replay, self.replay_weight = replay, replay_weight

    def start(self, tools: Tools) -> None:
        """A random query projection, and no keys."""
        super().start(tools)
        width, random = tools.backbone.width, generator(tools.seeds.init, 19)
        down = torch.empty(self.hidden, width).uniform_(-1, 1, generator=random)
        up = torch.empty(width, self.hidden).uniform_(-1, 1, generator=random)
        self.query = {
            "down": (down / math.sqrt(width)).to(self._device),
            "up": (up / math.sqrt(self.hidden)).to(self._device),
            "scale": torch.ones(width, device=self._device),
            "shift": torch.zeros(width, device=self._device),
        }
        self.keys = torch.zeros(0, width, device=self._device)
        self.past = {
            "means": torch.zeros(0, width),
            "factors": torch.zeros(0, width, width),
            "attention": torch.zeros(0, 0),
        }

    def learn(self, task: Task) -> None:
        """Train a module, its key, and the query projection."""
        module, head = self._begin(task)
        random = generator(self.tools.seeds.init, task.index, 23)  # 23: other draws than modules
        key = torch.empty(1, self.keys.shape[1]).uniform_(-1, 1, generator=random)
        extra = {"key": key.to(self._device), **{n: t.clone() for n, t in self.query.items()}}
        for tensor in extra.values():
            tensor.requires_grad_(True)
        self._fit(task, module, head, task.train, task.validation, extra)
        self.keys = torch.cat([self.keys, extra["key"].detach()])
        self.query = {n: extra[n].detach() for n in QUERY}
        if self.replay == "gaussian":
            self._remember(self.tools.features.features(task.train.inputs))
        self._keep(task.index, module, head)
        self._rename()

    def _scores(self, features: Tensor, keys: Tensor, query: dict[str, Tensor]) -> Tensor:
        """Attention before the softmax, ``(B, k)``."""
        x = nn.functional.silu(features @ query["down"].T @ query["up"].T)
        q = nn.functional.layer_norm(x, x.shape[1:], query["scale"], query["shift"])
        return q @ keys.T / (self.temperature * math.sqrt(x.shape[1]))

    def _given(self, fit: Fit, rows: np.ndarray, inputs: Sequence[Any]) -> Given:
        bank = self.tools.bank
        features = self.tools.features.features([inputs[r] for r in rows]).to(self._device)
        keys = torch.cat([self.keys, fit.extra["key"]])
        weights = self._scores(features, keys, fit.extra).softmax(1)
        modules = [*(bank.get(row) for row in range(bank.count)), fit.module]
        given: Given = {}
        for site, params in fit.module.items():
            stacks = {n: torch.stack([m[site][n] for m in modules]) for n in params}
            wide = {n: t.expand(len(rows), *t.shape) for n, t in stacks.items()}
            given[site] = Active(wide, weights)
        return given

    def _loss(self, fit: Fit, rows: np.ndarray) -> Tensor:
        loss = super()._loss(fit, rows)
        keys = torch.cat([self.keys, fit.extra["key"]])
        for mean, factor, attention in zip(*self.past.values(), strict=True):
            drawn = mean + torch.randn(len(rows), len(mean)) @ factor.T
            target = torch.zeros(len(rows), len(keys), device=self._device)
            target[:, : len(attention)] = attention.to(self._device)
            now = self._scores(drawn.to(self._device), keys, fit.extra).log_softmax(1)
            kl = nn.functional.kl_div(now, target, reduction="batchmean")
            loss = loss + self.replay_weight * kl
        return loss

    @torch.no_grad()
    def _remember(self, features: Tensor) -> None:
        """Keep a Gaussian of a task's features, and its mean attention."""
        x = features.double()
        mean = x.mean(0)
        covariance = (x - mean).T @ (x - mean) / len(x)
        covariance.diagonal().add_(1e-6 * covariance.trace() / len(mean) + 1e-12)  # few examples
        weights = self._scores(features.to(self._device), self.keys, self.query).softmax(1)
        count = len(self.keys)
        attention = torch.zeros(count, count)
        attention[:-1, :-1] = self.past["attention"]
        attention[-1] = weights.mean(0).cpu()
        factor = torch.linalg.cholesky(covariance).float()
        self.past = {
            "means": torch.cat([self.past["means"], mean.float()[None]]),
            "factors": torch.cat([self.past["factors"], factor[None]]),
            "attention": attention,
        }

    @torch.no_grad()
    def logits(self, inputs: Sequence[Any], units: np.ndarray, title: str = "") -> Tensor:
        """Logits over all classes, each sample through its own mixture of all modules."""
        features = self.tools.features.features(inputs).to(self._device)
        weights = self._scores(features, self.keys, self.query).softmax(1)
        out = torch.full((len(inputs), self.tools.n_classes), float("-inf"))
        mixed = self._evaluated(inputs, lambda rows: Route.dense(weights[rows]), title)
        for rows, pooled in mixed:
            out[torch.from_numpy(rows)] = self._answer(pooled, units[rows])
        return out

    def _rename(self) -> None:
        """Name the unit by all that its answers depend on."""
        ((task, unit),) = self.units.items()
        parts = {"keys": self.keys, **self.query, "temperature": torch.tensor(self.temperature)}
        rows = self._unit(unit.row, unit.head, [(row, 1.0) for row in range(unit.row)])
        name = rows.fingerprint + tensor_fingerprint(parts)
        self.units = {task: Unit(unit.row, unit.head, name)}  # others: not the same for all samples

    def state(self) -> dict[str, Tensor]:
        """Keys, the query projection, and what replay draws from."""
        past = self.past if self.replay == "gaussian" else {}
        return {"keys": self.keys, **self.query, **past}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """The inverse of :meth:`state`."""
        past = REPLAY if self.replay == "gaussian" else ()
        require(state, {"keys", *QUERY, *past}, "learner=sapt")
        self.keys = state["keys"].to(self._device)
        self.query = {n: state[n].to(self._device) for n in QUERY}
        self.past = {n: state[n] for n in past} or self.past
        self._rename()
