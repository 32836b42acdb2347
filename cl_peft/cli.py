"""The ``cl-peft`` command: what is done before runs, and with runs after they have run.

Runs themselves are started by ``python main.py``. Nothing here imports torch before it needs it.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from cl_peft.commands import cache, groups, paper
from cl_peft.errors import DataError, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from cl_peft.loading import LoadedRun


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns 0, or 2 with a message when something is wrong."""
    options = _parser().parse_args(arguments)
    with _plain_warnings():
        try:
            code = int(options.run(options))
            sys.stdout.flush()
            return code
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        except BrokenPipeError:  # who reads has enough: what is left is written nowhere
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1


@contextmanager
def _plain_warnings() -> Iterator[None]:
    """Show what is warned of as a line on stderr, each text once, without the code's place."""
    shown: set[str] = set()

    def show(message: Warning | str, *place: object, **more: object) -> None:
        text = " ".join(str(message).split())
        if text not in shown:
            shown.add(text)
            print(f"warning: {text}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = show
        yield


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="cl-peft", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    export = commands.add_parser(
        "export",
        help="modules of a run as Hugging Face peft adapters",
        description="Write a run's LoRA, DoRA, prompt or prefix modules as folders that "
        "PeftModel.from_pretrained reads, each with its head beside it.",
    )
    _add_run(export)
    export.add_argument("target", type=Path, help="folder to write; one task_NNN below it per task")
    export.add_argument("--task", type=int, action="append", help="task from 1; default all")
    export.add_argument(
        "--classifier",
        action="store_true",
        help="for transformers' classification model of the backbone's kind, with the head inside; "
        "refused where that computes something else",
    )
    export.set_defaults(run=_export)

    read = commands.add_parser(
        "import",
        help="a peft LoRA or DoRA folder as a module for a backbone",
        description="Check a peft adapter against a backbone, say what it is, and write it as one "
        "file that cl_peft.modules.huggingface.read_module turns into a bank and a module.",
    )
    read.add_argument("adapter", type=Path, help="folder with adapter_config.json")
    read.add_argument(
        "target", type=Path, nargs="?", help="module.safetensors to write; only checked if left out"
    )
    backbone = read.add_mutually_exclusive_group(required=True)
    backbone.add_argument("--run-folder", type=Path, help="run whose backbone it is for")
    backbone.add_argument("--backbone", help="Hugging Face name, local folder or package address")
    read.add_argument(
        "--without-head",
        action="store_true",
        help="leave out a head that was trained with the adapter (modules_to_save)",
    )
    read.set_defaults(run=_import)

    card = commands.add_parser(
        "card",
        help="a run's bank as a folder in hub layout: model card, adapters, router",
        description="Write README.md, adapters/task_NNN and run/, which load_run reads.",
    )
    _add_run(card)
    card.add_argument("target", type=Path, help="folder to write; must not exist, or be empty")
    card.add_argument(
        "--push-to",
        metavar="OWNER/NAME",
        help="also upload it to this repository of the Hugging Face hub; a new one is private",
    )
    card.set_defaults(run=_card)

    prepare = commands.add_parser(
        "prepare",
        help="fetch and check what a run needs, before it runs without network",
        description="Compose and check a configuration as python main.py would, and fetch its data "
        "and its model into paths.cache. Exit code 0: the run needs no network.",
    )
    prepare.add_argument(
        "overrides", nargs="*", metavar="OVERRIDE", help="as for main.py: experiment=clinc150"
    )
    prepare.set_defaults(run=_prepare)

    cache.add(commands)
    groups.add(commands)
    paper.add(commands)
    return parser


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, help="run folder, runs/GROUP/RUN")


def _load(folder: Path) -> LoadedRun:
    from cl_peft.console import Console
    from cl_peft.experiment import downloading
    from cl_peft.loading import load_run

    with downloading(Console(), "model") as progress:
        return load_run(folder, progress=progress)


def _export(options: argparse.Namespace) -> int:
    from cl_peft.modules.huggingface import export_task

    run = _load(options.folder)
    base_model = str(run.config["backbone"]["name"])
    for task in _known(run, options.task):
        target = options.target / f"task_{task:03d}"
        export_task(run, task, target, base_model=base_model, classifier=options.classifier)
        print(target)
    return 0


def _known(run: LoadedRun, tasks: list[int] | None) -> list[int]:
    """The tasks asked for, all of which the run must have, before anything is written."""
    for task in tasks or []:
        if task not in run.rows:
            known = ", ".join(map(str, sorted(run.rows)))
            raise DataError(f"--task {task}: {run.folder} has modules of task {known}.")
    return tasks or sorted(run.rows)


def _import(options: argparse.Namespace) -> int:
    from cl_peft.modules.huggingface import import_adapter, same_kind, write_module

    run = None if options.run_folder is None else _load(options.run_folder)
    model = _model(options.backbone) if run is None else run.backbone.model
    bank, module, node = import_adapter(options.adapter, model, without_head=options.without_head)
    size = sum(t.numel() for params in module.values() for t in params.values())
    kind, where = type(bank.method).__name__, options.target or options.adapter
    if options.target is not None:
        write_module(options.target, node, module)
    print(f"{where}: {kind} on {len(bank.sites)} layers, {size:,} parameters")
    if run is not None and same_kind(bank, run.bank):
        print("It can join the run's own bank.")
    elif run is not None:
        print("It needs a bank of its own: its layers, ranks or scales are not the run's.")
    return 0


def _model(name: str) -> PreTrainedModel:
    from cl_peft.backbones.base import load_model, pretrained
    from cl_peft.config import Paths
    from cl_peft.console import Console
    from cl_peft.experiment import downloading

    cache = Path(Paths().cache).expanduser()
    with (
        downloading(Console(), "model") as progress,
        pretrained(name, None, cache, progress) as (where, options),
    ):
        return load_model(where, options)


def _card(options: argparse.Namespace) -> int:
    from cl_peft.card import check_repository, push, write_card

    if options.push_to is not None:
        check_repository(options.push_to)
    print(write_card(_load(options.folder), options.target))
    if options.push_to is not None:
        print(push(options.target, options.push_to))
    return 0


def _prepare(options: argparse.Namespace) -> int:
    from cl_peft.console import Console
    from cl_peft.prepare import prepare

    print("\n".join(prepare(options.overrides, Console())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
