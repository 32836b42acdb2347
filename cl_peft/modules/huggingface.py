"""To and from Hugging Face peft: adapter folders that its ``PeftModel.from_pretrained`` loads.

A folder holds ``adapter_config.json`` and ``adapter_model.safetensors``. What the configuration and
the tensors are called is each method's own knowledge (:meth:`Method.peft_config`,
:meth:`Method.peft_tensors`). Beside lie ``head.safetensors``, the task's classifier, and
``cl_peft.json``, which names its classes and says how the feature is pooled: mean pooling is not
what the classification models of transformers do. Where they do the same, the head can go inside
as well (``task_model.py``).

Loading is strict in both directions: peft only warns of missing tensors, and a module that is
silently random is worse than an error.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

from cl_peft.atomic import write_atomic
from cl_peft.config import build
from cl_peft.errors import ConfigError, DamagedRunError, DataError
from cl_peft.modules.bank import Bank, Module, flatten
from cl_peft.modules.head import Head
from cl_peft.modules.task_model import HeadPlace, head_place

if TYPE_CHECKING:
    from cl_peft.loading import LoadedRun

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
HEAD, ABOUT = "head.safetensors", "cl_peft.json"
_PREFIX = "base_model.model."
_TENSOR = re.compile(
    r"(?P<site>.+)\.(?P<name>lora_A\.weight|lora_B\.weight|lora_embedding_A|lora_embedding_B"
    r"|lora_magnitude_vector(?:\.weight)?)"
)
#: Variants of LoRA in adapter_config.json that compute something else.
_OTHER = (
    *("lora_bias", "use_qalora", "fan_in_fan_out", "use_bdlora", "layer_replication"),
    *("alora_invocation_tokens", "trainable_token_indices", "target_parameters", "arrow_config"),
    *("megatron_config", "velora_config", "kasa_config", "monteclora_config"),
)
#: Starts that leave the backbone's weights alone; PiSSA, OLoRA, CorDA, ... subtract from them.
_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")


def export(
    bank: Bank,
    row: int,
    target: Path,
    *,
    base_model: str,
    head: Head | None = None,
    class_names: Mapping[int, str] | None = None,
    about: Mapping[str, Any] | None = None,
    place: HeadPlace | None = None,
) -> Path:
    """Write one module as a peft adapter folder.

    Args:
        bank: Where it is.
        row: Its row.
        target: Folder to write; created if absent.
        base_model: What ``base_model_name_or_path`` shall say.
        head: Its classifier, written beside it.
        class_names: Names of the head's classes by global id.
        about: What ``cl_peft.json`` shall say besides the classes, such as the pooling.
        place: Write the adapter for this classification model, with the head inside.

    Raises:
        ConfigError: peft has no equivalent of the method, or no place for a head beside it.
    """
    config = bank.method.peft_config(bank.sites)
    kind = type(bank.method).__name__
    if config is None:
        raise ConfigError(
            f"{kind} modules on this backbone have no equivalent in Hugging Face peft. LoRA and "
            "DoRA have, and prompts and prefixes on texts."
        )
    module = bank.get(row)
    tensors: dict[str, Tensor] = {}
    for site in bank.sites:
        tensors.update(bank.method.peft_tensors(site, module[site.name]))
    if place is not None:
        if any(not name.startswith(_PREFIX) for name in tensors):
            raise ConfigError(
                f"{kind} modules cannot carry a head: in peft they act on the whole model's input. "
                "It can lie beside, in head.safetensors: leave --classifier out."
            )
        inside = {f"{place.prefix}.{n.removeprefix(_PREFIX)}": t for n, t in tensors.items()}
        inside |= {f"{place.layer}.{name}": tensor for name, tensor in place.tensors.items()}
        tensors = {f"{_PREFIX}{name}": tensor for name, tensor in inside.items()}
        config |= {"modules_to_save": [place.layer], "task_type": place.task_type}
    whole = {"base_model_name_or_path": base_model, "inference_mode": True, **config}
    if config["peft_type"] == "LORA":
        whole["bias"] = "none"
    write_atomic(target / WEIGHTS, save(_stored(tensors), {"format": "pt"}))
    write_atomic(target / CONFIG, _json(whole))
    facts = {"format": 1, **(about or {})}
    if head is not None:
        facts["classes"] = {str(c): (class_names or {}).get(c, str(c)) for c in head.classes}
        write_atomic(target / HEAD, save(_stored(head.tensors())))
    write_atomic(target / ABOUT, _json(facts))
    return target


def export_task(
    run: LoadedRun, task: int, target: Path, *, base_model: str, classifier: bool = False
) -> Path:
    """Write the module of a run's task with its head; see :func:`export`.

    Args:
        run: A loaded run.
        task: From 1.
        target: Folder to write.
        base_model: What ``base_model_name_or_path`` shall say.
        classifier: For the classification model of the backbone's kind, with the head inside.

    Raises:
        DataError: The run has no module of this task.
        ConfigError: peft has no equivalent of the module, or no place for its head.
    """
    if task not in run.rows:
        known = ", ".join(map(str, sorted(run.rows)))
        raise DataError(f"--task {task}: {run.folder} has modules of task {known}.")
    backbone, head = run.backbone, run.heads[task]
    if run.rows[task] < 0 or not run.bank.sites:
        raise ConfigError(f"{run.folder} has no modules: learner={run.config['learner']['name']}.")
    about = {"run": run.folder.name, "task": task}
    about |= {n: getattr(backbone, n) for n in ("pooling", "max_length") if hasattr(backbone, n)}
    return export(
        run.bank,
        run.rows[task],
        target,
        base_model=base_model,
        head=head,
        class_names=dict(enumerate(run.class_names)),
        about=about,
        place=head_place(backbone, head) if classifier else None,
    )


def head_of(folder: Path, device: torch.device) -> tuple[Head, dict[int, str]]:
    """The head that :func:`export` wrote beside an adapter, and the names of its classes.

    Raises:
        DataError: There is none, or it cannot be read.
    """
    try:
        head = Head.from_tensors(load_file(folder / HEAD), device)
        names = json.loads((folder / ABOUT).read_text())["classes"]
    except (OSError, KeyError, ValueError, SafetensorError) as error:
        raise DataError(f"{folder}: {HEAD} and {ABOUT} cannot be read: {error}") from error
    return head, {int(k): str(v) for k, v in names.items()}


def import_adapter(
    folder: Path, model: nn.Module, device: str = "cpu", *, without_head: bool = False
) -> tuple[Bank, Module, dict[str, Any]]:
    """Read a peft LoRA or DoRA folder as a module, with a bank that fits it.

    Args:
        folder: Where ``adapter_config.json`` is.
        model: The backbone's model.
        device: Where the bank shall live.
        without_head: Leave out the layers that were trained beside the adapter
            (``modules_to_save``), which are for another classification model than ours.

    Returns:
        An empty bank of the right method on ``model``; the module, ready for :meth:`Bank.add`; the
        method's configuration, for :func:`write_module`.

    Raises:
        DataError: No such folder, or its files cannot be read.
        ConfigError: Another kind of adapter, or one that was trained with a head.
        DamagedRunError: Tensors are missing, left over or misshapen; each is named.
    """
    node, tensors = _translated(folder, model, without_head)
    bank, module = _fitted(node, tensors, model, device, folder / WEIGHTS)
    return bank, module, node


def _fitted(
    node: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    model: nn.Module,
    device: str,
    source: Path,
) -> tuple[Bank, Module]:
    bank = Bank(build(node), model, device)
    try:
        return bank, bank.check(tensors, str(source))
    except DamagedRunError:
        bank.close()
        raise


def _translated(
    folder: Path, model: nn.Module, without_head: bool
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Configuration of the method that a peft folder means, and its tensors by our names."""
    config, tensors = _read(folder)
    _check_kind(folder, config)
    heads = [f"{_PREFIX}{name}." for name in config.get("modules_to_save") or []]
    if heads and any(key.startswith(tuple(heads)) for key in tensors) and not without_head:
        raise ConfigError(
            f"{folder} was trained together with {', '.join(config['modules_to_save'])} "
            "(modules_to_save), a head for a classification model of transformers. Import the "
            "adapter alone with --without-head, and train or bring a head of your own."
        )
    layers = dict(model.named_modules())
    found: dict[str, Tensor] = {}
    theirs: dict[str, str] = {}
    problems = []
    for key, tensor in tensors.items():
        if key.startswith(tuple(heads)):
            continue
        match = _TENSOR.fullmatch(key.removeprefix(_PREFIX))
        site = None if match is None else _own_name(match["site"], layers, model)
        if match is None:
            problems.append(f"unknown tensor {key}")
        elif site is None:
            problems.append(f"{key}: the backbone has no layer {match['site']}")
        else:
            word = match["name"].split("_")[-1] if "vector" not in match["name"] else "m"
            found[f"{site}/{word.removesuffix('.weight')}"] = tensor.float()
            theirs[site] = match["site"]
    problems += [
        f"missing {site}, which target_modules names"
        for site in sorted(_targets(config, layers, model) - set(theirs))
    ]
    if problems:
        raise DamagedRunError(f"{folder} does not fit the backbone: {'; '.join(problems[:5])}")
    if not found:
        raise DamagedRunError(f"{folder / WEIGHTS} holds no LoRA tensors.")
    return _method(config, theirs), found


