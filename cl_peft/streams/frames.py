"""From tables to examples: what the sources of text and label columns have in common."""

from __future__ import annotations

import csv
import json
import logging
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from cl_peft.errors import DataError, did_you_mean, some
from cl_peft.streams.base import Examples, RawData

log = logging.getLogger(__name__)

SUFFIXES = (".csv", ".tsv", ".tab", ".txt", ".jsonl", ".ndjson", ".json", ".parquet")
_SHOWN = 5  # rows, labels or columns named in a message before "and N more"


def read_table(
    path: Path, *, header: bool = True, columns: list[str] | None = None, quoted: bool = True
) -> pd.DataFrame:
    """Read a table in the format that its suffix says.

    Delimited files are read as text throughout, so that a text such as ``None`` or ``1e3`` stays
    what it is. ``.tsv``, ``.tab`` and ``.txt`` are tab-separated.

    Args:
        path: A file with one of :data:`SUFFIXES`.
        header: Whether the first line of a delimited file names the columns.
        columns: Names for the columns of a file without header line.
        quoted: Whether ``"`` quotes a field of a delimited file; if not, it is a plain character.

    Raises:
        DataError: There is no such file, or it cannot be read as what its suffix says.
    """
    if not path.is_file():
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise DataError(f"There is no file {path}.{did_you_mean(path.name, siblings)}")
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise DataError(f"{path}: unknown kind of file. Allowed endings: {', '.join(SUFFIXES)}")
    try:
        if suffix == ".parquet":
            return pd.read_parquet(path)
        if suffix in (".jsonl", ".ndjson", ".json"):
            return _read_json_lines(path)
        with warnings.catch_warnings():
            # pandas only warns when it cuts off fields that no column was named for
            warnings.simplefilter("error", pd.errors.ParserWarning)
            return pd.read_csv(
                path,
                sep="," if suffix == ".csv" else "\t",
                header=0 if header else None,
                names=None if header else columns,
                quoting=csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE,
                dtype=str,
                keep_default_na=False,
                skip_blank_lines=False,  # or row numbers in messages would be off
                index_col=False,
                encoding="utf-8-sig",
            )
    except pd.errors.EmptyDataError as error:
        raise DataError(f"{path} holds no rows.") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text ({error.reason}); convert it.") from error
    except pd.errors.ParserWarning as error:
        raise DataError(
            f"{path}: rows have more fields than there are columns. Quote texts that hold the "
            "separator, or check stream.header and stream.columns."
        ) from error
    except (OSError, ValueError) as error:  # parser errors of pandas and pyarrow are ValueErrors
        raise DataError(f"{path} cannot be read as {suffix[1:]}: {str(error).strip()}") from error


def _read_json_lines(path: Path) -> pd.DataFrame:
    # Not pandas.read_json: it turns texts that look like dates or numbers into such.
    rows: list[dict[str, Any]] = []
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            try:
                row = json.loads(line) if line.strip() else {}
            except json.JSONDecodeError as error:
                raise DataError(f"{path}, line {number}: no JSON ({error.msg}).") from error
            if not isinstance(row, dict):
                raise DataError(
                    f"{path}, line {number}: one object per line is expected, as in "
                    '{"text": "...", "label": "..."}'
                )
            rows.append(row)
    return pd.DataFrame(rows)


def to_raw_data(
    tables: Mapping[str, tuple[str, pd.DataFrame]],
    *,
    text: str | list[str],
    label: str | list[str],
    more_text: list[str] | None = None,
    domain: str | None = None,
    drop_labels: list[str] | None = None,
    drop_empty: bool = False,
) -> RawData:
    """Check tables and turn them into examples.

    Classes are the labels of the training split: integers in numerical order, names in
    alphabetical order, so that a stream does not depend on where its data came from.

    Args:
        tables: For ``train``, ``test`` and perhaps ``validation``: where it came from, for
            messages, and the table.
        text: Column of the texts, or candidates of which the first that exists is used.
        label: Column of the labels, likewise.
        more_text: Columns whose texts are appended after a space, where they are not empty.
        domain: Column of domain names, if any.
        drop_labels: Labels whose rows are left out.
        drop_empty: Leave out rows without text or label, instead of refusing them. Rows that are
            blank in every column are always left out.

    Raises:
        DataError: A column is missing, a text or label is empty, a split has no rows, or a label
            of test or validation does not occur in train.
    """
    dropped = {str(name) for name in drop_labels or []}
    found: dict[str, _Rows] = {}
    for split, (where, table) in tables.items():
        chosen = [_column(table, text, "text", where), _column(table, label, "label", where)]
        if more_text:
            further = [_column(table, name, "more_text", where) for name in more_text]
            table = table.copy()
            joined = _appended(table, [chosen[0], *further])
            table[chosen[0]] = pd.Series(joined, index=table.index, dtype=object)
        if domain is not None:
            chosen.append(_column(table, domain, "domain", where))
        found[split] = _clean(table, chosen, dropped, drop_empty, where)
    present = {name for rows in found.values() for name in rows.seen}
    for name in sorted(dropped - present):
        near = did_you_mean(name, present)
        if near:  # a copy may lack what the original has, but a typo must not pass
            raise DataError(
                f"stream.drop_labels names '{name}', which no row has.{near} "
                f"Labels: {some(sorted(present), _SHOWN)}"
            )
        log.info("stream.drop_labels: no row has the label '%s'", name)
    names = _class_names(found["train"].labels)
    _alike(names)
    ids = {name: number for number, name in enumerate(names)}
    examples: dict[str, Examples] = {}
    for split, rows in found.items():
        unknown = sorted(set(rows.labels) - set(names))
        if unknown:
            raise DataError(
                f"{tables[split][0]}: {len(unknown)} label(s) that {tables['train'][0]} lacks: "
                f"{some(unknown, _SHOWN)}.{did_you_mean(unknown[0], names)} Add training rows for "
                "them, or leave them out with stream.drop_labels=[...]."
            )
        labels = np.array([ids[name] for name in rows.labels], dtype=np.int64)
        examples[split] = Examples(rows.texts, labels, rows.domains, np.array(rows.numbers))
    return RawData(
        train=examples["train"],
        test=examples["test"],
        class_names=names,
        validation=examples.get("validation"),
    )


