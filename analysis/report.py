"""One self-contained page about a sweep: tables, figures, matrices, misrouted examples.

    analysis.report.write_report("runs/newsgroups", "report.html")

The page loads nothing: styles, script, figures and data are inside, and its content security policy
forbids every request and every script but its own. Tables and figures are plain HTML and SVG; only
the matrices and examples of single runs need JavaScript. Equal run folders give equal pages.
"""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.directions import heading
from analysis.paper import PaperTable, paper_table
from analysis.report_data import (
    Sweep,
    as_json,
    configuration,
    first_line,
    gather,
    overview,
    payload,
    provenance,
    seeds,
)
from analysis.report_figures import pictures
from analysis.tables import summary
from cl_peft.atomic import write_atomic
from cl_peft.errors import DataError
from cl_peft.view import duration, percent

EXAMPLES, MOST_RUNS, SHOWN_PROBLEMS = 200, 200, 10
TABLES = {
    "Accuracy and forgetting": (
        "average_accuracy_oracle",
        "average_accuracy_routed",
        "average_incremental_accuracy_routed",
        "learning_accuracy_routed",
        "forgetting_routed",
        "backward_transfer_routed",
    ),
    "Where errors come from": (
        "router_accuracy",
        "routing_loss",
        "misroute_luck",
        "forgetting_module_drift",
        "forgetting_routing_drift",
    ),
    "Size": ("trainable_parameters", "stored_parameters", "router_parameters"),
}
COSTS = TABLES["Size"]
#: Numbers in the table of runs: heading, column.
RUN_NUMBERS = (
    ("oracle, %", "average_accuracy_oracle"),
    ("routed, %", "average_accuracy_routed"),
    ("router, %", "router_accuracy"),
    ("forgetting, %", "forgetting_routed"),
)


def write_report(
    folder: str | Path,
    target: str | Path,
    *,
    reference: str | None = None,
    over: str | None = None,
    examples: int = EXAMPLES,
    most: int = MOST_RUNS,
) -> Path:
    """Write the page; an older one is replaced as a whole.

    Args:
        folder: As :func:`render`.
        target: The file.
        reference: As :func:`render`.
        over: As :func:`render`.
        examples: As :func:`render`.
        most: As :func:`render`.

    Returns:
        The file.

    Raises:
        DataError: As :func:`render`.
        UserError: The page cannot be written.
    """
    path = Path(target)
    page = render(folder, reference=reference, over=over, examples=examples, most=most)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, page.encode())
    return path


def render(
    folder: str | Path,
    *,
    reference: str | None = None,
    over: str | None = None,
    examples: int = EXAMPLES,
    most: int = MOST_RUNS,
) -> str:
    """The page as text.

    Args:
        folder: Folder of runs, at any depth below it; usually a group's.
        reference: Label of the configuration that others are tested against, as in
            :func:`analysis.paper_table`; None is the best of each column.
        over: A key whose values count as seeds; see :func:`analysis.seeds.as_seed`.
        examples: Misrouted examples per run, the most certain mistakes first.
        most: Runs with matrices and examples; all runs are in the tables.

    Raises:
        DataError: No such folder, no run in it, or no configuration of that label.
    """
    sweep = gather(folder, over)
    runs = overview(sweep)
    data = payload(sweep, runs, examples=examples, most=most)
    sections = [
        ("results", "Results", _results(sweep, reference)),
        ("figures", "Figures", _figures(sweep)),
        ("run", "A single run", _drill_down(data, examples)),
        ("runs", "All runs", _runs(sweep, runs)),
        ("configuration", "Configuration", _configuration(sweep)),
        ("provenance", "Provenance", _provenance(sweep)),
    ]
    body = _summary(sweep, runs) + "".join(
        f'<section id="{name}"><h2>{title}</h2>{content}</section>\n'
        for name, title, content in sections
    )
    links = "".join(f'<a href="#{name}">{title}</a>' for name, title, _ in sections)
    style, script = (_resource(name) for name in ("report.css", "report.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; "
        "base-uri 'none'; form-action 'none'"
    )
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(sweep.name)}: report</title>\n<style>\n{style}</style>\n</head>\n<body>\n"
        f'<header><h1>{escape(sweep.name)}</h1><nav aria-label="Sections">{links}</nav></header>\n'
        f"<main>\n{body}</main>\n"
        f'<script type="application/json" id="data">{as_json(data)}</script>\n'
        f"<script>{script}</script>\n</body>\n</html>\n"
    )


# ---------------------------------------------------------------- sections


