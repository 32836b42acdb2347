"""Multiple-choice tasks of BIG-bench (Srivastava et al. 2022) as domains of one stream."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd

from cl_peft.archives import fetch, parse
from cl_peft.errors import DataError, did_you_mean
from cl_peft.streams.base import Progress, RawData, Source
from cl_peft.streams.frames import to_raw_data

_TEST = 5  # the last fifth


class BigBench(Source):
    """Tasks whose choices are the same for every example, so that they are classes.

    A task's folder holds ``task.json`` with ``examples``, each an ``input`` and ``target_scores``
    by choice, of which the highest is the label. BIG-bench tests only: here the last fifth of each
    task's examples is tested and the rest is trained, so that translations of one text, which have
    the same place in each language's task, are on the same side.

    Args:
        archive: Address of a folder, ``package:NAME==VERSION/FOLDER#sha256=HEX``; see
            :mod:`cl_peft.archives`.
        domains: Name of each domain, and the folder of its task.
        drop_labels: Labels whose examples are left out.

    Raises:
        ConfigError: The address is malformed.
    """

    def __init__(
        self, archive: str, domains: dict[str, str], drop_labels: list[str] | None = None
    ) -> None:
        parse(archive)
        self.archive = archive
        self.domains = domains
        self.drop_labels = drop_labels

    def load(self, cache: Path, progress: Progress | None = None) -> RawData:
        """Fetch the folder if the cache lacks it, and read the tasks; see :meth:`Source.load`."""
        folder = fetch(self.archive, cache, progress=progress)
        rows: dict[str, list[tuple[str, str, str]]] = {"train": [], "test": []}
        for domain, name in self.domains.items():
            examples = _read(folder / name / "task.json")
            first = len(examples) - len(examples) // _TEST
            for number, (text, label) in enumerate(examples):
                rows["train" if number < first else "test"].append((text, label, domain))
        columns = ["text", "label", "domain"]
        return to_raw_data(
            {s: (f"{s} texts", pd.DataFrame(r, columns=columns)) for s, r in rows.items()},
            text="text",
            label="label",
            domain="domain",
            drop_labels=self.drop_labels,
            drop_empty=True,
        )


def _read(path: Path) -> list[tuple[str, str]]:
    """Text and label of each example."""
    if not path.is_file():
        others = [p.name for p in path.parent.parent.iterdir() if p.is_dir()]
        raise DataError(
            f"stream.domains: there is no task {path.parent.name} in {path.parent.parent}."
            f"{did_you_mean(path.parent.name, others)}"
        )
    try:
        examples = json.loads(path.read_text(encoding="utf-8"))["examples"]
        return [
            (str(example["input"]), max(scores, key=scores.__getitem__))
            for example in examples
            for scores in [example["target_scores"]]
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path} is no multiple-choice task of BIG-bench ({type(error).__name__}: {error})."
        ) from error
