r"""Arrow: per token and layer, the modules whose main direction the token has.

Ostapenko et al. 2024, arXiv:2405.11157. With ``v_t`` the top right singular vector of module t's
``B_t A_t`` at a linear layer, a token ``x`` there is routed by

.. math::
    s_t = |x \cdot v_t|, \qquad w = \mathrm{softmax}(\mathrm{top}_k(s) / \tau), \qquad
    y = W x + b + \sum_t w_t \, s B_t A_t x

``v_t`` is the direction in which the module changes a layer most; its sign is arbitrary, hence the
absolute value. ``v_t`` comes from a QR of ``A^T`` and ``B``, never from the whole product. Nothing
is learned and nothing stored besides the modules: one pass per sample, and all samples again after
each task, since every token's weights change.

The paper routes language models, which have no head per task. Here a task's score is its weight
averaged over tokens (padding left out) and layers, and the heads of all tasks answer on the pooled
feature ``f``: ``z_c = log w_t + log softmax_t(h_t(f))_c``. Modules: LoRA on linear layers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor, nn

from cl_peft.batching import by_length
from cl_peft.errors import ConfigError
from cl_peft.routers.base import Choice, Router
from cl_peft.store import require

if TYPE_CHECKING:
    from cl_peft.memo import Questions
    from cl_peft.modules.base import Site


class Arrow(Router):
    """Routes every token at every layer.

    Args:
        top_k: Modules that a token uses; 3 as in Hugging Face peft.
        temperature: ``tau``; 1 as in the authors' code (github.com/microsoft/mttl).
    """

    needs_features: ClassVar[bool] = False
    mixes: ClassVar[bool] = True
    modules: ClassVar[tuple[str, ...]] = ("lora",)

    def __init__(self, top_k: PositiveInt = 3, temperature: PositiveFloat = 1.0) -> None:
        super().__init__(top_k=top_k, temperature=temperature)

    def fit(self, features: Tensor, labels: Tensor, task: int) -> None:
        """Nothing to learn."""

    def choose(self, features: Tensor, tasks: Tensor | None = None) -> Choice:
        """Features alone have no tokens."""
        raise RuntimeError("this router looks inside the backbone: call answer()")

    def by_class(self, choice: Choice) -> bool:
        """All heads answer."""
        return True

    @torch.no_grad()
    def answer(self, questions: Questions) -> tuple[Choice, Tensor]:
        """Route tokens, pool, and let all heads answer."""
        with self.timed(len(questions)):
            return self._answer(questions)

    def _answer(self, questions: Questions) -> tuple[Choice, Tensor]:
        learner, backbone = questions.learner, questions.learner.tools.backbone
        units = [learner.units[questions.unit(t)] for t in range(questions.tasks)]
        bank = learner.tools.bank
        layers = [
            _Layer(site, [bank.get(u.row)[site.name] for u in units], bank.method.scale(site))  # type: ignore[attr-defined]
            for site in bank.sites
            if isinstance(site.layer, nn.Linear)
        ]
        if len(layers) < len(bank.sites):
            raise ConfigError("router=arrow needs LoRA on linear layers alone, not on embeddings.")
        features = learner.tools.features
        encoded = features.encoded(questions.inputs)
        scores = torch.zeros(len(questions), len(units))
        logits = torch.full((len(questions), questions.n_classes), float("-inf"))
        for rows in by_length(encoded.lengths, learner.tools.trainer.eval_batch_size):
            batch = backbone.collate(encoded.take(rows))
            mask = batch.get("attention_mask")
            sums: list[Tensor] = []
            hooks = [
                la.site.layer.register_forward_hook(self._hook(la, mask, sums)) for la in layers
            ]
            try:
                pooled = backbone(batch)
            finally:
                for hook in hooks:
                    hook.remove()
            weights = torch.stack(sums).mean(0).cpu()
            where = torch.from_numpy(rows)
            scores[where] = weights
            logits[where] = learner.weighted_heads(pooled, weights)
        learner.passes += len(questions)
        return Choice.best(scores), logits

    def _hook(
        self, layer: _Layer, mask: Tensor | None, sums: list[Tensor]
    ) -> Callable[..., Tensor]:
        def act(_: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> Tensor:
            x = args[0]
            weights = self.weights(layer, x)  # (B, L, T)
            if mask is not None and mask.shape == weights.shape[:2]:
                real = mask.unsqueeze(-1).to(weights.dtype)
                sums.append((weights * real).sum(1) / real.sum(1))
            else:
                sums.append(weights.mean(1))
            u = (x @ layer.a.T).unflatten(-1, (len(layer.v), -1)) * weights.unsqueeze(-1)
            out: Tensor = y + layer.scale * (u.flatten(-2) @ layer.b.T)
            return out

        return act

    def weights(self, layer: _Layer, x: Tensor) -> Tensor:
        """``w`` of each token, ``(..., in)`` to ``(..., T)``; 0 outside the top k."""
        s = (x @ layer.v.T).abs()
        best = s.topk(min(self.top_k, s.shape[-1]), dim=-1)
        kept = (best.values / self.temperature).softmax(-1)
        return torch.zeros_like(s).scatter(-1, best.indices, kept)

    def state(self) -> dict[str, Tensor]:
        """Empty: the modules say it all."""
        return {}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Nothing to load."""
        require(state, set(), "router=arrow")


class _Layer:
    """All modules at one linear layer.

    Attributes:
        v: ``(T, in)`` main directions.
        a: ``(T r, in)``.
        b: ``(out, T r)``.
    """

    def __init__(self, site: Site, params: list[dict[str, Tensor]], scale: float) -> None:
        self.site, self.scale = site, scale
        self.v = torch.stack([main_direction(p["A"], p["B"]) for p in params])
        self.a = torch.cat([p["A"] for p in params])
        self.b = torch.cat([p["B"] for p in params], dim=1)


def main_direction(a: Tensor, b: Tensor) -> Tensor:
    """Top right singular vector of ``B A``, ``(in,)``, for ``A (r, in)`` and ``B (out, r)``."""
    q_a, r_a = torch.linalg.qr(a.T)  # A = R_a^T Q_a^T
    r_b = torch.linalg.qr(b).R
    _, _, vh = torch.linalg.svd(r_b @ r_a.T)
    direction: Tensor = q_a @ vh[0]
    return direction
