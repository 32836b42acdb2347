"""Which of transformers' classification models computes what a head computes here, and where.

An adapter can carry its head inside (peft's ``modules_to_save``) only if the classification model
of the backbone's kind is a single linear layer on the very feature that we pool. That is so for a
ViT with CLS pooling (``ViTForImageClassification``), and for decoders with last-token pooling as
far as their ``score`` layer goes, which has no bias. It is not so for BERT and its kin, which put a
dense layer with tanh in between, and never with mean pooling. Rather than listing architectures,
the claim is tested: both are computed on a probe and compared.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cl_peft.backbones.base import Backbone
from cl_peft.errors import ConfigError
from cl_peft.modules.head import Head

_TEXTS = ["a", "a somewhat longer text, so that there is padding"]


@dataclass(frozen=True)
class HeadPlace:
    """Where a head goes in a classification model.

    Attributes:
        model_class: The model's class, such as ``ViTForImageClassification``.
        prefix: What the backbone is called inside it, such as ``vit``.
        layer: What its linear layer is called, such as ``classifier``.
        tensors: The head under this layer's names.
        task_type: What peft calls the task; None where it has no word for it.
    """

    model_class: str
    prefix: str
    layer: str
    tensors: dict[str, Tensor]
    task_type: str | None


@torch.no_grad()
def head_place(backbone: Backbone, head: Head) -> HeadPlace:
    """Find the place of a head, if there is one that computes the same.

    Args:
        backbone: A loaded backbone.
        head: A classifier on its pooled feature.

    Raises:
        ConfigError: There is none; says why.
    """
    config, kind = _config(backbone, len(head.classes)), _model_class(backbone)
    with torch.device("meta"):
        model = kind(config)
    prefix = str(kind.base_model_prefix)
    own = [
        (n, m)
        for n, m in model.named_children()
        if n != prefix and next(m.parameters(), None) is not None
    ]
    layer, linear = own[0] if len(own) == 1 else ("", None)
    if not isinstance(linear, nn.Linear) or linear.in_features != backbone.width:
        raise _refused(kind, f"its head is {', '.join(n for n, _ in own)}, not one linear layer")
    tensors = {"weight": head.weight.detach(), "bias": head.bias.detach()}
    if linear.bias is None:
        bias = tensors.pop("bias")
        if bool(bias.any()):
            raise _refused(
                kind,
                f"its layer '{layer}' has no bias, and this head's is up to {bias.abs().max():.3g}",
            )
    linear.load_state_dict(tensors, assign=True)
    setattr(model, prefix, backbone.model)
    batch = backbone.collate(backbone.encode(_probe(backbone)))
    expected = head(backbone(batch))
    try:
        logits = model.eval()(**batch).logits
    except (TypeError, AttributeError, IndexError):  # it wants a pooler that is not there
        logits = None
    if logits is None or not torch.allclose(logits, expected, atol=1e-5, rtol=1e-5):
        pooling = getattr(backbone, "pooling", "?")
        raise _refused(kind, f"it does not compute a linear layer on backbone.pooling={pooling}")
    task_type = "SEQ_CLS" if backbone.modality == "text" else None
    return HeadPlace(kind.__name__, prefix, layer, tensors, task_type)


def _model_class(backbone: Backbone) -> Any:  # noqa: ANN401 (a class of transformers)
    from transformers import (
        MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
        MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    )

    text = backbone.modality == "text"
    kinds = (
        MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
        if text
        else MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING
    )
    try:
        found = kinds[type(backbone.model.config)]
    except KeyError:
        name = type(backbone.model).__name__
        raise ConfigError(
            f"transformers has no classification model for {name}, so the head cannot go inside "
            "the adapter. It can lie beside, in head.safetensors: leave --classifier out."
        ) from None
    return found[0] if isinstance(found, tuple) else found


def _config(backbone: Backbone, classes: int) -> Any:  # noqa: ANN401 (of transformers)
    config = copy.deepcopy(backbone.model.config)
    config.num_labels = classes
    tokenizer = getattr(backbone, "tokenizer", None)
    if tokenizer is not None:
        config.pad_token_id = tokenizer.pad_token_id
    return config


def _probe(backbone: Backbone) -> list[Any]:
    if backbone.modality == "text":
        return list(_TEXTS)
    random = np.random.default_rng(0)
    return [random.integers(0, 256, (32, 32), dtype=np.uint8) for _ in range(2)]


def _refused(kind: Any, why: str) -> ConfigError:  # noqa: ANN401
    return ConfigError(
        f"the head cannot go inside the adapter: {kind.__name__} computes something else, since "
        f"{why}. It can lie beside, in head.safetensors: leave --classifier out."
    )
