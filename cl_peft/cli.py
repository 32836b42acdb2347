"""The ``cl-peft`` command: what is done with runs after they have run.

Runs themselves are started by ``python main.py``. Nothing here imports torch before it needs it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from cl_peft.errors import DataError, UserError


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns 0, or 2 with a message when something is wrong."""
    options = _parser().parse_args(arguments)
    try:
        return int(options.run(options))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="cl-peft", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    export = commands.add_parser("export", help="modules of a run as Hugging Face peft adapters")
    export.add_argument("folder", type=Path, help="run folder, runs/GROUP/RUN")
    export.add_argument("target", type=Path, help="folder to write; one task_NNN below it per task")
    export.add_argument("--task", type=int, action="append", help="task from 1; default all")
    export.set_defaults(run=_export)

    read = commands.add_parser(
        "import", help="a peft LoRA or DoRA folder as a module of a run's kind"
    )
    read.add_argument("adapter", type=Path, help="folder with adapter_config.json")
    read.add_argument("target", type=Path, help="module.safetensors to write")
    read.add_argument("--run-folder", type=Path, required=True, help="run whose backbone it is for")
    read.set_defaults(run=_import)

    status = commands.add_parser("status", help="table of all runs of a group")
    status.add_argument("folder", type=Path, help="group folder, runs/GROUP")
    status.set_defaults(run=_status)
    return parser


def _export(options: argparse.Namespace) -> int:
    from cl_peft.loading import load_run
    from cl_peft.modules.huggingface import export

    run = load_run(options.folder)
    tasks = options.task or sorted(run.rows)
    for task in tasks:
        if task not in run.rows:
            known = ", ".join(map(str, sorted(run.rows)))
            raise DataError(f"--task {task}: {options.folder} has modules of task {known}.")
    for task in tasks:
        folder = export(
            run.bank,
            run.rows[task],
            options.target / f"task_{task:03d}",
            base_model=str(run.config["backbone"]["name"]),
            head=run.heads[task],
            class_names=dict(enumerate(run.class_names)),
        )
        print(folder)
    return 0


def _import(options: argparse.Namespace) -> int:
    from safetensors.torch import save

    from cl_peft.atomic import write_atomic
    from cl_peft.loading import load_run
    from cl_peft.modules.bank import flatten
    from cl_peft.modules.huggingface import import_adapter

    run = load_run(options.run_folder)
    run.bank.close()
    bank, module = import_adapter(options.adapter, run.backbone.model)
    tensors = {name: tensor.contiguous() for name, tensor in flatten(module).items()}
    kind = type(bank.method).__name__
    write_atomic(
        options.target, save(tensors, {"module": json.dumps(bank.method.peft_config(bank.sites))})
    )
    size = sum(t.numel() for t in tensors.values())
    print(f"{options.target}: {kind} on {len(bank.sites)} layers, {size:,} parameters")
    return 0


def _status(options: argparse.Namespace) -> int:
    from cl_peft.console import Console
    from cl_peft.view import sweep_status

    if not options.folder.is_dir():
        raise DataError(f"There is no folder {options.folder}; give a group's, runs/GROUP.")
    Console().status(options.folder)
    table = sweep_status(options.folder)
    return int(not len(table) or not bool((table["state"] == "finished").all()))


if __name__ == "__main__":
    sys.exit(main())
