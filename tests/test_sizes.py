"""Sizes that a run reports, against the tensors that lie in its folder."""

import pandas as pd
import pytest
from running import CONF, run
from safetensors.numpy import load_file

import analysis
from cl_peft.view import ResultView

SMALL = (
    "debug=smoke",
    "trainer.epochs=1",
    "stream.train_per_class=6",
    "stream.test_per_class=2",
    "backbone.max_length=48",
)
LEARNERS = sorted(path.stem for path in (CONF / "learner").glob("*.yaml"))
PROMPTS = ("progressive", "l2p", "dualprompt", "codaprompt")
MODULES = sorted(
    path.stem
    for path in (CONF / "module").glob("*.yaml")
    if path.stem not in ("none", "lora", "lora_upper")
)
#: What is trained on and stored as a whole: the last task's file is all there is.
WHOLE = ("sequential", "joint", "ewc", "lwf", "replay", "derpp", "seqstar", "merging",
         "l2p", "dualprompt", "codaprompt")  # fmt: skip
#: A module per task under one head that widens; the heads of earlier tasks' files are outdated.
ONE_HEAD = ("olora", "inflora", "sdlora", "sapt")


def tensors(path):
    return load_file(path) if path.exists() else {}


def sized(names, own):
    """Bytes of tensors whose names begin with ``head.``, or of the others."""
    return sum(t.nbytes for name, t in names.items() if name.startswith("head.") is not own)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return tmp_path_factory.mktemp("sizes")


def check(folder, learner):
    rows = pd.read_parquet(folder / "results.parquet")
    rows = rows[rows["eval_task"].isna()].set_index(["metric", "after_task"])["value"]
    units = [tensors(folder / f"tasks/00{task}/module.safetensors") for task in (1, 2, 3)]
    for task, unit in enumerate(units, start=1):
        own = [t for name, t in unit.items() if not name.startswith("head.")]
        assert rows["module_parameters", task] == sum(t.size for t in own)
        assert rows["module_bytes", task] == sum(t.nbytes for t in own)
        head = [unit[n] for n in ("head.weight", "head.bias") if n in unit]
        assert rows["head_parameters", task] == sum(t.size for t in head)
    state, router = (
        sum(t.nbytes for t in tensors(folder / f"tasks/003/{who}.safetensors").values())
        for who in ("learner", "router")
    )
    assert rows["learner_state_bytes", 3] == state
    assert rows["router_state_bytes", 3] == router
    modules = [sized(unit, own=True) for unit in (units[-1:] if learner in WHOLE else units)]
    one_head = learner in (*WHOLE, *ONE_HEAD)
    heads = [sized(unit, own=False) for unit in (units[-1:] if one_head else units)]
    assert rows["stored_bytes", 3] == sum(modules) + sum(heads) + state + router
    return rows


@pytest.mark.parametrize("learner", LEARNERS)
def test_what_a_learner_keeps_is_what_lies_in_its_folder(runs, learner):
    module = ("module=prompt", "module.tokens=4") if learner in PROMPTS else ("module=lora",)
    folder = run(*SMALL, f"learner={learner}", *module, f"paths.runs={runs}", f"paths.cache={runs}")
    rows = check(folder, learner)
    text = ResultView.from_folder(folder).parameters()
    module, head = (f"{rows[f'{part}_parameters', 3]:,.0f}" for part in ("module", "head"))
    if learner in WHOLE:
        assert text == f"in all {module} module + {head} head parameters"
    elif learner in (*ONE_HEAD, "ease"):
        assert text == f"per task {module} module parameters, in all {head} head parameters"
    elif learner == "growth":
        first = f"{rows['module_parameters', 1]:,.0f}"
        assert text == f"per task 0 to {first} module + {head} head parameters"
    else:
        assert text == f"per task {module} module + {head} head parameters"


@pytest.mark.parametrize("module", MODULES)
def test_what_a_module_adds_is_what_lies_in_its_file(runs, module):
    check(run(*SMALL, f"module={module}", f"paths.runs={runs}", f"paths.cache={runs}"), "isolated")


def test_a_table_of_costs_counts_a_pool_once(runs):
    options = (*SMALL, "module=prompt", "module.tokens=4", "group=costs", f"paths.runs={runs}")
    folder = run(*options, "learner=codaprompt", f"paths.cache={runs}")
    (row,) = analysis.costs(analysis.load_runs(runs / "costs")).to_dict("records")
    stored = sized(tensors(folder / "tasks/003/module.safetensors"), own=True)
    head = sized(tensors(folder / "tasks/003/module.safetensors"), own=False)
    assert row["stored_parameters"] == (stored + head) / 4


def test_a_learner_that_trains_in_the_end_keeps_nothing_before(runs):
    when = ("learner=joint", "learner.when=last", "group=last")
    folder = run(*SMALL, *when, f"paths.runs={runs}", f"paths.cache={runs}")
    rows = check(folder, "joint")
    assert rows["stored_bytes", 1] == rows["stored_bytes", 2] == 0
