"""The page about a sweep in a real browser: what a person sees, points at and clicks.

Needs Chromium: on the PATH, named by CL_PEFT_BROWSER, or installed by ``playwright install``.
"""

import json
import os
import shutil
from pathlib import Path

import pandas as pd
import pytest

from analysis.report import write_report

sync_api = pytest.importorskip("playwright.sync_api")

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
HOSTILE = "</script><img src=x onerror=alert(1)>&\"'"
SCREENS = [(1280, 800, "light"), (1280, 800, "dark"), (390, 844, "light"), (390, 844, "dark")]


@pytest.fixture(scope="module")
def browser():
    named = os.environ.get("CL_PEFT_BROWSER")
    path = named or next(filter(None, map(shutil.which, NAMES)), None)
    with sync_api.sync_playwright() as playwright:
        if path is None and not Path(playwright.chromium.executable_path).exists():
            pytest.skip("no browser: put chromium on the PATH, or set CL_PEFT_BROWSER")
        started = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory, request):
    conftest = str(Path(__file__).with_name("conftest.py"))
    write = request.config.pluginmanager.getplugin(conftest)._write_run
    root = tmp_path_factory.mktemp("browser") / "grid"
    for learner in ("isolated", "sequential"):
        for seed in range(2):
            write(root / f"{learner}-{seed}", learner=learner, router="prototype", seed=seed)
    run = write(root / "bad", seed=5, router="prototype", done=3, state="failed")
    status = json.loads((run / "status.json").read_text())
    (run / "status.json").write_text(json.dumps({**status, "error": HOSTILE}))
    stream = json.loads((run / "stream.json").read_text())
    stream["class_names"] = [HOSTILE] * 8
    stream["tasks"][0]["name"] = HOSTILE
    (run / "stream.json").write_text(json.dumps(stream))
    return root


@pytest.fixture(scope="module")
def address(folder):
    return write_report(folder, folder / "report.html").resolve().as_uri()


