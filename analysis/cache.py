"""The numbers of many runs in one Parquet file, so that the next look takes a second.

Safe by construction: every run has a key made of the contents of its manifest, status and
configuration (:meth:`analysis.folders.RunFiles.key`). What has no matching key is read from its run
folder again, and the file is replaced as a whole. Deleting it loses nothing.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from analysis.folders import RESULT_SCHEMA
from cl_peft.atomic import write_atomic
from cl_peft.errors import UserError

#: Where the cache of a folder of runs lies, unless another place is given.
NAME = ".analysis.parquet"
FORMAT = 1
SCHEMA = pa.schema([("index", pa.int32()), *RESULT_SCHEMA])


class ResultCache:
    """A cache file as it stands on the disk; an unreadable one counts as empty.

    Args:
        path: The cache file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.keys: dict[str, str] = {}
        self._file: pa.NativeFile | None = None
        try:
            # one open file for keys and rows: another process may replace the file in between
            self._file = pa.memory_map(str(path))
            metadata = pq.read_schema(self._file).metadata or {}
            about = json.loads(metadata.get(b"cl_peft", b"{}"))
            if about.get("format") == FORMAT:
                self.keys = dict(about["keys"])
        except (OSError, ValueError, KeyError, TypeError, pa.ArrowException):
            self.keys = {}  # absent, half-written by another program, or of another version

    def read(
        self, names: Sequence[str], metric: Sequence[str] | None = None
    ) -> tuple[pa.Table, list[int]] | None:
        """The numbers of some runs.

        Args:
            names: Names of runs, each among :attr:`keys` and in the order of these (both are sorted
                as the folders are).
            metric: Read only these metrics; others never leave the file.

        Returns:
            The rows, and how many belong to each run. None if the file turns out damaged.
        """
        place = {name: index for index, name in enumerate(self.keys)}
        order = [place[name] for name in names]
        keep = pc.is_in(pc.field("index"), pa.array(order, pa.int32()))
        if metric is not None:
            keep &= pc.is_in(pc.field("metric"), pa.array(list(metric), pa.string()))
        everything = metric is None and len(order) == len(place)
        try:
            table = pq.read_table(
                self._file,
                filters=None if everything else keep,
                page_checksum_verification=True,
            )
        except (OSError, pa.ArrowException):
            return None
        found = pc.value_counts(table["index"]).to_pylist()
        counts = {pair["values"]: pair["counts"] for pair in found}
        sizes = [counts.get(index, 0) for index in order]
        return table.drop_columns("index").cast(RESULT_SCHEMA), sizes

    def write(self, keys: Mapping[str, str], tables: Sequence[pa.Table]) -> None:
        """Replace the file; where it cannot be written, a warning says so and nothing is lost.

        Args:
            keys: Key of each run by its name.
            tables: The numbers of each run, in the same order.
        """
        index = pa.array([i for i, t in enumerate(tables) for _ in range(t.num_rows)], pa.int32())
        rows = pa.concat_tables([RESULT_SCHEMA.empty_table(), *tables])
        about = json.dumps({"format": FORMAT, "keys": dict(keys)}).encode()
        table = rows.add_column(0, "index", index).replace_schema_metadata({b"cl_peft": about})
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(self.path, sink.getvalue().to_pybytes())
        except (OSError, UserError) as error:
            warnings.warn(f"the cache {self.path} was not written: {error}", stacklevel=4)
            return
        self.keys = dict(keys)
