"""Cut a source's examples into ordered tasks. Imports no torch.

Order and samples are decided by different seeds: ``seed.order`` puts classes into tasks and tasks
into order, ``seed.data`` draws few-shot subsets and the validation split. A class keeps the same
few-shot examples whatever the order, since every draw is seeded by (seed.data, split, class).

Two protocols leave the sequence of disjoint tasks:

Blurry boundaries (after i-Blurry, Koh et al. 2022, arXiv:2110.10031, where a share of every task's
samples appears in other tasks; here in the neighbouring ones). Task t owns the classes that it
would have anyway, and alone tests and validates them. Of its n training examples of a class,
``floor(blurry * n)`` leave it, alternately for the task before and the task after it. They keep
their label, so a task trains classes that a neighbour owns (:attr:`Task.borrowed`). No example is
in two tasks.

Repetition (class-incremental with repetition, Hemati et al. 2023, arXiv:2301.11396). The whole
sequence comes ``repetitions`` times. Training, validation and test examples of each class are dealt
to the visits, so a visit is a task like any other, with examples of its own; but several tasks own
a class (:attr:`Stream.owners`). Few-shot counts are over all visits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from cl_peft.config import Protocol
from cl_peft.errors import DataError, did_you_mean, some
from cl_peft.streams.base import Examples, RawData, Split, Stream, Task

_TRAIN, _TEST, _VALIDATION, _VISIT, _LEAK = 1, 2, 3, 4, 5  # one random stream per purpose


@dataclass(frozen=True)
class _Plan:
    """Which classes and which examples form one task."""

    name: str
    classes: tuple[int, ...]
    domain: str | None = None
    visit: int = 0


@dataclass(frozen=True)
class _Part:
    """Row numbers of one task; ``held`` are rows of the validation split, or of train."""

    train: np.ndarray
    held: np.ndarray
    test: np.ndarray


def make_stream(raw: RawData, protocol: Protocol, *, order_seed: int, data_seed: int) -> Stream:
    """Cut ``raw`` into tasks.

    Args:
        raw: All examples and class names.
        protocol: Scenario, number of tasks, few-shot counts, validation share.
        order_seed: Decides the classes of each task and the order of tasks.
        data_seed: Decides which examples are drawn and which are held out.

    Raises:
        DataError: More tasks than classes or domains, a class or domain without examples, or a
            class with too few examples to hold one out or to repeat it.
    """
    if protocol.scenario == "domain":
        plans = _domain_plans(raw, protocol, order_seed)
    elif raw.groups is not None:
        plans = _group_plans(raw, raw.groups, protocol, order_seed)
    else:
        plans = _class_plans(raw, protocol, order_seed)
    if protocol.repetitions > 1:
        plans = [
            replace(plan, name=f"{plan.name} (visit {visit + 1})", visit=visit)
            for visit in range(protocol.repetitions)
            for plan in plans
        ]
    parts = [_part(plan, raw, protocol, data_seed) for plan in plans]
    if protocol.blurry:
        parts = _leak(parts, plans, raw, protocol, data_seed)
    tasks = tuple(_task(i, *cut, raw) for i, cut in enumerate(zip(plans, parts, strict=True)))
    return Stream(protocol.name, protocol.scenario, raw.class_names, tasks)


def _class_plans(raw: RawData, protocol: Protocol, seed: int) -> list[_Plan]:
    """Disjoint classes per task."""
    names = raw.class_names
    used = len(names) if protocol.max_classes is None else protocol.max_classes
    if used > len(names):
        raise DataError(
            f"stream.max_classes={used}: there are only {len(names)} classes in stream="
            f"{protocol.name}."
        )
    _refuse_empty(raw, protocol)
    sizes = _sizes(protocol, used, seed)
    if protocol.order is None:
        order = np.random.default_rng([seed, 0]).permutation(len(names)).tolist()
    else:
        order = [names.index(name) for name in _explicit(protocol, raw, names, "class")]
    ends = np.cumsum(sizes).tolist()
    groups = [order[end - size : end] for end, size in zip(ends, sizes, strict=True)]
    return [_Plan(f"task {i + 1}", tuple(sorted(g))) for i, g in enumerate(groups)]


def _sizes(protocol: Protocol, used: int, seed: int) -> list[int]:
    """Classes per task: even, the first tasks with one more where a rest is left; or as asked."""
    if isinstance(protocol.sizes, list):
        if sum(protocol.sizes) != used:
            raise DataError(
                f"stream.sizes={protocol.sizes} makes {sum(protocol.sizes)} classes, but stream="
                f"{protocol.name} has {used}. Name sizes for all of them, or take fewer classes "
                f"with stream.max_classes={sum(protocol.sizes)}."
            )
        return protocol.sizes
    wanted = protocol.tasks or 1
    if wanted > used:
        raise DataError(
            f"stream.tasks={wanted}: there are only {used} classes in stream={protocol.name}, and "
            f"every task needs at least one. Use stream.tasks={used} or fewer."
        )
    if protocol.sizes == "random":  # every composition of `used` into tasks is equally likely
        rng = np.random.default_rng([seed, 1])
        ends = np.sort(rng.choice(np.arange(1, used), wanted - 1, replace=False))
        return [int(size) for size in np.diff([0, *ends, used])]
    return [used // wanted + (i < used % wanted) for i in range(wanted)]


def _group_plans(
    raw: RawData, groups: Mapping[str, tuple[int, ...]], protocol: Protocol, seed: int
) -> list[_Plan]:
    """One task per group of classes that the source names."""
    _refuse_empty(raw, protocol)
    names = _ordered(raw, list(groups), protocol, seed, "data set")
    return [_Plan(name, tuple(sorted(groups[name]))) for name in names]


def _refuse_empty(raw: RawData, protocol: Protocol) -> None:
    """Every class needs training and test examples."""
    names = raw.class_names
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
    domains = _ordered(raw, domains, protocol, seed, "domain")
    everything = tuple(range(len(raw.class_names)))
    return [_Plan(name, everything, name) for name in domains]


def _ordered(raw: RawData, names: list[str], protocol: Protocol, seed: int, kind: str) -> list[str]:
    """The first ``stream.tasks`` names of the order."""
    if protocol.tasks is not None and protocol.tasks > len(names):
        raise DataError(
            f"stream.tasks={protocol.tasks}: there are only {len(names)} {kind}s in stream="
            f"{protocol.name} ({_list(names)})."
        )
    if protocol.order is None:
        names = [names[i] for i in np.random.default_rng([seed, 0]).permutation(len(names))]
    else:
        names = _explicit(protocol, raw, names, kind)
    return names[: protocol.tasks]


def _explicit(protocol: Protocol, raw: RawData, names: Sequence[str], kind: str) -> list[str]:
    """The order that the protocol names, or that its number stands for."""
    order: Sequence[str] = protocol.order if isinstance(protocol.order, list) else ()
    if isinstance(protocol.order, int):
        if protocol.order not in raw.orders:
            known = ", ".join(str(number) for number in raw.orders) or "none"
            raise DataError(
                f"stream.order={protocol.order}: published orders of stream={protocol.name}: "
                f"{known}. Choose one, or list all {kind} names."
            )
        order = raw.orders[protocol.order]
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


def _part(plan: _Plan, raw: RawData, protocol: Protocol, seed: int) -> _Part:
    """A task's rows, before anything leaks."""
    train = _rows(raw.train, plan)
    if protocol.shots is not None:
        train = _draw(train, raw.train, protocol.shots, plan, [seed, _TRAIN])
    train = _deal(train, raw.train, _TRAIN, plan, protocol, raw.class_names, seed)
    if raw.validation is not None:
        held = _rows(raw.validation, plan)
        if protocol.shots is not None:
            held = _draw(held, raw.validation, protocol.shots, plan, [seed, _VALIDATION])
        held = _deal(held, raw.validation, _VALIDATION, plan, protocol, raw.class_names, seed)
    else:
        train, held = _hold_out(train, raw, protocol.validation_share, plan, seed)
    test = _rows(raw.test, plan)
    if protocol.test_shots is not None:
        test = _draw(test, raw.test, protocol.test_shots, plan, [seed, _TEST])
    test = _deal(test, raw.test, _TEST, plan, protocol, raw.class_names, seed)
    if not len(train) or not len(test):
        raise DataError(f"stream={protocol.name}: {plan.name} has no training or no test example.")
    return _Part(train, held, test)


