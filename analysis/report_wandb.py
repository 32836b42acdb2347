"""A W&B report that compares the runs of a group, built in code with wandb-workspaces.

The names of its metrics are those under which :mod:`cl_peft.tracking` logs. Only :func:`save` needs
an account; :func:`specification` shows what would be saved.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from analysis.load import load_run_table, varying_keys
from cl_peft.errors import DataError, UserError

if TYPE_CHECKING:
    import wandb_workspaces.reports.v2 as wr

AXIS = "task/idx"
#: Series over tasks: title, unit, metrics.
CURVES = (
    (
        "Anytime accuracy",
        "average accuracy over tasks seen",
        ("eval/routed/average_accuracy", "eval/oracle/average_accuracy"),
    ),
    ("Forgetting", "forgetting", ("eval/routed/forgetting", "eval/oracle/forgetting")),
    (
        "Forgetting: module drift and routing drift",
        "forgetting",
        ("eval/forgetting_module_drift", "eval/forgetting_routing_drift"),
    ),
    (
        "Errors: lost and gained by routing",
        "share of test samples",
        ("eval/routing_loss", "eval/misroute_luck"),
    ),
)
#: The last values of series: title, metrics.
BARS = (
    (
        "Final accuracy over samples: oracle - lost + gained = routed",
        (
            "eval/oracle/average_accuracy_micro",
            "eval/routing_loss",
            "eval/misroute_luck",
            "eval/routed/average_accuracy_micro",
        ),
    ),
    (
        "Final forgetting: module drift + routing drift = routed",
        (
            "eval/forgetting_module_drift",
            "eval/forgetting_routing_drift",
            "eval/routed/forgetting",
        ),
    ),
)
#: Names in the runs' summary.
SCORE = "routed/average_accuracy"
#: What accuracy is drawn against.
SIZES = {"module_parameters": "parameters per module", "router_state_bytes": "router state, bytes"}


def build(folder: str | Path, *, entity: str, project: str, offline: bool = False) -> wr.Report:
    """Build the report; nothing is sent.

    Args:
        folder: A group's run folders: they say which groups and which varying keys there are.
        entity: W&B user or team.
        project: W&B project that holds the runs.
        offline: Leave the project of the run sets to the report's own, which needs no look-up when
            the report is turned into JSON.

    Raises:
        DataError: No run in the folder.
        UserError: wandb-workspaces is not installed.
    """
    runs = load_run_table(folder)
    if runs.empty:
        raise DataError(f"There is no run in {folder}; give a group's folder, runs/GROUP.")
    wr = _workspaces()
    groups = sorted(set(runs["group"].astype(str)))
    keys = [key for key in varying_keys(runs) if "." in key]
    names = [f"Metric('Group') == {name!r}" for name in groups]
    where = {"filters": " or ".join(names)}
    if not offline:
        where |= {"entity": entity, "project": project}
    order = [wr.OrderBy(wr.SummaryMetric(SCORE))]
    averaged = wr.Runset(
        name="averaged over seeds",
        groupby=[f"config.{key}" for key in keys] or ["run.group"],
        order=order,
        **where,
    )
    single = wr.Runset(name="single runs", order=order, **where)
    title = f"{', '.join(groups)}: comparison"
    text = (
        f"{len(runs)} runs. Averaged over seeds by {', '.join(keys)}."
        if keys
        else f"{len(runs)} runs, alike but for their seeds."
    )
    return wr.Report(
        project=project,
        entity=entity,
        title=title if len(title) <= 128 else f"{title[:125]}...",  # what W&B allows
        description=text,
        width="fluid",
        blocks=[
            wr.H1("Accuracy and forgetting"),
            wr.P("Oracle: each sample's true task is given; routed: the router chooses it."),
            wr.PanelGrid(runsets=[averaged], panels=[*_curves(wr), *_bars(wr)]),
            wr.H1("Accuracy against parameters"),
            wr.PanelGrid(runsets=[single], panels=_scatters(wr)),
            wr.H1("Run by run"),
            wr.PanelGrid(
                runsets=[single],
                panels=[
                    wr.RunComparer(diff_only="split", layout=wr.Layout(w=24, h=12)),
                    wr.MediaBrowser(
                        title="Accuracy matrices",
                        media_keys=["figures/accuracy_matrix"],
                        num_columns=2,
                        layout=wr.Layout(y=12, w=24, h=12),
                    ),
                ],
            ),
        ],
    )


def specification(report: wr.Report) -> str:
    """What would be saved, as JSON. Build the report with ``offline=True`` for that."""
    model = report._to_model()  # the package has no public name for it
    spec: dict[str, Any] = {
        "title": model.display_name,
        "description": model.description,
        "entity": report.entity,
        "project": report.project,
        **model.spec.model_dump(by_alias=True, exclude_none=True, mode="json"),
    }
    return json.dumps(spec, indent=1)


def save(report: wr.Report) -> str:
    """Save the report in W&B.

    Returns:
        Its address.

    Raises:
        UserError: W&B refused, or there is no login or no connection.
    """
    try:
        report.save()
    except Exception as error:  # what the service's client raises is its own business
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"W&B did not save the report: {reason}\n"
            "  It needs a login (wandb login, or WANDB_API_KEY) with access to "
            f"{report.entity}/{report.project}; --dry-run shows the report without."
        ) from error
    return str(report.url)


def _curves(wr: Any) -> list[Any]:  # noqa: ANN401 (the module is imported lazily)
    return [
        wr.LinePlot(
            title=title,
            x=AXIS,
            y=list(metrics),
            title_x="tasks learned",
            title_y=unit,
            groupby_aggfunc="mean",
            groupby_rangefunc="stderr",
            layout=wr.Layout(x=12 * (k % 2), y=8 * (k // 2), w=12, h=8),
        )
        for k, (title, unit, metrics) in enumerate(CURVES)
    ]


def _bars(wr: Any) -> list[Any]:  # noqa: ANN401
    below = 8 * -(-len(CURVES) // 2)
    return [
        wr.BarPlot(
            title=title,
            metrics=list(metrics),
            groupby_aggfunc="mean",
            groupby_rangefunc="stderr",
            layout=wr.Layout(x=12 * k, y=below, w=12, h=10),
        )
        for k, (title, metrics) in enumerate(BARS)
    ]


def _scatters(wr: Any) -> list[Any]:  # noqa: ANN401
    return [
        wr.ScatterPlot(
            title=f"Final routed accuracy against {text}",
            x=wr.SummaryMetric(name),
            y=wr.SummaryMetric(SCORE),
            layout=wr.Layout(x=12 * k, w=12, h=9),
        )
        for k, (name, text) in enumerate(SIZES.items())
    ]


def _workspaces() -> Any:  # noqa: ANN401
    try:
        import wandb_workspaces.reports.v2 as wr
    except ImportError as error:
        raise UserError(
            "W&B reports need the package wandb-workspaces: pip install 'cl_peft[report]'."
        ) from error
    return wr
