"""The computed part of the cache stays within its bound, whoever else uses it."""

import logging
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import filelock
import pandas as pd
import pytest
import torch
from running import run
from test_reuse import SMALL, modules, reused, tables

from cl_peft import eviction
from cl_peft.cli import main
from cl_peft.errors import ConfigError
from cl_peft.eviction import KINDS, entries, remove
from cl_peft.store import ContentStore

KB = 1000


def key(i):
    return f"{i:064x}"


def value(i=0):
    return {"x": torch.full((240,), float(i))}  # 960 bytes and a header: just over 1 kB


def put(store, i, kind="features"):
    return store.get(kind, key(i), lambda: value(i))


def age(folder, seconds):
    """Make everything there older, keeping the order."""
    for entry in entries(folder):
        os.utime(entry.path, (entry.used - seconds,) * 2)


def kept(folder):
    return sorted(int(e.path.stem, 16) for e in entries(folder))


@pytest.fixture
def ancient(tmp_path):
    """Ten entries; number 0 is the oldest, an hour and more."""
    store = ContentStore(tmp_path)
    for i in range(10):
        put(store, i, KINDS[i % 3])
    for entry in entries(tmp_path):
        when = time.time() - 7200 + int(entry.path.stem, 16)
        os.utime(entry.path, (when, when))
    return tmp_path


def test_the_least_recently_used_goes_first(ancient, caplog):
    for i in (0, 3):
        put(ContentStore(ancient), i, KINDS[i % 3])  # a look-up
    with caplog.at_level(logging.INFO):
        put(ContentStore(ancient, 8 * KB), 99)
    held = sum(e.bytes for e in entries(ancient))
    assert held <= 8 * KB
    assert kept(ancient) == [0, 3, 7, 8, 9, 99]
    assert "evicted the 5 least recently used of 11 entries" in caplog.text
    assert "paths.cache_gb=8e-06" in caplog.text


def test_nothing_goes_while_there_is_room(ancient, caplog):
    put(ContentStore(ancient, 100 * KB), 99)
    put(ContentStore(ancient), 98)  # no bound
    assert len(kept(ancient)) == 12
    assert not caplog.text


def test_what_was_just_used_stays_whatever_the_bound(tmp_path):
    store = ContentStore(tmp_path, 2 * KB)
    for i in range(5):
        put(store, i)
    assert kept(tmp_path) == [0, 1, 2, 3, 4]
    age(tmp_path, eviction.FRESH + 1)
    put(store, 5)
    assert kept(tmp_path) == [5]


def test_downloads_are_never_touched(ancient):
    other = [ancient / name / "aa" / "big" for name in ("archives", "hub", "packages", "locks")]
    for path in other:
        path.parent.mkdir(parents=True)
        path.write_bytes(bytes(50 * KB))
        os.utime(path, (1, 1))
    put(ContentStore(ancient, 2 * KB), 99)
    assert kept(ancient) == [99]
    assert main(["cache", str(ancient), "--clear"]) == 0
    assert all(path.stat().st_size == 50 * KB for path in other)


def test_what_is_no_entry_is_never_touched(ancient):
    """A folder of somebody's own may have parts that are called features or modules."""
    names = ("features/aa/data.csv", "modules/lora/weights.safetensors", "tokens/ab/cd.safetensors")
    for path in (ancient / name for name in names):
        path.parent.mkdir(parents=True)
        path.write_bytes(bytes(50 * KB))
        os.utime(path, (1, 1))
    put(ContentStore(ancient, 2 * KB), 99)
    assert main(["cache", str(ancient), "--clear"]) == 0
    assert kept(ancient) == []
    assert all((ancient / name).exists() for name in names)


def test_the_disk_is_looked_at_once_in_a_while(tmp_path, monkeypatch):
    looks = []
    monkeypatch.setattr(eviction, "entries", lambda folder: looks.append(folder) or [])
    store = ContentStore(tmp_path, 200 * KB)  # a step is 10 kB
    for i in range(40):
        put(store, i)
    assert len(looks) == 1 + 39 * (960 + 64) // (10 * KB)


def test_a_process_alone_stays_below_the_bound(tmp_path, monkeypatch):
    monkeypatch.setattr(eviction, "FRESH", -1.0)
    store, limit = ContentStore(tmp_path, 50 * KB), 50 * KB
    for i in range(200):
        put(store, i)
        assert sum(e.bytes for e in entries(tmp_path)) <= limit
    assert len(kept(tmp_path)) >= 0.85 * limit / 1100


def test_many_processes_evict_each_others_entries(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(eviction, "FRESH", -1.0)

    def job(turn):
        store = ContentStore(tmp_path, 5 * KB)  # its own, as every process has
        return all(torch.equal(put(store, i)["x"], value(i)["x"]) for i in range(turn % 7, 20))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(job, range(24)))
    assert "damaged" not in caplog.text


