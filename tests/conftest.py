"""What several test files share: a cache, and one finished run."""

from dataclasses import dataclass
from pathlib import Path

import pytest
from running import RIDGE, command


@dataclass(frozen=True)
class Finished:
    """A finished run and what its command printed."""

    folder: Path
    args: tuple[str, ...]
    stdout: str
    stderr: str


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """Tokens and frozen features, shared by all runs of a session."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def smoke_run(tmp_path_factory, cache):
    """``python main.py debug=smoke`` with a narrow router. Copy it before changing it."""
    runs = tmp_path_factory.mktemp("smoke") / "runs"
    args = ("debug=smoke", *RIDGE, f"paths.runs={runs}", f"paths.cache={cache}")
    done = command(*args)
    assert done.returncode == 0, done.stderr
    (folder,) = (runs / "smoke").iterdir()
    return Finished(folder, args, done.stdout, done.stderr)


@pytest.fixture
def places(tmp_path, cache):
    """Overrides that keep a test's runs to itself."""
    return (f"paths.runs={tmp_path / 'runs'}", f"paths.cache={cache}")
