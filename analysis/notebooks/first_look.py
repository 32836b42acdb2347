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
# # A first look at finished runs
#
# What did the runs reach, what did they forget, and was it the modules or the router?
#
# Open this file as a notebook with jupytext, or run it as a script:
#
# ```
# CL_PEFT_RUNS=runs CL_PEFT_FIGURES=figures python analysis/notebooks/first_look.py
# ```
#
# `CL_PEFT_RUNS` is the folder of runs (default `runs`); as a script, the figures are written into
# `CL_PEFT_FIGURES` if that is set.

# %%
import os
from pathlib import Path

import pandas as pd

import analysis
from analysis import figures
from cl_peft.errors import DataError

RUNS = Path(os.environ.get("CL_PEFT_RUNS", "runs"))
FIGURES = os.environ.get("CL_PEFT_FIGURES")


def table(frame, digits=3):
    """Print a frame as a Markdown table."""
    print(analysis.to_markdown(frame, digits))


def show(figure, name):
    """Display a figure in a notebook; as a script, write it to a file."""
    picture = figures.png(figure)
    if "get_ipython" in globals():
        from IPython.display import Image, display

        display(Image(data=picture, width=800))
    if FIGURES:
        path = Path(FIGURES) / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture)
        print(f"wrote {path}")


# %% [markdown]
# ## All runs
# One row per number: which run, after which task, on which task, under which routing. Runs that are
# not finished come along with what they have committed (`state` tells).

# %%
frame = analysis.load_runs(RUNS)
if frame.empty:
    raise SystemExit(f"{RUNS} holds no results yet. Run an experiment first, or set CL_PEFT_RUNS.")
print(f"{frame['run'].nunique()} runs, {len(frame)} numbers\n")

runs = analysis.summary(frame)
COLUMNS = [
    "average_accuracy_oracle",
    "average_accuracy_routed",
    "router_accuracy",
    "forgetting_routed",
    "backward_transfer_routed",
]
table(runs[["group", "run", "state", "stream", "learner", "router", "tasks", *COLUMNS]])

# %% [markdown]
# ## Over seeds
# Mean and sample standard deviation of the finished runs of each configuration. Runs that differ in
# more than their seeds are not averaged; what is printed then says how to tell them apart.

# %%
try:
    table(analysis.aggregate(frame, metric=COLUMNS))
except DataError as reason:
    print(reason)

# %% [markdown]
# ## Anytime curve
# Average accuracy over the tasks seen so far. The gap between dashed (oracle) and solid (routed) is
# what routing costs.

# %%
try:
    show(analysis.anytime_curve(frame), "anytime")
except DataError as reason:
    print(reason)

# %% [markdown]
# ## One run: its two accuracy matrices
# Left, every sample goes to its own task's module; right, the router chooses. A column that fades
# downwards is a task being forgotten. Change `chosen` to look at another run.

# %%
chosen = runs.iloc[-1]
one = frame[(frame["group"] == chosen["group"]) & (frame["run"] == chosen["run"])]
print(f"run {chosen['run']}: {chosen['learner']} learner, {chosen['router']} router\n")

oracle = analysis.accuracy_matrix(one, "oracle")
routed = analysis.accuracy_matrix(one, "routed")
table(oracle)
table(routed)
show(analysis.accuracy_matrices(oracle, routed, title=str(chosen["run"])), "matrices")

# %% [markdown]
# ## Where do its errors come from?
# `accuracy = oracle_accuracy - routing_loss + misroute_luck`, in every row.

# %%
errors = analysis.error_decomposition(one)
table(errors[["n", "oracle_accuracy", "routing_loss", "misroute_luck", "accuracy"]])
table(errors.filter(like="n_"))

# %% [markdown]
# ## Why does it forget?
# Module drift: the old modules answer worse than they did. Routing drift: the router finds them
# less often than it did. Their sum is the routed forgetting.

# %%
table(analysis.forgetting_split(one))

# %% [markdown]
# ## Which samples were misrouted?
# From the predictions of every sample, after the latest task: first who is taken for whom, then the
# mistakes that the router was surest of. `row` is the row in the test split of the data source.

# %%
folder = next(
    path
    for path in analysis.run_folders(RUNS)
    if path.name == chosen["run"] and analysis.load_config(path)["group"] == chosen["group"]
)
predictions = analysis.load_predictions(folder)
table(analysis.routing_confusion(predictions))

class_names = pd.Series(analysis.load_stream(folder)["class_names"])
mistakes = analysis.misrouted(predictions)
print(f"{len(mistakes)} samples went to another task's module\n")
table(
    mistakes.head(15).assign(
        label=mistakes["label"].map(class_names),
        routed_prediction=mistakes["routed_prediction"].map(class_names),
    )[
        [
            *("eval_task", "row", "label", "routed_task", "routed_prediction", "margin"),
            *("oracle_right", "routed_right"),
        ]
    ]
)
