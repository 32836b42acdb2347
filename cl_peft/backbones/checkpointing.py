"""Gradient checkpointing: a transformer's layers keep their inputs alone (Chen et al. 2016).

arXiv:1604.06174. The backward pass computes each layer once more, just before it needs what the
layer had computed inside. Of a model with N layers that leaves memory for N inputs and for the
inside of one layer, at the price of a second forward pass. Gradients are the same to the bit: the
second pass has the modules, the switch for dropout and the state of the random numbers that the
first one had, although by then the bank's scope is closed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from cl_peft.errors import ConfigError
from cl_peft.modules.bank import Bank


@contextmanager
def checkpointed(model: nn.Module, bank: Bank) -> Iterator[None]:
    """Inside this scope, layers of ``model`` are computed again in backward passes.

    Hooks inside a layer run again with it; those on the layer itself do not.

    Args:
        model: A transformer of the transformers library.
        bank: Whose modules act in it.

    Raises:
        ConfigError: The model has no layers that can be computed again.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not layers:
        raise ConfigError(
            f"trainer.checkpointing=on: {type(model).__name__} does not say which of its layers "
            "can be computed again. Use trainer.checkpointing=off; trainer.accumulate=4 saves "
            "memory as well."
        )
    for layer in layers:
        layer.__dict__["forward"] = _twice(layer.forward, bank)  # before the class's own
    try:
        yield
    finally:
        for layer in layers:
            del layer.__dict__["forward"]


def _twice(forward: Callable[..., Any], bank: Bank) -> Callable[..., Any]:
    """A layer's forward pass that keeps nothing but its inputs; the same where nothing is kept."""

    def run(*args: Any, **options: Any) -> Any:  # noqa: ANN401
        reopened = bank.reopening()

        def inside(*args: Any) -> Any:  # noqa: ANN401
            with reopened():
                return forward(*args, **options)

        return checkpoint(inside, *args, use_reentrant=False)

    return run