def _summary(sweep: Sweep, runs: pd.DataFrame) -> str:
    table = sweep.table
    states = table["state"].value_counts()
    streams = sorted({str(name) for name in table["stream"].dropna()})
    tasks = sorted({int(n) for n in table["tasks"].dropna() if n})
    facts = [
        ("runs", str(len(table))),
        *((str(state), str(count)) for state, count in states.items()),
        ("configurations", str(runs["label"].nunique())),
        ("seeds", str(len({seeds(row) for row in table.to_dict("records")}))),
        ("stream" if len(streams) == 1 else "streams", ", ".join(streams) or "unknown"),
        ("tasks", " or ".join(map(str, tasks)) or "unknown"),
    ]
    cards = "".join(f"<div><dt>{escape(n)}</dt><dd>{escape(v)}</dd></div>" for n, v in facts)
    return f'<dl class="cards" id="summary">{cards}</dl>\n{_problems(sweep)}'


def _problems(sweep: Sweep) -> str:
    if not sweep.problems:
        return ""
    items = [f"<li>{escape(text)}</li>" for text in sweep.problems]
    rest = ""
    if len(items) > SHOWN_PROBLEMS:
        rest = (
            f"<details><summary>and {len(items) - SHOWN_PROBLEMS} more</summary>"
            f"<ul>{''.join(items[SHOWN_PROBLEMS:])}</ul></details>"
        )
    return (
        '<div class="problems" id="problems"><h2>Left out</h2>'
        f"<ul>{''.join(items[:SHOWN_PROBLEMS])}</ul>{rest}</div>\n"
    )


def _results(sweep: Sweep, reference: str | None) -> str:
    frame = sweep.finished
    if frame.empty:
        return "<p>No run is finished, so there are no final numbers yet.</p>"
    known = set(summary(frame).columns) | set(COSTS)
    parts = []
    for title, metrics in TABLES.items():
        metrics = tuple(name for name in metrics if name in known)
        try:
            table = paper_table(frame, metric=metrics, reference=reference, interval="range")
        except DataError as error:
            if reference is not None and repr(reference) in str(error):
                raise
            parts.append(f'<p class="note">{escape(title)}: {escape(str(error))}</p>')
            continue
        parts.append(_paper(title, table))
    return "".join(parts)


def _paper(title: str, table: PaperTable) -> str:
    head = [str(column) for column in table.rows.columns]
    heads = [f"<th>{escape(text)}</th>" for text in head]
    heads += [f'<th class="number">{escape(heading(metric))}</th>' for metric in table.metrics]
    rows = []
    for k, names in enumerate(table.rows.itertuples(index=False)):
        cells = [f"<th>{escape(_name(name))}</th>" for name in names]
        mine = table.cells[table.cells["row"] == k].set_index("metric").to_dict("index")
        for metric in table.metrics:
            cell = mine[metric]
            kind = ("", " best", " second")[int(cell["rank"])]
            mark = '<span class="mark">†</span>' if cell["significant"] else ""
            hint = f"n = {int(cell['n'])}"
            if not pd.isna(cell["p_holm"]):
                hint += f", p = {cell['p_holm']:.2g} after Holm"
            number, _, ends = cell["text"].partition(" [")
            text = f'<span class="estimate">{escape(number) or "–"}</span>{mark}'
            if ends and (metric not in COSTS or cell["low"] < cell["high"]):
                text += f' <span class="ends">[{escape(ends)}</span>'
            cells.append(f'<td class="number{kind}" title="{hint}">{text}</td>')
        rows.append(f"<tr>{''.join(cells)}</tr>")
    texts = {"LaTeX": table.to_latex(caption=title), "CSV": table.to_csv()}
    sources = "".join(
        f"<details><summary>{kind}</summary><pre>{escape(text)}</pre></details>"
        for kind, text in texts.items()
    )
    notes = escape(" ".join(table.notes))
    body = f"<thead><tr>{''.join(heads)}</tr></thead><tbody>{''.join(rows)}</tbody>"
    return (
        f'<h3>{escape(title)}</h3><div class="scroll"><table class="paper">{body}</table></div>'
        f'<p class="note">{notes}</p><div class="sources">{sources}</div>'
    )


def _figures(sweep: Sweep) -> str:
    drawn, missing = [], []
    for picture in pictures(sweep):
        if not picture.svg:
            missing.append(f"<li>{escape(picture.title)}: {escape(picture.why)}</li>")
            continue
        drawn.append(
            f"<figure><figcaption><b>{escape(picture.title)}.</b> {escape(picture.caption)}"
            f'</figcaption><div class="paper-white">{picture.svg}</div></figure>'
        )
    if not drawn and not missing:
        return "<p>No run is finished, so there is nothing to draw yet.</p>"
    rest = (
        f'<p class="note">Not drawn:</p><ul class="note">{"".join(missing)}</ul>' if missing else ""
    )
    return f'<div class="figures">{"".join(drawn)}</div>{rest}'


