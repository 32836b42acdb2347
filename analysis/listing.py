"""How lists are written: in natural order, counts with their word."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import pandas as pd

Key = tuple[int, float, tuple[tuple[int, float, str], ...]]


def natural(value: object) -> Key:
    """A key to sort by: numbers by size, then words with the numbers in them by size, then none.

    ``2 < 10 < "1e3" < "ridge 2" < "ridge 10" < None``.
    """
    if value is None or value is pd.NA or (isinstance(value, float) and math.isnan(value)):
        return (2, 0.0, ())
    text = str(value)
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isnan(number):
        return (0, number, ())
    parts = [part for part in re.split(r"(\d+(?:\.\d+)?)", text) if part]
    keys = [(0, float(part), "") if part[0].isdecimal() else (1, 0.0, part) for part in parts]
    return (1, 0.0, tuple(keys))


def in_order(rows: pd.DataFrame, columns: Sequence[str]) -> pd.DataFrame:
    """Rows by the values of some columns, the first one first, each in natural order."""
    keys: list[Any] = [tuple(map(natural, values)) for values in rows[list(columns)].to_numpy()]
    return rows.iloc[sorted(range(len(rows)), key=keys.__getitem__)]


def count(n: int | str, word: str) -> str:
    """``1 pair``, ``2 pairs``, ``1 to 5 pairs``."""
    return f"{n} {word}" if str(n) == "1" else f"{n} {word}s"
