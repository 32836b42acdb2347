"""cl-peft wandb-report: the report's specification, and what is sent to the service."""

import json
import sys

import pytest
from fake_run import config, write_run

from cl_peft import presentation
from cl_peft.cli import main
from cl_peft.tracking import _series
from cl_peft.view import ResultView

wr = pytest.importorskip("wandb_workspaces.reports.v2")
from wandb_workspaces.reports.v2 import interface  # noqa: E402 (after the check)


@pytest.fixture
def group(tmp_path):
    root = tmp_path / "runs" / "it's a group"
    for router in ("ridge", "prototype"):
        for seed in (0, 1):
            settings = config(router__name=router, seed__init=seed, group=root.name)
            write_run(root / f"{router}-{seed}", tasks=3, seed=seed, cfg=settings)
    return root


@pytest.fixture
def no_service(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the service was called")

    for name in ("_get_api", "execute_graphql"):
        monkeypatch.setattr(interface, name, refuse)


@pytest.fixture
def spec(group, no_service, capsys):
    arguments = ["wandb-report", str(group), "--entity", "team", "--project", "p", "--dry-run"]
    assert main(arguments) == 0
    return json.loads(capsys.readouterr().out)


def grids(spec):
    return [block["metadata"] for block in spec["blocks"] if block["type"] == "panel-grid"]


def panels(spec):
    return [panel for grid in grids(spec) for panel in grid["panelBankSectionConfig"]["panels"]]


def names(node):
    """Every metric that a panel asks for."""
    if isinstance(node, dict):
        for key in ("metrics", "xAxis", "yAxis"):
            value = node.get(key)
            yield from [value] if isinstance(value, str) else value or []
        for value in node.values():
            yield from names(value)
    elif isinstance(node, list):
        for value in node:
            yield from names(value)


def test_specification(spec):
    assert (spec["entity"], spec["project"], spec["title"]) == (
        *("team", "p"),
        "it's a group: comparison",
    )
    assert "4 runs. Averaged over seeds by router.name." in spec["description"]
    kinds = [panel["viewType"] for panel in panels(spec)]
    assert kinds == [
        *["Run History Line Plot"] * 4,
        *["Bar Chart"] * 2,
        *["Scatter Plot"] * 2,
        *("Run Comparer", "Media Browser"),
    ]
    titles = [panel["config"].get("chartTitle") for panel in panels(spec)]
    assert titles[:4] == [
        "Anytime accuracy",
        "Forgetting",
        "Forgetting: module drift and routing drift",
        "Errors: lost and gained by routing",
    ]
    for panel in panels(spec)[:4]:
        assert panel["config"]["xAxis"] == "task/idx"
        assert len(panel["config"]["metrics"]) == 2
    assert panels(spec)[8]["config"]["diffOnly"] == "split"


def test_run_sets_hold_this_group_and_average_over_seeds(spec):
    averaged, *single = [grid["runSets"][0] for grid in grids(spec)]
    for run_set in (averaged, *single):
        (condition,) = run_set["filters"]["filters"]
        assert condition["key"] == {"section": "run", "name": "group"}
        assert (condition["op"], condition["value"]) == ("=", "it's a group")
    # nested configuration: W&B keeps router.name as router.value.name
    assert averaged["grouping"] == [{"section": "config", "name": "router.value.name"}]
    assert [run_set["grouping"] for run_set in single] == [[], []]


def test_panels_do_not_overlap(spec):
    for grid in grids(spec):
        boxes = [panel["layout"] for panel in grid["panelBankSectionConfig"]["panels"]]
        cells = [
            (x, y)
            for box in boxes
            for x in range(box["x"], box["x"] + box["w"])
            for y in range(box["y"], box["y"] + box["h"])
        ]
        assert len(cells) == len(set(cells))
        assert max(x for x, _ in cells) < 24


def test_names_are_those_that_the_tracker_logs(spec, group):
    view = ResultView.from_folder(group / "ridge-0")
    logged = {_series(row) for row in view.results.to_dict("records")} | {"task/idx"}
    summary = presentation._summary(view)
    asked = set(names(panels(spec)))
    of_summary = {n.removeprefix("summary:") for n in asked if n.startswith("summary:")}
    series = {n for n in asked if not n.startswith("summary:")}
    assert len(series) == 11
    assert series <= logged, series - logged
    assert of_summary == {"module_parameters", "router_state_bytes", "routed/average_accuracy"}
    assert of_summary <= set(summary)
    media = panels(spec)[9]["config"]["mediaKeys"]
    assert media == [f"figures/{name}" for name in presentation.write(group / "ridge-0").figures]


def test_several_groups(group, no_service, capsys):
    settings = config(group="other")
    write_run(group.parent / "other" / "run", tasks=3, cfg=settings)
    assert main(["wandb-report", str(group.parent), "--entity", "team", "--dry-run"]) == 0
    spec = json.loads(capsys.readouterr().out)
    text = json.dumps(grids(spec)[0]["runSets"][0]["filters"])
    assert '"it\'s a group"' in text
    assert '"other"' in text


class Service:
    """Answers what saving asks for."""

    default_entity = "team"
    client = None

    def __init__(self):
        self.asked = []

    def projects(self, entity):
        return [type("Project", (), {"name": "p"})]

    def execute(self, api, query, variables):
        self.asked.append(variables)
        if "spec" not in variables:
            return {"project": {"internalId": "1"}}
        keys = ("id", "name", "description", "displayName")
        view = {
            **{key: variables[key] for key in keys},
            "id": "abc",
            "type": "runs",
            "project": {"id": "1", "name": "p", "entityName": "team"},
            "spec": variables["spec"],
            "createdAt": None,
            "updatedAt": None,
        }
        return {"upsertView": {"view": view}}


def test_saving_sends_the_specification_once(group, spec, monkeypatch, capsys):
    service = Service()
    monkeypatch.setattr(interface, "_get_api", lambda: service)
    monkeypatch.setattr(interface, "execute_graphql", service.execute)
    monkeypatch.setattr(interface, "get_app_url", lambda api: "https://wandb.example")
    assert main(["wandb-report", str(group), "--entity", "team", "--project", "p"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("https://wandb.example/team/p/reports/")
    (sent,) = [asked for asked in service.asked if "spec" in asked]
    assert (sent["entityName"], sent["projectName"]) == ("team", "p")
    kinds = [panel["viewType"] for panel in panels(json.loads(sent["spec"]))]
    assert kinds == [panel["viewType"] for panel in panels(spec)]
    run_set = grids(json.loads(sent["spec"]))[0]["runSets"][0]
    assert (run_set["project"]["entityName"], run_set["project"]["name"]) == ("team", "p")


def test_a_service_that_refuses_is_said_in_words(group, monkeypatch, capsys):
    def refuse(*args):
        raise ValueError("permission\ndenied")

    monkeypatch.setattr(interface, "execute_graphql", refuse)
    monkeypatch.setattr(interface, "_get_api", lambda: None)
    assert main(["wandb-report", str(group), "--entity", "team"]) == 2
    err = capsys.readouterr().err
    assert "W&B did not save the report: permission denied" in err
    assert "--dry-run" in err


def test_without_the_package(group, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb_workspaces.reports.v2", None)
    assert main(["wandb-report", str(group), "--entity", "team", "--dry-run"]) == 2
    assert "pip install 'cl_peft[report]'" in capsys.readouterr().err
