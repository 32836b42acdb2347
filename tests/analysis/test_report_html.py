"""The page about a sweep: its numbers, traced to the predictions by a computation of their own."""

import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from report_page import Page, finished, mean, numbers, outcomes, printed, settings

from analysis.report import render, write_report
from cl_peft.errors import DataError

HOSTILE = "</script><img src=x onerror=alert(1)>&\"'"


@pytest.fixture(scope="module")
def module_write_run(request):
    """What the fixture write_run gives, which lives for one test only."""
    conftest = str(Path(__file__).with_name("conftest.py"))
    return request.config.pluginmanager.getplugin(conftest)._write_run


@pytest.fixture(scope="module")
def folder(tmp_path_factory, module_write_run):
    """Twelve finished runs of four configurations, one that failed, one that was killed."""
    root = tmp_path_factory.mktemp("report") / "grid"
    for learner in ("isolated", "sequential"):
        for rank in (4, 16):
            for seed in range(3):
                module_write_run(
                    root / f"{learner}-{rank}-{seed}", learner=learner, rank=rank, seed=seed
                )
    failed = module_write_run(root / "failed", seed=5, done=1, state="failed", rank=4)
    status = json.loads((failed / "status.json").read_text())
    status["error"] = f"DivergedError: loss is nan {HOSTILE}\nsecond line"
    (failed / "status.json").write_text(json.dumps(status))
    module_write_run(root / "killed", seed=6, done=2, state="running", rank=4)
    return root


@pytest.fixture(scope="module")
def page(folder):
    return Page(render(folder))


# ---------------------------------------------------------------- numbers


def test_summary_counts_the_folders(page, folder):
    states = [json.loads((r / "status.json").read_text())["state"] for r in folder.iterdir()]
    assert page.cards["runs"] == str(len(states)) == "14"
    assert page.cards["finished"] == str(states.count("finished")) == "12"
    assert page.cards["failed"] == str(states.count("failed")) == "1"
    assert page.cards["interrupted"] == str(states.count("running")) == "1"  # nobody runs it
    seeds = {tuple(settings(r)["seed"].values()) for r in folder.iterdir()}
    assert page.cards["seeds"] == str(len(seeds)) == "5"
    assert page.cards["stream"] == "newsgroups"
    assert page.cards["tasks"] == "4"


ROUTED = {
    "average accuracy oracle (%) ↑": ("average_accuracy", "oracle"),
    "average accuracy routed (%) ↑": ("average_accuracy", "routed"),
    "average incremental accuracy routed (%) ↑": ("average_incremental_accuracy", "routed"),
    "learning accuracy routed (%) ↑": ("learning_accuracy", "routed"),
    "forgetting routed (%) ↓": ("forgetting", "routed"),
    "backward transfer routed (%) ↑": ("backward_transfer", "routed"),
}
ERRORS = {
    "router accuracy (%) ↑": ("router_accuracy", "none"),
    "lost by routing (%) ↓": ("routing_loss", "none"),
    "gained by routing (%)": ("misroute_luck", "none"),
    "forgetting module drift (%) ↓": ("forgetting_module_drift", "none"),
    "forgetting routing drift (%) ↓": ("forgetting_routing_drift", "none"),
}


@pytest.mark.parametrize(
    ("title", "columns"),
    [("Accuracy and forgetting", ROUTED), ("Where errors come from", ERRORS)],
)
def test_tables_with_intervals(page, folder, title, columns):
    head, *rows = page.tables[title]
    names = [text for text, _, _ in head]
    assert names == ["learner", "module.rank", *columns]
    groups = finished(folder)
    assert sorted((row[0][0], int(row[1][0])) for row in rows) == sorted(groups)
    by_run = {run: numbers(run) for runs in groups.values() for run in runs}
    for k, (heading, key) in enumerate(columns.items(), start=2):
        values = {config: [by_run[r][key] for r in runs] for config, runs in groups.items()}
        means = {config: mean(part) for config, part in values.items()}
        sign = 1 if heading.endswith("↑") else -1
        order = sorted({round(100 * sign * v, 1) + 0.0 for v in means.values()}, reverse=True)
        best = None
        for row in rows:
            config = (row[0][0], int(row[1][0]))
            text, classes, title_ = row[k]
            # three seeds: all 27 resamples, equally likely
            draws = [mean(d) for d in itertools.product(values[config], repeat=3)]
            low, high = np.quantile(draws, [0.025, 0.975], method="inverted_cdf")
            expected = f"{printed(means[config])} [{printed(low)}, {printed(high)}]"
            assert text.replace("†", "") == expected, (heading, config)
            rank = order.index(round(100 * sign * means[config], 1) + 0.0)
            marked = len(order) > 1 and rank < 2
            assert ("best" in classes) == (marked and rank == 0)
            assert ("second" in classes) == (marked and rank == 1)
            assert title_.startswith("n = 3")
            if best is None and "best" in classes:
                best = config
        if best is not None:
            _check_p(rows, k, values, best)


