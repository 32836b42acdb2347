"""What a run folder says, read without torch: behind the terminal screen, report and sweep table.

Every number is one that the run stored; nothing is computed again here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cl_peft.errors import ConfigError, DamagedRunError
from cl_peft.runs import is_held

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd


@dataclass(frozen=True)
class ResultView:
    """A run folder as a person reads it; finished, running or failed.

    Attributes:
        folder: The run folder.
        state: ``finished``, ``running``, ``interrupted`` (killed), ``failed``, ``refused``, or
            ``unknown`` without a status (``running`` where a process is in the folder).
        error: What stopped the run, or None.
        tasks: Number of tasks of the stream (0 where the run stopped before it knew).
        done: Number of tasks whose results are stored.
        config: The resolved configuration.
        results: Rows of ``results.parquet``.
        times: Seconds of each finished task: ``task``, ``learn``, ``route``, ``evaluate``.
        total_seconds: Seconds of the whole run, NaN where unknown.
    """

    folder: Path
    state: str
    error: str | None
    tasks: int
    done: int
    config: dict[str, Any]
    results: pd.DataFrame
    times: list[dict[str, float]]
    total_seconds: float

    @classmethod
    def from_folder(cls, folder: Path) -> ResultView:
        """Read a run folder. Of an unfinished run, the tasks that its manifest lists are read.

        Raises:
            DamagedRunError: A file is missing or cannot be read; it is named.
        """
        import pandas as pd

        status = read_json(folder / "status.json")
        state = str(status.get("state", "unknown"))
        if state == "running" and not is_held(folder):
            state = "interrupted"
        if state == "unknown" and is_held(folder):  # it has just begun
            state = "running"
        if state == "finished":
            results = read_parquet(folder / "results.parquet")
            timing = read_json(folder / "timing.json")
            times, total = timing.get("tasks", []), timing.get("total_seconds")
        else:
            parts = _committed(folder)
            frames = [read_parquet(part / "results.parquet") for part in parts]
            results = pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()
            times, total = [read_json(part / "timing.json") for part in parts], None
        stream = read_json(folder / "stream.json")
        if not stream and "stream.json" in read_json(folder / "manifest.json").get("fixed", ()):
            raise _damaged(folder / "stream.json", "manifest.json lists it")
        return cls(
            folder=folder,
            state=state,
            error=status.get("error"),
            tasks=len(stream.get("tasks", [])) or int(status.get("tasks") or 0),
            done=int(results["after_task"].max()) if len(results) else 0,
            config=read_config(folder / "config.yaml"),
            results=results,
            times=[t for t in times if t],
            total_seconds=float(total if total is not None else status.get("seconds", math.nan)),
        )

    @property
    def title(self) -> str:
        """``<group>/<run>``, as the folder is found under ``runs/``."""
        return f"{self.folder.parent.name}/{self.folder.name}"

    def matrix(self, routing: str) -> np.ndarray:
        """Accuracy ``R[t, i]`` on task ``i + 1`` after task ``t + 1``.

        Args:
            routing: ``oracle`` or ``routed``.

        Returns:
            ``(done, done)`` float64; NaN where no such cell exists.
        """
        import numpy as np

        cells = np.full((self.done, self.done), np.nan)
        if self.done:
            rows = self.results
            rows = rows[(rows["metric"] == "accuracy") & (rows["routing"] == routing)].dropna()
            after, task = rows["after_task"].to_numpy(int), rows["eval_task"].to_numpy(int)
            cells[after - 1, task - 1] = rows["value"]
        return cells

    def value(self, metric: str, routing: str = "none", after_task: int | None = None) -> float:
        """A number over all seen tasks; NaN where undefined or absent.

        Args:
            metric: Such as ``average_accuracy``.
            routing: ``oracle``, ``routed``, or ``none`` for what belongs to no routing.
            after_task: From 1; the last finished task if None.
        """
        if not self.done:
            return math.nan
        rows = self.results
        rows = rows[
            (rows["metric"] == metric)
            & (rows["routing"] == routing)
            & (rows["after_task"] == (after_task or self.done))
            & rows["eval_task"].isna()
        ]
        return float(rows["value"].iloc[0]) if len(rows) else math.nan

    def predictions(self) -> pd.DataFrame:
        """Predictions made after the last finished task; empty where none are stored.

        Raises:
            DamagedRunError: The file cannot be read.
        """
        import pandas as pd

        for path in (
            self.folder / "predictions.parquet",
            self.folder / "tasks" / f"{self.done:03d}" / "predictions.parquet",
        ):
            if path.exists():
                rows = read_parquet(path)
                return rows[rows["after_task"] == self.done]
        return pd.DataFrame()

    def metrics(self) -> list[tuple[str, str, str]]:
        """Rows ``(name, oracle, routed)`` of the table of metrics, in percent."""
        first = "n/a (first task)" if self.done == 1 else "n/a"

        def show(name: str, routing: str, undefined: str) -> str:
            return percent(self.value(name, routing), undefined)

        return [
            (label, show(name, "oracle", undefined), show(name, "routed", undefined))
            for label, name, undefined in (
                ("average accuracy (over tasks)", "average_accuracy", "n/a"),
                ("average accuracy (over samples)", "average_accuracy_micro", "n/a"),
                ("average incremental accuracy", "average_incremental_accuracy", "n/a"),
                ("forgetting", "forgetting", first),
                ("backward transfer", "backward_transfer", first),
            )
        ]

    def facts(self) -> list[tuple[str, str]]:
        """Lines ``(name, text)`` below the metrics."""
        return [
            ("router", self.routing()),
            ("errors", self.decomposition()),
            ("drift", self.drift()),
            ("size", self.parameters()),
            ("stored", self.stored()),
            ("time", self.time()),
            *self.passed(),
            *self.bounds(),
        ]

    def bounds(self) -> list[tuple[str, str]]:
        """Where a finished run stands between its baselines, if it was run with them."""
        from cl_peft import bounds

        found = bounds.read(self.folder) if self.state == "finished" else None
        if found is None:
            return []
        names = {"lower": "sequential", "upper": "joint", "frozen": "frozen nearest mean"}
        known = [f"{names[name]} {percent(value)}" for name, value in found.accuracy.items()]
        return [
            ("bounds", f"{', '.join(known)}; share of the gap {percent(found.share_of_gap)}"),
            (
                "new task",
                f"intransigence {percent(found.intransigence)}, gain over frozen "
                f"{percent(found.gain_over_frozen)}, forward transfer "
                f"{percent(found.forward_transfer, 'n/a (heads come with tasks)')}",
            ),
        ]

    def routing(self) -> str:
        """Share of samples whose task is found, and what counts as one in a repeated stream."""
        found = f"accuracy {percent(self.value('router_accuracy'))}"
        again = int(self.config.get("stream", {}).get("repetitions") or 1) > 1
        return f"{found}; another visit of the same classes counts as a miss" if again else found

    def decomposition(self) -> str:
        """Routed accuracy out of oracle accuracy, over all test samples of all seen tasks."""
        oracle, routed = (self.value("average_accuracy_micro", r) for r in ("oracle", "routed"))
        lost, luck = self.value("routing_loss"), self.value("misroute_luck")
        return (
            f"oracle {percent(oracle)} - lost by routing {percent(lost)} + gained by it "
            f"{percent(luck)} = routed {percent(routed)}{_rounded([oracle, -lost, luck], routed)}"
        )

    def drift(self) -> str:
        """Forgetting of the routed accuracy, split by what moved."""
        if self.done == 1:
            return "n/a (first task)"
        total = self.value("forgetting", "routed")
        module, routing = (self.value(f"forgetting_{part}_drift") for part in ("module", "routing"))
        return (
            f"routed forgetting {percent(total)} = module drift {percent(module)} + routing drift "
            f"{percent(routing)}{_rounded([module, routing], total)}"
        )

    def parameters(self) -> str:
        """Parameters that a task adds, or that all tasks share: ``per task`` or ``in all``."""

        def count(metric: str, grows: bool) -> str:
            values = [self.value(metric, after_task=t + 1) for t in range(self.done)]
            known = [v for v in values if not math.isnan(v)]
            ends = sorted({min(known), max(known)} if grows else {known[-1]}) if known else []
            return " to ".join(f"{v:,.0f}" for v in ends) or "n/a"

        grow = self._grows()
        modules, heads = ("per task" if g else "in all" for g in grow)
        module, head = map(count, ("module_parameters", "head_parameters"), grow)
        if modules == heads:
            return f"{modules} {module} module + {head} head parameters"
        return f"{modules} {module} module parameters, {heads} {head} head parameters"

    def _grows(self) -> tuple[bool, bool]:
        """Whether every task brings a module of its own, and a head of its own."""
        from cl_peft.schema import class_constant

        target = str(self.config.get("learner", {}).get("_target_"))
        try:
            every = class_constant(target, "keeps") == "all"
            return every, every and class_constant(target, "uses_router")
        except ConfigError:  # written by another version
            return True, True

    def stored(self) -> str:
        """Bytes of all that is kept, and of its parts; a run of an older version lacks the sum."""
        total, state, router = (
            self.value(f"{name}_bytes") for name in ("stored", "learner_state", "router_state")
        )
        parts = {
            "modules and heads": total - state - router,
            "learner state": state,
            "router": router,
        }
        shown = [f"{name} {size(value)}" for name, value in parts.items() if value > 0]
        known = "" if math.isnan(total) else f"{size(total)}: "
        return f"{known}{', '.join(shown)}" or "n/a"

    def time(self) -> str:
        """Time by what it was spent on."""
        spent = [
            f"{part} {duration(sum(float(t.get(part, 0.0)) for t in self.times))}"
            for part in ("learn", "route", "evaluate")
        ]
        reused = sum(bool(t.get("reused")) for t in self.times)
        looked_up = f"; {reused} of {len(self.times)} modules from the cache" if reused else ""
        return f"{', '.join(spent)}; in total {duration(self.total_seconds)}{looked_up}"

    def passed(self) -> list[tuple[str, str]]:
        """Passes through the backbone that all evaluations took, where they were counted."""
        passes = self.passes()
        text = f"{passes:.2f} through the backbone per test example, in all evaluations together"
        return [] if math.isnan(passes) else [("passes", text)]

    def passes(self) -> float:
        """Passes through the backbone of all evaluations, per test example; NaN where unknown.

        A frozen feature counts as one, even if it came from the cache.
        """
        stream = read_json(self.folder / "stream.json")
        tests = sum(int(t["test"]) for t in stream.get("tasks", [])[: self.done])
        counts = [t["passes"] + t["features"] for t in self.times if "features" in t]
        if not tests or len(counts) < self.done:
            return math.nan
        return float(sum(counts)) / tests

    def paths(self) -> list[tuple[str, Path]]:
        """Where to look next: the run folder, and figure and report where they exist."""
        files = (
            ("folder", self.folder),
            ("figure", self.folder / "accuracy_matrix.png"),
            ("report", self.folder / "report.md"),
        )
        return [(name, path) for name, path in files if path.exists()]


def flatten(node: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield ``(dotted key, value)`` for everything in nested dicts that is no dict."""
    for key, value in node.items():
        if isinstance(value, dict) and value:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def percent(value: float, undefined: str = "n/a") -> str:
    """A share as percent with one decimal."""
    if math.isnan(value):
        return undefined
    return f"{round(100 * value, 1) + 0.0:.1f}"  # + 0.0 turns -0.0 into 0.0


