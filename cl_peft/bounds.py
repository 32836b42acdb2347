"""What a run is measured against: lower bound, upper bound, and the frozen backbone.

With ``bounds=on`` a run's baselines are run first, under the same stream, backbone, module,
optimizer, trainer and seeds, in the same group, and recognised when they were run before:

* ``lower``: sequential fine-tuning of one module;
* ``upper``: joint training, anew on tasks 1..t after each task t;
* ``frozen``: nearest class mean on frozen features, no training at all.

Imports no torch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cl_peft import metrics
from cl_peft.atomic import write_atomic
from cl_peft.config import run_id, validate
from cl_peft.errors import DamagedRunError
from cl_peft.view import ResultView, read_json

#: Names of a run's baselines, kept in its folder.
FILE = "bounds.json"

_FROZEN = {
    "learner": {"_target_": "cl_peft.learners.frozen.Frozen", "name": "frozen"},
    "router": {
        "_target_": "cl_peft.routers.prototype.Prototype",
        "name": "prototype",
        "combine": "classes",
    },
}
_LEARNERS: dict[str, dict[str, Any]] = {
    "lower": {
        "learner": {"_target_": "cl_peft.learners.sequential.Sequential", "name": "sequential"}
    },
    "upper": {"learner": {"_target_": "cl_peft.learners.joint.Joint", "name": "joint"}},
    "frozen": _FROZEN,
}


def baselines(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Validated configurations of a run's baselines, by name; the run itself is left out.

    A learner without modules has nothing to bound but the frozen baseline.
    """
    own = run_id(config)
    found = {}
    for name, axes in _LEARNERS.items():
        if name != "frozen" and config["module"]["name"] == "none":
            continue
        other = validate({**config, **axes, "bounds": "off", "fresh": False})
        if run_id(other) != own:
            found[name] = other
    return found


def record(folder: Path, runs: Mapping[str, Mapping[str, Any]]) -> None:
    """Write into a run's folder which runs its baselines are."""
    names = {name: run_id(config) for name, config in runs.items()}
    write_atomic(folder / FILE, (json.dumps(names, indent=1) + "\n").encode())


@dataclass(frozen=True)
class Bounds:
    """A finished run beside its baselines; accuracies are routed, macro over tasks, final.

    Attributes:
        accuracy: Of baselines by name.
        share_of_gap: ``(A - lower) / (upper - lower)``; NaN where a bound is missing or they are
            equal.
        intransigence: Mean over t of ``a*_t - R[t, t]``, ``a*_t`` from joint training on 1..t.
        gain_over_frozen: Mean over t of ``R[t, t] - F[t, t]``: what training adds on a new task.
        forward_transfer: Lopez-Paz and Ranzato 2017, against the frozen baseline as the untrained
            model; NaN where no cell lies above the diagonal, as with heads that come with tasks.
    """

    accuracy: dict[str, float]
    share_of_gap: float
    intransigence: float
    gain_over_frozen: float
    forward_transfer: float

    def numbers(self) -> dict[str, float]:
        """For a tracker's summary, by name."""
        parts = {f"bounds/{name}": value for name, value in self.accuracy.items()}
        rest = {k: v for k, v in vars(self).items() if k != "accuracy"}
        return {**parts, **{f"bounds/{name}": value for name, value in rest.items()}}


def read(folder: Path) -> Bounds | None:
    """A finished run's bounds; None where it was run without.

    A baseline that was deleted since, is not finished, or has another stream (the data changed in
    between) is left out, and what needs it is NaN.
    """
    path = folder / FILE
    if not path.exists():
        return None
    own = ResultView.from_folder(folder)
    names = json.loads(path.read_text())
    found = {name: _beside(own, folder.parent / run) for name, run in names.items()}
    views = {name: view for name, view in found.items() if view is not None}
    if not views:
        return None
    R = own.matrix("routed")
    diagonals = {name: np.diagonal(v.matrix("routed")) for name, v in views.items()}
    accuracy = {name: v.value("average_accuracy", "routed") for name, v in views.items()}
    lower, upper = accuracy.get("lower", math.nan), accuracy.get("upper", math.nan)
    gap = upper - lower
    share = (own.value("average_accuracy", "routed") - lower) / gap if gap else math.nan
    none = np.full(len(R), np.nan)
    frozen = diagonals.get("frozen", none)
    return Bounds(
        accuracy=accuracy,
        share_of_gap=share,
        intransigence=_mean(metrics.intransigence(R, diagonals.get("upper", none))),
        gain_over_frozen=_mean(np.diagonal(R) - frozen),
        forward_transfer=metrics.forward_transfer(R, frozen) if len(R) > 1 else math.nan,
    )


def _beside(own: ResultView, folder: Path) -> ResultView | None:
    """A baseline that can stand beside a run, or None."""
    try:
        view = ResultView.from_folder(folder)
        streams = [read_json(path / "stream.json") for path in (own.folder, folder)]
    except DamagedRunError:
        return None
    mine, its = (stream.get("fingerprint") for stream in streams)
    return view if view.state == "finished" and mine == its else None


def _mean(values: np.ndarray) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else math.nan
