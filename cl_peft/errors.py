"""Errors that a person is meant to read: what was wrong, where, what is allowed, what to do.

Everything raised on purpose derives from :class:`UserError`; ``main.py`` prints its text on one
screen and exits with code 2. Any other exception is a bug, and keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class UserError(Exception):
    """A problem the user can fix. The message is complete; no traceback is needed."""


class ConfigError(UserError):
    """The configuration is wrong; nothing has been loaded, trained or written."""


class DataError(UserError):
    """A data file, column, label or split does not fit."""


class DownloadError(UserError):
    """A package archive, model or data set could not be fetched or is damaged."""


class DamagedRunError(UserError):
    """A file of a run folder is missing or differs from its recorded digest."""


class DivergedError(UserError):
    """Training produced a loss that is not finite, or that exploded."""


def some(items: Sequence[object], most: int, separator: str = ", ") -> str:
    """The first few of many: ``a, b and 3 more``."""
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return separator.join(map(str, items[:most])) + more


def did_you_mean(word: str, allowed: Iterable[str]) -> str:
    """Return ``" Did you mean 'x'?"`` for the nearest allowed word, or an empty string."""
    near = difflib.get_close_matches(word, list(allowed), n=1, cutoff=0.6)
    return f" Did you mean '{near[0]}'?" if near else ""
