"""The tables of docs/results: routers or learners of finished runs, mean and 95 % interval.

    python benchmarks/tables.py routers runs/clinc150
    python benchmarks/tables.py learners runs/fewshot

Intervals are Student's over the runs of one configuration that differ in seeds or samples alone:
with three runs they are wide (4.3 standard errors), as they should be. Prints Markdown.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import pandas as pd
import yaml

from cl_peft.schema import constructor_model

#: 97.5 % quantiles of Student's distribution by degrees of freedom.
STUDENT = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36, 8: 2.31, 9: 2.26}
COLUMNS = {
    "routers": ["routed", "router", "lost by routing", "gained", "forgetting, routed", "kB", "us"],
    "learners": ["oracle", "routed", "forgetting, oracle", "forgetting, routed", "learning", "kB"],
}
PERCENT = {"oracle", "routed", "router", "lost by routing", "gained", "forgetting, routed",
           "forgetting, oracle", "learning"}  # fmt: skip


def one(folder: Path, kind: str) -> dict[str, object] | None:
    """A finished run's numbers, and what it is called in the table."""
    if json.loads((folder / "status.json").read_text())["state"] != "finished":
        return None
    config = yaml.safe_load((folder / "config.yaml").read_text())
    rows = pd.read_parquet(folder / "results.parquet")
    rows = rows[(rows["after_task"] == rows["after_task"].max()) & rows["eval_task"].isna()]
    value = rows.set_index(["metric", "routing"])["value"]
    timing = json.loads((folder / "timing.json").read_text())["tasks"]
    router, learner, module = (config[axis] for axis in ("router", "learner", "module"))
    name = router["name"]
    if router.get("layers"):
        name += f", layers {router['layers'][0]}-{router['layers'][-1]}"
    if router.get("projection", 2000) != 2000:
        name += f", width {router['projection']}"
    if router.get("ensemble", 1) > 1:
        name += f", {router['ensemble']} draws"
    if router.get("combine", "none") != "none":
        top = f" of {router['top_k']}" if router["combine"] == "heads" else " alone"
        name += f", {router['combine']}{top}"
    if router.get("mix") == "soft":
        name += f", soft top {router['top_k']}"
    if kind == "learners":
        usual = constructor_model(learner["_target_"]).model_fields
        other = [f"{k}={v}" for k, v in learner.items() if k in usual and v != usual[k].default]
        routed = "" if router["name"] == "none" else f", {name}"
        name = " ".join([learner["name"], *other]) + routed
        name += "" if module["name"] in ("lora", "none") else f", {module['name']}"
        order = config["stream"].get("order")  # of the standard benchmark; 1 is the usual one
        name += f", order {order}" if isinstance(order, int) and order != 1 else ""
    elif learner["name"] != "isolated":
        name = learner["name"]
    kept = sum(
        0.0 if math.isnan(v) else v
        for v in (value.get(("router_state_bytes", "none"), 0.0),
                  value.get(("learner_state_bytes", "none"), 0.0) if kind == "learners" else 0.0)
    )  # fmt: skip
    return {
        "name": name,
        "oracle": value["average_accuracy", "oracle"],
        "routed": value["average_accuracy", "routed"],
        "router": value["router_accuracy", "none"],
        "lost by routing": value["routing_loss", "none"],
        "gained": value["misroute_luck", "none"],
        "forgetting, oracle": value["forgetting", "oracle"],
        "forgetting, routed": value["forgetting", "routed"],
        "learning": value["learning_accuracy", "routed"],
        "kB": kept / 1000,
        "us": timing[-1].get("choose_microseconds", math.nan),
    }


def show(values: pd.Series, column: str) -> str:
    """Mean and half interval."""
    values = values.dropna() * (100 if column in PERCENT else 1)
    if values.empty:
        return ""
    if column not in PERCENT:
        return f"{values.median():,.0f}"
    if len(values) < 2:
        return f"{values.mean():.1f}"
    half = STUDENT.get(len(values) - 1, 1.96) * values.std(ddof=1) / math.sqrt(len(values))
    return f"{values.mean():.1f} ± {half:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=list(COLUMNS))
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    found = [one(p.parent, arguments.kind) for p in arguments.folder.glob("*/status.json")]
    frame = pd.DataFrame([row for row in found if row is not None])
    order = frame.groupby("name")["routed"].mean().sort_values(ascending=False).index
    columns = COLUMNS[arguments.kind]
    print("| " + " | ".join([arguments.kind[:-1], *columns, "runs"]) + " |")
    print("|---|" + "---:|" * (len(columns) + 1))
    for name in order:
        mine = frame[frame["name"] == name]
        cells = [show(mine[c].astype(float), c) for c in columns]
        print("| " + " | ".join([name, *cells, str(len(mine))]) + " |")


if __name__ == "__main__":
    main()
