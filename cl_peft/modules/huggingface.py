"""To and from Hugging Face peft: adapter folders that its ``PeftModel.from_pretrained`` loads.

A folder holds ``adapter_config.json`` and ``adapter_model.safetensors``, whose names are
``base_model.model.<layer>.<parameter>``. What the configuration and the parameters are called is
each method's own knowledge (:meth:`Method.peft_config`, :meth:`Method.peft_name`). The head has no
place there, since mean pooling is not what peft's classification models do; it lies beside, as
``head.safetensors``.

Loading is strict in both directions: peft only warns of missing tensors, and a module that is
silently random is worse than an error.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from cl_peft.atomic import write_atomic
from cl_peft.errors import ConfigError, DamagedRunError, DataError
from cl_peft.modules.bank import Bank, Module
from cl_peft.modules.dora import DoRA
from cl_peft.modules.head import Head
from cl_peft.modules.lora import LoRA

CONFIG, WEIGHTS, HEAD = "adapter_config.json", "adapter_model.safetensors", "head.safetensors"
_PREFIX = "base_model.model."
_TENSOR = re.compile(
    r"(?P<site>.+)\.(?P<name>lora_A\.weight|lora_B\.weight|lora_embedding_A|lora_embedding_B"
    r"|lora_magnitude_vector(?:\.weight)?)"
)


def export(
    bank: Bank,
    row: int,
    target: Path,
    *,
    base_model: str,
    head: Head | None = None,
    class_names: Mapping[int, str] | None = None,
) -> Path:
    """Write one module as a peft adapter folder.

    Args:
        bank: Where it is.
        row: Its row.
        target: Folder to write; created if absent.
        base_model: What ``base_model_name_or_path`` shall say.
        head: Its classifier, written beside it.
        class_names: Names of the head's classes by global id.

    Raises:
        ConfigError: peft has no equivalent of the method.
    """
    config = bank.method.peft_config(bank.sites)
    if config is None:
        raise ConfigError(
            f"{type(bank.method).__name__} modules have no equivalent adapter in Hugging Face peft."
        )
    module = bank.get(row)
    tensors = {
        f"{_PREFIX}{site.name}.{bank.method.peft_name(site, name)}": tensor.cpu().contiguous()
        for site in bank.sites
        for name, tensor in module[site.name].items()
    }
    write_atomic(target / WEIGHTS, save(tensors, {"format": "pt"}))
    whole = {
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "bias": "none",
        **config,
    }
    write_atomic(target / CONFIG, (json.dumps(whole, indent=2, sort_keys=True) + "\n").encode())
    if head is not None:
        names = {str(c): (class_names or {}).get(c, str(c)) for c in head.classes}
        stored = {name: t.cpu().contiguous() for name, t in head.tensors().items()}
        write_atomic(target / HEAD, save(stored, {"classes": json.dumps(names)}))
    return target


def import_adapter(folder: Path, model: nn.Module, device: str = "cpu") -> tuple[Bank, Module]:
    """Read a peft LoRA or DoRA folder as a module, with a bank that fits it.

    Args:
        folder: Where ``adapter_config.json`` is.
        model: The backbone's model.
        device: Where the bank shall live.

    Returns:
        An empty bank of the right method on ``model``, and the module, ready for :meth:`Bank.add`.

    Raises:
        DataError: No such folder, or its files cannot be read.
        ConfigError: Another kind of adapter, or layers that the backbone lacks.
        DamagedRunError: Tensors are missing, left over or misshapen; each is named.
    """
    config, tensors = _read(folder)
    if config.get("peft_type") != "LORA":
        raise ConfigError(
            f"{folder}: peft_type {config.get('peft_type')!r} cannot be imported; LORA (with or "
            "without use_dora) can."
        )
    for key in ("lora_bias", "use_qalora", "fan_in_fan_out"):
        if config.get(key):
            raise ConfigError(f"{folder}: {key} is set in {CONFIG}, which is not supported.")
    layers = dict(model.named_modules())
    found: Module = {}
    problems = []
    for key, tensor in tensors.items():
        match = _TENSOR.fullmatch(key.removeprefix(_PREFIX))
        if match is None:
            problems.append(f"unknown tensor {key}")
            continue
        site = _own_name(match["site"], layers, model)
        if site is None:
            problems.append(f"{key}: the backbone has no layer {match['site']}")
            continue
        word = match["name"].split("_")[-1].removesuffix(".weight")
        found.setdefault(site, {})["m" if word == "vector" else word] = tensor
    if problems:
        raise DamagedRunError(f"{folder} does not fit the backbone: {'; '.join(problems[:5])}")
    if not found:
        raise DamagedRunError(f"{folder / WEIGHTS} holds no LoRA tensors.")
    bank = Bank(_method(config, found), model, device)
    flat = {f"{s}/{n}": t.float() for s, params in found.items() for n, t in params.items()}
    try:
        return bank, bank.check(flat, str(folder / WEIGHTS))
    except DamagedRunError:
        bank.close()
        raise


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        config = dict(json.loads((folder / CONFIG).read_text()))
        return config, load_file(folder / WEIGHTS)
    except FileNotFoundError as error:
        raise DataError(
            f"{error.filename or folder / WEIGHTS} is missing: a peft adapter folder has {CONFIG} "
            f"and {WEIGHTS} (safetensors only; .bin files are not read)."
        ) from error
    except (ValueError, TypeError, OSError, SafetensorError) as error:
        raise DataError(f"{folder}: {CONFIG} or {WEIGHTS} cannot be read: {error}") from error


def _own_name(name: str, layers: Mapping[str, nn.Module], model: nn.Module) -> str | None:
    """The layer's name here; adapters of task models have the backbone's name in front."""
    prefix = str(getattr(model, "base_model_prefix", ""))
    for candidate in (name, name.removeprefix(f"{prefix}."), name.removeprefix("model.")):
        if candidate in layers:
            return candidate
    return None


def _method(config: Mapping[str, Any], found: Module) -> LoRA:
    """The LoRA or DoRA whose sites, ranks and scales are those of the folder."""
    alphas = dict(config.get("alpha_pattern") or {})

    def alpha(site: str) -> float:
        fits = (v for k, v in alphas.items() if re.match(rf"(.*\.)?({k})$", site))
        return float(next(fits, config.get("lora_alpha", 8)))

    ranks = {s: int(p["A"].shape[0]) for s, p in found.items() if "A" in p}
    kind = DoRA if config.get("use_dora") else LoRA
    return kind(
        rank=int(config.get("r", 8)),
        alpha=float(config.get("lora_alpha", 8)),
        scaling="sqrt_r" if config.get("use_rslora") else "r",
        dropout=float(config.get("lora_dropout", 0.0)),
        sites=sorted(found),
        rank_pattern=ranks,
        alpha_pattern={site: alpha(site) for site in found},
    )


def head_of(folder: Path, device: torch.device) -> tuple[Head, dict[int, str]]:
    """The head that :func:`export` wrote beside an adapter, and the names of its classes."""
    from safetensors import safe_open

    with safe_open(folder / HEAD, framework="pt") as file:
        names = json.loads((file.metadata() or {}).get("classes", "{}"))
    head = Head.from_tensors(load_file(folder / HEAD), device)
    return head, {int(k): str(v) for k, v in names.items()}
