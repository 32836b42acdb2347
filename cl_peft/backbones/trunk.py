"""The frozen layers below all modules, computed once per example instead of once per epoch.

Where modules act in upper layers alone, what enters the lowest of these, layer k, is the same in
every step of a task's training. It is kept in memory, ``(L, H)`` per example as the model gives it
(float32), and a step starts at layer k: the layers below give back what is kept, the embeddings,
masks, positions and all that is above are the model's own. Padding is zeros there: nobody attends
to it, and pooling leaves it out.

What is kept depends on the examples, the backbone and the batch size of evaluations alone: a task
that is trained again after an interruption ends with the same bits. They are not the bits of a
training that computes the layers in every step, as matrix products of another shape add up in
another order; gradients agree to about 1e-6.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from cl_peft.backbones.base import Batch
from cl_peft.backbones.features import Features
from cl_peft.batching import by_length
from cl_peft.modules.base import Site, layer_of
from cl_peft.streams.base import content_id

log = logging.getLogger(__name__)

#: Largest relative difference of features at which a model counts as one that may start at layer k;
#: far above rounding in bfloat16, far below what anything left out below makes.
AGREES = 0.02


def below(model: nn.Module, sites: Sequence[Site]) -> list[nn.Module]:
    """Layers below all sites, lowest first; empty where a site is at the input or there is none."""
    places = [layer_of(site.name) for site in sites]
    found = [place for place in places if place is not None]
    if not found or len(found) < len(places) or len({name for name, _ in found}) > 1:
        return []
    layers = model.get_submodule(found[0][0])
    return list(layers.children())[: min(at for _, at in found)]


class Trunk:
    """What frozen layers give for a task's examples, by the examples' content.

    Args:
        features: Model-ready inputs, and the backbone.
        layers: The backbone's layers below all modules, lowest first; at least one.
    """

    def __init__(self, features: Features, layers: list[nn.Module]) -> None:
        self.features, self.backbone, self.layers = features, features.backbone, layers
        self.kept: dict[str, Tensor] = {}
        self._wrapped = False  # whether layers give tuples

    @property
    def bytes(self) -> int:
        """Memory of what is kept."""
        return sum(t.numel() * t.element_size() for t in self.kept.values())

    @contextmanager
    def given(self, inputs: Sequence[Any]) -> Iterator[None]:
        """Inside this scope, a forward pass of exactly these examples starts above the layers.

        Those that are not known (replayed ones, say) are sent through the layers first.
        """
        known = [self.kept.get(content_id(item)) for item in inputs]
        strange = [item for item, hidden in zip(inputs, known, strict=True) if hidden is None]
        if len(strange) == len(inputs):
            yield
            return
        passed = iter(self._through(strange))
        rows = [next(passed) if hidden is None else hidden for hidden in known]
        padded = pad_sequence(rows, batch_first=True)
        output = (padded,) if self._wrapped else padded
        # set before the class's own forward, so that type, hooks and place of a layer stay
        before = [layer.__dict__.get("forward") for layer in self.layers]
        for layer in self.layers:
            layer.__dict__["forward"] = lambda *args, **options: output
        try:
            yield
        finally:
            for layer, own in zip(self.layers, before, strict=True):
                if own is None:
                    del layer.__dict__["forward"]
                else:
                    layer.__dict__["forward"] = own

    def fill(self, inputs: Sequence[Any], limit: float) -> str | None:
        """Compute and keep what the layers give for these examples, but for those it knows.

        Args:
            inputs: Raw inputs.
            limit: Bytes that may be kept in all.

        Returns:
            Why none of them is kept, if so: too large, or a model that cannot start above its
            layers.
        """
        new = {content_id(item): item for item in inputs}
        distinct = [item for name, item in new.items() if name not in self.kept]
        if not distinct:
            return None
        lengths = self.features.encoded(distinct).lengths
        order = np.argsort(-lengths, kind="stable")
        sample = order[np.linspace(0, len(order) - 1, min(4, len(order))).astype(int)]
        some = [distinct[r] for r in sample]
        hidden = self._through(some)
        if not hidden:
            return "its layers pass on more than hidden states"
        each = hidden[0].numel() // int(lengths[sample[0]]) * hidden[0].element_size()
        needed = int(lengths.sum()) * each
        if self.bytes + needed > limit:
            total = (self.bytes + needed) / 1e9
            return f"{total:.3g} GB would be kept, and trainer.trunk_gb={limit / 1e9:g}"
        self._keep(some, hidden)
        batch = self.backbone.collate(self.features.encoded(some))
        with torch.no_grad():
            whole = self.backbone(batch).float()
            with self.given(some):
                start = self.backbone(batch).float()
        if not float((start - whole).norm()) <= AGREES * float(whole.norm()):
            for item in some:
                del self.kept[content_id(item)]
            return "started above these layers, the model gives other features"
        batches = list(by_length(lengths, self.features.batch_size))
        for rows in self.features.progress(batches, len(batches)):
            items = [distinct[r] for r in rows]
            self._keep(items, self._through(items))
        return None

    def _keep(self, inputs: Sequence[Any], hidden: Sequence[Tensor]) -> None:
        for item, own in zip(inputs, hidden, strict=True):
            self.kept[content_id(item)] = own.clone()  # without the padding beside it

    @torch.no_grad()
    def _through(self, inputs: Sequence[Any]) -> list[Tensor]:
        """Hidden states ``(L, H)`` per example behind the layers, without padding.

        Empty where the layers give other things than hidden states.
        """
        if not inputs:
            return []
        encoded = self.features.encoded(inputs)
        hidden = self._lower(self.backbone.collate(encoded))
        if hidden is None:
            return []
        positions = hidden.shape[1] // int(encoded.lengths.max())  # 1, or those of an image
        lengths = encoded.lengths * positions
        return [own[: int(n)] for own, n in zip(hidden, lengths, strict=True)]

    def _lower(self, batch: Batch) -> Tensor | None:
        """Output of the layers; None where it is not hidden states alone."""

        def stop(layer: nn.Module, args: Any, output: Any) -> None:  # noqa: ANN401
            raise _Enough(output)

        handle = self.layers[-1].register_forward_hook(stop)
        try:
            self.backbone(batch)
        except _Enough as enough:
            output = enough.output
        else:
            return None  # this model does not call its layers one by one
        finally:
            handle.remove()
        self._wrapped = isinstance(output, tuple)
        if isinstance(output, tuple) and len(output) == 1:
            (output,) = output
        return output if isinstance(output, Tensor) and output.ndim == 3 else None


class _Enough(Exception):  # noqa: N818 (no error: layers above are not needed)
    def __init__(self, output: Any) -> None:  # noqa: ANN401
        self.output = output


def trunk_of(
    features: Features,
    sites: Sequence[Site],
    inputs: Sequence[Any],
    limit: float,
    title: str,
) -> Trunk | None:
    """What lies below all sites, for these examples; None where nothing does, or it does not fit.

    Args:
        features: Model-ready inputs, and the backbone.
        sites: Where modules act.
        inputs: Raw inputs.
        limit: Bytes that may be kept.
        title: What the log says, such as ``task 2/5``.
    """
    layers = below(features.backbone.model, sites)
    if not layers or not len(inputs):
        return None
    trunk = Trunk(features, layers)
    why = trunk.fill(inputs, limit)
    about = f"{title}: the {len(layers)} frozen layers below all modules are computed"
    if why is not None:
        log.info("%s in every step: %s", about, why)
        return None
    log.info("%s once: %.0f MB kept", about, trunk.bytes / 1e6)
    return trunk
