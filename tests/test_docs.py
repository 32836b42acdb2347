"""What the documentation shows is what the code says."""

import ast
import re
import textwrap

import pytest
import torch
import yaml
from running import ROOT

from cl_peft.routers.base import Router

GUIDES = {
    "docs/adding_a_router.md": ("cl_peft/routers/prototype.py", "conf/router/prototype.yaml"),
    "docs/adding_a_module.md": ("cl_peft/modules/ia3.py", "conf/module/ia3.yaml"),
    "docs/adding_a_learner.md": ("cl_peft/learners/lwf.py", "conf/learner/lwf.yaml"),
}


def blocks(page, language):
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(), re.S)


def functions(source):
    """Functions and methods by name, without what the guides leave out: docstrings, annotations."""
    found = {}
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef):
            continue
        for arg in [*node.args.args, node.args.kwarg]:
            if arg is not None:
                arg.annotation = None
        node.returns = None
        first = node.body[0]
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
            node.body = node.body[1:]
        found[node.name] = ast.unparse(node)
    return found


@pytest.mark.parametrize("page", GUIDES)
def test_a_guide_s_code_is_the_file_s(page):
    file, conf = (ROOT / name for name in GUIDES[page])
    real, shown = functions(file.read_text()), {}
    for block in blocks(page, "python"):
        if "def " in block and not block.startswith("# tests/"):
            shown |= functions(textwrap.dedent(block))
    assert len(shown) >= 3
    assert {name: real.get(name) for name in shown} == shown
    assert yaml.safe_load(conf.read_text()) in [yaml.safe_load(b) for b in blocks(page, "yaml")]
    text = " ".join((ROOT / page).read_text().split())
    said = re.findall(r"\]\(\.\./([^)]*\.(?:py|yaml))\), (\d+) lines", text)
    assert len(said) == 2
    assert {name: len((ROOT / name).read_text().splitlines()) for name, _ in said} == {
        name: int(lines) for name, lines in said
    }


@pytest.mark.parametrize("page", [*GUIDES, "README.md", "docs/huggingface.md"])
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", (ROOT / page).read_text()):
        assert ((ROOT / page).parent / target).exists(), target


def test_the_readme_s_router():
    (code,) = [b for b in blocks("README.md", "python") if b.startswith("# cl_peft/routers/first")]
    (conf,) = [b for b in blocks("README.md", "yaml") if b.startswith("# conf/router/first")]
    names = {"__name__": "first"}
    exec(compile(code, "first.py", "exec"), names)
    settings = yaml.safe_load(conf)
    assert settings.pop("_target_") == "cl_peft.routers.first.First"
    assert settings.pop("name") == "first"
    router = names["First"](**settings)
    assert isinstance(router, Router)
    router.start(4, 0)
    for task in (0, 1):
        router.fit(torch.randn(6, 4), torch.tensor([task] * 6), task)
    other = names["First"](**settings)
    other.start(4, 0)
    other.load_state(router.state())
    for r in (router, other):
        assert r.choose(torch.randn(3, 4)).tasks.tolist() == [0, 0, 0]
