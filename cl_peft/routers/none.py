"""No router: for learners that keep one module, where nothing is to choose."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from cl_peft.routers.base import Choice, Router


class NoRouter(Router):
    """Refuses to choose; a learner that consults no router never asks."""

    needs_features: ClassVar[bool] = False

    def __init__(self) -> None:
        super().__init__()

    def fit(self, features: Tensor, labels: Tensor, task: int) -> None:
        """Nothing to learn."""

    def choose(self, features: Tensor, tasks: Tensor | None = None) -> Choice:
        """Must not be asked."""
        raise RuntimeError("router=none cannot choose a module")

    def state(self) -> dict[str, Tensor]:
        """Empty."""
        return {}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Nothing to load."""
