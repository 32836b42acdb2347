"""Start runs from tests: as a command, in this process, or in one that is killed at a moment."""

import csv
import functools
import hashlib
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from cl_peft.config import run_id, validate

ROOT = Path(__file__).resolve().parent.parent
CONF = ROOT / "conf"
#: A narrow projection, so that a ridge router costs nothing.
RIDGE = ("router=ridge", "router.projection=64")
#: Five tasks of two classes each.
FIVE = (
    "stream.classes=10",
    "stream.tasks=5",
    "stream.train_per_class=8",
    "stream.test_per_class=4",
    "trainer.epochs=2",
    "trainer.batch_size=4",
)


def command(*args, env=None, timeout=240, python=(), cwd=ROOT, main="main.py"):
    """Run ``python main.py ARGS``; returns the completed process."""
    return subprocess.run(
        [sys.executable, *python, main, *args],
        cwd=cwd,
        env={**environment(), **(env or {})},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def environment():
    """Without what would make a message or a speed depend on who runs the tests."""
    drop = (
        "HYDRA_FULL_ERROR",
        "FORCE_COLOR",
        "COLUMNS",
        "PYTHONPATH",
        "CL_PEFT_CACHE",
        "WANDB_SERVICE",
    )  # the last: W&B's own process, which a killed run must not share
    kept = {k: v for k, v in os.environ.items() if k not in drop}
    return {**kept, "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}


@functools.cache  # composing takes a third of a second; nothing changes what it gets
def config(*overrides, **options):
    """Compose the configuration as the command line would."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", list(overrides), **options)


def folder_of(*overrides):
    """Where a run with these overrides lives."""
    return _folder(config(*overrides))


def _folder(cfg):
    valid = validate(cfg)
    return Path(valid["paths"]["runs"]) / valid["group"] / run_id(valid)


def run(*overrides):
    """Run in this process; returns the run's folder."""
    from cl_peft.launch import job

    cfg = config(*overrides)
    job(cfg)
    return _folder(cfg)


def digests(folder, skip=(".lock",)):
    """Sha256 of every file below ``folder`` by relative path."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in skip
    }


def write_csv(path, rows, header=("text", "label")):
    """A table of ``rows``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def rows_of(classes, each, split=""):
    """Separable texts: ``each`` examples of every class."""
    return [(f"{name} {split} number {i} of {name}", name) for name in classes for i in range(each)]


# ------------------------------------------------------------------ killed at a moment


def in_child(moment, overrides):
    """Run in a process of its own, killed at ``moment`` (a key of :data:`MOMENTS`, or None).

    Returns:
        The exit code; ``-SIGKILL`` if the moment came.
    """
    return _forked(_run_until, moment, list(overrides))


def warm_command(*args, folder):
    """As :func:`command`, in a process that has imported torch already: seconds faster.

    Args:
        folder: Where the output is kept meanwhile.
    """
    outputs = [folder / "stdout.txt", folder / "stderr.txt"]
    code = _forked(_run_main, list(args), outputs)
    return subprocess.CompletedProcess(args, code, *(path.read_text() for path in outputs))


def _forked(target, *args):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["cl_peft.experiment", "transformers.models.bert.modeling_bert"])
    child = context.Process(target=target, args=args)
    child.start()
    child.join(120)
    if child.exitcode is None:
        child.kill()
        raise AssertionError("the run hangs")
    return child.exitcode


def _run_until(moment, overrides):
    if moment is not None:
        MOMENTS[moment]()
    run(*overrides)


def _run_main(args, outputs):
    os.environ.clear()
    os.environ.update(environment())
    os.chdir(ROOT)
    for number, path in enumerate(outputs, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.argv = ["main.py", *args]
    runpy.run_path("main.py", run_name="__main__")


def _die():
    os.kill(os.getpid(), signal.SIGKILL)


def _before(owner, name, when):
    """Die just before ``owner.name`` is called with arguments for which ``when`` is true."""
    original = getattr(owner, name)

    def replacement(*args, **kwargs):
        if when(*args, **kwargs):
            _die()
        return original(*args, **kwargs)

    setattr(owner, name, replacement)


def _training(task):
    def patch():
        from cl_peft.training import Trainer

        counted = []

        def third_step(self, job, *rest):
            counted.append(job.task)
            return counted.count(task - 1) == 3

        _before(Trainer, "_step", third_step)

    return patch


def _writing_task(task):
    def patch():
        _before(Path, "rename", lambda self, target: Path(target).name == f"{task:03d}")

    return patch


def _renamed_not_listed(task):
    def patch():
        from cl_peft.runs import RunFolder

        _before(RunFolder, "_write_manifest", lambda self: self.done == task)

    return patch


def _listed_not_cleaned(task):
    def patch():
        from cl_peft.runs import RunFolder

        _before(
            RunFolder,
            "set_status",
            lambda self, state, *rest: state == "running" and self.done == task,
        )

    return patch


def _final_written_not_listed():
    from cl_peft.runs import RunFolder

    _before(RunFolder, "_write_manifest", lambda self: self._manifest["final"] is not None)


def _final_half_written():
    from cl_peft import runs

    def second_table(path, data):
        return path.name == "predictions.parquet" and path.parent.parent.name != "tasks"

    _before(runs, "write_atomic", second_table)


def _finished_not_said():
    from cl_peft.runs import RunFolder

    _before(RunFolder, "set_status", lambda self, state, *rest: state == "finished")


def _finished_not_shown():
    from cl_peft import presentation

    _before(presentation, "write", lambda folder: True)


#: Moments at which a run can be killed, in the order in which they come.
MOMENTS = {
    "while task 1 trains": _training(1),
    "while task 2 trains": _training(2),
    "before the files of task 2 appear": _writing_task(2),
    "before task 2 is listed": _renamed_not_listed(2),
    "before the status after task 2": _listed_not_cleaned(2),
    "while task 3 trains": _training(3),
    "before task 5 is listed": _renamed_not_listed(5),
    "while the final files are written": _final_half_written,
    "before the final files are listed": _final_written_not_listed,
    "before the status says finished": _finished_not_said,
    "before the figure is drawn": _finished_not_shown,
}