def _check_p(rows, k, values, best):
    """Sign flips of the three differences from the best, Holm over the three comparisons."""
    raw = {}
    for config, part in values.items():
        if config != best:
            d = [a - b for a, b in zip(values[best], part, strict=True)]
            if max(map(abs, d)) < 1e-12:
                return  # equal but for the last bits: which sign pattern is extreme is noise
            sums = [
                abs(sum(s * x for s, x in zip(signs, d, strict=True)))
                for signs in itertools.product((1, -1), repeat=3)
            ]
            raw[config] = mean(s >= abs(sum(d)) - 1e-12 for s in sums)
    expected, previous = {}, 0.0
    for place, config in enumerate(sorted(raw, key=raw.get)):
        previous = max(previous, min(1.0, (len(raw) - place) * raw[config]))
        expected[config] = previous
    for row in rows:
        config = (row[0][0], int(row[1][0]))
        shown = re.search(r"p = ([\d.e-]+) after Holm", row[k][2])
        assert (shown is None) == (config == best)
        if shown is not None:
            assert float(shown[1]) == pytest.approx(expected[config], rel=0.01)
            assert ("†" in row[k][0]) == (expected[config] < 0.05)


def test_sizes(page, folder):
    _, *rows = page.tables["Size"]
    assert len(rows) == 4
    for learner, rank, trained, stored, router in (tuple(c[0] for c in row) for row in rows):
        one = 9216 * int(rank) + 770
        tasks = 4 if learner == "isolated" else 1  # a single module keeps the last one only
        assert (trained, stored, router) == (f"{one:,}", f"{tasks * one:,}", "1,024")


def test_every_number_of_every_run(page, folder):
    assert {run["run"] for run in page.data["runs"]} == {path.name for path in folder.iterdir()}
    for run in page.data["runs"]:
        path = folder / run["run"]
        expected = numbers(path)
        shown = {}
        for metric, *values in run["metrics"]:
            for routing, value in zip(("oracle", "routed", "none"), values, strict=True):
                shown[metric, routing] = math.nan if value is None else value
        for key, value in expected.items():
            assert shown[key] == pytest.approx(value, abs=1e-12, nan_ok=True), (run["run"], key)
        table = pd.read_parquet(sorted((path / "tasks").glob("*/results.parquet"))[-1])
        sizes = [n for n, r in shown if n.endswith(("_parameters", "_bytes", "_modules"))]
        assert len(set(sizes)) == 5
        for name in set(sizes):
            assert shown[name, "none"] == table.loc[table["metric"] == name, "value"].item()
        # nothing else is shown
        undefined = {key for key, value in shown.items() if math.isnan(value)} - set(expected)
        assert set(shown) - undefined == set(expected) | {(name, "none") for name in sizes}


def test_matrices_and_their_counts(page, folder):
    for run in page.data["runs"]:
        matrices, rows, last = outcomes(folder / run["run"])
        done = len(matrices["oracle"])
        assert run["done"] == done
        assert [len(row) for row in run["cells"]] == list(range(1, done + 1))
        for t, i in itertools.product(range(done), repeat=2):
            if i > t:
                continue
            here = [r for r in rows if (r["after_task"], r["eval_task"]) == (t + 1, i + 1)]
            oracle = [r["oracle_prediction"] == r["label"] for r in here]
            routed = [r["routed_prediction"] == r["label"] for r in here]
            assert dict(zip(page.data["cell"], run["cells"][t][i], strict=True)) == {
                "n": len(here),
                "oracle_right": sum(oracle),
                "routed_right": sum(routed),
                "route_right": sum(r["routed_task"] == i + 1 for r in here),
                "lost": sum(o and not r for o, r in zip(oracle, routed, strict=True)),
                "lucky": sum(r and not o for o, r in zip(oracle, routed, strict=True)),
            }
        confusion = np.zeros((done, done + 1), dtype=int)
        for row in last:
            confusion[row["eval_task"] - 1, row["routed_task"] - 1] += 1
        assert run["confusion"] == confusion.tolist()


