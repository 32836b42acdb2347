"""Sentiment of four kinds of short texts, rated by people (Hutto and Gilbert 2014)."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Literal

import pandas as pd
from pydantic import NonNegativeFloat

from cl_peft.archives import fetch, parse
from cl_peft.errors import DataError
from cl_peft.streams.base import Progress, RawData, Source
from cl_peft.streams.frames import to_raw_data

#: Domain, and the file of its rated texts.
_FILES = {
    "tweets": "tweets_GroundTruth.txt",
    "movies": "movieReviewSnippets_GroundTruth.txt",
    "products": "amazonReviewSnippets_GroundTruth.txt",
    "news": "nytEditorialSnippets_GroundTruth.txt",
}
_TEST = 5  # every fifth document


class Ratings(Source):
    """Tweets and snippets of film reviews, product reviews and editorials, one sentiment each.

    At least fifteen people rated each text from -4 to 4. Its label is ``negative`` where the mean
    is below ``-threshold``, ``positive`` above ``threshold``, else ``neutral``. The publication has
    no test split: here every fifth document (tweet, film snippet, product review, editorial) is
    tested, with all its snippets.

    Args:
        archive: Address of the archive inside the package, ``package:NAME==VERSION/FILE.tar.gz``;
            see :mod:`cl_peft.archives`.
        threshold: Mean rating up to which a text is neutral; 0 leaves almost none.
        labels: ``ternary``, or ``binary``: without the neutral texts.

    Raises:
        ConfigError: The address is malformed.
    """

    def __init__(
        self,
        archive: str,
        threshold: NonNegativeFloat = 0.5,
        labels: Literal["ternary", "binary"] = "ternary",
    ) -> None:
        parse(archive)
        self.archive = archive
        self.threshold = threshold
        self.labels = labels

    def load(self, cache: Path, progress: Progress | None = None) -> RawData:
        """Fetch the archive if the cache lacks it, and read it; see :meth:`Source.load`."""
        path = fetch(self.archive, cache, progress=progress)
        rows: dict[str, list[tuple[str, str, str]]] = {"train": [], "test": []}
        for domain, lines in _read(path).items():
            for number, line in enumerate(lines, start=1):
                where = f"{path}, {_FILES[domain]}, line {number}"
                document, rating, text = _fields(line, where)
                split = "test" if document % _TEST == 0 else "train"
                rows[split].append((text, self._label(rating), domain))
        columns = ["text", "label", "domain"]
        return to_raw_data(
            {s: (f"{s} texts", pd.DataFrame(r, columns=columns)) for s, r in rows.items()},
            text="text",
            label="label",
            domain="domain",
            drop_labels=["neutral"] if self.labels == "binary" else None,
            drop_empty=True,
        )

    def _label(self, rating: float) -> str:
        if abs(rating) <= self.threshold:
            return "neutral"
        return "positive" if rating > 0 else "negative"


def _read(path: Path) -> dict[str, list[str]]:
    """Lines of each domain's file, read from the archive as it is."""
    found: dict[str, list[str]] = {}
    try:
        with tarfile.open(path, "r:gz") as archive:
            members = {Path(m.name).name: m for m in archive.getmembers() if m.isreg()}
            for domain, name in _FILES.items():
                file = archive.extractfile(members[name])
                if file is not None:  # never for a regular file
                    with io.TextIOWrapper(file, encoding="utf-8-sig") as text:
                        found[domain] = [line.rstrip("\n") for line in text]
    except KeyError as error:
        raise DataError(f"{path} holds no {error.args[0]}: is it the right archive?") from error
    except (tarfile.TarError, EOFError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    return found


def _fields(line: str, where: str) -> tuple[int, float, str]:
    """Number of the document, mean rating, text."""
    name, _, rest = line.partition("\t")
    rating, _, text = rest.partition("\t")
    try:
        return int(name.partition("_")[0]), float(rating), text
    except ValueError as error:
        raise DataError(f"{where}: expected ID, mean rating and text, found {line!r}.") from error
