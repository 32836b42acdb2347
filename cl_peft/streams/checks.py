"""Whether a stream's protocol fits together and fits its source, before anything is read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from cl_peft.schema import class_constant


def protocol_problems(stream: Mapping[str, Any]) -> Iterator[str]:
    """Yield one line per problem.

    Args:
        stream: The validated node of the stream: its source's keys and its protocol's.
    """
    name, scenario, sizes = stream["name"], stream["scenario"], stream["sizes"]
    groups = class_constant(stream["_target_"], "groups")
    orders, listed = stream.get("orders") or {}, isinstance(sizes, list)
    if not groups and scenario != "domain" and stream["tasks"] is None and not listed:
        yield f"stream.tasks: say into how many tasks stream={name} is cut."
    if listed and stream["tasks"] not in (None, len(sizes)):
        yield (
            f"stream.sizes={sizes} makes {len(sizes)} tasks, but stream.tasks={stream['tasks']}. "
            "Leave one of them out (null)."
        )
    if isinstance(stream["order"], int) and stream["order"] not in orders:
        known = ", ".join(str(number) for number in orders) or "none"
        yield (
            f"stream.order={stream['order']}: published orders of stream={name}: {known}. Choose "
            "one, list all names, or leave it out (null)."
        )
    fixed = "joins data sets, each of which is one task with classes of its own"
    if groups and scenario == "domain":
        yield f"stream.scenario=domain does not fit: stream={name} {fixed}. Use class or task."
    for key in ("sizes", "max_classes"):
        if stream[key] is not None and (groups or scenario == "domain"):
            why = f"stream={name} {fixed}" if groups else "tasks are domains with all classes"
            yield f"stream.{key}={stream[key]} has no meaning: {why}. Leave it out (null)."
    if stream["blurry"] > 0 and scenario == "task":
        yield (
            f"stream.blurry={stream['blurry']} makes tasks share classes, which "
            "stream.scenario=task forbids. Use stream.scenario=class, or stream.blurry=0."
        )