def test_misrouted_examples(page, folder):
    names = page.data["example"]
    seen = 0
    for run in page.data["runs"]:
        _, _, last = outcomes(folder / run["run"])
        wrong = [row for row in last if row["routed_task"] != row["eval_task"]]
        wrong.sort(key=lambda row: -row["margin"])
        assert run["examples"]["total"] == len(wrong) == len(run["examples"]["rows"])
        for shown, row in zip(run["examples"]["rows"], wrong, strict=True):
            assert shown == pytest.approx([row[name] for name in names], rel=1e-5)
        seen += len(wrong)
    assert seen > 100
    classes = page.data["streams"][0]["class_names"]
    assert classes == [f"topic {c}" for c in range(8)]


def test_table_of_runs(page, folder):
    _, *rows = page.tables["All runs"]
    assert len(rows) == 14
    for run, _, seeds, state, tasks, time, *values in ([c[0] for c in row] for row in rows):
        path = folder / ("failed" if run.startswith("failed") else run)
        found = numbers(path)
        status = json.loads((path / "status.json").read_text())
        assert state == ("interrupted" if path.name == "killed" else status["state"])
        assert tasks == f"{status['tasks_done']}/4"
        assert (time, seeds) == ("1.5 s", ".".join(map(str, settings(path)["seed"].values())))
        keys = [
            *(("average_accuracy", "oracle"), ("average_accuracy", "routed")),
            *(("router_accuracy", "none"), ("forgetting", "routed")),
        ]
        for key, shown in zip(keys, values, strict=True):
            value = found[key]
            assert (shown == "–") == math.isnan(value)
            assert shown == "–" or float(shown) == pytest.approx(100 * value, abs=0.0501)
    error = next(row[0][0] for row in rows if row[0][0].startswith("failed"))
    assert error == f"failedDivergedError: loss is nan {HOSTILE}"


def test_configuration_differences(page, folder):
    _, *rows = page.tables["Configuration"]
    found, key = {}, None
    for name, value, runs in ([c[0] for c in row] for row in rows if len(row) == 3):
        key = name or key
        count = re.match(r"(?:all )?(\d+)", runs)[1]
        found.setdefault(key, {})[value] = runs.removeprefix(count)
    configs = {run.name: settings(run) for run in folder.iterdir()}
    assert sorted(list(found)[:2]) == ["learner.name", "module.rank"]
    assert list(found)[2:] == ["seed.order", "seed.init", "seed.data"]
    for key, values in found.items():
        axis, name = key.split(".")
        for value, runs in values.items():
            expected = sorted(r for r, c in configs.items() if str(c[axis][name]) == value)
            assert runs == "".join(expected)
    common = {row[0][0]: row[1][0] for row in rows if len(row) == 2}
    assert common["router.name"] == "ridge"
    assert common["router.alpha"] == "none"
    assert not set(common) & set(found)


def test_provenance(page):
    _, *rows = page.tables["Provenance"]
    assert [[c[0] for c in row] for row in rows] == [
        ["git", "0" * 40, "all 14"],
        ["dirty", "False".lower(), "all 14"],
    ]


# ---------------------------------------------------------------- the page itself


def test_nothing_is_loaded_and_no_string_becomes_markup(page, folder):
    # what an address could be: fragments of this page only
    assert all(link.startswith("#") for link in page.links)
    assert not re.search(r"(?:src|@import|url\()\s*=?\s*['\"]?(?:https?:)?//", page.text)
    assert "<img" not in page.text
    assert len(page.scripts) == 2
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', page.text)[1]
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert page.data["runs"][0]["error"].startswith(f"DivergedError: loss is nan {HOSTILE}")


