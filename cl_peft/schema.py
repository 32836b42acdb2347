"""Read what a class may be configured with from its constructor, without importing it.

A file on an axis (``routers/ridge.py``, ``modules/lora.py``, ...) imports torch; checking a
configuration must not. So the constructor's annotated keyword arguments *are* the schema, and they
are read from the source text with :mod:`ast`: one place says name, type, range and default, and a
new method is one file and one config with nothing else to touch.

A constructor that ends in ``**common: Any`` takes its base class's arguments too.

Annotations may use builtins, ``Literal``, ``Annotated`` and pydantic's constrained types
(``PositiveInt``, ``Field(ge=0, lt=1)``, ...). Defaults must be literals.
"""

from __future__ import annotations

import ast
import importlib.util
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
from pydantic import BaseModel, ConfigDict

from cl_peft.errors import ConfigError, did_you_mean

#: What an annotation in a constructor may mention.
NAMES: dict[str, Any] = {
    "Annotated": Annotated,
    "Any": Any,
    "Literal": Literal,
    "Field": pydantic.Field,
    "PositiveInt": pydantic.PositiveInt,
    "NonNegativeInt": pydantic.NonNegativeInt,
    "PositiveFloat": pydantic.PositiveFloat,
    "NonNegativeFloat": pydantic.NonNegativeFloat,
}


def constructor_model(target: str) -> type[BaseModel]:
    """Build a closed pydantic model from the constructor of ``target``.

    Args:
        target: Dotted name of a class, such as ``cl_peft.modules.lora.LoRA``.

    Raises:
        ConfigError: ``target`` lies outside cl_peft, or no such file or class exists.
    """
    arguments = _constructor(*_split(target))
    fields: dict[str, Any] = {}
    for name, annotation, default in arguments:
        kind = eval(annotation, {"__builtins__": __builtins__}, dict(NAMES))  # noqa: S307 (our source)
        fields[name] = (kind, default)
    model: type[BaseModel] = pydantic.create_model(
        target.rsplit(".", 1)[1], __config__=ConfigDict(extra="forbid", strict=True), **fields
    )
    return model


def class_constant(target: str, name: str) -> Any:  # noqa: ANN401 (a literal of any type)
    """Read a literal class attribute (``uses_router = False``), following base classes.

    Raises:
        ConfigError: ``target`` does not exist, or neither it nor a base class sets the constant.
    """
    module, cls = _split(target)
    for path, node in _with_bases(module, cls):
        for statement in node.body:
            if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                names, value = [statement.target.id], statement.value
            elif isinstance(statement, ast.Assign):
                names = [t.id for t in statement.targets if isinstance(t, ast.Name)]
                value = statement.value
            else:
                continue
            if name in names and value is not None:
                try:
                    return ast.literal_eval(value)
                except ValueError:
                    raise ConfigError(f"{path}: {cls}.{name} must be a literal.") from None
    raise ConfigError(f"{target} does not say '{name}'; its base class should set a default.")


def _split(target: str) -> tuple[str, str]:
    module, _, cls = target.rpartition(".")
    if not target.startswith("cl_peft.") or not module or not cls.isidentifier():
        raise ConfigError(
            f"_target_: {target!r} is not allowed. Only classes of cl_peft can be configured, for "
            "example cl_peft.modules.lora.LoRA."
        )
    return module, cls


@lru_cache(maxsize=256)
def _source(module: str) -> tuple[Path, ast.Module]:
    parent, _, leaf = module.rpartition(".")
    try:
        spec = importlib.util.find_spec(module)
    except (ModuleNotFoundError, ValueError):
        spec = None
    if spec is None or spec.origin is None:
        folder = Path(__file__).parent.joinpath(*parent.split(".")[1:])
        files = sorted(p.stem for p in folder.glob("*.py") if p.stem != "__init__")
        raise ConfigError(
            f"_target_: there is no module {module}.{did_you_mean(leaf, files)}\n"
            f"  files in {parent}: {', '.join(files) or 'none'}"
        )
    path = Path(spec.origin)
    return path, ast.parse(path.read_text(encoding="utf-8"))


def _with_bases(module: str, cls: str) -> list[tuple[Path, ast.ClassDef]]:
    """The class and its bases inside cl_peft, nearest first."""
    path, tree = _source(module)
    classes = {n.name: n for n in tree.body if isinstance(n, ast.ClassDef)}
    if cls not in classes:
        raise ConfigError(
            f"_target_: {path.name} has no class {cls}.{did_you_mean(cls, classes)}\n"
            f"  classes there: {', '.join(classes) or 'none'}"
        )
    imported = {
        (alias.asname or alias.name): (n.module, alias.name)
        for n in tree.body
        if isinstance(n, ast.ImportFrom) and n.module and n.module.startswith("cl_peft")
        for alias in n.names
    }
    found = [(path, classes[cls])]
    for base in classes[cls].bases:
        if isinstance(base, ast.Name) and base.id in classes:
            found += _with_bases(module, base.id)
        elif isinstance(base, ast.Name) and base.id in imported:
            found += _with_bases(*imported[base.id])
    return found


def _constructor(module: str, cls: str) -> list[tuple[str, str, Any]]:
    """``(name, annotation, default)`` of the first ``__init__`` found; ``...`` means required.

    One that ends in ``**common`` hands those on, so the next base class's arguments count as well.
    """
    result: list[tuple[str, str, Any]] = []
    for path, node in _with_bases(module, cls):
        for statement in node.body:
            if isinstance(statement, ast.FunctionDef) and statement.name == "__init__":
                known = {name for name, _, _ in result}
                result += [a for a in _arguments(path, statement) if a[0] not in known]
                if statement.args.kwarg is None:
                    return result
    return result


def _arguments(path: Path, init: ast.FunctionDef) -> list[tuple[str, str, Any]]:
    positional = init.args.posonlyargs + init.args.args
    defaults: list[ast.expr | None] = [None] * (len(positional) - len(init.args.defaults))
    defaults += init.args.defaults
    pairs = list(zip(positional, defaults, strict=True))[1:]  # without self
    pairs += list(zip(init.args.kwonlyargs, init.args.kw_defaults, strict=True))
    result = []
    for argument, default in pairs:
        if argument.annotation is None:
            raise ConfigError(f"{path.name}: argument {argument.arg} needs a type annotation.")
        value = ... if default is None else ast.literal_eval(default)
        if isinstance(value, tuple):  # lists cannot be default arguments; configurations have lists
            value = list(value)
        result.append((argument.arg, ast.unparse(argument.annotation), value))
    return result