def size(count: float) -> str:
    """A number of bytes in the unit that suits it."""
    if math.isnan(count):
        return "n/a"
    for unit, power in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= power:
            return f"{count / power:,.1f} {unit}"
    return f"{count:.0f} bytes"


def duration(seconds: float) -> str:
    """Seconds as a person says them."""
    if math.isnan(seconds):
        return "n/a"
    if seconds < 99.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object, or nothing where there is no such file.

    Raises:
        DamagedRunError: The file holds something else.
    """
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _damaged(path, error) from error
    if not isinstance(content, dict):
        raise _damaged(path, "not a JSON object")
    return content


def read_config(path: Path) -> dict[str, Any]:
    """Read ``config.yaml``, or nothing where there is none.

    Raises:
        DamagedRunError: The file is no YAML.
    """
    from omegaconf import OmegaConf

    if not path.exists():
        return {}
    try:
        content = OmegaConf.to_container(OmegaConf.load(path))
    except Exception as error:  # what a YAML parser raises is its own business
        raise _damaged(path, error) from error
    return {str(key): value for key, value in content.items()} if isinstance(content, dict) else {}


def read_parquet(path: Path) -> pd.DataFrame:
    """Read a table.

    Raises:
        DamagedRunError: The file is missing or damaged.
    """
    import pandas as pd

    try:
        return pd.read_parquet(path)
    except (OSError, ValueError) as error:  # pyarrow's errors derive from these
        raise _damaged(path, error) from error


def _damaged(path: Path, why: object) -> DamagedRunError:
    reason = str(why).strip().splitlines()[0] if str(why).strip() else type(why).__name__
    return DamagedRunError(
        f"{path}: missing or damaged ({reason}).\n"
        "  Put the file back, or run the same command again with fresh=true to start over."
    )


def _committed(folder: Path) -> list[Path]:
    """Folders of the tasks that the manifest lists, in order."""
    tasks = read_json(folder / "manifest.json").get("tasks", [])
    return [folder / "tasks" / f"{int(entry['task']):03d}" for entry in tasks]


def _rounded(terms: list[float], total: float) -> str:
    """Say so where rounding to tenths makes a sum look wrong."""
    shown = sum(round(100 * term, 1) for term in terms)
    wrong = abs(shown - round(100 * total, 1)) > 0.05  # False where something is undefined
    return " (rounded)" if wrong else ""
