"""Tables for a paper: best in bold, second underlined, significance marked, in three formats."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from analysis.directions import direction, heading, is_count
from analysis.listing import in_order
from analysis.pairing import most_alike, tested_alike
from analysis.paper_notes import left_out_note, notes_on, ranks_note, unmarked_note
from analysis.seeds import (
    compare_columns,
    final_numbers,
    intervals,
    method_keys,
    paired_by,
    score_table,
)
from analysis.statistics import holm
from analysis.tables import configuration_columns, configuration_labels
from cl_peft.errors import DataError, did_you_mean

DEFAULT_METRICS = ("average_accuracy_oracle", "average_accuracy_routed", "forgetting_routed")
_LATEX = {
    "\\": r"\textbackslash{}",
    # \\ and \midrule before a row take what stands in brackets, or a star, as an option
    "[": "{[}",
    "]": "{]}",
    "*": "{*}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "±": r"$\pm$",
    "−": "$-$",
    "†": r"$^{\dagger}$",
    "↑": r"$\uparrow$",
    "↓": r"$\downarrow$",
    "→": r"$\rightarrow$",
    "≥": r"$\geq$",
    "≤": r"$\leq$",
    "×": r"$\times$",
}


@dataclass(frozen=True)
class PaperTable:
    """A table of configurations against metrics, with everything that its marks rest on.

    Attributes:
        rows: The columns that name the configurations, one row each.
        metrics: The columns of numbers.
        cells: Long: row, metric, estimate, low, high, half_width, n, text, rank (1 best, 2 second,
            0 neither), p_holm (against the reference), significant.
        notes: What the marks and intervals mean, and the smallest p that the seeds can give.
    """

    rows: pd.DataFrame
    metrics: tuple[str, ...]
    cells: pd.DataFrame
    notes: tuple[str, ...]

    def to_markdown(self) -> str:
        """The table and its notes in Markdown."""
        head = [*map(str, self.rows.columns), *map(heading, self.metrics)]
        align = ["---"] * self.rows.shape[1] + ["--:"] * len(self.metrics)
        marks = {0: "{}", 1: "**{}**", 2: "<u>{}</u>"}
        lines = [[_pipe(text) for text in head], align]
        for names, cells in self._lines():
            lines.append([*map(_pipe, names), *(_marked(c, marks, _pipe) for c in cells)])
        table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        return f"{table}\n\n{' '.join(self.notes)}\n"

    def to_latex(self, *, caption: str | None = None, label: str | None = None) -> str:
        r"""The table in LaTeX with the rules of booktabs; every text is escaped.

        Args:
            caption: Plain text; with it, or with ``label``, a ``table`` environment is written that
                also holds the notes. Without, the ``tabular`` alone.
            label: For ``\ref``.
        """
        marks = {0: "{}", 1: r"\textbf{{{}}}", 2: r"\underline{{{}}}"}
        head = [*map(str, self.rows.columns), *map(heading, self.metrics)]
        lines = [rf"\begin{{tabular}}{{{'l' * self.rows.shape[1]}{'r' * len(self.metrics)}}}"]
        lines += [r"\toprule", _latex_row(map(escape_latex, head)), r"\midrule"]
        for names, cells in self._lines():
            texts = [_marked(cell, marks, escape_latex) for cell in cells]
            lines.append(_latex_row([*map(escape_latex, names), *texts]))
        lines += [r"\bottomrule", r"\end{tabular}"]
        if caption is None and label is None:
            return "\n".join(lines) + "\n"
        notes = " ".join(map(escape_latex, self.notes))
        return (
            "\n".join(
                [
                    "% needs \\usepackage{booktabs}",
                    r"\begin{table}[t]",
                    r"\centering",
                    *([rf"\caption{{{escape_latex(caption)}}}"] if caption is not None else []),
                    *([rf"\label{{{label}}}"] if label is not None else []),
                    *lines,
                    rf"\par\smallskip{{\footnotesize {notes}}}",
                    r"\end{table}",
                ]
            )
            + "\n"
        )

    def to_csv(self) -> str:
        """All numbers in full precision, wide: estimate, low, high, n and p_holm per metric."""
        wide = self.rows.copy()
        for metric in self.metrics:
            cells = self.cells[self.cells["metric"] == metric].set_index("row")
            for part in ("estimate", "low", "high", "n", "p_holm"):
                name = metric if part == "estimate" else f"{metric}_{part}"
                wide[name] = cells[part].reindex(wide.index)
        return wide.to_csv(index=False, lineterminator="\n")

    def _lines(self) -> list[tuple[list[str], list[Any]]]:
        found = []
        for row, names in enumerate(self.rows.itertuples(index=False)):
            mine = self.cells[self.cells["row"] == row].set_index("metric")
            cells = [mine.loc[metric] for metric in self.metrics]
            found.append(([_name(name) for name in names], cells))
        return found


def paper_table(
    frame: pd.DataFrame,
    *,
    metric: Sequence[str] = DEFAULT_METRICS,
    by: Sequence[str] | None = None,
    strata: str | None = None,
    reference: str | None = None,
    interval: str = "half",
    statistic: str = "mean",
    level: float = 0.95,
    alpha: float = 0.05,
    digits: int = 1,
    seed: int = 0,
) -> PaperTable:
    """Configurations against metrics: mean over seeds, interval, best, second, significance.

    In each column every other configuration is tested against the reference, corrected by Holm
    within the column; the dagger marks those that differ. Without ``reference`` the best of the
    column is it. Choosing the best after seeing the numbers makes the test lenient; for a claim,
    name the reference beforehand.

    With runs of several streams, each stream has rows of its own: best, second and the tests (by
    permutation, over shared seeds) are within a stream, and the notes give average ranks over
    streams (Demsar 2006). With ``strata="stream"`` a configuration is one row, its numbers are over
    all streams, and the tests are Wilcoxon's over streams. Seeds never count as data sets.

    Bold and underlined go by the numbers as printed, so what reads equal is marked alike. Rows that
    were tested on other examples than one another (column ``tests``) have neither.

    Args:
        frame: From :func:`analysis.load_runs`.
        metric: Columns of :func:`analysis.summary` or :func:`analysis.costs`.
        by: Columns that tell configurations apart; None is all but run, state, seeds and
            ``strata``, of which those that vary are shown.
        strata: Such as "stream": resampled apart. It is "stream" where ``by`` lacks the streams
            that the runs have.
        reference: Label of a configuration, as in :func:`analysis.paired_tests`; with several
            streams it names the rows of all of them.
        interval: "half" for 91.3 ± 0.8 (half the interval's width), "range" for [90.5, 92.1], or
            "none".
        statistic: "mean" or "iqm".
        level: Of the intervals.
        alpha: Of the tests.
        digits: After the point, of percentages.
        seed: Of resampling.

    Raises:
        DataError: Unknown names, no finished run, or runs that differ in more than their seeds.
    """
    if interval not in ("half", "range", "none"):
        raise DataError(f'interval is {interval!r}; allowed: "half", "range", "none"')
    keys = list(by) if by is not None else configuration_columns(frame)
    runs = final_numbers(frame, metric)
    if "stream" not in keys and runs["stream"].nunique() > 1:
        strata = "stream"
    keys = [key for key in keys if key != strata]
    numbers = intervals(
        frame, metric=metric, by=keys, strata=strata, statistic=statistic, level=level, seed=seed
    )
    first = numbers[numbers["metric"] == metric[0]].reset_index(drop=True)
    own = method_keys(runs, keys)
    labels = configuration_labels(first, own).where(lambda text: text != "", "all runs")
    streams = first["stream"] if "stream" in keys else pd.Series("", first.index)
    shown = [key for key in keys if first[key].nunique(dropna=False) > 1] or keys[:1]
    if reference is not None and reference not in set(labels):
        raise DataError(
            f"No configuration is called {reference!r}.{did_you_mean(reference, labels)}\n"
            f"  there are: {'; '.join(dict.fromkeys(labels))}"
        )
    on = paired_by(frame, own)
    row = pd.Series(0, runs.index)
    if keys:  # numbered as the rows of intervals are
        row = in_order(runs, keys).groupby(keys, sort=False, dropna=False).ngroup()[runs.index]
    alike = {
        name: tested_alike(runs[row.isin(part.index)], row[row.isin(part.index)], on)
        for name, part in first.groupby(streams, sort=False)
    }
    left = runs.drop(most_alike(runs, on).index) if "tests" in runs.columns else runs[:0]
    unlike = [name if len(alike) > 1 else "" for name, same in alike.items() if not same]
    parts, tests, texts = [], [], unmarked_note(unlike, metric)
    for name in metric:
        column = numbers[numbers["metric"] == name].reset_index(drop=True)
        cells = column.drop(columns=keys).assign(row=range(len(column)), label=labels)
        cells["text"] = [_text(cell, name, interval, digits) for _, cell in cells.iterrows()]
        cells["rank"] = 0
        for stream, part in cells["estimate"].groupby(streams, sort=False):
            if alike[stream]:
                cells.loc[part.index, "rank"] = _ranks(part, name, digits)
        found, said = _tests(frame, name, own, cells, streams, reference, seed, left)
        tests.append(found.assign(metric=name))
        texts += said
        known = found.set_index(["stream", "b"])["p_holm"]
        cells["p_holm"] = known.reindex(pd.MultiIndex.from_arrays([streams, labels])).to_numpy()
        cells["significant"] = cells["p_holm"] < alpha
        parts.append(cells.drop(columns="label"))
    table = pd.concat(parts, ignore_index=True)
    notes = notes_on(
        table, runs, pd.concat(tests, ignore_index=True),
        reference=reference, interval=interval, statistic=statistic, level=level, alpha=alpha,
        streams=streams.nunique(), unbalanced=_unbalanced(runs, keys, strata),
    )  # fmt: skip
    return PaperTable(first[shown], tuple(metric), table, (*notes, *dict.fromkeys(texts)))


def escape_latex(text: str) -> str:
    """Text that LaTeX prints as it is: special characters become commands, line breaks spaces."""
    text = re.sub(r"\s*[\r\n]\s*", " ", text)  # a blank line would end a caption
    return "".join(_LATEX.get(character, character) for character in text)


# ---------------------------------------------------------------- parts


def _tests(
    frame: pd.DataFrame,
    metric: str,
    keys: Sequence[str],
    cells: pd.DataFrame,
    streams: pd.Series,
    reference: str | None,
    seed: int,
    left: pd.DataFrame,
) -> tuple[pd.DataFrame, list[str]]:
    """Tests of a column, each stream's rows on their own, and what the notes say of its ranks."""
    none = pd.DataFrame(columns=["a", "b", "stream", "p", "p_holm", "n", "smallest_p", "unit"])
    if is_count(metric) or cells["label"].nunique() < 2:
        return none, []
    scores = score_table(frame, metric=metric, by=keys, leave_out=not left.empty)
    several = streams.nunique() > 1
    found = [none]
    for stream, part in cells.groupby(streams, sort=False):
        best = part.loc[part["rank"] == 1, "label"]
        against = reference or (None if best.empty else str(best.iloc[0]))
        if against is not None:
            mine = scores[scores.index.get_level_values("stream") == stream] if several else scores
            found.append(compare_columns(mine, against, seed).assign(stream=stream))
    tests = pd.concat([part for part in found if len(part)] or [none], ignore_index=True)
    tests["p_holm"] = holm(tests["p"].astype("float64"))
    way = direction(metric)
    ranks = [ranks_note(scores, metric, way)] if several and way else []
    done = tests.loc[tests["n"].astype("float64") > 0, "stream"]
    if several and not any("Friedman" in text for text in ranks):
        left = left[left["stream"].isin(done)]
    elif not several and done.empty:
        left = left[:0]
    return tests, [*left_out_note(left), *ranks]


def _unbalanced(runs: pd.DataFrame, keys: Sequence[str], strata: str | None) -> bool:
    """Whether a configuration averaged over streams has more runs of some than of others."""
    if strata is None or not keys:
        return False
    counts = runs.groupby([*keys, strata], dropna=False).size().unstack(fill_value=0)
    return bool(counts.nunique(axis=1).gt(1).any())


def _ranks(estimates: pd.Series, metric: str, digits: int) -> list[int]:
    """1 for what prints like the best, 2 for what prints like the next, else 0."""
    way = direction(metric)
    printed = estimates.map(lambda value: round(_scaled(value, metric), _places(metric, digits)))
    order = sorted(set(printed.dropna()), reverse=way > 0)
    if not way or len(order) < 2:  # nothing to be better than
        return [0] * len(estimates)
    return [order.index(v) + 1 if v in order[:2] else 0 for v in printed]


def _text(cell: pd.Series, metric: str, interval: str, digits: int) -> str:
    if pd.isna(cell["estimate"]):
        return ""
    text = _number(cell["estimate"], metric, digits)
    if interval == "none" or pd.isna(cell["low"]):
        return text
    if interval == "half":
        return f"{text} ± {_number(cell['half_width'], metric, digits)}"
    ends = (_number(cell[end], metric, digits) for end in ("low", "high"))
    return f"{text} [{', '.join(ends)}]"


def _number(value: float, metric: str, digits: int) -> str:
    text = f"{_scaled(value, metric):,.{_places(metric, digits)}f}"
    if not text.strip("-0.,"):
        text = text.lstrip("-")  # never "-0.0"
    return text.replace("-", "−")


def _scaled(value: float, metric: str) -> float:
    return value if is_count(metric) else 100 * value


def _places(metric: str, digits: int) -> int:
    return 0 if is_count(metric) else digits


def _marked(cell: pd.Series, marks: dict[int, str], escape: Any) -> str:  # noqa: ANN401
    text = marks[int(cell["rank"])].format(escape(cell["text"]))
    return text + (escape("†") if cell["significant"] else "")


def _name(value: object) -> str:
    if pd.isna(value):  # type: ignore[call-overload]
        return ""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _pipe(text: str) -> str:
    return text.replace("|", "\\|")


def _latex_row(cells: Any) -> str:  # noqa: ANN401 (any iterable of text)
    return " & ".join(cells) + r" \\"
