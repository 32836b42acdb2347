"""From the command line to a run: Hydra's errors in people's words, run or recognise, sweeps.

Imports no torch until a valid configuration has to be computed.
"""

from __future__ import annotations

import errno
import functools
import logging
import math
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, MissingConfigException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from cl_peft import inputs, sweeps
from cl_peft.atomic import disk_error
from cl_peft.config import run_id, validate
from cl_peft.environment import available_cores
from cl_peft.errors import ConfigError, UserError, did_you_mean
from cl_peft.runs import RunFolder, is_held

log = logging.getLogger(__name__)

#: What an OSError has to say to be the user's disk, and not our bug.
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR)
#: Exit code of Ctrl-C.
INTERRUPTED = 130


def launch(main: Callable[[], Any]) -> int:
    """Run Hydra's ``main`` and turn whatever it raises into words and an exit code.

    Returns:
        0 when all is well; 2 for a problem the user can fix; 1 for a bug; 130 when interrupted.
    """
    if {"--help", "-h"} & set(sys.argv):
        _list_quickly()
    raw = os.environ.get("HYDRA_FULL_ERROR") == "1"
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors shall reach us, not be printed and swallowed
    try:
        code = _guarded(main, raw)
    finally:
        left = sweeps.left()
    for config, jobs in left:
        if code != INTERRUPTED:
            done = _guarded(functools.partial(_complete, config, jobs), raw)
            code = done if done == INTERRUPTED else code or done
    sweeps.show_tables()
    return code


def _list_quickly() -> None:
    """Let Hydra read its search path once for a help text, instead of for each of 120 groups.

    That takes ``--help`` from 1.1 seconds to 0.45. A Hydra without this function stays as it is.
    """
    from hydra._internal.config_loader_impl import ConfigLoaderImpl  # no run rests on it

    name = "_parse_overrides_and_create_caching_repo"
    read = getattr(ConfigLoaderImpl, name, None)
    if read is not None:
        known: dict[tuple[Any, ...], Any] = {}

        def once(loader: Any, config_name: str | None, overrides: list[str]) -> Any:  # noqa: ANN401
            key = (loader, config_name, *overrides)
            if key not in known:
                known[key] = read(loader, config_name, overrides)
            return known[key]

        setattr(ConfigLoaderImpl, name, once)


def _guarded(main: Callable[[], Any], raw: bool) -> int:
    """Call it; the exit code, with whatever it raises in words."""
    code = 0
    try:
        main()
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from the last finished task", file=sys.stderr)
        code = INTERRUPTED
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    except (HydraException, OmegaConfBaseException) as error:
        if raw:
            raise
        print(f"error: {explain(error)}", file=sys.stderr)
        code = 2
    except OSError as error:
        if error.errno in _DISK and isinstance(error.filename, str):
            print(f"error: {disk_error(error, Path(error.filename), 0)}", file=sys.stderr)
            code = 2
        else:
            traceback.print_exc()
            code = 1
    except Exception as error:
        if raw or not _about_the_command(error):
            traceback.print_exc()
            code = 1
        else:
            print(f"error: {explain(error)}", file=sys.stderr)
            code = 2
    return code