def same_kind(one: Bank, other: Bank) -> bool:
    """Whether a module of one bank means the same in the other: layers, ranks and scales agree."""

    def law(bank: Bank) -> Any:  # noqa: ANN401 (compared only)
        config = bank.method.peft_config(bank.sites)
        if config is None or config["peft_type"] != "LORA":
            return None
        r, alpha = config["rank_pattern"], config["alpha_pattern"]
        sites = config["target_modules"]
        scales = [(s, r.get(s, config["r"]), alpha.get(s, config["lora_alpha"])) for s in sites]
        return scales, config["use_rslora"], config["use_dora"]

    return law(one) is not None and law(one) == law(other)


def write_module(path: Path, node: Mapping[str, Any], module: Module) -> None:
    """Keep a module in one file, together with the configuration of its method."""
    write_atomic(path, save(_stored(flatten(module)), {"module": json.dumps(dict(node))}))


def read_module(path: Path, model: nn.Module, device: str = "cpu") -> tuple[Bank, Module]:
    """The inverse of :func:`write_module`: an empty bank of the right method, and the module.

    Raises:
        DataError: There is no such file, or it does not say what its method is.
        DamagedRunError: Its tensors do not fit the backbone.
    """
    try:
        with safe_open(path, framework="pt") as file:
            node = json.loads((file.metadata() or {})["module"])
        tensors = load_file(path)
    except (OSError, KeyError, ValueError, SafetensorError) as error:
        raise DataError(f"{path} is no module written by cl-peft import: {error}") from error
    return _fitted(node, tensors, model, device, path)


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


