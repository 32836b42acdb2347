"""Which way numbers are better, and that everything asks the one place that knows."""

import pytest

import analysis
from analysis.directions import direction, heading, required_direction
from cl_peft.errors import DataError


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        ("average_accuracy_routed", 1),
        ("average_accuracy_micro_oracle", 1),
        ("average_incremental_accuracy_routed", 1),
        ("learning_accuracy_routed", 1),
        ("router_accuracy", 1),
        ("backward_transfer_t_routed", 1),
        ("forgetting_routed", -1),
        ("forgetting_module_drift", -1),
        ("routing_loss", -1),
        ("misroute_luck", 0),
        ("stored_parameters", 0),
        ("module_bytes", 0),
        ("seconds", 0),
    ],
)
def test_directions(metric, expected):
    assert direction(metric) == expected
    arrow = {1: "↑", -1: "↓", 0: ""}[expected]
    assert heading(metric).endswith(arrow)
    assert ("↑" in heading(metric)) + ("↓" in heading(metric)) == abs(expected)


def test_every_number_of_a_run_has_a_known_direction(sweep):
    frame = analysis.load_runs(sweep)
    names = [c for c in analysis.summary(frame).columns if c not in frame.columns]
    without = {name for name in names if not direction(name)}
    assert without == {
        *("tasks", "misroute_luck", "module_parameters", "head_parameters", "module_bytes"),
        *("router_state_bytes", "bank_modules"),
    }


def test_nothing_is_ranked_by_what_has_no_direction(grid):
    frame = analysis.load_runs(grid, config="varying")
    with pytest.raises(DataError, match="module_bytes is neither better high nor better low"):
        analysis.rank_configurations(frame, metric="module_bytes")
    with pytest.raises(DataError, match="ranks nothing"):
        required_direction("stored_parameters")
    table = analysis.paper_table(frame, metric=["stored_parameters", "misroute_luck"])
    assert (table.cells["rank"] == 0).all()
    assert "Bold" not in " ".join(table.notes)
    assert "| stored parameters | gained by routing (%) |" in table.to_markdown()
