"""The story of a run, in one function.

A stream delivers tasks, a learner grows modules, a router chooses among them, everything is
measured and lands in the run folder.
"""

from __future__ import annotations

import io
import json
import logging
import time
from collections.abc import Iterator, Mapping
from typing import Any

import pandas as pd

from cl_peft import inputs, presentation
from cl_peft.config import Seeds, build, run_id, split_stream
from cl_peft.console import Console
from cl_peft.errors import DataError
from cl_peft.runs import RunFolder
from cl_peft.streams.base import Stream, Task, content_id
from cl_peft.streams.protocol import make_stream
from cl_peft.world import World, cache_folder, downloading, task_timing

log = logging.getLogger(__name__)


def run_experiment(config: Mapping[str, Any], folder: RunFolder, console: Console) -> float:
    """Run, or go on with, one configuration.

    Args:
        config: As returned by :func:`cl_peft.config.validate`.
        folder: An opened run folder whose lock is held.
        console: Where progress is shown.

    Returns:
        Final routed average accuracy.

    Raises:
        UserError: Something the user can fix; the folder can be resumed.
    """
    folder.claim(config)
    files = inputs.file_digests(inputs.local_files(config))  # as they are before they are read
    stream = load_stream(config, console)
    if not folder.done:
        folder.begin(config, describe(stream))
    folder.set_status("running", len(stream.tasks))
    world = World.build(config, stream, console)
    folder.provenance({**world.facts(), "files": files})
    tracker = world.learner.tools.tracker
    tracker.start(run_id(config), config["group"], dict(config), folder.path)
    try:
        world.check_room()
        world.resume(folder)
        if folder.done:  # the process that committed it may have died before it said so
            name = f"tasks/{folder.done:03d}/results.parquet"
            tracker.log_task(folder.done, _records(pd.read_parquet(folder.read(name))))
        world.prefetch()
        for task in _counted(stream, folder.done, console):
            started = time.perf_counter()
            reused = world.learn(task)
            learned = time.perf_counter()
            world.fit_router(task)
            fitted = time.perf_counter()
            results = world.evaluator.after(task, world.costs(task))
            evaluated = time.perf_counter()
            timing = {
                "task": task.index + 1,
                "learn": round(learned - started, 3),
                "route": round(fitted - learned, 3),
                "evaluate": round(evaluated - fitted, 3),
                "passes": results.passes,
                "features": world.asked_features(task),
                "reused": reused,
                **world.choosing(),
                **world.training(),
            }
            folder.commit(
                task.index,
                {
                    **world.tensors(task),
                    "results.parquet": _parquet(results.rows),
                    "predictions.parquet": _parquet(results.predictions),
                    "memo.parquet": _parquet(results.memo),
                    "timing.json": json.dumps(timing).encode(),
                },
                len(stream.tasks),
            )
            log.info("task %d/%d finished: %s", task.index + 1, len(stream.tasks), timing)
            tracker.log_task(task.index + 1, _records(results.rows))
            presentation.task_line(console, results.rows, len(stream.tasks), learned - started)
        world.check_backbone()
        finish(folder, stream)
    except BaseException:
        tracker.finish("failed", {}, {}, {})
        raise
    final = presentation.write(folder.path)
    tracker.finish("finished", final.summary, final.figures, final.tables)
    return final.score


def _counted(stream: Stream, done: int, console: Console) -> Iterator[Task]:
    """The tasks that remain, under a progress bar."""
    with console.bar(f"stream {stream.name}", total=len(stream.tasks)) as bar:
        bar.advance(done)
        for task in stream.after(done):
            yield task
            bar.advance()


def load_stream(config: Mapping[str, Any], console: Console) -> Stream:
    """Read the source and cut it into tasks; before any model is fetched."""
    protocol, source = split_stream(config["stream"])
    seed = Seeds(**config["seed"])
    with downloading(console, "data") as download:
        raw = build({**source, "name": protocol.name}).load(cache_folder(config), download)
    stream = make_stream(raw, protocol, order_seed=seed.order, data_seed=seed.data)
    unheld = [task.name for task in stream.tasks if not len(task.validation)]
    if unheld and config["trainer"].get("patience") is not None:
        raise DataError(
            f"trainer.patience stops on validation accuracy, but {unheld[0]} of stream="
            f"{protocol.name} has no validation example. Raise stream.validation_share or "
            "stream.shots, or set trainer.patience=null."
        )
    twice = tested_on_training(stream)
    if twice:
        log.warning(
            "%d of the test examples of stream=%s are training examples as well (the same "
            "content): accuracy is flattered by up to as many",
            *(twice, protocol.name),
        )
    sizes = [sum(len(getattr(t, s)) for t in stream.tasks) for s in ("train", "validation", "test")]
    console.message(
        f"stream {stream.name}: {len(stream.tasks)} tasks, {len(stream.class_names)} classes, "
        f"{sizes[0]} training, {sizes[1]} validation and {sizes[2]} test examples"
    )
    return stream


def tested_on_training(stream: Stream) -> int:
    """Number of test examples whose content some task trains on, whatever their label."""
    trained = {content_id(item) for task in stream.tasks for item in task.train.inputs}
    return sum(content_id(item) in trained for task in stream.tasks for item in task.test.inputs)


def finish(folder: RunFolder, stream: Stream) -> None:
    """Join the tasks' tables into the run's."""
    names = [f"tasks/{task.index + 1:03d}" for task in stream.tasks]
    tables = {
        name: _parquet(
            pd.concat(
                [pd.read_parquet(folder.read(f"{n}/{name}")) for n in names], ignore_index=True
            )
        )
        for name in ("results.parquet", "predictions.parquet")
    }
    timings = [task_timing(folder, task.index) for task in stream.tasks]
    total = sum(t["learn"] + t["route"] + t["evaluate"] for t in timings)
    timing = {"total_seconds": round(total, 3), "tasks": timings}
    tables["timing.json"] = (json.dumps(timing, indent=1) + "\n").encode()
    folder.finish(tables, len(stream.tasks))


def describe(stream: Stream) -> dict[str, Any]:
    """The stream as stream.json has it: enough to name predictions without the data."""
    tasks = [
        {
            "task": t.index + 1,
            "name": t.name,
            "classes": list(t.classes),
            **({"borrowed": list(t.borrowed)} if t.borrowed else {}),
            "train": len(t.train),
            "validation": len(t.validation),
            "test": len(t.test),
            "test_digest": stream.test_digest(t),
        }
        for t in stream.tasks
    ]
    return {
        "name": stream.name,
        "scenario": stream.scenario,
        "class_names": list(stream.class_names),
        "fingerprint": stream.fingerprint,
        "tasks": tasks,
    }


def _records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    return [{str(k): v for k, v in row.items()} for row in frame.to_dict("records")]


def _parquet(frame: pd.DataFrame) -> bytes:
    buffer = io.BytesIO()
    frame.to_parquet(buffer, index=False)
    return buffer.getvalue()
