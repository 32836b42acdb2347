r"""GaLore: AdamW on gradients projected to a low rank (Zhao et al. 2024, arXiv:2403.03507).

For a matrix ``W (m, n)`` with gradient ``G``, whose moments live in the projected space
(algorithm 2; the projection acts on the shorter side):

.. math::
    m \ge n:\; R = G P^T,\; P = V^T_{[:r]} \qquad m < n:\; R = P^T G,\; P = U_{[:, :r]}

.. math::
    N = \frac{\hat M}{\sqrt{\hat V} + \epsilon}, \qquad
    W \leftarrow (1 - \eta \lambda) W - \eta\, \alpha\, \mathrm{back}(N), \qquad
    \mathrm{back}(N) = N P \;\text{or}\; P N

``M`` and ``V`` are Adam's moments of ``R``. ``P`` comes from an SVD of the gradient at steps 0, T,
2T, ...; the moments are kept across a new ``P``, as in the authors' code. Weight decay is decoupled
and unprojected. States of a matrix: ``r min(m, n) + 2 r max(m, n)`` values, where AdamW has
``2 m n``. Epsilon is added after the bias correction, as in torch's AdamW (the authors' code adds
it before).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal, overload

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor

from cl_peft.errors import ConfigError

#: Columns that the randomized SVD computes beyond the rank (Halko et al. 2011, arXiv:0909.4061).
OVERSAMPLING = 10


class GaLore:
    """Makes a GaLore optimizer for one task; its state starts fresh with every task.

    Module tensors with two dimensions, both larger than ``rank``, are projected; all others, and
    heads, are trained by plain AdamW. The defaults are the paper's for pretraining (section 5; the
    rank is that of its smallest model).

    Args:
        rank: ``r``.
        update_every: Steps between two projectors, ``T``.
        scale: ``alpha``, factor of the projected update.
        svd: ``exact``, or ``randomized`` (Halko et al. 2011): approximate and faster; what it draws
            is decided by the step alone.
        lr: Peak learning rate of modules.
        head_lr: Peak learning rate of heads; None means ``lr``.
        betas: Decay of the two moments.
        eps: Added to the denominator.
        weight_decay: Decoupled decay of module weights; heads' biases are never decayed.
    """

    def __init__(
        self,
        rank: PositiveInt = 128,
        update_every: PositiveInt = 200,
        scale: PositiveFloat = 0.25,
        svd: Literal["exact", "randomized"] = "exact",
        lr: PositiveFloat = 0.01,
        head_lr: PositiveFloat | None = None,
        betas: Annotated[list[float], Field(min_length=2, max_length=2)] = (0.9, 0.999),  # type: ignore[assignment]
        eps: PositiveFloat = 1e-8,
        weight_decay: NonNegativeFloat = 0.0,
    ) -> None:
        self.rank, self.update_every, self.scale, self.svd = rank, update_every, scale, svd
        self.lr, self.head_lr = lr, head_lr if head_lr is not None else lr
        self.betas = (betas[0], betas[1])
        self.eps, self.weight_decay = eps, weight_decay

    def make(self, module: list[Tensor], head: list[Tensor]) -> torch.optim.Optimizer:
        """An optimizer over a module's and a head's leaf tensors.

        Raises:
            ConfigError: Nothing of the module is large enough to be projected.
        """
        large = [t for t in module if t.ndim == 2 and min(t.shape) > self.rank]
        small = [t for t in module if not (t.ndim == 2 and min(t.shape) > self.rank)]
        if module and not large:
            sides = max((min(t.shape) for t in module if t.ndim == 2), default=1)
            raise ConfigError(
                f"optimizer.rank={self.rank}: the module has no matrix that is larger than that in "
                f"both directions (the largest shorter side is {sides}), so nothing would be "
                "projected. Use module=full, a lower optimizer.rank, or optimizer=adamw."
            )
        groups = [
            {"params": large, "lr": self.lr, "rank": self.rank},
            {"params": small, "lr": self.lr},
            {"params": [t for t in head if t.ndim > 1], "lr": self.head_lr},
            {
                "params": [t for t in head if t.ndim <= 1],
                "lr": self.head_lr,
                "weight_decay": 0.0,
            },
        ]
        return ProjectedAdamW(
            [g for g in groups if g["params"]],
            lr=self.lr,
            betas=self.betas,
            eps=self.eps,
            weight_decay=self.weight_decay,
            update_every=self.update_every,
            scale=self.scale,
            randomized=self.svd == "randomized",
        )


class ProjectedAdamW(torch.optim.Optimizer):
    """AdamW whose groups may ask for a projection of their matrices.

    A group with ``rank`` > 0 is projected. The state of a tensor is ``step`` (int), ``exp_avg``,
    ``exp_avg_sq`` and, if projected, ``projector``: numbers and tensors only, so an optimizer that
    loads a :meth:`state_dict` goes on bit for bit.

    Args:
        params: Tensors or groups.
        lr: Learning rate.
        betas: Decay of the two moments.
        eps: Added to the denominator.
        weight_decay: Decoupled decay.
        rank: Rank of the projection; 0 is plain AdamW.
        update_every: Steps between two projectors.
        scale: Factor of a projected update.
        randomized: Whether the SVD is approximate.
    """

    def __init__(
        self,
        params: Any,  # noqa: ANN401 (torch's own)
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        rank: int = 0,
        update_every: int = 200,
        scale: float = 0.25,
        randomized: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "rank": rank,
            "update_every": update_every,
            "scale": scale,
            "randomized": randomized,
        }
        super().__init__(params, defaults)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every tensor that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for tensor in group["params"]:
                if tensor.grad is not None:
                    self._update(tensor, tensor.grad, group, self.state[tensor])
        return loss

    def _update(
        self, tensor: Tensor, grad: Tensor, group: dict[str, Any], state: dict[str, Any]
    ) -> None:
        done = state.setdefault("step", 0)
        if group["rank"] > 0:
            if done % group["update_every"] == 0:
                state["projector"] = projector(grad, group["rank"], group["randomized"], done)
            grad = project(grad, state["projector"])
        if done == 0:
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(grad), torch.zeros_like(grad)
        state["step"] = done + 1
        beta1, beta2 = group["betas"]
        mean = state["exp_avg"].lerp_(grad, 1 - beta1)
        square = state["exp_avg_sq"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        denominator = (square / (1 - beta2 ** (done + 1))).sqrt_().add_(group["eps"])
        change = mean / (1 - beta1 ** (done + 1)) / denominator
        if group["rank"] > 0:
            change = group["scale"] * back(change, state["projector"], tensor.shape)
        tensor.mul_(1 - group["lr"] * group["weight_decay"])
        tensor.add_(change, alpha=-group["lr"])


def projector(grad: Tensor, rank: int, randomized: bool = False, seed: int = 0) -> Tensor:
    """The gradient's leading singular vectors on its shorter side.

    Args:
        grad: ``(m, n)``.
        rank: ``r``, less than both sides.
        randomized: Approximate them by random projections and two power iterations.
        seed: Decides what is drawn.

    Returns:
        ``(r, n)``, rows orthonormal, if ``m >= n``; else ``(m, r)``, columns orthonormal.
    """
    matrix = grad.to(torch.promote_types(grad.dtype, torch.float32))  # no SVD in half precision
    if randomized:
        cuda = [matrix.device] if matrix.device.type == "cuda" else []
        columns = min(rank + OVERSAMPLING, *matrix.shape)
        with torch.random.fork_rng(devices=cuda):
            torch.manual_seed(seed)
            u, _, v = torch.svd_lowrank(matrix, q=columns, niter=2)
        vh = v.mH
    else:
        u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    right = grad.shape[0] >= grad.shape[1]
    chosen = vh[:rank] if right else u[:, :rank]
    return chosen.to(grad.dtype).clone(memory_format=torch.contiguous_format)


def project(grad: Tensor, p: Tensor) -> Tensor:
    """``G P^T (m, r)``, or ``P^T G (r, n)``."""
    return grad @ p.T if grad.shape[0] >= grad.shape[1] else p.T @ grad


def back(low: Tensor, p: Tensor, shape: torch.Size) -> Tensor:
    """``N P`` or ``P N``, ``(m, n)``: the way back from :func:`project`."""
    return low @ p if shape[0] >= shape[1] else p @ low
