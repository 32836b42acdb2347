"""What a task added and what is kept after it, counted in stored tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor

from cl_peft.learners.base import Later, Learner
from cl_peft.routers.base import Router
from cl_peft.streams.base import Task


class Sizes:
    """Counts a run's tensors as they lie in its folder, in values and in bytes.

    The frozen backbone is not counted, nor what is not stored: examples that a replay buffer points
    to (the stream has them) and VeRA's random pair (its seed draws it again).
    """

    def __init__(self) -> None:
        self._modules: dict[int, int] = {}  # bytes by task
        self._heads: dict[int, int] = {}

    def note(self, task: int, unit: Mapping[str, Tensor] | Later) -> None:
        """Remember the size of a task's stored unit, as :meth:`Learner.snapshot` gave it."""
        module, head = _split(unit.read() if isinstance(unit, Later) else unit)
        self._modules[task], self._heads[task] = _bytes(module.values()), _bytes(head.values())

    def after(self, task: Task, learner: Learner, router: Router) -> dict[str, float]:
        """Sizes after a task; those learned before it must have been noted.

        Returns:
            ``module_parameters``, ``module_bytes``: of the module that the task added; of the whole
            module or pool where one is trained on. ``head_parameters``: of the head that the task
            added, or of the one that widens. ``learner_state_bytes``, ``router_state_bytes``: what
            they keep besides. ``bank_modules``: rows of the bank in memory. ``stored_bytes``: all
            that is kept, the sum of modules (of every task, or the last where the learner needs no
            other), heads (of every task, or the one that answers for all), learner state and
            router state.
        """
        unit = learner.snapshot()
        self.note(task.index, unit)
        module, head = _split(unit)
        every, last = range(task.index + 1), (task.index,)
        state = _bytes(learner.state().values())
        routing = router.state_bytes() if learner.uses_router else 0
        modules = every if learner.keeps == "all" else last
        heads = modules if learner.uses_router else last
        kept = sum(self._modules[t] for t in modules) + sum(self._heads[t] for t in heads)
        sizes = {
            "module_parameters": sum(t.numel() for t in module.values()),
            "head_parameters": sum(t.numel() for t in head.values() if t.is_floating_point()),
            "learner_state_bytes": state,
            "module_bytes": _bytes(module.values()),
            "router_state_bytes": routing,
            "bank_modules": learner.tools.bank.count,
            "stored_bytes": kept + state + routing,
        }
        return {name: float(size) for name, size in sizes.items()}


def _split(unit: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Tensors of the module, and of the head: its weights, its classes and the row it uses."""
    head = {name: t for name, t in unit.items() if name.startswith("head.")}
    return {name: t for name, t in unit.items() if name not in head}, head


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)
