"""Cut a source's examples into ordered tasks. Imports no torch.

Order and samples are decided by different seeds: ``seed.order`` puts classes into tasks and tasks
into order, ``seed.data`` draws few-shot subsets and the validation split. A class keeps the same
few-shot examples whatever the order, since every draw is seeded by (seed.data, split, class).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cl_peft.config import Protocol
from cl_peft.errors import DataError, did_you_mean
from cl_peft.streams.base import Examples, RawData, Split, Stream, Task

_TRAIN, _TEST, _VALIDATION = 1, 2, 3  # one random stream per purpose


@dataclass(frozen=True)
class _Plan:
    """Which classes and which examples form one task."""

    name: str
    classes: tuple[int, ...]
    domain: str | None = None


def make_stream(raw: RawData, protocol: Protocol, *, order_seed: int, data_seed: int) -> Stream:
    """Cut ``raw`` into tasks.

    Args:
        raw: All examples and class names.
        protocol: Scenario, number of tasks, few-shot counts, validation share.
        order_seed: Decides the classes of each task and the order of tasks.
        data_seed: Decides which examples are drawn and which are held out.

    Raises:
        DataError: More tasks than classes or domains, a class or domain without examples, or a
            class with too few examples to hold one out.
    """
    if protocol.scenario == "domain":
        plans = _domain_plans(raw, protocol, order_seed)
    else:
        plans = _class_plans(raw, protocol, order_seed)
    tasks = tuple(_cut(i, plan, raw, protocol, data_seed) for i, plan in enumerate(plans))
    return Stream(protocol.name, protocol.scenario, raw.class_names, tasks)


def _class_plans(raw: RawData, protocol: Protocol, seed: int) -> list[_Plan]:
    """Disjoint classes per task. Where the division leaves a rest, the first tasks get one more."""
    names, wanted = raw.class_names, protocol.tasks or 1
    used = len(names) if protocol.max_classes is None else protocol.max_classes
    if used > len(names):
        raise DataError(
            f"stream.max_classes={used}: there are only {len(names)} classes in stream="
            f"{protocol.name}."
        )
    empty = [name for i, name in enumerate(names) if not np.any(raw.train.labels == i)]
    if empty:
        raise DataError(
            f"stream={protocol.name}: no training example for {_list(empty)}. Remove the class, or "
            "add examples."
        )
    untested = [name for i, name in enumerate(names) if not np.any(raw.test.labels == i)]
    if untested:
        raise DataError(
            f"stream={protocol.name}: no test example for {_list(untested)}, so accuracy on it "
            "cannot be measured. Remove the class, or add examples."
        )
    if wanted > used:
        raise DataError(
            f"stream.tasks={wanted}: there are only {used} classes in stream={protocol.name}, and "
            f"every task needs at least one. Use stream.tasks={used} or fewer."
        )
    if protocol.order is None:
        order = np.random.default_rng([seed, 0]).permutation(len(names)).tolist()
    else:
        order = [names.index(name) for name in _explicit(protocol.order, names, "class")]
    sizes = [used // wanted + (i < used % wanted) for i in range(wanted)]
    ends = np.cumsum(sizes).tolist()
    groups = [order[end - size : end] for end, size in zip(ends, sizes, strict=True)]
    return [_Plan(f"task {i + 1}", tuple(sorted(g))) for i, g in enumerate(groups)]


def _domain_plans(raw: RawData, protocol: Protocol, seed: int) -> list[_Plan]:
    """One task per domain, all with the same classes."""
    if raw.train.domains is None or raw.test.domains is None:
        raise DataError(
            f"stream={protocol.name}: stream.scenario=domain needs a domain for every example; "
            "name its column with stream.domain=COLUMN."
        )
    domains = sorted(set(raw.train.domains))
    untested = [d for d in domains if d not in set(raw.test.domains)]
    if untested:
        raise DataError(f"stream={protocol.name}: no test example for domain {_list(untested)}.")
    if protocol.tasks is not None and protocol.tasks > len(domains):
        raise DataError(
            f"stream.tasks={protocol.tasks}: there are only {len(domains)} domains in stream="
            f"{protocol.name} ({_list(domains)})."
        )
    if protocol.order is None:
        domains = [domains[i] for i in np.random.default_rng([seed, 0]).permutation(len(domains))]
    else:
        domains = _explicit(protocol.order, domains, "domain")
    everything = tuple(range(len(raw.class_names)))
    return [_Plan(name, everything, name) for name in domains[: protocol.tasks]]


def _explicit(order: list[str], names: Sequence[str], kind: str) -> list[str]:
    unknown = [name for name in order if name not in names]
    if unknown:
        raise DataError(
            f"stream.order: there is no {kind} '{unknown[0]}'.{did_you_mean(unknown[0], names)}\n"
            f"  {kind} names: {_list(names)}"
        )
    if len(set(order)) != len(order) or len(order) != len(names):
        raise DataError(
            f"stream.order must name each of the {len(names)} {kind} names exactly once."
        )
    return list(order)


def _cut(index: int, plan: _Plan, raw: RawData, protocol: Protocol, seed: int) -> Task:
    train = _rows(raw.train, plan)
    if protocol.shots is not None:
        train = _draw(train, raw.train, protocol.shots, plan, [seed, _TRAIN])
    if raw.validation is not None:
        held = _rows(raw.validation, plan)
        if protocol.shots is not None:
            held = _draw(held, raw.validation, protocol.shots, plan, [seed, _VALIDATION])
        validation = _split(raw.validation, held)
    else:
        train, held = _hold_out(train, raw, protocol.validation_share, plan, seed)
        validation = _split(raw.train, held)
    test = _rows(raw.test, plan)
    if protocol.test_shots is not None:
        test = _draw(test, raw.test, protocol.test_shots, plan, [seed, _TEST])
    if not len(train) or not len(test):
        raise DataError(f"stream={protocol.name}: {plan.name} has no training or no test example.")
    return Task(
        index, plan.name, plan.classes, _split(raw.train, train), validation, _split(raw.test, test)
    )


def _rows(examples: Examples, plan: _Plan) -> np.ndarray:
    keep = np.isin(examples.labels, plan.classes)
    if plan.domain is not None:
        keep &= np.asarray(examples.domains, dtype=object) == plan.domain
    return np.flatnonzero(keep)


def _draw(
    rows: np.ndarray, examples: Examples, shots: int, plan: _Plan, seed: list[int]
) -> np.ndarray:
    """At most ``shots`` rows of each class, in row order; classes with fewer keep what they have.

    The first k of a class's shuffled rows: a larger ``shots`` contains the smaller one's examples.
    """
    chosen = [
        _shuffled(rows[examples.labels[rows] == label], label, plan, seed)[:shots]
        for label in plan.classes
    ]
    return np.sort(np.concatenate(chosen))


def _hold_out(
    train: np.ndarray, raw: RawData, share: float, plan: _Plan, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Cut the validation split from train, the same share of every class (rounded)."""
    held = [np.empty(0, dtype=train.dtype)]
    for label in plan.classes:
        mine = train[raw.train.labels[train] == label]
        count = round(share * len(mine))
        if count >= len(mine) > 0:
            raise DataError(
                f"stream.validation_share={share} would leave class "
                f"'{raw.class_names[label]}' of {plan.name} without training examples "
                f"(it has {len(mine)}). Lower it, or raise stream.shots."
            )
        held.append(_shuffled(mine, label, plan, [seed, _VALIDATION])[:count])
    out = np.sort(np.concatenate(held))
    return np.setdiff1d(train, out), out


def _shuffled(rows: np.ndarray, label: int, plan: _Plan, seed: list[int]) -> np.ndarray:
    extra = list(plan.domain.encode()) if plan.domain is not None else []
    return np.random.default_rng([*seed, label, *extra]).permutation(rows)


def _split(examples: Examples, rows: np.ndarray) -> Split:
    return Split(
        rows.astype(np.int64),
        [examples.inputs[i] for i in rows],
        examples.labels[rows].astype(np.int64),
    )


def _list(names: Sequence[str], most: int = 8) -> str:
    shown = ", ".join(f"'{name}'" for name in names[:most])
    return shown + (f" and {len(names) - most} more" if len(names) > most else "")
