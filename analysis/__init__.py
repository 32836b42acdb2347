"""Read what runs left behind: tidy frames, statistics, tables and figures. Never imports torch.

    import analysis
    frame = analysis.load_runs("runs")
    analysis.summary(frame)

Names load on first use, so ``import analysis`` costs nothing and only figures import matplotlib.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for editors and type checkers; at run time, __getattr__
    from analysis.compare import compare_runs as compare_runs
    from analysis.figures import abstention as abstention
    from analysis.figures import accuracy_against_parameters as accuracy_against_parameters
    from analysis.figures import accuracy_matrices as accuracy_matrices
    from analysis.figures import anytime_curve as anytime_curve
    from analysis.figures import critical_difference_diagram as critical_difference_diagram
    from analysis.figures import forgetting_bars as forgetting_bars
    from analysis.figures import router_confusion as router_confusion
    from analysis.figures import routing_margins as routing_margins
    from analysis.figures import similarity_map as similarity_map
    from analysis.figures import stability_plasticity as stability_plasticity
    from analysis.figures import sweep_overview as sweep_overview
    from analysis.folders import load_config as load_config
    from analysis.folders import load_predictions as load_predictions
    from analysis.folders import load_stream as load_stream
    from analysis.folders import run_folders as run_folders
    from analysis.load import load_run_table as load_run_table
    from analysis.load import load_runs as load_runs
    from analysis.load import varying_keys as varying_keys
    from analysis.paper import paper_table as paper_table
    from analysis.ranks import critical_difference as critical_difference
    from analysis.ranks import friedman as friedman
    from analysis.ranks import wilcoxon as wilcoxon
    from analysis.samples import abstention_curve as abstention_curve
    from analysis.samples import misrouted as misrouted
    from analysis.samples import routing_confusion as routing_confusion
    from analysis.samples import task_similarity as task_similarity
    from analysis.seeds import example_pairs as example_pairs
    from analysis.seeds import intervals as intervals
    from analysis.seeds import paired_tests as paired_tests
    from analysis.seeds import rank_configurations as rank_configurations
    from analysis.seeds import score_table as score_table
    from analysis.statistics import bootstrap_interval as bootstrap_interval
    from analysis.statistics import compare_examples as compare_examples
    from analysis.statistics import holm as holm
    from analysis.statistics import interquartile_mean as interquartile_mean
    from analysis.statistics import mcnemar as mcnemar
    from analysis.statistics import paired_permutation as paired_permutation
    from analysis.statistics import smallest_p as smallest_p
    from analysis.tables import accuracy_matrix as accuracy_matrix
    from analysis.tables import aggregate as aggregate
    from analysis.tables import costs as costs
    from analysis.tables import error_decomposition as error_decomposition
    from analysis.tables import forgetting_per_task as forgetting_per_task
    from analysis.tables import forgetting_split as forgetting_split
    from analysis.tables import summary as summary
    from analysis.tables import to_markdown as to_markdown

_HOME = {
    "load": ("load_run_table", "load_runs", "varying_keys"),
    "folders": ("load_config", "load_predictions", "load_stream", "run_folders"),
    "tables": (
        "accuracy_matrix",
        "aggregate",
        "costs",
        "error_decomposition",
        "forgetting_per_task",
        "forgetting_split",
        "summary",
        "to_markdown",
    ),
    "samples": ("abstention_curve", "misrouted", "routing_confusion", "task_similarity"),
    "statistics": (
        "bootstrap_interval",
        "compare_examples",
        "holm",
        "interquartile_mean",
        "mcnemar",
        "paired_permutation",
        "smallest_p",
    ),
    "ranks": ("critical_difference", "friedman", "wilcoxon"),
    "seeds": ("example_pairs", "intervals", "paired_tests", "rank_configurations", "score_table"),
    "paper": ("paper_table",),
    "compare": ("compare_runs",),
    "figures": (
        "accuracy_against_parameters",
        "accuracy_matrices",
        "anytime_curve",
        "abstention",
        "critical_difference_diagram",
        "forgetting_bars",
        "router_confusion",
        "routing_margins",
        "similarity_map",
        "stability_plasticity",
        "sweep_overview",
    ),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> Any:  # noqa: ANN401 (a function of any type)
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'analysis' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"analysis.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
