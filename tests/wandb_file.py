"""Read an offline ``.wandb`` file back: the records that W&B would send."""

import json
import struct
from pathlib import Path

HEADER, BLOCK, RECORD = 7, 32 * 1024, struct.Struct("<IHB")
WHOLE, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def records(path: Path):
    """Yield every record of a file: chunks of 32 KiB blocks, joined where one spans blocks."""
    from wandb.proto import wandb_internal_pb2

    data, at, parts = path.read_bytes(), HEADER, []
    while at < len(data):
        left = BLOCK - at % BLOCK
        if left < RECORD.size:
            at += left
            continue
        _, length, kind = RECORD.unpack_from(data, at)
        at += RECORD.size
        parts.append(data[at : at + length])
        at += length
        assert kind in (WHOLE, FIRST, MIDDLE, LAST), f"broken record at byte {at}"
        if kind in (WHOLE, LAST):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(b"".join(parts))
            parts = []
            yield record


class WandbFile:
    """What one run logged: ``config``, ``history`` (list of dicts), ``summary``, ``axes``, ..."""

    def __init__(self, path: Path):
        self.config, self.history, self.summary, self.axes = {}, [], {}, {}
        self.run, self.exit_code, self.files, self.artifacts = None, None, [], []
        for record in records(path):
            kind = record.WhichOneof("record_type")
            if kind == "run":
                self.run = record.run
                self.config |= {i.key: json.loads(i.value_json) for i in record.run.config.update}
            elif kind == "metric":
                metric = record.metric
                self.axes[metric.name or metric.glob_name] = metric.step_metric
            elif kind == "history":
                self.history.append(_items(record.history.item))
            elif kind == "summary":
                self.summary |= _items(record.summary.update)
            elif kind == "files":
                self.files += [item.path for item in record.files.files]
            elif kind == "artifact":
                self.artifacts.append(record.artifact)
            elif kind == "exit":
                self.exit_code = record.exit.exit_code

    def series(self, key: str, axis: str) -> list[tuple[float, float]]:
        return [(row[axis], row[key]) for row in self.history if key in row]

    def logged(self, key: str):
        """The value of a media key, whose parts W&B stores as nested keys."""
        found = [row[key] for row in self.history if key in row]
        assert len(found) == 1, f"{key} was logged {len(found)} times"
        return found[0]


def _items(items) -> dict:
    result: dict = {}
    for item in items:
        keys = list(item.nested_key) or [item.key]
        node = result
        for key in keys[:-1]:
            node = node.setdefault(key, {})
        node[keys[-1]] = json.loads(item.value_json)
    return result
