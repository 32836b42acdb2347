"""``cl-peft table`` and ``cl-peft figures``: what goes into a paper, out of a group of runs."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cl_peft.atomic import disk_error, write_atomic
from cl_peft.commands.groups import add_over, require_folder
from cl_peft.errors import DataError

if TYPE_CHECKING:
    from analysis.report_data import Sweep

#: Characters of a figure's file name: even of three bytes each, file systems take them.
LONGEST = 80


def add(commands: Any) -> None:  # noqa: ANN401 (argparse names no public type for it)
    """Add the subcommands to the parser's."""
    table = commands.add_parser(
        "table",
        help="configurations against metrics, as Markdown, LaTeX or CSV",
        description="Mean over seeds with 95 % intervals; best in bold, second underlined, and a "
        "dagger where a paired test with Holm's correction tells from the best. Several streams "
        "are never pooled: marks are within each, and the notes rank configurations over them.",
    )
    table.add_argument("folder", type=Path, help="group folder, runs/GROUP, or all of runs")
    table.add_argument(
        "--metrics",
        nargs="+",
        metavar="METRIC",
        help="columns, such as average_accuracy_routed; a wrong one is answered with all names",
    )
    table.add_argument("--format", choices=["markdown", "latex", "csv"], default="markdown")
    table.add_argument(
        "--reference", metavar="LABEL", help="configuration to test others against; default best"
    )
    table.add_argument(
        "--caption", metavar="TEXT", help="with --format latex: a table environment with the notes"
    )
    add_over(table)
    table.add_argument("-o", "--output", type=Path, help="file to write; default the terminal")
    table.set_defaults(run=_table)

    figures = commands.add_parser(
        "figures",
        help="every figure that a group of runs allows, as files",
        description="Sweep overview, anytime accuracy, stability and plasticity, accuracy against "
        "parameters, critical difference, and forgetting per task.",
    )
    figures.add_argument("folder", type=Path, help="group folder, runs/GROUP, or all of runs")
    figures.add_argument("-o", "--output", type=Path, required=True, help="folder to write into")
    add_over(figures)
    figures.add_argument("--format", choices=["pdf", "svg", "png"], default="pdf")
    figures.set_defaults(run=_figures)


def _table(options: argparse.Namespace) -> int:
    from analysis.paper import DEFAULT_METRICS, paper_table

    if options.caption is not None and options.format != "latex":
        raise DataError("--caption is of --format latex; Markdown and CSV have none.")
    metrics = options.metrics or DEFAULT_METRICS
    frame = _sweep(options).finished
    found = paper_table(frame, metric=metrics, reference=options.reference)
    if options.format == "latex":
        text = found.to_latex(caption=options.caption)
    else:
        text = found.to_markdown() if options.format == "markdown" else found.to_csv()
    if options.output is None:
        print(text, end="" if text.endswith("\n") else "\n")
    else:
        write_atomic(options.output, text.encode())
        print(options.output)
    return 0


def _figures(options: argparse.Namespace) -> int:
    from analysis import figures
    from analysis.report_figures import plan

    drawn: set[Path] = set()
    for picture in plan(_sweep(options)):
        path = options.output / f"{_name(picture.title)}.{options.format}"
        if path in drawn:  # titles of configurations that differ in signs alone
            path = path.with_name(f"{path.stem}_{len(drawn)}{path.suffix}")
        try:
            print(figures.save(picture.draw(), path))
            drawn.add(path)
        except DataError as error:
            print(f"not drawn: {picture.title}: {error}")
        except OSError as error:
            raise disk_error(error, path, 0) from error
    return int(not drawn)


def _name(title: str) -> str:
    """A title as a file name, cut to what every file system takes."""
    return re.sub(r"\W+", "_", title.lower()).strip("_")[:LONGEST]


def _sweep(options: argparse.Namespace) -> Sweep:
    from analysis.report_data import gather

    folder = options.folder
    require_folder(folder)
    sweep = gather(folder, options.over)
    if sweep.finished.empty:
        raise DataError(f"No run in {folder} is finished yet; cl-peft status {folder} shows them.")
    return sweep
