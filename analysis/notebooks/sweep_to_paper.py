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
# # From a sweep to the paper's tables
#
# What has run, what came out best, which differences hold, and the table as Markdown, LaTeX, CSV.
#
# ```
# CL_PEFT_RUNS=runs/orders CL_PEFT_FIGURES=figures python analysis/notebooks/sweep_to_paper.py
# ```
#
# `CL_PEFT_RUNS` is a sweep's folder (default `runs`). Figures, `table.tex` and `table.csv` are
# written into `CL_PEFT_FIGURES` if that is set.

# %%
import os
from pathlib import Path

import analysis
from analysis import figures
from analysis.seeds import method_keys
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
# ## What has run
# One row per run, read without opening a table of numbers. Unfinished runs are shown and then left
# out: their averages are over fewer tasks.

# %%
jobs = analysis.load_run_table(RUNS)
if not jobs["finished"].any():
    raise SystemExit(f"{RUNS} holds no finished run yet. Set CL_PEFT_RUNS.")
table(jobs.groupby("state", sort=False).size().rename("runs").reset_index())
open_jobs = jobs[~jobs["finished"]]
if len(open_jobs):
    table(open_jobs[["group", "run", "state", "tasks_done", "tasks", "error"]])

# %% [markdown]
# ## What varies
# Everything but the seeds in which runs differ; what another key already determines is left out.

# %%
varying = analysis.varying_keys(jobs)
print(f"varying: {', '.join(varying) or 'only the seeds'}\n")
frame = analysis.load_runs(RUNS, config="varying")
frame = frame[frame["state"] == "finished"]
keys = ["group", *analysis.varying_keys(frame)]

# %% [markdown]
# ## Overview
# Best on top; every dot is a run.

# %%
show(analysis.sweep_overview(frame, by=keys), "overview")

# %% [markdown]
# ## The table
# Best in bold, second underlined. A dagger marks what differs from the best of its column, by a
# paired permutation test over seeds with Holm's correction. The note says the smallest p that the
# seeds can give: with few of them nothing can be significant, however large the difference.
#
# With several streams, all of that is within each of them, and the note ranks configurations over
# streams. A test over the seeds of one stream speaks of seeds only, not of other streams. Sizes
# have no best: the smallest run is the one that learned nothing.

# %%
METRICS = ["average_accuracy_oracle", "average_accuracy_routed", "forgetting_routed"]
paper = analysis.paper_table(frame, metric=METRICS, by=keys)
print(paper.to_markdown())
latex = paper.to_latex(caption="Final accuracy and forgetting.", label="tab:sweep")
print(latex)
if FIGURES:
    Path(FIGURES).mkdir(parents=True, exist_ok=True)
    (Path(FIGURES) / "table.tex").write_text(latex, encoding="utf-8")
    (Path(FIGURES) / "table.csv").write_text(paper.to_csv(), encoding="utf-8")

# %% [markdown]
# ## Outliers
# The interquartile mean drops the lowest and the highest quarter of the seeds.

# %%
table(analysis.intervals(frame, metric=METRICS[1:2], by=keys, statistic="iqm"))

# %% [markdown]
# ## Ranks
# Over streams (Demšar 2006): within each, the means over the seeds that every configuration has are
# ranked. Where there is only one stream, over its seeds. Configurations under one bar are not told
# apart.

# %%
try:
    ranks = analysis.rank_configurations(frame, by=keys)
    print(ranks.note())
    show(analysis.critical_difference_diagram(ranks), "critical_difference")
except DataError as reason:
    print(reason)

# %% [markdown]
# ## Best against second
# The two runs with equal seeds whose configurations came first and second: what differs in their
# configuration, in their numbers, and example by example. Runs that were tested on other examples
# are not compared; the reason is printed.

# %%
SEEDS = ["stream", "seed_order", "seed_init", "seed_data"]
runs = analysis.summary(frame).merge(jobs[["group", "run", "folder"]], on=["group", "run"])
labels = configuration_labels(runs, method_keys(runs, keys))
try:
    scores = analysis.score_table(frame, metric="average_accuracy_routed", by=keys)
    best = scores.groupby(level="stream").mean().mean().sort_values(ascending=False).index
    if len(best) > 1:
        first, second = (runs[labels == name][[*SEEDS, "folder"]] for name in best[:2])
        pairs = first.merge(second, on=SEEDS)
        if len(pairs):
            both = pairs.iloc[0]
            print(analysis.compare_runs(both["folder_x"], both["folder_y"]).to_text(most=5))
except DataError as reason:
    print(reason)
