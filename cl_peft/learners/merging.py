r"""One model by merging: modules are trained alone, and their task vectors are merged.

All tasks start from the same module :math:`\theta_0`, which seed.init decides. Each trains alone,
with its own head, by cross-entropy over its own classes. After task t the one module is

.. math:: \theta_0 + m(\tau_1, \dots, \tau_t), \qquad \tau_i = \theta_i - \theta_0

    \text{average: } \frac{1}{t} \sum_i \tau_i \qquad
    \text{task\_arithmetic: } \lambda \sum_i \tau_i \qquad
    \text{ties: } \lambda \, \frac{\sum_{i \in A_j} \hat\tau_{ij}}{|A_j|}

TIES keeps of each vector the 20 % largest entries, :math:`\hat\tau_i`; elects for each parameter j
the sign of :math:`\sum_i \hat\tau_{ij}` (positive at zero); and averages over :math:`A_j`, the
tasks whose kept entry has that sign.

Vectors live in the module's own parameter space (as finished modules are stored). For LoRA that is
A and B, and the merged change of a weight is the product of merged factors, with cross terms
:math:`B_i A_j`; it is not the merge of the products :math:`B_i A_i`, which would be dense or have
rank t r. A shared :math:`\theta_0` keeps the A's alike, so for the average the two are near.

At test time the merged module and all heads side by side answer for all tasks; a class of several
heads has the mean of its rows. The heads never met, so their logits are comparable only as far as
separate training happens to make them so. Stored besides: every task's vector and head, so the
memory grows as a bank's does, while one module is active.

Sources: Wortsman et al. 2022 (arXiv:2203.05482); Ilharco et al. 2022 (arXiv:2212.04089); Yadav et
al. 2023 (arXiv:2306.01708), who without a validation set take :math:`\lambda = .4` for task
arithmetic, and 20 % and :math:`\lambda = 1` for TIES. The rule holds for a single task, too.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field, PositiveFloat
from torch import Tensor

from cl_peft.learners.base import Tools
from cl_peft.learners.shared import SharedModule
from cl_peft.modules.bank import Module, flatten
from cl_peft.modules.head import Head
from cl_peft.streams.base import Task
from cl_peft.training import generator

Rule = Literal["average", "task_arithmetic", "ties"]


class Merging(SharedModule):
    """One module, merged anew after every task.

    Args:
        rule: How task vectors are merged.
        scale: ``lambda``; None: .4 for task arithmetic, 1 for TIES. An average has none.
        keep: Share of each vector's entries that TIES keeps.
    """

    def __init__(
        self,
        rule: Literal["average", "task_arithmetic", "ties"] = "average",
        scale: PositiveFloat | None = None,
        keep: Annotated[float, Field(gt=0, le=1)] = 0.2,
    ) -> None:
        self.rule: Rule = rule
        self.keep = keep
        self.scale = scale if scale is not None else (0.4 if rule == "task_arithmetic" else 1.0)

    def start(self, tools: Tools) -> None:
        """No vectors yet."""
        super().start(tools)
        self._parts: dict[int, tuple[Module, Head]] = {}  # task vector and head by task

    def learn(self, task: Task) -> None:
        """Train from the common start, then merge."""
        module = self._origin()
        start = flatten(self._folded(module))
        start = {name: tensor.clone() for name, tensor in start.items()}
        _, head = self._fresh(task)
        self._fit(task, module, head, task.train, task.validation)
        vector = {
            site: {n: t.detach() - start[f"{site}/{n}"] for n, t in params.items()}
            for site, params in self._folded(module).items()
        }
        self._parts[task.index] = (vector, head.frozen())
        self._keep(task.index, self._merged(start), joined([h for _, h in self._parts.values()]))

    def state(self) -> dict[str, Tensor]:
        """Every task's vector and head."""
        return {
            f"{task}/{name}": tensor
            for task, (vector, head) in self._parts.items()
            for name, tensor in {**flatten(vector), **head.tensors()}.items()
        }

    def load_state(self, state: dict[str, Tensor]) -> None:
        """The inverse of :meth:`state`."""
        tasks: dict[int, dict[str, Tensor]] = {}
        for key, tensor in state.items():
            task, _, name = key.partition("/")
            tasks.setdefault(int(task), {})[name] = tensor
        self._parts = {t: self._load(tasks.get(t, {}), t) for t in range(self._newest + 1)}

    def _origin(self) -> Module:
        return self.tools.bank.fresh(generator(self.tools.seeds.init, 0))

    def _folded(self, module: Module) -> Module:
        bank = self.tools.bank
        return {s.name: bank.method.fold(s, module[s.name]) for s in bank.sites}

    def _merged(self, start: dict[str, Tensor]) -> Module:
        vectors = [flatten(vector) for vector, _ in self._parts.values()]
        flat = torch.stack([torch.cat([v[n].flatten() for n in start]) for v in vectors])
        change = merge(flat, self.rule, self.scale, self.keep)
        parts = change.split([t.numel() for t in start.values()])
        merged: Module = {}
        for (key, tensor), part in zip(start.items(), parts, strict=True):
            site, _, name = key.rpartition("/")
            merged.setdefault(site, {})[name] = tensor + part.view_as(tensor)
        return merged


def merge(vectors: Tensor, rule: Rule, scale: float = 1.0, keep: float = 0.2) -> Tensor:
    """Merge task vectors ``(T, P)`` into one ``(P,)``; see the head of this file."""
    if rule == "average":
        return vectors.mean(0)
    if rule == "task_arithmetic":
        return scale * vectors.sum(0)
    top = vectors.abs().topk(max(1, int(keep * vectors.shape[1])), dim=1).indices
    kept = torch.zeros_like(vectors).scatter(1, top, vectors.gather(1, top))
    sign = torch.where(kept.sum(0) >= 0, 1.0, -1.0)
    agrees = kept.sign() == sign
    return scale * (kept * agrees).sum(0) / agrees.sum(0).clamp_min(1)


def joined(heads: list[Head]) -> Head:
    """All heads side by side; a class that several know has the mean of its rows."""
    classes = tuple(dict.fromkeys(c for head in heads for c in head.classes))
    rows: dict[int, list[tuple[Tensor, Tensor]]] = {c: [] for c in classes}
    for head in heads:
        for c, weight, bias in zip(head.classes, head.weight, head.bias, strict=True):
            rows[c].append((weight, bias))
    weight = torch.stack([torch.stack([w for w, _ in rows[c]]).mean(0) for c in classes])
    bias = torch.stack([torch.stack([b for _, b in rows[c]]).mean(0) for c in classes])
    return Head(weight, bias, classes)
