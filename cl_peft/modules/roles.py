"""Layers by what they do inside a transformer's layer, for methods that act on roles, not names.

Families that name their layers alike are told apart by name patterns: BERT and RoBERTa, ViT and
DeiT, Llama and its relatives, OPT, DistilBERT.
"""

from __future__ import annotations

from typing import Literal

from torch import nn

from cl_peft.errors import ConfigError
from cl_peft.modules.base import Layers, Site, among, layer_of, linear_sites, matches

Role = Literal["key", "value", "attention_out", "ffn_in", "ffn_out"]

PATTERNS: dict[Role, tuple[str, ...]] = {
    "key": ("key", "k_proj", "k_lin"),
    "value": ("value", "v_proj", "v_lin"),
    "attention_out": ("attention.output.dense", "o_proj", "self_attn.out_proj", "out_lin"),
    "ffn_in": ("intermediate.dense", "mlp.fc1", "fc1", "gate_proj", "ffn.lin1"),
    "ffn_out": ("output.dense", "mlp.fc2", "fc2", "down_proj", "ffn.lin2"),
}


def role_of(name: str) -> Role | None:
    """The role of a linear layer by its dotted name; the attention's output comes first.

    BERT calls both ``attention.output.dense`` and ``output.dense``, so the order matters.
    """
    return next(
        (role for role, names in PATTERNS.items() if any(matches(name, n) for n in names)), None
    )


def role_sites(model: nn.Module, roles: tuple[Role, ...], layers: Layers = None) -> list[Site]:
    """Linear layers with one of these roles, in the model's order; only in ``layers`` if given.

    Raises:
        ConfigError: The backbone has none with one of the roles.
    """
    sites = [site for site in linear_sites(model, ["all"], layers) if role_of(site.name) in roles]
    missing = sorted(set(roles) - {role_of(site.name) for site in sites})
    if missing:
        wanted = {role: ", ".join(PATTERNS[role]) for role in missing if role is not None}
        raise ConfigError(
            f"module: {type(model).__name__} has no layer for {' and '.join(wanted)}; layers of "
            f"these names are known: {wanted}. Add the family's names to modules/roles.py, or use "
            "module=lora, which takes any name pattern."
        )
    return sites


def norm_sites(model: nn.Module, layers: Layers = None) -> list[Site]:
    """LayerNorms and RMSNorms inside the transformer's layers; only in ``layers`` if given."""
    return [
        Site(name, layer)
        for name, layer in model.named_modules()
        if type(layer).__name__.endswith(("LayerNorm", "RMSNorm"))
        and layer_of(name) is not None
        and among(model, name, layers)
    ]
