"""What no single axis of a configuration can see: combinations that make no sense.

Imports no torch; classes say what fits them as constants, which are read from their source.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from cl_peft.schema import class_constant
from cl_peft.streams.checks import protocol_problems

#: What can name a folder.
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def combination_problems(config: Mapping[str, Any]) -> Iterator[str]:
    """What no single axis can see: yields one line per combination that makes no sense."""
    stream, backbone = config["stream"], config["backbone"]
    router, learner, module = config["router"], config["learner"], config["module"]
    if not NAME.fullmatch(config["group"]):
        yield f"group={config['group']!r}: letters, digits, '.', '_' and '-', at most 64."
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", config["device"]):
        yield f"device={config['device']!r}: allowed are auto, cpu, cuda, cuda:N and mps."
    if class_constant(learner["_target_"], "uses_router"):
        sees_task = class_constant(router["_target_"], "sees_task")
        if router["name"] == "none":
            yield (
                f"router=none does not fit learner={learner['name']}: it grows one module per task "
                "and something must choose between them. Try router=ridge."
            )
        elif not sees_task and (problem := _use_of_choice(config)):
            yield problem
        elif stream["scenario"] == "task" and not sees_task:
            yield (
                f"stream.scenario=task gives the task at test time, so router={router['name']} has "
                "nothing to choose. Use router=oracle, or stream.scenario=class."
            )
    if class_constant(learner["_target_"], "uses_module") and module["name"] == "none":
        yield (
            f"module=none does not fit learner={learner['name']}, which trains a module. Try "
            "module=lora, or learner=frozen for the backbone without modules."
        )
    fitting = class_constant(learner["_target_"], "modules")
    if fitting and module["name"] not in fitting:
        yield (
            f"learner={learner['name']} is made for {' or '.join(f'module={m}' for m in fitting)}, "
            f"not module={module['name']}."
        )
    source_modality = class_constant(stream["_target_"], "modality")
    backbone_modality = class_constant(backbone["_target_"], "modality")
    if source_modality != backbone_modality:
        yield (
            f"stream={stream['name']} delivers {source_modality}, but the backbone "
            f"{backbone['_target_'].rsplit('.', 1)[1]} reads {backbone_modality}. Choose a "
            f"backbone for {source_modality}, such as backbone=minilm for text."
        )
    if stream["scenario"] == "domain" and stream.get("domain", "") is None:
        yield (
            "stream.scenario=domain needs to know each example's domain. Add "
            "stream.domain=COLUMN, or use stream.scenario=class."
        )
    yield from protocol_problems(stream)
    yield from _accumulation(config)
    if config["trainer"].get("patience") is not None and not _has_validation(stream):
        yield (
            "trainer.patience stops on validation accuracy, but there are no validation examples. "
            "Set stream.validation_share=0.1, or trainer.patience=null."
        )


def _accumulation(config: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with splitting steps, if they are to be split."""
    trainer, learner = config["trainer"], config["learner"]
    parts, batch = trainer.get("accumulate", 1), trainer.get("batch_size", 1)
    if parts > 1 and not class_constant(learner["_target_"], "splits"):
        yield (
            f"trainer.accumulate={parts} does not fit learner={learner['name']}: its loss draws "
            "from a buffer once a step, so a step cannot be split. Use trainer.accumulate=1; "
            "trainer.checkpointing=on or a smaller trainer.batch_size saves memory as well."
        )
    elif parts > batch:
        yield (
            f"trainer.accumulate={parts}: a step has trainer.batch_size={batch} examples, and "
            f"cannot be split into more. Use trainer.accumulate={batch} or less."
        )


def _has_validation(stream: Mapping[str, Any]) -> bool:
    nodes = [stream, *(stream.get("sets") or {}).values()]
    return stream["validation_share"] > 0 or any(
        node.get(key) is not None for node in nodes for key in ("validation", "validation_split")
    )


def _use_of_choice(config: Mapping[str, Any]) -> str | None:
    """What is wrong with how a router's choice is to be used, if anything."""
    router, module = config["router"], config["module"]
    name, soft = router["name"], router.get("mix") == "soft"
    combines, heads = router.get("combine", "none") != "none", router.get("combine") == "heads"
    if combines and not class_constant(router["_target_"], "knows_classes"):
        return (
            f"router.combine={router['combine']} needs a router that knows classes, which router="
            f"{name} does not. Try router=ridge."
        )
    if combines and soft:
        return f"router.combine={router['combine']} and router.mix=soft exclude each other."
    if router.get("layers") is not None:
        if not class_constant(router["_target_"], "needs_features"):
            return (
                f"router.layers={router['layers']} has no effect: router={name} looks at no frozen "
                "features. Leave it out (null)."
            )
        if not router["layers"] or len(set(router["layers"])) < len(router["layers"]):
            return (
                f"router.layers={router['layers']}: name at least one layer, and each once, or "
                "leave it out (null) for the last."
            )
    if heads and not _has_validation(config["stream"]):
        return (
            "router.combine=heads chooses its weight on validation examples, and there are none. "
            "Set stream.validation_share=0.1."
        )
    mixes = soft or class_constant(router["_target_"], "mixes")
    fitting = class_constant(router["_target_"], "modules")
    if fitting and module["name"] not in fitting:
        wanted = " or ".join(f"module={m}" for m in fitting)
        return f"router={name} is made for {wanted}, not module={module['name']}."
    if mixes and not class_constant(module["_target_"], "weightable"):
        return (
            f"module={module['name']} cannot be mixed by weights, as router={name} would: its "
            "virtual tokens are there or not. Use router.mix=hard with a router that chooses, or "
            "module=lora."
        )
    if soft and router.get("top_k", 1) == 1:
        return (
            "router.mix=soft mixes the router.top_k best modules, and with router.top_k=1 the "
            "choice is a hard one. Use router.top_k=3, or router.mix=hard."
        )
    if router.get("top_k", 1) > 1 and not (mixes or heads):
        return (
            f"router.top_k={router['top_k']} has no effect with a hard choice. Add "
            "router.mix=soft or router.combine=heads, or set router.top_k=1."
        )
    return None
