"""W&B as the mirror of a run. The run folder is the truth, so a lost mirror stops nothing."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import yaml

from cl_peft.config import Paths, public
from cl_peft.runs import RunFolder

log = logging.getLogger(__name__)

#: Metrics on the left are drawn over the axis on the right, which is logged in the same call.
AXES = {"train/*": "train/step", "eval/*": "task/idx"}
#: W&B cuts a longer table off without a word that a person would see.
MAX_TABLE_ROWS = 200_000
#: Entries of provenance.json that tell of the machine and the code, and stay in the run folder.
PRIVATE = ("command", "git_revision", "git_dirty", "platform", "cpus", "sessions")
#: Seconds that an unreachable server may cost when a run starts, and when it ends, unless W&B's own
#: variables WANDB_INIT_TIMEOUT and WANDB_FINISH_TIMEOUT say otherwise.
START_TIMEOUT, FINISH_TIMEOUT = 20.0, 120.0


class Tracker:
    """Tracks nothing: ``tracker=disabled``, and the interface of every tracker.

    The calls come in this order: :meth:`start`, then :meth:`log_training` and :meth:`log_task` for
    every task, then :meth:`finish`. None of them ever raises because of the tracker.
    """

    def start(self, run_id: str, group: str, config: dict[str, Any], folder: Path) -> None:
        """Open the mirror of a run, or continue it when the run is resumed.

        Args:
            run_id: Name of the run's folder.
            group: The sweep or experiment that the run belongs to.
            config: The whole resolved configuration as plain nested dicts.
            folder: The run folder; all that the tracker writes goes under it.
        """

    def log_training(self, task: int, step: int, values: dict[str, float]) -> None:
        """Log numbers of one training step.

        Args:
            task: Task being learned, from 1.
            step: Step counted over the whole run, which is the axis ``train/step``.
            values: Numbers by name, such as ``train/loss``.
        """

    def log_task(self, task: int, rows: list[dict[str, Any]]) -> None:
        """Log the results after one task.

        Args:
            task: Task just learned, from 1, which is the axis ``task/idx``.
            rows: Result rows of this ``after_task``, as in ``results.parquet``.
        """

    def finish(
        self,
        state: Literal["finished", "failed"],
        summary: dict[str, float],
        figures: dict[str, Path],
        tables: dict[str, pd.DataFrame],
    ) -> None:
        """Close the mirror.

        Args:
            state: How the run ended; ``failed`` closes with exit code 1.
            summary: Final numbers by name; undefined ones are left out.
            figures: Image files by name.
            tables: Long tables by name.
        """


class WandbTracker(Tracker):
    """Weights & Biases, offline by default; see ``conf/tracker/wandb.yaml`` for the keys.

    Series: ``train/...`` over ``train/step``; over ``task/idx`` the cells of the accuracy matrices
    as ``eval/<routing>/accuracy/task_03``, numbers over all seen tasks as
    ``eval/<routing>/<metric>``, and those that belong to no routing as ``eval/<metric>``.

    The W&B id is a hash of group and run id: a resumed run continues its own mirror. Of the machine
    nothing is sent: no host or user name, environment, code, git state, nor ``paths``; of absolute
    paths elsewhere in the configuration the last name. Two things are W&B's own, and stay: its
    telemetry (versions, kind of system), and its manifests of tables and of modules, which name the
    folder where each file lay; ``log_tables=False`` does without.
    """

    def __init__(
        self,
        mode: Literal["offline", "online", "disabled"] = "offline",
        project: str = "cl_peft",
        entity: str | None = None,
        tags: list[str] = [],  # noqa: B006 (a literal, read as the schema; copied below)
        job_type: str | None = None,
        log_tables: bool = True,
        log_modules: bool = False,
    ) -> None:
        self.mode = mode
        self.project = project
        self.entity = entity
        self.tags = list(tags)
        self.job_type = job_type
        self.log_tables = log_tables
        self.log_modules = log_modules
        self._run: Any = None
        self._off = True
        self._folder = Path()

    def start(self, run_id: str, group: str, config: dict[str, Any], folder: Path) -> None:
        """See :meth:`Tracker.start`. Online falls back to offline, with the reason as a warning."""
        if self.mode == "disabled":
            return
        self._folder = folder
        identity = {
            "id": hashlib.sha256(f"{group}/{run_id}".encode()).hexdigest()[:16],
            "name": run_id,
            "group": group,
            "job_type": self.job_type or config.get("learner", {}).get("name"),
            "config": public(config),
        }
        if self.mode == "online":
            self._off = False
            self._call("go online", "tracked offline", lambda: self._open("online", identity))
        if self._run is None:
            self._off = False
            self._call("start", "not tracked", lambda: self._open("offline", identity))

    def log_training(self, task: int, step: int, values: dict[str, float]) -> None:
        """See :meth:`Tracker.log_training`."""
        self._log(lambda: {"train/step": step, "train/task": task, **values})

    def log_task(self, task: int, rows: list[dict[str, Any]]) -> None:
        """See :meth:`Tracker.log_task`. Undefined values are left out, so curves show a gap."""

        def values() -> dict[str, float]:
            return {"task/idx": task, **_defined({_series(row): row["value"] for row in rows})}

        self._log(values)

    def finish(
        self,
        state: Literal["finished", "failed"],
        summary: dict[str, float],
        figures: dict[str, Path],
        tables: dict[str, pd.DataFrame],
    ) -> None:
        """See :meth:`Tracker.finish`. The run is closed even where logging had failed before."""
        if self._run is None:
            return
        run, code = self._run, int(state == "failed")
        if not self._off:
            self._call(
                "log the results",
                "no longer tracked",
                lambda: self._results(summary, figures, tables),
            )
        self._call("finish", "no longer tracked", lambda: run.finish(exit_code=code))
        self._run, self._off = None, True

    def _call(self, doing: str, then: str, call: Callable[[], object]) -> None:
        """Run everything that touches W&B; on any error warn once and switch the tracker off."""
        try:
            call()
        except Exception as error:
            if not self._off:
                reason = " ".join(str(error).split()) or type(error).__name__
                log.warning(
                    "W&B could not %s: %s. The run goes on, %s; its results are in %s.",
                    *(doing, reason.rstrip("."), then, self._folder),
                )
            self._off = True

    def _open(self, mode: Literal["offline", "online"], identity: dict[str, Any]) -> None:
        # Otherwise W&B reports on itself, offline too, and a run without network ends late.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb  # takes seconds, which a run without it does not pay

        settings = _settings(wandb)
        if mode == "online":
            # Asked here, because wandb.init would prompt at a terminal. An unreachable server
            # raises after 10 seconds.
            wandb.setup(settings=settings)
            if not wandb.login(prompt=False, verify=True):
                raise RuntimeError(
                    "no login for W&B on this machine (run `wandb login` or set WANDB_API_KEY)"
                )
        run = wandb.init(
            mode=mode,
            project=self.project,
            entity=self.entity,
            tags=self.tags,
            dir=str(self._folder),
            resume="allow" if mode == "online" else None,
            reinit="finish_previous",  # the default would hand out a crashed run's mirror again
            settings=settings,
            **identity,
        )
        self._run = run
        for series, axis in AXES.items():
            run.define_metric(axis)
            run.define_metric(series, step_metric=axis)

    def _log(self, values: Callable[[], dict[str, float]]) -> None:
        if not self._off:
            self._call("log", "no longer tracked", lambda: self._run.log(values()))

    def _results(
        self,
        summary: dict[str, float],
        figures: dict[str, Path],
        tables: dict[str, pd.DataFrame],
    ) -> None:
        import wandb

        self._run.summary.update(_defined(summary))
        for name, path in figures.items():
            self._run.log({f"figures/{name}": wandb.Image(str(path))})
        for name, table in tables.items() if self.log_tables else ():
            if len(table) > MAX_TABLE_ROWS:
                log.warning(
                    "W&B: table %s has %d rows, more than %d, and is kept in the run folder only.",
                    *(name, len(table), MAX_TABLE_ROWS),
                )
                continue
            plain = table.astype(object).where(table.notna(), None)
            content = wandb.Table(columns=[str(c) for c in table], data=plain.to_numpy().tolist())
            self._run.log({f"tables/{name}": content})
        if self.log_modules:
            self._run.log_artifact(self._modules(wandb))

    def _modules(self, wandb: Any) -> Any:  # noqa: ANN401 (the module is imported lazily)
        """Modules and heads of all tasks, as a run folder that can be loaded again.

        A backbone that was a local folder is named there, but does not go along.
        """
        about = {"tasks": len(list(self._folder.glob("tasks/*/module.safetensors")))}
        artifact = wandb.Artifact(f"modules-{self._run.id}", type="modules", metadata=about)
        for path in [
            self._folder / "stream.json",
            *sorted(self._folder.glob("tasks/*/*.safetensors")),
        ]:
            artifact.add_file(
                str(path), name=path.relative_to(self._folder).as_posix(), policy="immutable"
            )
        run = RunFolder(self._folder)
        run.look()
        config = yaml.safe_load(run.content("config.yaml"))
        facts = json.loads((self._folder / "provenance.json").read_text())
        kept = json.dumps({k: v for k, v in facts.items() if k not in PRIVATE}, indent=1)
        written = run.published({**public(config), "paths": Paths().model_dump()})
        for name, data in {**written, "provenance.json": kept.encode()}.items():
            with artifact.new_file(name, mode="wb") as file:
                file.write(data)
        return artifact


def _series(row: Mapping[str, Any]) -> str:
    """Name under which one result row is drawn."""
    parts = ["eval", row["routing"], row["metric"]]
    if row["routing"] == "none":
        parts.remove("none")
    if not pd.isna(row["eval_task"]):
        parts.append(f"task_{int(row['eval_task']):02d}")
    return "/".join(parts)


def _defined(values: Mapping[str, float]) -> dict[str, float]:
    return {name: float(value) for name, value in values.items() if not math.isnan(value)}


def _settings(wandb: Any) -> Any:  # noqa: ANN401 (the module is imported lazily)
    """Quiet, private and bounded in time, as far as the installed version knows the setting."""
    wanted = {
        "silent": True,
        "console": "off",
        "save_code": False,
        "disable_code": True,
        "disable_git": True,
        "disable_job_creation": True,
        "symlink": False,  # a run folder can be copied as it is
        "init_timeout": START_TIMEOUT,
        "finish_timeout": FINISH_TIMEOUT,
        "finish_timeout_raises": True,
        "program": "main.py",
        "host": "",
        "username": "",
        "email": "",
        "x_disable_stats": True,
        "x_disable_meta": True,
        "x_disable_machine_info": True,
        "x_disable_viewer": True,
        "x_save_requirements": False,
    }
    known = wandb.Settings.model_fields
    chosen = {
        key for key in ("init_timeout", "finish_timeout") if f"WANDB_{key.upper()}" in os.environ
    }
    return wandb.Settings(**{k: v for k, v in wanted.items() if k in known and k not in chosen})
