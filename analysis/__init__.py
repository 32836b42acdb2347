"""Read what runs left behind: tidy frames, tables and figures. Never imports torch.

    import analysis
    frame = analysis.load_runs("runs")
    analysis.summary(frame)

Names load on first use, so ``import analysis`` costs nothing and only figures import matplotlib.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from analysis.figures import accuracy_matrices as accuracy_matrices
    from analysis.figures import anytime_curve as anytime_curve
    from analysis.load import load_config as load_config
    from analysis.load import load_predictions as load_predictions
    from analysis.load import load_runs as load_runs
    from analysis.load import load_stream as load_stream
    from analysis.load import run_folders as run_folders
    from analysis.tables import accuracy_matrix as accuracy_matrix
    from analysis.tables import aggregate as aggregate
    from analysis.tables import error_decomposition as error_decomposition
    from analysis.tables import forgetting_split as forgetting_split
    from analysis.tables import misrouted as misrouted
    from analysis.tables import routing_confusion as routing_confusion
    from analysis.tables import summary as summary
    from analysis.tables import to_markdown as to_markdown

_HOME = {
    "load": ("load_config", "load_predictions", "load_runs", "load_stream", "run_folders"),
    "tables": (
        "accuracy_matrix",
        "aggregate",
        "error_decomposition",
        "forgetting_split",
        "misrouted",
        "routing_confusion",
        "summary",
        "to_markdown",
    ),
    "figures": ("accuracy_matrices", "anytime_curve"),
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