@pytest.fixture
def visit(browser, address):
    """``visit(width, height, scheme)`` opens the page; afterwards nothing may have gone wrong."""
    contexts, wrong, asked = [], [], []

    def go(width=1280, height=800, scheme="light"):
        context = browser.new_context(
            viewport={"width": width, "height": height}, color_scheme=scheme
        )
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: wrong.append(message.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("dialog", lambda dialog: wrong.append(dialog.message))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(address)
        return page

    yield go
    for context in contexts:
        context.close()
    assert wrong == []
    assert {url.split("#")[0] for url in asked} == {address}


def rgb(page, selector, which):
    text = page.eval_on_selector(selector, f"e => getComputedStyle(e).{which}")
    return [float(part) for part in text.strip("rgba()").split(",")[:3]]


def contrast(a, b):
    """WCAG 2 contrast of two colours."""

    def luminance(colour):
        parts = [c / 255 for c in colour]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize(("width", "height", "scheme"), SCREENS)
def test_looks_right(visit, width, height, scheme):
    page = visit(width, height, scheme)
    # nothing sticks out: what is wider scrolls inside its own box
    assert page.evaluate("document.documentElement.scrollWidth") == width
    ground = rgb(page, "body", "backgroundColor")
    assert (sum(ground) < 200) == (scheme == "dark")
    for selector in ("body", ".note", "a", ".state.failed", ".state.finished", ".cards dt"):
        assert contrast(rgb(page, selector, "color"), ground) > 4.5, selector
    # every figure is drawn, on white, and large enough to read
    boxes = page.eval_on_selector_all(
        "figure svg", "all => all.map(e => [e.getBoundingClientRect().width, "
        "e.getBoundingClientRect().height])"
    )  # fmt: skip
    assert len(boxes) >= 6
    assert all(w >= 300 and h >= 80 for w, h in boxes)
    assert rgb(page, ".paper-white", "backgroundColor") == [255, 255, 255]
    cells = page.eval_on_selector_all(
        ".matrix td[tabindex]", "all => all.map(e => [getComputedStyle(e).color, "
        "getComputedStyle(e).backgroundColor])"
    )  # fmt: skip
    assert len(cells) == 10
    for ink, fill in cells:
        values = [[float(v) for v in c.strip("rgba()").split(",")[:3]] for c in (ink, fill)]
        assert contrast(*values) > 4.5


def test_pointing_at_a_cell_gives_its_counts(visit, folder):
    page = visit()
    rows = pd.read_parquet(folder / "isolated-0" / "predictions.parquet")
    here = rows[(rows["after_task"] == 4) & (rows["eval_task"] == 2)]
    oracle = (here["oracle_prediction"] == here["label"]).sum()
    routed = (here["routed_prediction"] == here["label"]).sum()
    cell = page.locator(".matrix tbody tr").nth(3).locator("td").nth(1)
    assert cell.inner_text() == f"{100 * routed / 40:.1f}"
    assert not page.locator("#tip").is_visible()
    cell.hover()
    text = page.locator("#tip").inner_text()
    assert "After task 4, on task 2" in text
    assert f"right with the oracle: {oracle} of 40" in text
    assert f"right as routed: {routed} of 40" in text
    assert f"routed to its task: {(here['routed_task'] == 2).sum()} of 40" in text
    page.locator("h1").hover()
    assert not page.locator("#tip").is_visible()
    cell.focus()  # the keyboard gets there too
    assert page.locator("#tip").is_visible()
    page.get_by_role("button", name="Oracle", exact=True).click()
    assert cell.inner_text() == f"{100 * oracle / 40:.1f}"
    page.get_by_role("button", name="Cost of routing").click()
    assert cell.inner_text() == f"{100 * (oracle - routed) / 40:.1f}"


@pytest.mark.parametrize(("width", "height"), [(1280, 800), (390, 844)])
def test_the_tip_stays_on_the_screen(visit, width, height):
    page = visit(width, height)
    for place in (0, 3):
        page.locator(".matrix tbody tr").nth(3).locator("td").nth(place).click()
        box = page.locator("#tip").bounding_box()
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= width


def test_from_the_confusion_to_single_examples(visit, folder):
    page = visit()
    rows = pd.read_parquet(folder / "isolated-0" / "predictions.parquet")
    wrong = rows[(rows["after_task"] == 4) & (rows["routed_task"] != rows["eval_task"])]
    examples = page.locator("#examples tbody tr")
    assert examples.count() == len(wrong)
    pair, count = wrong.groupby(["eval_task", "routed_task"]).size().agg(["idxmax", "max"])
    page.get_by_role("button", name="Routed to", exact=True).click()
    cell = page.locator(".matrix tbody tr").nth(pair[0] - 1).locator("td").nth(pair[1] - 1)
    assert cell.inner_text() == str(count)
    cell.click()
    assert examples.count() == count
    mine = wrong[(wrong["eval_task"] == pair[0]) & (wrong["routed_task"] == pair[1])]
    first = mine.sort_values("margin", ascending=False).iloc[0]
    shown = examples.nth(0).locator("td").all_inner_texts()
    names = [f"topic {int(first[key])}" for key in ("label", "oracle_prediction")]
    assert shown[:5] == [str(int(first["row"])), *map(str, pair), *names]
    assert float(shown[7]) == pytest.approx(first["margin"], rel=5e-3)
    page.get_by_role("button", name="Show all").click()
    assert examples.count() == len(wrong)
    page.get_by_role("button", name="row", exact=True).click()
    ids = [int(row.locator("td").nth(0).inner_text()) for row in examples.all()]
    assert ids == sorted(wrong["row"])


def test_another_run_and_what_it_says(visit):
    page = visit()
    assert page.locator("#about b").inner_text() == "grid/isolated-0"  # the first that finished
    page.locator("#pick").select_option(label=page.locator("#pick option").nth(3).inner_text())
    assert page.locator("#about b").inner_text() == "grid/sequential-0"
    page.locator("#run-table a", has_text="bad").click()
    assert page.locator("#about b").inner_text() == "grid/bad"
    assert page.locator("#about pre").inner_text() == HOSTILE
    page.locator(".matrix td[tabindex]").first.hover()
    assert f"on task 1 ({HOSTILE})" in page.locator("#tip").inner_text()
    assert page.locator("img").count() == 0


def test_sorting_the_runs(visit):
    page = visit()
    column = page.locator("#run-table thead th").nth(7)
    values = page.locator("#run-table tbody tr td:nth-child(8)")
    for order in ("ascending", "descending"):
        column.locator("button").click()
        assert column.get_attribute("aria-sort") == order
        numbers = [float(text) for text in values.all_inner_texts()]
        assert numbers == sorted(numbers, reverse=order == "descending")


def test_without_javascript_the_tables_are_there(browser, address):
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(address)
    assert page.locator(".paper tbody tr").count() == 6
    assert page.locator("figure svg").count() >= 6
    assert "need JavaScript" in page.locator("#run").inner_text()
    context.close()
