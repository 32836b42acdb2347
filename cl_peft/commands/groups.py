"""What is done with many runs: ``report``, ``compare``, ``status``, ``sync``, ``wandb-report``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from cl_peft.errors import DataError


def add(commands: Any) -> None:  # noqa: ANN401 (argparse names no public type for it)
    """Add the subcommands to the parser's."""
    report = commands.add_parser(
        "report",
        help="one self-contained page about a group of runs",
        description="Tables with intervals, figures, matrices, misrouted examples, differences in "
        "configuration, provenance: all in one file that needs no network.",
    )
    report.add_argument("folder", type=Path, help="group folder, runs/GROUP, or all of runs")
    report.add_argument(
        "-o", "--output", type=Path, help="file to write; default report.html in the folder"
    )
    report.add_argument(
        "--reference", metavar="LABEL", help="configuration to test others against; default best"
    )
    add_over(report)
    report.add_argument(
        "--examples", type=_count, default=200, help="misrouted examples per run; default 200"
    )
    report.add_argument(
        "--runs", type=_count, default=200, help="runs with matrices and examples; default 200"
    )
    report.set_defaults(run=_report)

    compare = commands.add_parser(
        "compare",
        help="two runs: configuration, numbers with intervals, changed examples",
        description="What was configured differently, what came out, which answers changed.",
    )
    compare.add_argument("a", type=Path, help="run folder, runs/GROUP/RUN")
    compare.add_argument("b", type=Path, help="another")
    compare.add_argument(
        "--after-task", type=int, metavar="TASK", help="from 1; default the latest that both have"
    )
    compare.add_argument(
        "--examples", type=_count, default=20, help="changed examples to list; default 20"
    )
    compare.set_defaults(run=_compare)

    status = commands.add_parser(
        "status",
        help="table of all runs of a group; exit code 0 if all finished, else 1",
        description="State, task reached, time, error and folder of every run of a group: a table "
        "at a terminal; else a line per run (run, state, task, seconds, routed accuracy in %, "
        "settings, error, separated by tabs, - where empty). Exit code 0 if all are finished, 1 if "
        "not, 2 if there is no such folder.",
    )
    status.add_argument("folder", type=Path, help="group folder, runs/GROUP")
    status.add_argument(
        "--watch", action="store_true", help="keep the table up to date until no run is going on"
    )
    status.add_argument(
        "--every", type=_seconds, default=2.0, metavar="SECONDS", help="with --watch; default 2"
    )
    status.add_argument(
        "--patience",
        type=_seconds,
        default=30.0,
        metavar="SECONDS",
        help="with --watch: how long no run may be going on, as between two jobs of a sweep, "
        "before it ends; default 30",
    )
    status.set_defaults(run=_status)

    sync = commands.add_parser(
        "sync",
        help="upload W&B runs that were tracked offline",
        description="Find offline W&B runs below a folder, at any depth, and give them to wandb "
        "sync. Runs going on, and those uploaded before, are left alone.",
    )
    sync.add_argument("folder", type=Path, help="runs, a group's folder or a run folder")
    sync.add_argument("--dry-run", action="store_true", help="list them and upload nothing")
    sync.add_argument("--entity", help="W&B user or team; default as the runs were tracked")
    sync.add_argument("--project", help="W&B project; default as the runs were tracked")
    sync.set_defaults(run=_sync)

    wandb = commands.add_parser(
        "wandb-report",
        help="a W&B report that compares the runs of a group",
        description="Build a report with panels for anytime accuracy, forgetting, the error "
        "decomposition and accuracy against parameters, and a run comparer. The runs must be in "
        "W&B: tracked online, or uploaded by cl-peft sync. Needs pip install 'cl_peft[report]'.",
    )
    wandb.add_argument("folder", type=Path, help="group folder, runs/GROUP")
    wandb.add_argument("--entity", required=True, help="W&B user or team")
    wandb.add_argument("--project", default="cl_peft", help="W&B project; default cl_peft")
    wandb.add_argument(
        "--dry-run", action="store_true", help="print the report as JSON; needs no account"
    )
    wandb.set_defaults(run=_wandb_report)


def _report(options: argparse.Namespace) -> int:
    from analysis.report import write_report

    target = options.output or options.folder / "report.html"
    require_folder(options.folder)
    if target.is_dir():
        raise DataError(f"{target} is a folder; give -o a file, such as {target / 'report.html'}.")
    print(
        write_report(
            options.folder,
            target,
            reference=options.reference,
            over=options.over,
            examples=options.examples,
            most=options.runs,
        )
    )
    return 0


def _compare(options: argparse.Namespace) -> int:
    from analysis.compare import compare_runs

    for folder in (options.a, options.b):
        if not (folder / "config.yaml").exists():
            raise DataError(f"{folder} is no run folder: it has no config.yaml.")
    found = compare_runs(options.a, options.b, after_task=options.after_task)
    print(found.to_text(most=options.examples), end="")
    return 0


def _status(options: argparse.Namespace) -> int:
    from cl_peft.commands.status import show, watch

    require_folder(options.folder)
    if options.watch:
        table = watch(options.folder, every=options.every, patience=options.patience)
    else:
        table = show(options.folder)
    if not len(table):
        print(f"no run in {options.folder}; give a group's folder, runs/GROUP", file=sys.stderr)
    return int(not len(table) or not bool((table["state"] == "finished").all()))


def _sync(options: argparse.Namespace) -> int:
    from cl_peft.sync import find, listing, upload

    found = find(options.folder)
    print(listing(options.folder, found))
    if options.dry_run:
        return 0
    return upload(found, entity=options.entity, project=options.project)


def _wandb_report(options: argparse.Namespace) -> int:
    from analysis.report_wandb import build, save, specification

    where = {"entity": options.entity, "project": options.project}
    report = build(options.folder, **where, offline=options.dry_run)
    print(specification(report) if options.dry_run else save(report))
    return 0


def add_over(parser: argparse.ArgumentParser) -> None:
    """Let a key count as a seed."""
    parser.add_argument(
        "--over",
        metavar="KEY",
        help="a key whose values count as seeds, so that means and tests are over them: "
        "stream.sample, say",
    )


def require_folder(folder: Path) -> None:
    """Refuse what is no folder.

    Raises:
        DataError: It is none.
    """
    if not folder.is_dir():
        raise DataError(f"There is no folder {folder}; give a group's, runs/GROUP.")


def _count(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is below 0")
    return value


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is no number of seconds")
    return value