def _check_kind(folder: Path, config: Mapping[str, Any]) -> None:
    if config.get("peft_type") != "LORA":
        raise ConfigError(
            f"{folder}: peft_type {config.get('peft_type')!r} cannot be imported; LORA (with or "
            "without use_dora) can."
        )
    for key in _OTHER:
        if config.get(key):
            raise ConfigError(f"{folder}: {key} is set in {CONFIG}, which is not supported.")
    if config.get("init_lora_weights") not in _STARTS:
        raise ConfigError(
            f"{folder}: it starts by {config['init_lora_weights']!r}, which changes the backbone's "
            "weights too. Convert it to plain LoRA first: save_pretrained(..., "
            "path_initial_model_for_weight_conversion=...) in peft."
        )


def _own_name(name: str, layers: Mapping[str, nn.Module], model: nn.Module) -> str | None:
    """The layer's name here; adapters of task models have the backbone's name in front."""
    prefix = str(getattr(model, "base_model_prefix", ""))
    for candidate in (name, name.removeprefix(f"{prefix}."), name.removeprefix("model.")):
        if candidate in layers:
            return candidate
    return None


def _targets(
    config: Mapping[str, Any], layers: Mapping[str, nn.Module], model: nn.Module
) -> set[str]:
    """Layers of the backbone that ``target_modules`` means, by peft's rules."""
    prefix = str(getattr(model, "base_model_prefix", ""))
    only = config.get("layers_to_transform")
    only = [only] if isinstance(only, int) else only
    numbers = None if only is None else {str(number) for number in only}

    def named(name: str, patterns: str | Sequence[str] | None) -> bool:
        if isinstance(patterns, str):
            return any(re.fullmatch(patterns, n) for n in (name, f"{prefix}.{name}"))
        ends = patterns or ()
        return any(name == end or f".{prefix}.{name}".endswith(f".{end}") for end in ends)

    return {
        name
        for name, layer in layers.items()
        if isinstance(layer, (nn.Linear, nn.Embedding))
        and named(name, config.get("target_modules"))
        and not named(name, config.get("exclude_modules"))
        and (numbers is None or numbers & set(name.split(".")))
    }


def _method(config: Mapping[str, Any], sites: Mapping[str, str]) -> dict[str, Any]:
    """Configuration of the LoRA or DoRA whose sites, ranks and scales are those of the folder.

    Args:
        config: ``adapter_config.json``.
        sites: Names of the layers here, and there.
    """

    def value(pattern: str, default: str, theirs: str) -> float:
        fits = (v for k, v in (config.get(pattern) or {}).items() if _fits(k, theirs))
        return float(next(fits, config.get(default, 8)))

    kind = "dora.DoRA" if config.get("use_dora") else "lora.LoRA"
    return {
        "_target_": f"cl_peft.modules.{kind}",
        "rank": int(config.get("r", 8)),
        "alpha": float(config.get("lora_alpha", 8)),
        "scaling": "sqrt_r" if config.get("use_rslora") else "r",
        "dropout": float(config.get("lora_dropout", 0.0)),
        "sites": sorted(sites),
        "rank_pattern": {s: int(value("rank_pattern", "r", name)) for s, name in sites.items()},
        "alpha_pattern": {s: value("alpha_pattern", "lora_alpha", n) for s, n in sites.items()},
    }


def _fits(pattern: str, name: str) -> bool:
    """Whether a key of ``rank_pattern`` or ``alpha_pattern`` means a layer, by peft's rule."""
    return re.match(rf"(.*\.)?({pattern})$", name) is not None


def _stored(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()