def _task(index: int, plan: _Plan, part: _Part, raw: RawData) -> Task:
    trained = set(raw.train.labels[part.train].tolist())
    borrowed = tuple(sorted(trained - set(plan.classes)))
    return Task(
        index,
        plan.name,
        tuple(sorted({*plan.classes, *borrowed})),
        _split(raw.train, part.train),
        _split(raw.train if raw.validation is None else raw.validation, part.held),
        _split(raw.test, part.test),
        borrowed,
    )


def _deal(
    rows: np.ndarray,
    examples: Examples,
    split: int,
    plan: _Plan,
    protocol: Protocol,
    names: Sequence[str],
    seed: int,
) -> np.ndarray:
    """The rows of this visit: each class's, shuffled, are dealt to the visits in turn."""
    visits = protocol.repetitions
    if visits == 1:
        return rows
    chosen = [np.empty(0, dtype=rows.dtype)]
    for label in plan.classes:
        mine = rows[examples.labels[rows] == label]
        if 0 < len(mine) < visits and split != _VALIDATION:
            kind = "training" if split == _TRAIN else "test"
            raise DataError(
                f"stream.repetitions={visits}: class '{names[label]}' has only {len(mine)} {kind} "
                "example(s), and every visit needs one of its own. Repeat less often."
            )
        chosen.append(_shuffled(mine, label, plan, [seed, _VISIT, split])[plan.visit :: visits])
    return np.sort(np.concatenate(chosen))


def _leak(
    parts: list[_Part], plans: list[_Plan], raw: RawData, protocol: Protocol, seed: int
) -> list[_Part]:
    """Move a share of each class's training rows to the neighbouring tasks."""
    if len(parts) < 2:
        raise DataError("stream.blurry: there is no neighbouring task. Use stream.tasks=2 or more.")
    arriving: list[list[np.ndarray]] = [[] for _ in parts]
    for index, (part, plan) in enumerate(zip(parts, plans, strict=True)):
        around = [i for i in (index - 1, index + 1) if 0 <= i < len(parts)]
        staying = [np.empty(0, dtype=part.train.dtype)]
        for label in plan.classes:
            mine = part.train[raw.train.labels[part.train] == label]
            rows = _shuffled(mine, label, plan, [seed, _LEAK])
            count = int(protocol.blurry * len(rows))
            staying.append(rows[count:])
            for turn, other in enumerate(around):
                arriving[other].append(rows[:count][turn :: len(around)])
        arriving[index] += staying
    return [
        replace(part, train=np.sort(np.concatenate(rows)))
        for part, rows in zip(parts, arriving, strict=True)
    ]


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
    names = rows if examples.rows is None else examples.rows[rows]
    return Split(
        names.astype(np.int64),
        [examples.inputs[i] for i in rows],
        examples.labels[rows].astype(np.int64),
    )


def _list(names: Sequence[str]) -> str:
    return some([f"'{name}'" for name in names], 8)