def test_an_entry_that_vanishes_while_it_is_looked_for_is_a_miss(tmp_path, monkeypatch, caplog):
    store = ContentStore(tmp_path)
    put(store, 1)
    calls = []
    monkeypatch.setattr("cl_peft.store.load_file", lambda path: Path(path).read_bytes())
    monkeypatch.setattr(Path, "exists", lambda _: True)
    for entry in list(entries(tmp_path)):
        entry.path.unlink()
    store.get("features", key(1), lambda: calls.append(1) or value(1))
    assert calls == [1]
    assert not caplog.text


def test_entries_that_vanish_during_the_look_do_not_count(ancient, monkeypatch):
    stat = Path.stat

    def gone(self, **options):
        if self.stem == key(4):
            raise FileNotFoundError(self)
        return stat(self, **options)

    monkeypatch.setattr(Path, "stat", gone)
    assert kept(ancient) == [0, 1, 2, 3, 5, 6, 7, 8, 9]


def test_an_evicted_entry_takes_its_lock_along_and_a_held_one_stays(tmp_path):
    store = ContentStore(tmp_path)
    for i in (1, 2):
        store.get("modules", key(i), value, exclusive=True)
    first, second = sorted(entries(tmp_path), key=lambda e: e.path)
    with filelock.FileLock(first.path.with_suffix(".lock")):
        assert remove(second)
        assert not remove(first)
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file()) == [
        f"{key(1)}.lock",
        f"{key(1)}.safetensors",
    ]


def test_what_is_being_written_stays_and_what_a_killed_process_left_goes(ancient):
    half = next(entries(ancient)).path.with_name(f".{key(7)}.safetensors.abc")
    for seconds, goes in ((600, False), (4000, True)):
        half.write_bytes(bytes(KB))
        os.utime(half, (time.time() - seconds,) * 2)
        main(["cache", str(ancient), "--clear"])
        assert half.exists() != goes


def test_a_kind_that_nobody_bounds_is_refused(tmp_path):
    with pytest.raises(ValueError, match="'other' is not in"):
        ContentStore(tmp_path).get("other", key(1), value)


# ------------------------------------------------------------------ runs


@pytest.mark.parametrize("learner", ["isolated", "sequential"])
def test_a_tiny_bound_changes_no_bit(tmp_path, monkeypatch, learner):
    monkeypatch.setattr(eviction, "FRESH", -1.0)  # a run is over before anything is a minute old
    options = (*SMALL, f"learner={learner}")
    shared = f"paths.cache={tmp_path / 'cache'}"
    variants = {
        "large": (shared,),
        "tiny": (f"paths.cache={tmp_path / 'tiny'}", "paths.cache_gb=1e-4"),
        "shrunk": (shared, "paths.cache_gb=1e-4"),
        "again": (f"paths.cache={tmp_path / 'tiny'}", "paths.cache_gb=1e-4"),
        "off": ("cache=off", f"paths.cache={tmp_path / 'none'}"),
    }
    runs = {n: run(*options, *v, f"paths.runs={tmp_path / n}") for n, v in variants.items()}
    assert len({folder.name for folder in runs.values()}) == 1  # no part of a run's identity
    assert sum(e.bytes for e in entries(tmp_path / "tiny")) <= 100 * KB
    assert False in reused(runs["again"])  # something was evicted that it would have needed
    for folder in runs.values():
        assert modules(folder) == modules(runs["large"])
        for ours, theirs in zip(tables(folder), tables(runs["large"]), strict=True):
            pd.testing.assert_frame_equal(ours, theirs, check_exact=True)


@pytest.mark.parametrize("bad", ["0", "-1", "much", ".inf", ".nan"])
def test_a_bound_that_is_none_is_refused(tmp_path, bad):
    with pytest.raises(ConfigError, match=r"paths\.cache_gb"):
        run(*SMALL, f"paths.runs={tmp_path}", f"paths.cache_gb={bad}")


# ------------------------------------------------------------------ the command


def test_the_command_shows_and_clears(ancient, capsys, monkeypatch):
    monkeypatch.setenv("CL_PEFT_CACHE", str(ancient))
    assert main(["cache"]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[0] == str(ancient)
    rows = {line.split()[0]: line.split()[1] for line in out.splitlines()[1:]}
    assert rows == {"tokens": "4", "features": "3", "modules": "3", "together": "10"}
    main(["cache", "--clear", "features"])
    assert "removed 3 entries, 3.1 kB" in capsys.readouterr().out
    assert kept(ancient) == [0, 2, 3, 5, 6, 8, 9]
    main(["cache", "--clear"])
    assert kept(ancient) == []
    with pytest.raises(SystemExit):
        main(["cache", "--clear", "archives"])


def test_the_command_without_a_cache(tmp_path, capsys):
    assert main(["cache", str(tmp_path / "none"), "--clear"]) == 0
    assert "together          0 entries    0 bytes" in capsys.readouterr().out
    assert not (tmp_path / "none").exists()