def job(cfg: DictConfig) -> float:
    """Run one configuration, or recognise that it has run.

    A sweep's job that another process is running is left for the end, so that several processes
    share a sweep: by then it is finished, or its process has died and it is gone on with.

    Returns:
        Final routed average accuracy, which a sweeper may optimise; NaN for a job that is left.
    """
    from cl_peft.console import Console

    hydra = HydraConfig.get() if HydraConfig.initialized() else None
    sweep = hydra is not None and hydra.mode == RunMode.MULTIRUN
    jobs = int(OmegaConf.select(hydra, "launcher.n_jobs", default=1)) if hydra and sweep else 1
    try:
        config = validate(cfg)
    except ConfigError as error:
        if sweep:
            sweeps.record_refused(cfg, error)
        raise
    if sweep and config["fail_fast"]:
        sweeps.refuse_after_failure(Path(config["paths"]["runs"]).expanduser() / config["group"])
    console = Console(bars=False if jobs != 1 else None)
    if hydra is not None and sweep:
        console.message(f"job {hydra.job.num}: {' '.join(hydra.overrides.task)}")
    for axis in ("module", "router"):
        given = OmegaConf.select(cfg, f"{axis}.name")
        if config[axis]["name"] == "none" and given != "none":
            learner = config["learner"]["name"]
            console.message(f"learner={learner} uses no {axis}: {axis}={given} is set to none")
    if sweep and _may_leave(hydra) and _busy(_folder(config).path):
        console.message(f"another process runs this configuration; {sweeps.leave(config, jobs)}")
        return math.nan
    try:
        folder = _with_bounds(config, console, jobs)
    except UserError as error:
        if sweep:  # of a sweep's errors Hydra hands on the first alone
            console.message(f"error: {error}")
        raise
    from cl_peft import presentation

    if not sweep:
        return presentation.show(folder.path, console)
    return presentation.write(folder.path).score  # the sweep's table comes at its end


def _complete(config: dict[str, Any], jobs: int) -> None:
    """Run a sweep's job that was left for the end."""
    from cl_peft import presentation
    from cl_peft.console import Console

    if config["fail_fast"]:
        sweeps.refuse_after_failure(_folder(config).path.parent)
    console = Console()
    console.message(f"left before: {run_id(config)}")
    presentation.write(_with_bounds(config, console, jobs).path)


def _busy(path: Path) -> bool:
    """Whether a process runs there, and does not only look whether one does."""
    if not is_held(path):
        return False
    time.sleep(0.2)
    return is_held(path)


def _may_leave(hydra: Any) -> bool:  # noqa: ANN401 (Hydra's own node)
    """Whether nobody waits for the job's score: a grid does not, a search does."""
    return str(OmegaConf.select(hydra, "sweeper._target_")).endswith("BasicSweeper")


def _with_bounds(config: dict[str, Any], console: Any, jobs: int) -> RunFolder:  # noqa: ANN401
    """Run a validated configuration, after its baselines if it asks for them."""
    baselines: dict[str, dict[str, Any]] = {}
    if config["bounds"] == "on":
        from cl_peft import bounds

        baselines = bounds.baselines(config)
        for what, other in baselines.items():
            console.message(f"baseline {what}: {run_id(other)}")
            _run(other, console, jobs)
    return _run(config, console, jobs, baselines)


def _folder(config: Mapping[str, Any]) -> RunFolder:
    return RunFolder(Path(config["paths"]["runs"]).expanduser() / config["group"] / run_id(config))


def _run(
    config: dict[str, Any],
    console: Any,  # noqa: ANN401
    jobs: int,
    baselines: Mapping[str, Mapping[str, Any]] | None = None,
) -> RunFolder:
    """Run a validated configuration, go on with it, or recognise that it has run."""
    folder = _folder(config)
    waiting = "another process runs this configuration; waiting for it"
    with folder.lock(lambda: console.message(waiting)):
        if config["fresh"]:
            aside = folder.set_aside()
            if aside is not None:
                console.message(f"the earlier run was moved to {aside}")
        state = folder.open(config)
        if state == "finished":
            with _warnings(console):
                inputs.check_finished(config, folder.path)
        if baselines:
            from cl_peft import bounds

            bounds.record(folder.path, baselines)
            (folder.path / "report.md").unlink(missing_ok=True)  # written again, with bounds
        if state == "finished":
            console.message(f"already finished: {folder.path}")
        else:
            if folder.done:
                console.message(f"going on after task {folder.done} of {folder.path}")
            _compute(config, folder, console, jobs)
    return folder


