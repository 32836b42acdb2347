"""Reads the page about a sweep, and computes its numbers from the predictions, by counting."""

import json
import math
from html.parser import HTMLParser

import pandas as pd
import yaml


class Page(HTMLParser):
    """A strict reader: every element closed in order; tables as rows of (text, classes, title)."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.text, self.tables, self.ids, self.scripts, self.links = text, {}, [], [], []
        self._open, self._title, self._table, self._cell = [], None, None, None
        self.headings, self.cards = [], {}
        self.feed(text)
        self.close()
        assert self._open == []
        assert len(self.ids) == len(set(self.ids))
        self.data = json.loads(self.scripts[0])

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if "id" in attributes:
            self.ids.append(attributes["id"])
        self.links += [attributes[name] for name in ("src", "href") if name in attributes]
        if tag not in ("meta", "br"):
            self._open.append(tag)
        if tag == "script":
            self.scripts.append("")
        elif tag in ("h2", "h3", "dt", "dd"):
            self._title = ""
        elif tag == "table":
            name = self.headings[-1]
            self._table = self.tables.setdefault(name, [])
        elif tag == "tr":
            self._table.append([])
        elif tag in ("td", "th"):
            classes = attributes.get("class", "").split()
            self._cell = ["", classes, attributes.get("title", "")]

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in ("meta", "br"):
            self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag
        if tag in ("h2", "h3"):
            self.headings.append(self._title)
        elif tag == "dt":
            self._name = self._title
        elif tag == "dd":
            self.cards[self._name] = self._title
        elif tag in ("td", "th"):
            self._table[-1].append(tuple(self._cell))
            self._cell = None

    def handle_data(self, data):
        if self._open and self._open[-1] == "script":
            self.scripts[-1] += data
        elif self._cell is not None:
            self._cell[0] += data
        elif self._open and self._open[-1] in ("h2", "h3", "dt", "dd"):
            self._title += data


# ---------------------------------------------------------------- a computation of its own


def outcomes(run):
    """matrices[routing][t, i], and the rows of the last evaluation; by counting, nothing else."""
    rows = [
        row
        for file in sorted((run / "tasks").glob("*/predictions.parquet"))
        for row in pd.read_parquet(file).to_dict("records")
    ]
    done = max(row["after_task"] for row in rows)
    right = {"oracle": {}, "routed": {}}
    for row in rows:
        for name, cells in right.items():
            cell = cells.setdefault((row["after_task"] - 1, row["eval_task"] - 1), [0, 0])
            cell[0] += row[f"{name}_prediction"] == row["label"]
            cell[1] += 1
    matrices = {
        name: [[cells[t, i][0] / cells[t, i][1] for i in range(t + 1)] for t in range(done)]
        for name, cells in right.items()
    }
    return matrices, rows, [row for row in rows if row["after_task"] == done]


def mean(values):
    values = list(values)
    return sum(values) / len(values) if values else math.nan


def numbers(run):
    """All numbers over tasks of a run, by name and routing."""
    matrices, _, last = outcomes(run)
    found = {}
    for name, R in matrices.items():
        T = len(R)
        old = range(T - 1)
        best = [max(R[t][i] for t in range(i, T - 1)) for i in old]
        best_ever = [max(R[t][i] for t in range(i, T)) for i in old]
        moved = [R[-1][i] - R[i][i] for i in old]
        right = [row[f"{name}_prediction"] == row["label"] for row in last]
        found |= {
            ("average_accuracy", name): mean(R[-1]),
            ("average_accuracy_micro", name): mean(right),
            ("average_incremental_accuracy", name): mean(mean(row) for row in R),
            ("learning_accuracy", name): mean(R[t][t] for t in range(T)),
            ("forgetting", name): mean(best[i] - R[-1][i] for i in old),
            ("forgetting_nonnegative", name): mean(best_ever[i] - R[-1][i] for i in old),
            ("forgetting_first_last", name): mean(-m for m in moved),
            ("forgetting_one_step", name): mean(
                mean(R[t - 1][i] - R[t][i] for i in range(t)) for t in range(1, T)
            ),
            ("backward_transfer", name): mean(moved),
            ("backward_transfer_t", name): sum(moved) / T if moved else math.nan,
        }
    oracle = [row["oracle_prediction"] == row["label"] for row in last]
    routed = [row["routed_prediction"] == row["label"] for row in last]
    R, ideal = matrices["routed"], matrices["oracle"]
    drift = []
    for i in range(len(R) - 1):
        column = [R[t][i] for t in range(i, len(R) - 1)]
        drift.append(ideal[i + column.index(max(column))][i] - ideal[-1][i])
    total = found["forgetting", "routed"]
    found |= {
        ("router_accuracy", "none"): mean(row["routed_task"] == row["eval_task"] for row in last),
        ("routing_loss", "none"): mean(o and not r for o, r in zip(oracle, routed, strict=True)),
        ("misroute_luck", "none"): mean(r and not o for o, r in zip(oracle, routed, strict=True)),
        ("forgetting_module_drift", "none"): mean(drift),
        ("forgetting_routing_drift", "none"): total - mean(drift),
    }
    return found


def settings(run):
    return yaml.safe_load((run / "config.yaml").read_text())


def finished(folder):
    """Runs by (learner, rank), in the order of their seeds."""
    found = {}
    for run in sorted(folder.iterdir()):
        if json.loads((run / "status.json").read_text())["state"] == "finished":
            config = settings(run)
            found.setdefault((config["learner"]["name"], config["module"]["rank"]), []).append(run)
    return found


def printed(value, digits=1):
    text = f"{100 * value:.{digits}f}"
    return text.replace("-", "−") if float(text) else f"{0:.{digits}f}"
