"""The run folder: the truth about a run. Atomic, resumable, verified. Imports no torch.

Layout (numbers of tasks are 1-based, as in the literature)::

    config.yaml stream.json provenance.json status.json manifest.json run.log
    tasks/001/   module.safetensors results.parquet predictions.parquet memo.parquet timing.json
                 router.safetensors learner.safetensors (of the latest task only)
    results.parquet predictions.parquet timing.json accuracy_matrix.png report.md   (when finished)

A task's files are written into a hidden folder, flushed to disk, and appear by one rename; then the
manifest, which lists every file with its sha256, is replaced. What the manifest does not list does
not exist. So a run killed at any moment goes on from its last listed task.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import filelock
import yaml

from cl_peft.atomic import disk_error, write_atomic
from cl_peft.config import run_id
from cl_peft.environment import environment
from cl_peft.errors import DamagedRunError

log = logging.getLogger(__name__)

FORMAT = 1
#: Files of a task that replace those of earlier tasks.
LATEST = ("router.safetensors", "learner.safetensors")
State = Literal["new", "running", "finished", "failed", "refused"]


class RunFolder:
    """One run's folder.

    Args:
        path: ``runs/<group>/<run id>``.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._manifest: dict[str, Any] = {"format": FORMAT, "fixed": {}, "tasks": [], "final": None}
        self._started = time.monotonic()
        self._before = 0.0

    # ------------------------------------------------------------------ opening

    @contextlib.contextmanager
    def lock(self, waiting: Any = None) -> Iterator[None]:  # noqa: ANN401 (a callable without arguments)
        """Hold the folder; another process that runs the same configuration waits.

        Args:
            waiting: Called once if somebody else holds it.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise disk_error(error, self.path, 0) from error
        lock = filelock.FileLock(self.path / ".lock")
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            if waiting is not None:
                waiting()
            lock.acquire()
        except OSError as error:
            raise disk_error(error, self.path, 0) from error
        try:
            yield
        finally:
            lock.release()

    def open(self, config: Mapping[str, Any]) -> State:
        """Read what is there and check it.

        Args:
            config: The validated configuration that is about to run here.

        Returns:
            ``new``, or how the run stood when it was last seen.

        Raises:
            DamagedRunError: A listed file is missing or differs, or the folder belongs to another
                configuration.
        """
        self._clean()
        if not self.look():
            return "new"
        for name in self.files():
            self.content(name)
        stored = run_id(yaml.safe_load((self.path / "config.yaml").read_text()))
        if stored != run_id(config):
            raise DamagedRunError(
                f"{self.path} holds the run {stored}, not {run_id(config)}. Move it away, or use "
                "fresh=true to start over."
            )
        status = self.status()
        self._before = float(status.get("seconds") or 0.0)
        if self._manifest["final"] is not None:
            if status.get("state") != "finished":  # killed between the manifest and the status
                self.set_status("finished", None)
            return "finished"
        state: State = status.get("state", "running")
        return "running" if state == "finished" else state

    def look(self) -> bool:
        """Read the manifest and write nothing: the run may be going on in another process.

        Returns:
            Whether there is a manifest.

        Raises:
            DamagedRunError: It cannot be read, or is of another format.
        """
        path = self.path / "manifest.json"
        if not path.exists():
            return False
        self._manifest = self._read_json(path)
        if self._manifest.get("format") != FORMAT:
            raise DamagedRunError(
                f"{path}: format {self._manifest.get('format')!r} is not {FORMAT}; it was written "
                "by another version. Use fresh=true to start over."
            )
        return True

    def files(self) -> dict[str, dict[str, Any]]:
        """Every file that the manifest lists."""
        found: dict[str, dict[str, Any]] = dict(self._manifest["fixed"])
        for task in self._manifest["tasks"]:
            found.update(task["files"])
        found.update(self._manifest["final"] or {})
        return found

    def set_aside(self) -> Path | None:
        """Rename the folder's content away, for ``fresh=true``; returns where it went."""
        if not (self.path / "manifest.json").exists():
            return None
        stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
        aside = self.path.parent / ".old" / f"{self.path.name}-{stamp}"
        aside.mkdir(parents=True)
        for item in self.path.iterdir():
            if item.name != ".lock":
                item.rename(aside / item.name)
        return aside

    @property
    def done(self) -> int:
        """Number of finished tasks."""
        return len(self._manifest["tasks"])

    # ------------------------------------------------------------------ writing

    def claim(self, config: Mapping[str, Any]) -> None:
        """Say what is about to run here, before anything that may fail; needs the lock.

        A configuration that is there already stays: that of a run which began, or that of an
        earlier attempt, which :meth:`begin` replaces.
        """
        if not (self.path / "config.yaml").exists():
            write_atomic(self.path / "config.yaml", _yaml(config))

    def begin(self, config: Mapping[str, Any], stream: Mapping[str, Any]) -> None:
        """Write what never changes: the configuration and the stream's description."""
        fixed = {
            "config.yaml": _yaml(config),
            "stream.json": _json(stream),
        }
        for name, data in fixed.items():
            write_atomic(self.path / name, data)
        self._manifest["fixed"] = {name: _entry(data) for name, data in fixed.items()}
        self._write_manifest()

    def published(self, config: Mapping[str, Any]) -> dict[str, bytes]:
        """``config.yaml`` and ``manifest.json`` of a copy that has another configuration."""
        data = _yaml(config)
        fixed = {**self._manifest["fixed"], "config.yaml": _entry(data)}
        return {"config.yaml": data, "manifest.json": _json({**self._manifest, "fixed": fixed})}

    def provenance(self, facts: Mapping[str, Any]) -> None:
        """Write, or on a resumed run compare, where this run comes from.

        Raises:
            DamagedRunError: Data or backbone differ from those of the finished tasks.
        """
        path = self.path / "provenance.json"
        session = {**facts, **environment()}
        stored = self._read_json(path) if path.exists() else {}
        sessions = [*stored.get("sessions", []), _session(session)]
        if not self.done:  # nothing was learned before, so nothing has to agree
            write_atomic(path, _json({**session, "sessions": sessions}))
            return
        for name in ("stream_fingerprint", "backbone_fingerprint"):
            if stored.get(name) != session.get(name):
                what = "the data" if name.startswith("stream") else "the backbone"
                raise DamagedRunError(
                    f"{self.path}: {what} changed since its first {self.done} tasks were learned "
                    f"({name} {str(stored.get(name))[:12]}, now {str(session.get(name))[:12]}). "
                    "Bring the old one back, or use fresh=true to start over."
                )
        for name in ("device", "threads"):
            if stored.get(name) != session.get(name):
                log.warning(
                    "%s was %s when this run began and is %s now; later tasks may differ in the "
                    "last bits from an uninterrupted run",
                    name, stored.get(name), session.get(name),
                )  # fmt: skip
        if {s.get("code") for s in sessions} - {None, session.get("code")}:
            log.warning("the code of this run's parts changed since it began; see fresh=true")
        write_atomic(path, _json({**stored, "sessions": sessions}))

    def commit(self, task: int, files: Mapping[str, bytes], tasks: int) -> None:
        """Make a finished task permanent.

        Args:
            task: Index of the task, 0-based.
            files: Content by file name inside the task's folder.
            tasks: Number of tasks of the stream.

        Raises:
            UserError: The disk is full; the run stands as after the task before.
        """
        folder = self.path / "tasks" / f"{task + 1:03d}"
        temporary = folder.with_name(f".{folder.name}.writing")
        size = sum(map(len, files.values()))
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            for name, data in files.items():
                with (temporary / name).open("wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
            if folder.exists():  # renamed by a process that died before it wrote the manifest
                shutil.rmtree(folder)
            temporary.rename(folder)
        except OSError as error:
            shutil.rmtree(temporary, ignore_errors=True)
            raise disk_error(error, folder, size) from error
        listed = {f"tasks/{folder.name}/{name}": _entry(data) for name, data in files.items()}
        newer = {name for name in LATEST if f"tasks/{folder.name}/{name}" in listed}
        old = [
            n for t in self._manifest["tasks"] for n in t["files"] if n.rsplit("/", 1)[1] in newer
        ]
        for entry in self._manifest["tasks"]:
            entry["files"] = {n: e for n, e in entry["files"].items() if n not in old}
        self._manifest["tasks"].append({"task": task + 1, "files": listed})
        self._write_manifest()
        for name in old:  # what it says is contained in the newer one
            (self.path / name).unlink(missing_ok=True)
        self.set_status("running", tasks)

    def finish(self, files: Mapping[str, bytes], tasks: int) -> None:
        """Write the final files and mark the run finished."""
        for name, data in files.items():
            write_atomic(self.path / name, data)
        self._manifest["final"] = {name: _entry(data) for name, data in files.items()}
        self._write_manifest()
        self.set_status("finished", tasks)

    def set_status(self, state: State, tasks: int | None, error: str | None = None) -> None:
        """Replace ``status.json``."""
        old = self.status()
        now = datetime.now(UTC).isoformat(timespec="seconds")
        status = {
            "state": state,
            "tasks_done": self.done,
            "tasks": tasks if tasks is not None else old.get("tasks"),
            "error": error,
            "started": old.get("started", now),
            "updated": now,
            "seconds": round(self._before + time.monotonic() - self._started, 2),
            "pid": os.getpid(),
        }
        write_atomic(self.path / "status.json", _json(status))

    def status(self) -> dict[str, Any]:
        """What ``status.json`` says; empty where there is none."""
        path = self.path / "status.json"
        return self._read_json(path) if path.exists() else {}

    # ------------------------------------------------------------------ reading

    def read(self, name: str) -> Path:
        """Path of a listed file.

        Raises:
            DamagedRunError: The manifest does not list it.
        """
        if name not in self.files():
            raise DamagedRunError(f"{self.path}: {name} is not in the manifest")
        return self.path / name

    def has(self, name: str) -> bool:
        """Whether the manifest lists a file."""
        return name in self.files()

    def content(self, name: str) -> bytes:
        """A listed file's bytes, compared with its digest.

        Raises:
            DamagedRunError: The manifest does not list it, or it is missing or differs.
        """
        path, entry = self.read(name), self.files()[name]
        advice = (
            "Put the file back from a copy, or use fresh=true to run from the start; nothing was "
            "changed."
        )
        if not path.is_file():
            raise DamagedRunError(f"{path} is missing, though the manifest lists it. {advice}")
        data = path.read_bytes()
        digest = hashlib.sha256(data).hexdigest()
        if digest != entry["sha256"]:
            raise DamagedRunError(
                f"{path} is damaged: {len(data)} bytes, sha256 {digest[:12]}; the manifest says "
                f"{entry['bytes']} bytes, sha256 {entry['sha256'][:12]}. {advice}"
            )
        return data

    # ------------------------------------------------------------------ inside

    def _clean(self) -> None:
        """Remove what a killed process left half-written."""
        for leftover in (*self.path.glob("tasks/.*.writing"), *self.path.glob(".*")):
            if leftover.is_dir():
                shutil.rmtree(leftover)
            elif leftover.name != ".lock":
                leftover.unlink()

    def _write_manifest(self) -> None:
        write_atomic(self.path / "manifest.json", _json(self._manifest))

    @staticmethod
    def _read_json(path: Path) -> dict[str, Any]:
        try:
            return dict(json.loads(path.read_text()))
        except (ValueError, TypeError, OSError) as error:
            raise DamagedRunError(
                f"{path} cannot be read ({error}). Put it back from a copy, or use fresh=true to "
                "run from the start."
            ) from error


def is_held(folder: Path) -> bool:
    """Whether a process is running in this run folder now."""
    path = folder / ".lock"
    if not path.exists():
        return False
    lock = filelock.FileLock(path)
    try:
        lock.acquire(timeout=0)
    except (filelock.Timeout, OSError):
        return True
    lock.release()
    return False


def _session(facts: Mapping[str, Any]) -> dict[str, Any]:
    keys = ("command", "git_revision", "git_dirty", "code", "device", "threads")
    time_ = datetime.now(UTC).isoformat(timespec="seconds")
    return {"started": time_, **{k: facts.get(k) for k in keys}}


def _entry(data: bytes) -> dict[str, Any]:
    return {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}


def _yaml(config: Mapping[str, Any]) -> bytes:
    return yaml.safe_dump(dict(config), sort_keys=False).encode()


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()
