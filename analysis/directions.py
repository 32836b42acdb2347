"""Which way a number is better; the one place that knows.

Ranks, bold and underlined cells, arrows in headings and the order of lists all ask here. Sizes and
times have no direction: less is cheaper, but the cheapest run (no module at all) is not the best.
Nor has the luck of misrouted samples, which is no merit.
"""

from __future__ import annotations

from cl_peft.errors import DataError

#: How the names of numbers begin that are better high, or low; others have no direction.
HIGHER = (
    "accuracy",
    "average_accuracy",
    "average_incremental_accuracy",
    "backward_transfer",
    "forward_transfer",
    "gain_over_frozen",
    "learning_accuracy",
    "oracle_accuracy",
    "router_accuracy",
    "share_of_gap",
)
LOWER = ("forgetting", "intransigence", "routing_loss")
#: What is not called by its name.
SPOKEN = {"routing_loss": "lost by routing", "misroute_luck": "gained by routing"}


def direction(metric: str) -> int:
    """1 where high values of a metric, or of a column of a summary, are better; -1 low; 0 neither.

    Args:
        metric: Such as "average_accuracy_routed", "forgetting" or "stored_parameters".
    """
    return int(metric.startswith(HIGHER)) - int(metric.startswith(LOWER))


def required_direction(metric: str) -> int:
    """1 or -1, as :func:`direction`.

    Raises:
        DataError: The metric has no direction, so nothing can be ranked by it.
    """
    found = direction(metric)
    if not found:
        raise DataError(f"{metric} is neither better high nor better low, so it ranks nothing.")
    return found


def spoken(metric: str) -> str:
    """A metric, or a column of a summary, in words."""
    return SPOKEN.get(metric, metric.replace("_", " "))


def heading(metric: str) -> str:
    """The head of a column: ``average accuracy routed (%) ↑``; no arrow without a direction."""
    unit = "" if is_count(metric) else " (%)"
    arrow = {1: " ↑", -1: " ↓", 0: ""}[direction(metric)]
    return f"{spoken(metric)}{unit}{arrow}"


def is_count(metric: str) -> bool:
    """Whether a number is a plain count, not a share that is shown in percent."""
    return metric.endswith(("_parameters", "_bytes", "_modules", "tasks", "seconds"))
