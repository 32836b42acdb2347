"""What a run rests on besides its configuration: local files, and the code of its parts.

Neither is part of a run's name. Both are stored with it, so that a result is not handed out for
other data, weights or code. Imports no torch: a finished run is recognised in a second.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cl_peft.config import build, split_stream
from cl_peft.errors import DataError, some
from cl_peft.view import read_json

log = logging.getLogger(__name__)

PACKAGE = Path(__file__).resolve().parent
#: Modules that say, keep, fetch or check something, and change no result.
_SILENT = {f"cl_peft.{name}" for name in (
    "archives", "atomic", "config", "console", "environment", "errors", "eviction", "inputs",
    "runs", "schema", "store", "tracking", "unpacking", "view")}  # fmt: skip
#: Axes whose classes decide what a run computes.
AXES = ("stream", "backbone", "module", "router", "learner", "optimizer", "trainer")
#: Modules that decide it whatever the axes are.
CORE = ("cl_peft.world", "cl_peft.evaluation", "cl_peft.streams.protocol")
#: What in a folder is data or a model, by the end of its name.
SUFFIXES = {".csv", ".tsv", ".json", ".jsonl", ".parquet", ".arrow", ".txt", ".gz", ".bz2", ".xz",
            ".zst", ".zip", ".safetensors", ".model"}  # fmt: skip
#: Of larger files, in bytes, size, beginning and end count.
LARGE, END = 2**26, 2**20
#: Of more files than this, one digest is kept for all.
MANY = 100


def files_in(folder: Path) -> list[Path]:
    """Data and model files of a folder, at any depth, in order; links are followed.

    Hidden files and folders, and what the datasets library writes beside its data, do not count.
    """
    found = []
    seen: set[str] = set()
    for place, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        folders[:] = [] if real in seen else [n for n in folders if not n.startswith(".")]
        shown = () if real in seen else names
        seen.add(real)
        found += [Path(place, n) for n in shown if not n.startswith((".", "cache-"))]
    return sorted(p for p in found if p.suffix.lower() in SUFFIXES and p.is_file())


def local_files(config: Mapping[str, Any]) -> dict[str, list[Path]]:
    """Local files that a run's stream and backbone are read from, by axis, there or not."""
    protocol, source = split_stream(config["stream"])
    found = {"stream": list(build({**source, "name": protocol.name}).files())}
    model = Path(str(config["backbone"].get("name"))).expanduser()
    found["backbone"] = files_in(model) if (model / "config.json").is_file() else []
    return {axis: [path.absolute() for path in files] for axis, files in found.items()}


def file_digests(files: Mapping[str, Sequence[Path]]) -> dict[str, dict[str, str]]:
    """Digests by axis and by path below the folder that an axis' files have in common.

    So files that were moved together are the same. Files that are not there are left out, and of
    more than :data:`MANY` there is one digest.

    Raises:
        DataError: A file cannot be read.
    """
    return {axis: _digests(paths) for axis, paths in files.items()}


def code_digest(
    config: Mapping[str, Any], axes: Iterable[str] = AXES, core: Iterable[str] = CORE
) -> str:
    """Name of the code of a configuration's classes and of what they import from this package.

    Args:
        config: The validated configuration.
        axes: The axes whose classes count, with those that they are configured with.
        core: Further modules that count.
    """
    targets = (target for axis in axes for target in _targets(config[axis]))
    return modules_digest({target.rpartition(".")[0] for target in targets} | set(core))


def modules_digest(names: Iterable[str]) -> str:
    """Name of the code of modules of this package and of what they import from it.

    Comments, docstrings and layout do not count. It is the code as it was when this process first
    asked: what was imported does not change afterwards.
    """
    todo, found = set(names), dict[str, str]()
    while todo:
        module = todo.pop()
        if module in found or module in _SILENT:
            continue
        digest, imported = _source(module)
        if digest:
            found[module] = digest
            todo.update(imported)
    return hashlib.sha256(repr(sorted(found.items())).encode()).hexdigest()


def check_finished(config: Mapping[str, Any], folder: Path) -> None:
    """Compare what a finished run was made from with what would be used now.

    Code that differs, and files that are gone, are warned of: the result is what it was.

    Raises:
        DataError: Data or weights are others than those of the result.
        DamagedRunError: What was stored of them cannot be read.
    """
    facts = read_json(folder / "provenance.json")
    again = "fresh=true computes it again and keeps the earlier result aside"
    files = local_files(config)
    now, stored = file_digests(files), facts.get("files")
    if stored is None and any(now.values()):
        log.warning("this run does not say which state of its data it was made from; %s", again)
    for axis, found in now.items():
        before = (stored or {}).get(axis, {})
        other = [name for name, digest in found.items() if before and before.get(name) != digest]
        if other:
            paths = [path for path in files[axis] if _below(files[axis], path) in other]
            raise DataError(
                f"{folder} is the result of other files than {axis}={config[axis]['name']} has "
                f"now: {some(paths or files[axis], 3)}. {again}; group=NAME keeps both in sight."
            )
        gone = [Path(name) for name in before if name not in found]
        if gone:
            log.warning("the result cannot be compared with what is gone: %s", some(gone, 3))
    codes = {session.get("code") for session in facts.get("sessions", ())} - {None}
    if codes and codes != {code_digest(config)}:
        log.warning("the code of this run's parts changed since it was made; %s", again)


def _digests(files: Sequence[Path]) -> dict[str, str]:
    found = {_below(files, path): _digest(path) for path in files if path.is_file()}
    if len(found) <= MANY:
        return found
    text = json.dumps(found, sort_keys=True)
    return {f"{len(found)} files": hashlib.sha256(text.encode()).hexdigest()}


def _below(files: Sequence[Path], path: Path) -> str:
    """Name of one of several files below the folder that they have in common."""
    return path.relative_to(os.path.commonpath([p.parent for p in files])).as_posix()


def _digest(path: Path) -> str:
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            if size <= LARGE:
                return hashlib.file_digest(file, "sha256").hexdigest()
            ends = file.read(END)
            file.seek(-END, os.SEEK_END)
            return hashlib.sha256(f"{size} ".encode() + ends + file.read()).hexdigest()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from error


def _targets(node: Any) -> Iterator[str]:  # noqa: ANN401 (a configuration value of any type)
    """Classes that a node names, at any depth."""
    if isinstance(node, Mapping):
        if "_target_" in node:
            yield str(node["_target_"])
        for value in node.values():
            yield from _targets(value)


@functools.cache
def _source(module: str) -> tuple[str, frozenset[str]]:
    """Digest of a module of this package, and what it imports; empty for any other name."""
    first, *rest = module.split(".")
    path = PACKAGE.joinpath(*rest).with_suffix(".py") if rest else PACKAGE / "__init__.py"
    if first != PACKAGE.name or not path.is_file():
        return "", frozenset()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    imported = frozenset(_imports(tree))
    return hashlib.sha256(ast.dump(_bare(tree)).encode()).hexdigest(), imported


def _imports(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def _bare(tree: ast.Module) -> ast.Module:
    """The same without docstrings."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            first = node.body[0] if node.body else None
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                node.body = node.body[1:]
    return tree
