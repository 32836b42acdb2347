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
# # Stability and plasticity
#
# What is learned of new tasks, what is kept of old ones, and which of the two causes (modules that
# changed, or a router that no longer finds them) takes it away?
#
# ```
# CL_PEFT_RUNS=runs/bounds CL_PEFT_FIGURES=figures python analysis/notebooks/stability_plasticity.py
# ```
#
# `CL_PEFT_RUNS` is a folder of runs, such as the sweep `bounds` writes (default `runs`).

# %%
import os
from pathlib import Path

import analysis
from analysis import figures
from analysis.tables import configuration_labels
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
# Grouped by everything that varies but the seeds.

# %%
frame = analysis.load_runs(RUNS, config="varying")
frame = frame[frame["state"] == "finished"]
if frame.empty:
    raise SystemExit(f"{RUNS} holds no finished run yet. Set CL_PEFT_RUNS.")
keys = ["group", *analysis.varying_keys(frame)]
print(f"{frame['run'].nunique()} finished runs, grouped by {', '.join(keys)}\n")

# %% [markdown]
# ## Final accuracy is plasticity plus stability
# `average accuracy = learning accuracy + backward transfer / T`, exactly: what was reached when
# each task was new, plus what later tasks changed.

# %%
PARTS = [
    "average_accuracy_routed",
    "learning_accuracy_routed",
    "backward_transfer_t_routed",
    "forgetting_routed",
]
numbers = analysis.intervals(frame, metric=PARTS, by=keys)
table(numbers)
show(analysis.stability_plasticity(frame, by=keys), "stability_plasticity")

# %% [markdown]
# ## As tasks arrive
# Between the bounds where they are there: joint training sees all data at once; the sequential
# learner changes one module and protects nothing. A warning names settings and seeds for which a
# bound was not run; what there is is drawn.

# %%
learners = set(frame["learner"])
bounds = {
    kind: name
    for kind, name in (("upper", "joint"), ("lower", "sequential"))
    if name in learners and len(learners) > 2
}
show(analysis.anytime_curve(frame, by=keys, **bounds), "stability_anytime")

# %% [markdown]
# ## Why is it forgotten?
# Module drift: the true task's module answers worse than it did. Routing drift: the router finds it
# less often. A learner that never touches old modules has a module drift of exactly zero.

# %%
CAUSES = ["forgetting_module_drift", "forgetting_routing_drift", "forgetting_routed"]
table(analysis.intervals(frame, metric=CAUSES, by=keys))

# %% [markdown]
# ## Which tasks are forgotten?
# One figure per configuration, at most four; tasks in the order they were learned.

# %%
runs = analysis.summary(frame)
labels = configuration_labels(runs, keys)
for number, label in enumerate(list(dict.fromkeys(labels))[:4], 1):
    mine = runs[labels == label][["group", "run"]]
    print(f"{label or 'all runs'}: mean of {len(mine)}")
    try:
        drawn = analysis.forgetting_bars(frame.merge(mine, on=["group", "run"]), title=label)
        show(drawn, f"forgetting_per_task_{number}")
    except DataError as reason:
        print(reason)

# %% [markdown]
# ## What does it cost?
# What is trained for one task, and what has to be kept.

# %%
COST = ["trainable_parameters", "stored_parameters", "router_parameters"]
table(analysis.costs(frame).groupby(keys, sort=False)[COST].mean().reset_index(), digits=0)
show(analysis.accuracy_against_parameters(frame, by=keys), "accuracy_against_parameters")