def _drill_down(data: Mapping[str, Any], examples: int) -> str:
    left_out = data["left_out"]
    note = (
        f" The first {len(data['runs'])} runs; {left_out} more are in the table below only."
        if left_out
        else ""
    )
    return (
        '<p class="note">Point at a cell, or tap it, for its counts. In "routed to", a click on a '
        f"cell lists those examples. At most {examples} misrouted examples per run are kept here, "
        f"the most certain mistakes first; texts stay in the stream's source, at the row given."
        f"{note}</p>"
        "<noscript><p>Matrices and examples need JavaScript; tables and figures do not.</p>"
        '</noscript><div id="explorer"></div>'
    )


def _runs(sweep: Sweep, runs: pd.DataFrame) -> str:
    several = sweep.table["group"].nunique() > 1
    heads = ["run", "configuration", "seeds", "state", "tasks", "time"]
    numbers = [(name, column) for name, column in RUN_NUMBERS if column in runs.columns]
    rows = []
    for row in runs.to_dict("records"):
        done, total, seconds = (
            math.nan if pd.isna(row[name]) else float(row[name])
            for name in ("learned", "tasks", "seconds")
        )
        progress = f"{done or 0:.0f}/{total:.0f}".replace("nan", "?")
        name = f"{row['group']}/{row['run']}" if several else str(row["run"])
        state = str(row["state"])
        texts = [
            (f"{row['group']}/{row['run']}", f'<a class="pick" href="#run">{escape(name)}</a>'),
            (row["label"], escape(str(row["label"]) or "–")),
            (seeds(row), seeds(row)),
            (state, f'<span class="state {escape(state)}">{escape(state)}</span>'),
            (done, progress),
            (seconds, duration(seconds)),
            *((row[column], percent(float(row[column]), "–")) for _, column in numbers),
        ]
        cells = "".join(
            f'<td data-sort="{escape(str(sort))}"{_number_class(k)}>{text}</td>'
            for k, (sort, text) in enumerate(texts)
        )
        error = first_line(row["error"])
        if error:
            cells = cells.replace("</td>", f'<div class="error">{escape(error)}</div></td>', 1)
        rows.append(f"<tr>{cells}</tr>")
    heads += [name for name, _ in numbers]
    head = "".join(f"<th{_number_class(k)}>{escape(name)}</th>" for k, name in enumerate(heads))
    return (
        '<p class="note">Numbers are over all tasks that the run has learned so far. A click on a '
        'heading sorts; a run opens above.</p><div class="scroll tall"><table id="run-table" '
        f'class="sortable"><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
    )


def _number_class(k: int) -> str:
    return ' class="number"' if k >= 4 else ""


def _configuration(sweep: Sweep) -> str:
    differ, common = configuration(sweep)
    many = (
        _values(differ, len(sweep.table), "key")
        if differ
        else "<p>All runs have the same configuration.</p>"
    )
    shared = _table(("key", "value"), ((escape(k), escape(v)) for k, v in common.items()))
    return (
        '<p class="note">Keys in which the runs differ; a key that another one already decides is '
        f'left out.</p>{many}<details id="common"><summary>What all runs have in common '
        f"({len(common)} keys)</summary>{shared}</details>"
    )


def _provenance(sweep: Sweep) -> str:
    facts = provenance(sweep)
    if not facts:
        return "<p>No run says where it comes from.</p>"
    dirty = any(value == "True" or value == "true" for key, values in facts.items()
                if key.endswith("dirty") for value in values)  # fmt: skip
    warning = (
        '<p class="note">Some runs were made with uncommitted changes: their revision does not '
        "say everything.</p>"
        if dirty
        else ""
    )
    return warning + _values(facts, len(sweep.table), "fact")


# ---------------------------------------------------------------- pieces


def _values(facts: Mapping[str, Mapping[str, Sequence[str]]], total: int, head: str) -> str:
    """A table of key, value and the number of runs; which ones, on request."""
    rows = []
    for key, values in facts.items():
        for k, (value, runs) in enumerate(values.items()):
            if len(runs) == total:
                who = f"all {total}" if total > 1 else "1"
            else:
                names = "<br>".join(map(escape, runs))
                who = f"<details><summary>{len(runs)}</summary>{names}</details>"
            rows.append((escape(key) if not k else "", escape(value), who))
    return _table((head, "value", "runs"), rows)


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f"<th>{name}</th>" for name in heads)
    lines = (
        "".join(f"<th>{cell}</th>" if not k else f"<td>{cell}</td>" for k, cell in enumerate(row))
        for row in rows
    )
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return (
        f'<div class="scroll"><table class="facts"><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _name(value: object) -> str:
    if pd.isna(value):  # type: ignore[call-overload]
        return "–"
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _resource(name: str) -> str:
    return (files("analysis") / "templates" / name).read_text(encoding="utf-8")