@dataclass
class _Rows:
    """Rows of one split that are kept, and all labels that were seen."""

    texts: list[str]
    labels: list[str]
    domains: list[str] | None
    seen: set[str]
    numbers: list[int]


def _clean(
    table: pd.DataFrame, chosen: list[str], dropped: set[str], drop_empty: bool, where: str
) -> _Rows:
    """Take the chosen columns (text, label, perhaps domain), refusing or dropping empty cells."""
    columns = [table[name].tolist() for name in chosen]
    kept = _Rows([], [], [] if len(chosen) == 3 else None, set(), [])
    empty: dict[str, list[int]] = {name: [] for name in chosen}  # rows, counted from 1
    skipped = 0
    for row, values in enumerate(zip(*columns, strict=True)):
        missing = [name for name, value in zip(chosen, values, strict=True) if _is_empty(value)]
        if len(missing) == len(chosen) and all(_is_empty(value) for value in table.iloc[row]):
            continue  # a blank line
        if not _is_empty(values[1]):
            name = _name(values[1])
            kept.seen.add(name)
            if name in dropped:
                continue
        if missing and drop_empty:
            skipped += 1
            continue
        for column in missing:
            empty[column].append(row + 1)
        if missing:
            continue
        if not isinstance(values[0], str):
            raise DataError(
                f"{where}, row {row + 1}: column '{chosen[0]}' holds {type(values[0]).__name__} "
                "values where texts are expected. Name the column of texts with stream.text=..."
            )
        kept.numbers.append(row)
        kept.texts.append(values[0])
        kept.labels.append(name)
        if kept.domains is not None:
            kept.domains.append(_name(values[2]))
    for column, rows in empty.items():
        if rows:
            raise DataError(
                f"{where}: column '{column}' is empty in {len(rows)} row(s): {some(rows, _SHOWN)} "
                "(the first row of data is row 1). Fill or remove them, or leave them out with "
                "stream.drop_empty=true."
            )
    if skipped:
        log.info("%s: left out %d row(s) without text or label", where, skipped)
    if not kept.texts:
        raise DataError(f"{where} holds no rows{' that are kept' if len(table) else ''}.")
    return kept


def _appended(table: pd.DataFrame, columns: list[str]) -> list[object]:
    """Texts of several columns in one; other values are left for :func:`_clean` to refuse."""
    result: list[object] = []
    for row in zip(*(table[name].tolist() for name in columns), strict=True):
        there = [value for value in row if not _is_empty(value)]
        strange = [value for value in there if not isinstance(value, str)]
        result.append(strange[0] if strange else " ".join(map(str, there)))
    return result


def _column(table: pd.DataFrame, wanted: str | list[str], role: str, where: str) -> str:
    """The first wanted column that exists."""
    names = [str(name) for name in table.columns]
    candidates = [wanted] if isinstance(wanted, str) else list(wanted)
    for name in candidates:
        if name in names:
            return name
    raise DataError(
        f"{where} has no column {' or '.join(repr(name) for name in candidates)}."
        f"{did_you_mean(candidates[0], names) if candidates else ''} "
        f"Columns there: {', '.join(names) or 'none'}. Choose one with stream.{role}=..."
    )


def _is_empty(value: object) -> bool:
    if isinstance(value, str):
        return not value.strip()
    if isinstance(value, float):
        return math.isnan(value)
    return value is None or value is pd.NA or value is pd.NaT


def _name(value: object) -> str:
    """A label as the name of a class; 3.0 is 3, as a gap in a column makes integers floats."""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)


def _class_names(labels: Sequence[str]) -> tuple[str, ...]:
    names = set(labels)
    if all(re.fullmatch(r"-?[0-9]+", name) for name in names):
        return tuple(sorted(names, key=lambda name: (int(name), name)))
    return tuple(sorted(names))


def _alike(names: Sequence[str]) -> None:
    """Warn of classes whose names differ in case and spaces alone."""
    plain: dict[str, list[str]] = {}
    for name in names:
        plain.setdefault("".join(name.casefold().split()), []).append(name)
    for group in plain.values():
        if len(group) > 1:
            log.warning(
                "the labels %s are taken as different classes", " and ".join(map(repr, group))
            )
