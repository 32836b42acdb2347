"""What a run rests on besides its configuration: local data files, and the code of its parts.

Neither is part of a run's name. Both are stored with it, so that a result is not handed out for
data or code that changed since. Imports no torch: a finished run is recognised in a second.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from cl_peft.errors import DataError

log = logging.getLogger(__name__)

PACKAGE = Path(__file__).resolve().parent
#: Modules that say, keep or check something, and change no result.
_SILENT = {f"cl_peft.{name}" for name in ("atomic", "config", "console", "environment", "errors",
           "eviction", "inputs", "runs", "schema", "store", "tracking", "view")}  # fmt: skip
#: Axes whose classes decide what a run computes.
AXES = ("stream", "backbone", "module", "router", "learner", "optimizer", "trainer")
#: Modules that decide it whatever the axes are.
CORE = ("cl_peft.world", "cl_peft.evaluation", "cl_peft.streams.protocol")
#: Of larger files than this, in bytes, the size alone counts.
LARGE = 2**28


def data_digest(stream: Mapping[str, Any]) -> str | None:
    """Name of the content of a stream's local files; None where it has none, or they are gone.

    Args:
        stream: The stream's configuration; ``path``, ``train``, ``test`` and ``validation`` count.
    """
    files = _files(stream)
    if not files or not all(path.is_file() for path in files):
        return None
    whole = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        whole.update(f"{path.name} {size} ".encode())
        if size <= LARGE:
            whole.update(hashlib.sha256(path.read_bytes()).digest())
    return whole.hexdigest()


def code_digest(
    config: Mapping[str, Any], axes: Iterable[str] = AXES, core: Iterable[str] = CORE
) -> str:
    """Name of the code of a configuration's classes and of what they import from this package.

    Comments, docstrings and layout do not count. It is the code as it was when this process first
    asked: what was imported does not change afterwards.

    Args:
        config: The validated configuration.
        axes: The axes whose classes count.
        core: Further modules that count.
    """
    todo = {str(config[axis]["_target_"]).rpartition(".")[0] for axis in axes} | set(core)
    found: dict[str, str] = {}
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
    """Compare a finished run's data and code with what would be run now.

    Code that differs, and data that are gone, are warned of: the result is what it was.

    Raises:
        DataError: The data are others than those of the result.
    """
    path = folder / "provenance.json"
    stored = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    again = "fresh=true computes it again and keeps the earlier result aside"
    if stored.get("data"):
        now = data_digest(config["stream"])
        if now is None:
            log.warning("the data of this run are gone; its result could not be compared with them")
        elif now != stored["data"]:
            names = ", ".join(str(path) for path in _files(config["stream"])[:4])
            raise DataError(
                f"{folder} is the result of other data: {names} changed since it finished. "
                f"{again}; group=NAME keeps both results in sight."
            )
    if stored.get("code") not in (None, code_digest(config)):
        log.warning("the code of this run's parts changed since it finished; %s", again)


def _files(stream: Mapping[str, Any]) -> list[Path]:
    """Local files that a stream's configuration names, or else all files of its folder."""
    folder = Path(str(stream.get("path") or "")).expanduser()
    named = [stream[key] for key in ("train", "test", "validation") if stream.get(key)]
    files = [folder / Path(str(name)).expanduser() for name in named]
    if not stream.get("path") or any(path.is_file() for path in files):
        return files
    if folder.is_dir():  # where the names are those of splits
        inside = (path.relative_to(folder) for path in sorted(folder.rglob("*")))
        shown = (path for path in inside if not any(part.startswith(".") for part in path.parts))
        return [folder / path for path in shown if (folder / path).is_file()]
    return [folder]


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
