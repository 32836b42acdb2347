# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Routers compared
#
# How much does each router lose against the oracle, is the difference between two of them more than
# chance, and does a router know when it errs?
#
# ```
# CL_PEFT_RUNS=runs/orders CL_PEFT_FIGURES=figures python analysis/notebooks/routers_compared.py
# ```
#
# `CL_PEFT_RUNS` is a folder of runs that differ in their router and seeds, such as the sweep
# `orders` writes (default `runs`).

# %%
import os
from pathlib import Path

import analysis
from analysis import figures
from cl_peft.errors import DataError

RUNS = Path(os.environ.get("CL_PEFT_RUNS", "runs"))
FIGURES = os.environ.get("CL_PEFT_FIGURES")


def table(frame, digits=3):
    """Print a frame as a Markdown table."""
    print(analysis.to_markdown(frame, digits))


def show(drawn, name):
    """Display a figure in a notebook; as a script, write it to a file."""
    picture = figures.png(drawn)
    if "get_ipython" in globals():
        from IPython.display import Image, display

        display(Image(data=picture, width=800))
    if FIGURES:
        print(f"wrote {figures.save(drawn, Path(FIGURES) / f'{name}.png')}")


# %% [markdown]
# ## The runs
# Finished runs of learners that route. Where more than router and seeds varies (a rank, a stream),
# the value that most runs have is taken, so that routers are compared and nothing else.

# %%
frame = analysis.load_runs(RUNS, config="varying")
frame = frame[(frame["state"] == "finished") & (frame["router"] != "none")]
if frame.empty:
    raise SystemExit(f"{RUNS} holds no finished run with a router. Set CL_PEFT_RUNS.")

runs = analysis.summary(frame)
chosen = {"group": runs["group"].mode()[0]}
for key in analysis.varying_keys(frame):
    if key != "router":
        chosen[key] = runs[key].mode()[0]
for key, value in chosen.items():
    runs = runs[runs[key] == value]
    frame = frame[frame[key] == value]
print("compared at", ", ".join(f"{key} {value}" for key, value in chosen.items()))
print(f"{len(runs)} runs of {runs['router'].nunique()} routers\n")

# %% [markdown]
# ## What routing costs
# `average_accuracy_micro_routed = average_accuracy_micro_oracle - routing_loss + misroute_luck`.
# Means over seeds with 95 % bootstrap intervals.

# %%
NUMBERS = [
    "average_accuracy_oracle",
    "average_accuracy_routed",
    "router_accuracy",
    "routing_loss",
    "misroute_luck",
]
paper = analysis.paper_table(frame, metric=NUMBERS, by=["router"], interval="range")
print(paper.to_markdown())
show(analysis.anytime_curve(frame, by=["router"]), "routers_anytime")

# %% [markdown]
# ## Is the difference more than chance?
# Paired over seeds: the same order of tasks, the same initial weights, the same test examples.
# `smallest_p` is what so many seeds can give at best; if it is above 0.05, only more seeds can show
# anything. These are seeds of one stream: about other streams they say nothing.

# %%
try:
    tests = analysis.paired_tests(frame, by=["router"])
    if tests.empty:
        print("Only one router: nothing to compare.")
    else:
        table(tests)
except DataError as reason:
    print(reason)

# %% [markdown]
# ## Example by example
# The two best routers on the same test examples, over all seeds they share. Runs are resampled, not
# examples, because the examples of a run share its modules.

# %%
best = runs.groupby("router")["average_accuracy_routed"].mean().sort_values(ascending=False)
if len(best) > 1:
    first, second = best.index[:2]
    names = {"module": "module.name", "learner": "learner.name", "stream": "stream.name"}
    fixed = {names.get(key, key): value for key, value in chosen.items() if key != "backbone"}
    try:
        pairs = analysis.example_pairs(
            RUNS, {**fixed, "router": first}, {**fixed, "router": second}
        )
        result = analysis.compare_examples(pairs)
        ends = result.interval
        print(
            f"{first} - {second}: {100 * result.difference:.2f} points "
            f"[{100 * ends.low:.2f}, {100 * ends.high:.2f}], resampled by {result.unit}"
        )
        if result.test is not None:
            print(f"p {result.test.p:.3g}; {result.test.note()}\n")
        table(result.pairs)
    except DataError as reason:
        print(reason)

# %% [markdown]
# ## Who is taken for whom?
# The first run of the best router.

# %%
jobs = analysis.load_run_table(RUNS)[["group", "run", "folder"]]
folders = runs.merge(jobs, on=["group", "run"]).groupby("router")["folder"].first()
final = {router: analysis.load_predictions(folders[router], after_task=-1) for router in best.index}
confusion = analysis.routing_confusion(final[best.index[0]])
table(confusion)
show(analysis.router_confusion(confusion), "routers_confusion")

# %% [markdown]
# ## Does the router know when it errs?
# Left of the histogram lies doubt. If samples with a small margin are handed on (to a person, or to
# a larger model), accuracy on the rest rises.

# %%
try:
    show(analysis.routing_margins(final[best.index[0]]), "routers_margins")
    show(analysis.abstention(final), "routers_abstention")
    for router, rows in final.items():
        curve = analysis.abstention_curve(rows)
        tenth = curve[curve["coverage"] <= 0.9].iloc[-1]
        print(
            f"{router}: {100 * curve['accuracy'].iloc[-1]:.1f} % on all samples, "
            f"{100 * tenth['accuracy']:.1f} % if a tenth is handed on"
        )
except DataError as reason:
    print(reason)