def _compute(config: dict[str, Any], folder: RunFolder, console: Any, jobs: int) -> None:  # noqa: ANN401
    """Run; whatever goes wrong is in the run's own log and status before it goes up."""
    with _own_log(folder.path / "run.log", console):
        try:
            if config["threads"] == "auto" and jobs != 1:
                config = {**config, "threads": _threads_per_job(jobs)}
            from cl_peft.experiment import run_experiment

            run_experiment(config, folder, console)
        except BaseException as error:
            log.error("%s", error, exc_info=error)
            known = isinstance(error, UserError)
            words = str(error) if known else f"{type(error).__name__}: {error}"
            stopped = isinstance(error, KeyboardInterrupt | SystemExit)  # by a person, by Slurm
            if stopped:
                words = "interrupted"
            try:
                folder.set_status("failed", None, words.strip() or type(error).__name__)
            except UserError as second:  # the disk may be full
                log.error("the status could not be written: %s", second)
            if not known and not stopped:
                console.message(f"the traceback is also in {folder.path / 'run.log'}")
            raise


def _threads_per_job(jobs: int) -> int:
    """Cores shared among parallel jobs, so that they are not oversubscribed."""
    cores = available_cores()
    return max(1, cores // (cores if jobs < 0 else jobs))


@contextmanager
def _own_log(path: Path, console: Any) -> Iterator[None]:  # noqa: ANN401
    """Send logging to the run's own file, and warnings to the terminal as well."""
    root = logging.getLogger()
    try:
        file = logging.FileHandler(path, encoding="utf-8")
    except OSError as error:
        raise disk_error(error, path, 0) from error
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    before = root.level
    root.setLevel(logging.INFO)
    root.addHandler(file)
    logging.captureWarnings(True)
    try:
        with _warnings(console):
            yield
    finally:
        logging.captureWarnings(False)
        root.setLevel(before)
        root.removeHandler(file)
        file.close()


@contextmanager
def _warnings(console: Any) -> Iterator[None]:  # noqa: ANN401
    """Show what is logged as a warning on the terminal; errors are shown once, at the end."""

    class Terminal(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            console.message(f"{record.levelname.lower()}: {record.getMessage()}")

    terminal = Terminal(level=logging.WARNING)
    terminal.addFilter(lambda record: record.exc_info is None)
    logging.getLogger().addHandler(terminal)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(terminal)


def explain(error: Exception) -> str:
    """Say in one screen what Hydra or OmegaConf refused, with the nearest allowed name."""
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options:
        group, _, name = str(error.missing_cfg_file).rpartition("/")
        options = sorted(str(option) for option in error.options)
        return (
            f"{group}={name}: there is no such {group}.{did_you_mean(name, options)}\n"
            f"  allowed: {', '.join(options)}"
        )
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OmegaConfBaseException):
        cause = cause.__cause__
    key, parent = getattr(cause, "full_key", None), getattr(cause, "parent_node", None)
    if key and isinstance(parent, DictConfig) and "not in struct" in str(cause):
        siblings = [str(k) for k in parent if k != "hydra"]
        prefix, _, last = str(key).rpartition(".")
        near = did_you_mean(last, siblings)
        if prefix:
            near = near.replace("'", f"'{prefix}.", 1)
        where = prefix or "the top of the configuration"
        return (
            f"{key}: there is no such key.{near}\n  keys in {where}: {', '.join(sorted(siblings))}"
        )
    text = str(error) or str(cause)
    match = re.search(r"Could not override '([^']+)'.*?No match in the defaults list", text, re.S)
    if match:
        groups = sorted(p.name for p in conf_folder().iterdir() if p.is_dir())
        wrong = match.group(1)
        return (
            f"{wrong}: there is no such group.{did_you_mean(wrong, groups)}\n"
            f"  groups: {', '.join(groups)}"
        )
    if "override must be a string or a list" in text:
        axes = sorted({p.name for p in conf_folder().iterdir() if p.is_dir()} - {"common"})
        return (
            "an axis cannot be null: name one of its choices, such as router=oracle, or leave it "
            f"out for the default.\n  axes: {', '.join(axes)}"
        )
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return "\n  ".join(lines[:6])


def _about_the_command(error: Exception) -> bool:
    """Whether Hydra itself raised a builtin exception, as for ``router=null``."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    raised = frames[-1].f_globals.get("__name__", "").split(".")[0]
    return raised in ("hydra", "omegaconf") and not any(f.f_code is job.__code__ for f in frames)


def conf_folder() -> Path:
    """Where the configuration files lie."""
    return Path(__file__).resolve().parent.parent / "conf"
