"""Write docs/results/performance.md, and its plots, from ``benchmarks/results/*.json``.

python benchmarks/render.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS, DOCS = ROOT / "benchmarks" / "results", ROOT / "docs" / "results"
ORDER = (
    "training_step",
    "upper_layers",
    "mixed_batch",
    "bank_size",
    "stream",
    "routers_fit",
    "methods",
    "memory",
    "profiles",
    "start_up",
)
HEAD = """# Performance

Made by `make bench` from `benchmarks/results/*.json`; every section names the script that measured
it. What is compared took turns, in one process but for start-up. *Ratio* is the median, over
repeats, of the row's time over that of what it is compared with in the same repeat; in brackets are
the first and third quartile. With one thread, times are CPU seconds of the process; with more, and
for start-up, wall clock.
"""


def number(value: float) -> str:
    """Three digits that matter."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def spread(pair: list[float], digits: int | None = None) -> str:
    """``(first to third quartile)``."""
    low, high = (number(v) if digits is None else f"{v:.{digits}f}" for v in pair)
    return f" ({low} to {high})"


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Rows as Markdown."""
    lines = [
        "| what | median | compared with | ratio | repeats | aim |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        value = f"{number(row['value'])} {row['unit']}"
        if "spread" in row and row["repeats"] > 1:
            value += spread(row["spread"])
        ratio = ""
        if "ratio" in row:
            ratio = f"{row['ratio']:.2f}"
            ratio += spread(row["quartiles"], 2) if row["repeats"] > 1 else ""
        cells = [row["what"], value, row.get("against", ""), ratio, str(row["repeats"]), row["aim"]]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def section(name: str, content: dict[str, Any]) -> list[str]:
    """One benchmark: what, where, the table, the plot if there is one."""
    m = content["machine"]
    load = ", ".join(str(x) for x in m["load"])
    about = (
        f"{content['settings']}. `benchmarks/{name}.py`, {m['date']}: {m['cpus']} CPUs, "
        f"{m['threads']} thread(s), load {load}; Python {m['python']}, torch {m['torch']}, "
        f"transformers {m['transformers']}, peft {m['peft']}."
    )
    lines = [f"## {content['about']}", "", about, "", *table(content["rows"]), ""]
    for more in content.get("tables", []):
        cells = [more["columns"], ["---"] * len(more["columns"]), *more["rows"]]
        lines += [*(f"| {' | '.join(row)} |" for row in cells), ""]
    if "series" in content:
        plot(DOCS / f"{name}.svg", content["series"])
        lines += [f"![{content['about']}]({name}.svg)", ""]
    return lines


def plot(path: Path, series: list[dict[str, Any]]) -> None:
    """Seconds by number of tasks, and how many times as fast."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "cl_peft"  # equal results, equal files
    from matplotlib import pyplot as plt

    tasks = [point["tasks"] for point in series]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for who, label, style in (("ours", "cl_peft", "-"), ("loop", "plain peft loop", "--")):
        for part, colour in (("learn", "tab:blue"), ("evaluate", "tab:orange")):
            seconds = [point[f"{part} seconds, {who}"] for point in series]
            left.plot(tasks, seconds, style, color=colour, marker="o", label=f"{label}, {part}")
    left.set(xlabel="tasks", ylabel="seconds", ylim=(0, None))
    left.legend(fontsize="small")
    for part, label in (("evaluation", "evaluation"), ("whole", "whole stream")):
        right.plot(tasks, [point[part] for point in series], marker="o", label=label)
    right.axhline(1, color="grey", linewidth=0.8)
    right.set(xlabel="tasks", ylabel="plain loop / cl_peft", ylim=(0, None))
    right.legend(fontsize="small")
    for axis in (left, right):
        axis.set_xticks(tasks)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def main() -> None:
    DOCS.mkdir(parents=True, exist_ok=True)
    lines = [HEAD]
    for name in ORDER:
        path = RESULTS / f"{name}.json"
        if path.exists():
            lines += section(name, json.loads(path.read_text()))
    target = DOCS / "performance.md"
    target.write_text("\n".join(lines).rstrip() + "\n")
    print(f"wrote {target.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
