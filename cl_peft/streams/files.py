"""A stream's data from anyone's own files: one table per split, a text and a label column."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cl_peft.errors import ConfigError
from cl_peft.streams.base import Progress, RawData, Source
from cl_peft.streams.frames import read_table, to_raw_data


class Files(Source):
    """CSV, TSV, JSON lines or Parquet files, told apart by their endings.

    Rows that are blank in every column are skipped. Class ids follow the labels' order: numerical
    where all are integers, else alphabetical.

    Args:
        train: File of training examples.
        test: File of test examples.
        validation: File of validation examples; without it the stream cuts some from train.
        path: Folder that the files' names start from.
        text: Column of the texts; of several candidates, the first that exists is used.
        label: Column of the labels, likewise.
        domain: Column of domain names, needed by the domain-incremental scenario only.
        drop_labels: Labels whose rows are left out.
        drop_empty: Leave out rows without text or label, instead of refusing them.
        header: Whether the first line of a CSV or TSV file names the columns.
        columns: Column names where there is no such line; by default text, then label.
        quoted: Whether ``"`` quotes fields of CSV or TSV. By default it does, except in
            tab-separated files without header, where it is a plain character.

    Raises:
        ConfigError: ``columns`` are given for files that have a header line.
    """

    def __init__(
        self,
        train: str,
        test: str,
        validation: str | None = None,
        path: str | None = None,
        text: str | list[str] = "text",
        label: str | list[str] = "label",
        domain: str | None = None,
        drop_labels: list[str] | None = None,
        drop_empty: bool = False,
        header: bool = True,
        columns: list[str] | None = None,
        quoted: bool | None = None,
    ) -> None:
        if header and columns is not None:
            raise ConfigError(
                "stream.columns names the columns of files without header line. Set "
                "stream.header=false as well, or leave stream.columns out."
            )
        self.paths = {"train": train, "test": test}
        if validation is not None:
            self.paths["validation"] = validation
        self.folder = Path(path or "").expanduser()
        self.text = text
        self.label = label
        self.domain = domain
        self.drop_labels = drop_labels
        self.drop_empty = drop_empty
        self.header = header
        self.columns = columns
        self.quoted = quoted

    def files(self) -> Sequence[Path]:
        """See :meth:`Source.files`."""
        return [self.folder / Path(name).expanduser() for name in self.paths.values()]

    def load(self, cache: Path, progress: Progress | None = None) -> RawData:
        """Read the files; see :meth:`Source.load`. ``cache`` is not used."""
        tables = {}
        for split, name in self.paths.items():
            path = self.folder / Path(name).expanduser()
            quoted = (
                self.header or path.suffix.lower() == ".csv" if self.quoted is None else self.quoted
            )
            columns = None if self.header else list(self.columns or ["text", "label"])
            table = read_table(path, header=self.header, columns=columns, quoted=quoted)
            tables[split] = (str(path), table)
        return to_raw_data(
            tables,
            text=self.text,
            label=self.label,
            domain=self.domain,
            drop_labels=self.drop_labels,
            drop_empty=self.drop_empty,
        )