def test_names_of_folders_and_classes_are_text(tmp_path, module_write_run):
    group = tmp_path / "gr<b>oup & co"
    run = module_write_run(group / "run<i>'\"", seed=1)
    stream = json.loads((run / "stream.json").read_text())
    stream["class_names"][0] = HOSTILE
    (run / "stream.json").write_text(json.dumps(stream))
    page = Page(render(group))
    assert page.data["streams"][0]["class_names"][0] == HOSTILE
    assert page.data["runs"][0]["run"] == "run<i>'\""
    assert "<i>" not in page.text
    assert "<b>oup" not in page.text


def test_figures_stand_inside(page):
    figures = re.findall(r"<figcaption><b>([^<]+)\.</b>", page.text)
    assert figures[:5] == [
        "Sweep overview",
        "Anytime accuracy",
        "Stability and plasticity",
        "Accuracy against parameters",
        "Critical difference",
    ]
    assert len([title for title in figures if title.startswith("Forgetting per task: ")]) == 4
    assert page.text.count("<svg") == 9
    # every reference inside a figure finds its target
    targets = re.findall(r'(?:href="#|url\(#)([^")]+)', page.text)
    assert set(targets) <= set(page.ids)
    assert len([t for t in targets if t not in ("run", "runs")]) > 100


def test_equal_folders_equal_pages_and_no_torch(folder, page, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "elsewhere" / "grid")
    code = (
        "import sys; from analysis.report import render; "
        "sys.stdout.reconfigure(encoding='utf-8'); sys.stdout.write(render(sys.argv[1])); "
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(copy)],
        env={**os.environ, "PYTHONHASHSEED": "1"},
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.decode() == page.text


def test_damaged_runs_are_named_and_left_out(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "grid")
    (copy / "isolated-4-0" / "results.parquet").write_bytes(b"no")
    (copy / "isolated-4-1" / "predictions.parquet").write_bytes(b"no")
    (copy / "isolated-4-2" / "config.yaml").write_text("a: [")
    page = Page(render(copy))
    left_out = page.text[page.text.index('id="problems"') :][:2000]
    for name in ("isolated-4-0/results", "isolated-4-1/predictions", "isolated-4-2/config"):
        assert name in left_out
    assert str(tmp_path) not in page.text
    assert page.cards["runs"] == "13"
    runs = {run["run"]: run for run in page.data["runs"]}
    assert runs["isolated-4-1"]["examples"] is None  # its matrices stand in another file
    assert len(runs["isolated-4-1"]["cells"]) == 4
    assert runs["isolated-4-0"]["cells"] == []


def test_time_is_what_the_status_table_says(tmp_path, module_write_run):
    run = module_write_run(tmp_path / "g" / "run")
    (run / "timing.json").write_text(json.dumps({"total_seconds": 42.0, "tasks": []}))
    assert Page(render(tmp_path / "g")).tables["All runs"][1][5][0] == "42.0 s"


def test_limits(folder, page):
    every = {run["run"]: run["examples"]["rows"] for run in page.data["runs"]}
    page = Page(render(folder, examples=2, most=3))
    assert [len(run["examples"]["rows"]) for run in page.data["runs"]] == [0, 2, 2]
    assert page.data["runs"][1]["examples"]["total"] > 2
    for run in page.data["runs"]:  # the most certain mistakes are the ones that stay
        assert run["examples"]["rows"] == every[run["run"]][:2]
    assert "The first 3 runs; 11 more" in page.text
    assert len(page.tables["All runs"]) == 15


def test_a_single_unfinished_run(tmp_path, module_write_run):
    module_write_run(tmp_path / "g" / "run", done=0, state="failed")
    page = Page(render(tmp_path / "g"))
    assert "No run is finished" in page.text
    assert page.tables["All runs"][1][4][0] == "0/4"
    assert page.data["runs"][0]["cells"] == []


def test_reference(folder):
    page = Page(render(folder, reference="isolated, rank 16"))
    assert "differs from isolated, rank 16" in page.text
    with pytest.raises(DataError, match="No configuration is called 'nobody'"):
        render(folder, reference="nobody")


def test_write_report(folder, page, tmp_path):
    target = write_report(folder, tmp_path / "new" / "page.html")
    assert target.read_text(encoding="utf-8") == page.text
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no run to report"):
        write_report(tmp_path / "empty", target)
    assert target.read_text(encoding="utf-8") == page.text
