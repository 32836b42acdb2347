"""A stream's data from the Hugging Face hub, a local data set folder, or one saved to disk."""

from __future__ import annotations

import errno
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from cl_peft.errors import DataError, DownloadError, did_you_mean
from cl_peft.inputs import files_in
from cl_peft.streams.base import Progress, RawData, Source
from cl_peft.streams.frames import to_raw_data
from cl_peft.unpacking import disk_errors

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict


class Hub(Source):
    """A data set that the ``datasets`` library can load. Code of a data set is never run.

    Args:
        path: Name on the hub (``owner/name``), a folder with files such as ``train.csv`` and
            ``test.csv`` (CSV, JSON lines, Parquet), or a folder made by ``save_to_disk``.
        config_name: Configuration of a hub data set that has several.
        revision: Commit or tag of a hub data set; give a commit to get the same bytes for ever.
        train_split: Name of the split to train on.
        test_split: Name of the split to test on.
        validation_split: Name of the validation split, used if it is there; without it the stream
            cuts validation examples from train.
        text: Column of the texts; of several candidates, the first that exists is used.
        more_text: Columns whose texts are appended, in this order, where they are not empty; for
            pairs of sentences, or a title and a body.
        label: Column of the labels, likewise. Class labels become their names.
        domain: Column of domain names, needed by the domain-incremental scenario only.
        drop_labels: Labels whose rows are left out.
        drop_empty: Leave out rows without text or label, instead of refusing them.
    """

    def __init__(
        self,
        path: str,
        config_name: str | None = None,
        revision: str | None = None,
        train_split: str = "train",
        test_split: str = "test",
        validation_split: str | None = "validation",
        text: str | list[str] = "text",
        more_text: list[str] | None = None,
        label: str | list[str] = "label",
        domain: str | None = None,
        drop_labels: list[str] | None = None,
        drop_empty: bool = False,
    ) -> None:
        self.path = path
        self.config_name = config_name
        self.revision = revision
        self.splits = {"train": train_split, "test": test_split}
        self.validation_split = validation_split
        self.text = text
        self.more_text = more_text
        self.label = label
        self.domain = domain
        self.drop_labels = drop_labels
        self.drop_empty = drop_empty

    def files(self) -> Sequence[Path]:
        """See :meth:`Source.files`: those of a local folder."""
        return files_in(Path(self.path).expanduser())

    def load(self, cache: Path, progress: Progress | None = None) -> RawData:
        """Download if needed, and read; see :meth:`Source.load`."""
        with _quiet():
            data = self._load(cache / "hub")
            splits = dict(self.splits)
            if self.validation_split is not None and self.validation_split in data:
                splits["validation"] = self.validation_split
            tables = {}
            for role, name in splits.items():
                if name not in data:
                    raise DataError(
                        f"Data set {self.path} has no split '{name}'.{did_you_mean(name, data)} "
                        f"Splits there: {', '.join(data)}. Choose with stream.{role}_split=..."
                    )
                tables[role] = (f"split '{name}' of {self.path}", _table(data[name]))
        return to_raw_data(
            tables,
            text=self.text,
            more_text=self.more_text,
            label=self.label,
            domain=self.domain,
            drop_labels=self.drop_labels,
            drop_empty=self.drop_empty,
        )

    def _load(self, cache: Path) -> DatasetDict:
        import datasets
        from datasets.exceptions import DatasetNotFoundError, DatasetsError
        from httpx import HTTPError  # what the hub's client lets through

        path = Path(self.path).expanduser()
        local = path.exists()
        if not local and (self.path.startswith(("/", "~", ".")) or self.path.count("/") > 1):
            raise DataError(f"stream.path: there is no folder {path}.")
        if path.is_file():
            raise DataError(
                f"stream.path: {path} is a file, a folder or a name on the hub is expected. For "
                "single files use stream=files stream.train=... stream.test=..."
            )
        try:
            if (path / "dataset_dict.json").exists():
                return datasets.load_from_disk(str(path))
            if (path / "state.json").exists():
                raise DataError(
                    f"{path} holds a single split. Save a DatasetDict with a train and a test "
                    "split (DatasetDict.save_to_disk)."
                )
            return datasets.load_dataset(
                str(path) if local else self.path,
                None if local else self.config_name,
                revision=None if local else self.revision,
                cache_dir=str(cache),
            )
        except DatasetNotFoundError as error:
            raise DataError(
                f"The hub has no data set '{self.path}', or it needs a login: {error}\n"
                "Check stream.path and stream.revision (owner/name), or name a local folder."
            ) from error
        except (OSError, HTTPError, ValueError, RuntimeError, DatasetsError) as error:
            cause = error.__cause__ or error
            if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
                with disk_errors(cache):
                    raise cause from error
            if not local and isinstance(error, OSError | HTTPError):
                raise DownloadError(
                    f"Could not fetch data set '{self.path}' from the hub: {cause}\n"
                    "With a connection, try again. Without one, copy the data set to this machine "
                    "and name its folder: stream.path=/local/folder"
                ) from error
            # Among the rest: an unknown configuration name, broken files, a loading script.
            raise DataError(f"Data set '{self.path}' cannot be loaded: {cause}") from error


def _table(data: Dataset) -> pd.DataFrame:
    """The split as a frame, with names in place of class label numbers (-1 means no label)."""
    from datasets import ClassLabel

    table = data.to_pandas()
    for column, feature in data.features.items():
        if isinstance(feature, ClassLabel):
            names = dict(enumerate(feature.names))
            table[column] = [names.get(number) for number in table[column].tolist()]
    return table


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars of the library unless a person watches."""
    import datasets

    if sys.stderr.isatty() or datasets.are_progress_bars_disabled():
        yield
        return
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.enable_progress_bars()
