import io

import numpy as np
import pandas as pd
import pytest
import torch
from core_fixtures import stream_of, world

from cl_peft import metrics
from cl_peft.evaluation import _best
from cl_peft.learners.frozen import Frozen
from cl_peft.learners.isolated import Isolated
from cl_peft.learners.joint import Joint
from cl_peft.learners.sequential import Sequential
from cl_peft.memo import Memo
from cl_peft.modules.bank import Route
from cl_peft.routers.oracle import Oracle
from cl_peft.routers.prototype import Prototype
from cl_peft.routers.ridge import Ridge
from cl_peft.training import Trainer

LEARNERS = {"isolated": Isolated, "sequential": Sequential, "joint": Joint, "frozen": Frozen}
DECOMPOSED = (
    "n_routed_right_oracle_right",
    "n_routed_right_oracle_wrong",
    "n_misrouted_oracle_right",
    "n_misrouted_oracle_wrong",
    "n_lost_by_routing",
    "n_lucky",
)


def weak(learner=None, router=None, scenario="class", **options):
    """A world whose modules and router both make mistakes."""
    trainer = options.pop("trainer", Trainer(epochs=1, batch_size=8, eval_batch_size=16))
    stream = options.pop("stream", None) or stream_of(scenario, classes=9, train=12, test=8)
    return world(learner, router or Prototype(), stream=stream, trainer=trainer, **options)


@torch.no_grad()
def naive_logits(w, text, task):
    """One example through the unit of one task: nothing remembered, batched, padded or mixed."""
    unit = w.learner.units[w.learner.unit_for(task)]
    batch = w.backbone.collate(w.backbone.encode([text]))
    if unit.row < 0:
        pooled = w.backbone(batch)
    else:
        with w.learner.tools.bank.use(Route.to(unit.row, 1)):
            pooled = w.backbone(batch)
    return dict(zip(unit.head.classes, unit.head(pooled)[0].tolist(), strict=True))


@torch.no_grad()
def naive_evaluation(w, after):
    """What the evaluation after a task means, in loops."""
    out = []
    for task in w.stream.tasks[: after + 1]:
        for text, label, row in zip(
            task.test.inputs, task.test.labels, task.test.rows, strict=True
        ):
            own = naive_logits(w, text, task.index)
            within = {c: v for c, v in own.items() if c in task.classes}
            oracle = max(within, key=within.get)
            if w.learner.uses_router:
                frozen = w.backbone(w.backbone.collate(w.backbone.encode([text])))
                chosen = int(w.router.choose(frozen, torch.tensor([task.index])).tasks)
                answers = naive_logits(w, text, chosen)
            else:
                chosen, answers = None, own
            routed = max(answers, key=answers.get)
            if w.stream.scenario == "task":
                chosen, routed = task.index, oracle
            elif chosen is None and w.stream.scenario == "class":
                chosen = next(t.index for t in w.stream.tasks if routed in t.classes)
            confidence = torch.tensor(list(answers.values())).softmax(0).max()
            out.append(
                {
                    "after_task": after + 1,
                    "eval_task": task.index + 1,
                    "row": row,
                    "label": label,
                    "oracle_prediction": oracle,
                    "routed_prediction": routed,
                    "routed_task": 0 if chosen is None else chosen + 1,
                    "confidence": float(confidence),
                }
            )
    return pd.DataFrame(out)


def cells(rows, metric, routing="none"):
    """``(after, eval) -> value``."""
    mine = rows[(rows["metric"] == metric) & (rows["routing"] == routing)]
    mine = mine[mine["eval_task"].notna()]
    return {(int(a), int(e)): v for a, e, v in mine[["after_task", "eval_task", "value"]].values}


def overall(rows, metric, routing="none"):
    mine = rows[(rows["metric"] == metric) & (rows["routing"] == routing)]
    (value,) = mine[mine["eval_task"].isna()]["value"]
    return value


CASES = [
    (name, "class", router)
    for name, router in [
        ("isolated", Prototype),
        ("isolated", lambda: Ridge(projection=48)),
        ("isolated", Oracle),
        ("frozen", Prototype),
        ("sequential", Prototype),
        ("joint", Prototype),
    ]
]
CASES += [("isolated", "domain", Prototype), ("sequential", "domain", Prototype)]
CASES += [("isolated", "task", Oracle), ("sequential", "task", Prototype)]


@pytest.mark.parametrize(("name", "scenario", "router"), CASES)
def test_equals_a_naive_evaluation(name, scenario, router):
    w = weak(LEARNERS[name](), router(), scenario)
    oracle, routed = np.full((3, 3), np.nan), np.full((3, 3), np.nan)
    for task in w.stream.tasks:
        result = w.step(task)
        naive = naive_evaluation(w, task.index)
        exact = [c for c in naive.columns if c != "confidence"]
        ours = result.predictions[exact].astype("int64").reset_index(drop=True)
        pd.testing.assert_frame_equal(ours, naive[exact].astype("int64"))
        if scenario == "class":
            np.testing.assert_allclose(result.predictions["confidence"], naive["confidence"],
                                       atol=1e-5)  # fmt: skip
        for i, part in naive.groupby("eval_task"):
            right = {k: part[f"{k}_prediction"] == part["label"] for k in ("oracle", "routed")}
            oracle[task.index, i - 1] = right["oracle"].mean()
            routed[task.index, i - 1] = right["routed"].mean()
            sent = (part["routed_task"] == i) | (part["routed_task"] == 0)
            counts = [
                sent & right["oracle"],
                sent & ~right["oracle"],
                ~sent & right["oracle"],
                ~sent & ~right["oracle"],
                right["oracle"] & ~right["routed"],
                ~right["oracle"] & right["routed"],
            ]
            place = (task.index + 1, i)
            for metric, count in zip(DECOMPOSED, counts, strict=True):
                assert cells(result.rows, metric)[place] == count.sum(), metric
            assert cells(result.rows, "n")[place] == len(part) == counts[0].size
            expected = np.nan if (part["routed_task"] == 0).any() else sent.mean()
            np.testing.assert_equal(cells(result.rows, "router_accuracy")[place], expected)
            assert cells(result.rows, "accuracy", "oracle")[place] == right["oracle"].mean()
            assert cells(result.rows, "accuracy", "routed")[place] == right["routed"].mean()
    np.testing.assert_array_equal(w.evaluator.oracle, oracle)
    np.testing.assert_array_equal(w.evaluator.routed, routed)
    rows, sizes = result.rows, [len(t.test) for t in w.stream.tasks]
    for routing, R in (("oracle", oracle), ("routed", routed)):
        assert overall(rows, "average_accuracy", routing) == pytest.approx(R[2].mean())
        micro = (R[2] * sizes).sum() / sum(sizes)
        assert overall(rows, "average_accuracy_micro", routing) == pytest.approx(micro)
        forgotten = np.mean([R[i:2, i].max() - R[2, i] for i in range(2)])
        assert overall(rows, "forgetting", routing) == pytest.approx(forgotten)
        bwt = np.mean([R[2, i] - R[i, i] for i in range(2)])
        assert overall(rows, "backward_transfer", routing) == pytest.approx(bwt)
    for metric in ("forgetting_module_drift", "forgetting_routing_drift"):
        assert np.isfinite(overall(rows, metric))
    drift = metrics.forgetting_split(oracle, routed)
    assert overall(rows, "forgetting_module_drift") == pytest.approx(drift.module_drift)
    lost = overall(rows, "average_accuracy_micro", "oracle") - overall(rows, "routing_loss")
    identity = lost + overall(rows, "misroute_luck")
    assert overall(rows, "average_accuracy_micro", "routed") == pytest.approx(identity, abs=1e-12)


@pytest.fixture(scope="module")
def isolated():
    """A finished isolated run with a fallible router, and what each task gave."""
    w = weak()
    forwarded, results = [], []
    w.features.prefetch(w.stream, ("train", "test"))
    w.backbone.model.register_forward_pre_hook(
        lambda m, a, k: forwarded.append(len(k["input_ids"])), with_kwargs=True
    )
    for task in w.stream.tasks:
        w.learner.learn(task)
        w.fit_router(task)
        forwarded.clear()
        results.append(w.evaluator.after(task, {"module_parameters": 7.0}))
        assert sum(forwarded) == results[-1].passes
    return w, results


def test_the_case_has_all_kinds_of_errors(isolated):
    _, results = isolated
    rows = results[2].rows
    for metric in DECOMPOSED[:5]:
        assert sum(cells(rows, metric).values()) > 0, metric


def test_only_new_examples_and_moved_routes_pass_the_backbone(isolated):
    w, results = isolated
    asked = set()
    for task, result in zip(w.stream.tasks, results, strict=True):
        frame = result.predictions
        pairs = {
            (unit, e, r)
            for column in ("eval_task", "routed_task")
            for unit, e, r in frame[[column, "eval_task", "row"]].itertuples(index=False)
        }
        assert result.passes == len(pairs - asked) == len(result.memo)
        asked |= pairs
        assert result.passes >= len(task.test)
    moved = {pair for pair in asked if pair[0] != pair[1]}
    tests = sum(len(t.test) for t in w.stream.tasks)
    assert moved
    assert sum(r.passes for r in results) == tests + len(moved) == len(w.evaluator.memo)


def test_evaluating_again_passes_nothing_and_says_the_same(isolated):
    w, results = isolated
    again = w.evaluator.after(w.stream.tasks[2], {"module_parameters": 7.0})
    assert again.passes == len(again.memo) == 0
    pd.testing.assert_frame_equal(again.rows, results[2].rows)
    pd.testing.assert_frame_equal(again.predictions, results[2].predictions)


def test_isolated_with_the_oracle_forgets_exactly_nothing(isolated):
    w, results = isolated
    assert overall(results[2].rows, "forgetting", "oracle") == 0.0
    assert overall(results[2].rows, "forgetting_module_drift") == 0.0
    for i in range(3):
        assert len(set(w.evaluator.oracle[i:, i])) == 1
        assert np.isnan(w.evaluator.oracle[:i, i]).all()


def test_costs_are_rows_and_columns_have_their_types(isolated):
    _, results = isolated
    rows, predictions = results[1].rows, results[1].predictions
    assert overall(rows, "module_parameters") == 7.0
    assert rows.dtypes.astype(str).to_dict() == {
        "run": "str",
        "after_task": "int32",
        "eval_task": "Int32",
        "routing": "str",
        "metric": "str",
        "value": "float64",
    }
    assert not rows.duplicated(["after_task", "eval_task", "routing", "metric"]).any()
    assert predictions.dtypes.astype(str).to_dict() == {
        "after_task": "int16",
        "eval_task": "int16",
        "row": "int32",
        "label": "int32",
        "oracle_prediction": "int32",
        "routed_prediction": "int32",
        "routed_task": "int16",
        "margin": "float32",
        "confidence": "float32",
        "abstained": "bool",
    }
    assert (predictions["margin"] >= 0).all()
    assert np.isnan(overall(results[0].rows, "forgetting", "routed"))


def parquet(frame):
    buffer = io.BytesIO()
    frame.to_parquet(buffer, index=False)
    return pd.read_parquet(buffer)


@pytest.mark.parametrize("name", LEARNERS)
def test_restored_evaluation_goes_on_with_the_same_bits_and_passes(name):
    make = LEARNERS[name]
    w = weak(make())
    results, snapshots = [], {}
    for task in w.stream.tasks:
        results.append(w.step(task))
        snapshots[task.index] = w.learner.snapshot()
    for done in (1, 2):
        again = weak(make(), stream=w.stream)
        seen = w.stream.tasks[:done]
        keep = seen if again.learner.keeps == "all" else seen[-1:]
        again.learner.restore({t.index: snapshots[t.index] for t in keep}, seen)
        for task in seen if again.learner.uses_router else ():
            again.fit_router(task)
        rows = pd.concat([r.rows for r in results[:done]], ignore_index=True)
        memos = [parquet(r.memo) for r in results[:done]]
        again.evaluator.restore(parquet(rows), memos)
        for task in w.stream.tasks[done:]:
            result = again.step(task)
            assert result.passes == results[task.index].passes
            for kind in ("rows", "predictions", "memo"):
                ours, theirs = getattr(result, kind), getattr(results[task.index], kind)
                pd.testing.assert_frame_equal(ours, theirs, check_exact=True)


@pytest.mark.parametrize("name", ["isolated", "frozen"])
def test_with_the_oracle_router_routed_equals_oracle(name):
    w = weak(LEARNERS[name](), Oracle())
    for task in w.stream.tasks:
        result = w.step(task)
        frame = result.predictions
        assert (frame["oracle_prediction"] == frame["routed_prediction"]).all()
        assert (frame["routed_task"] == frame["eval_task"]).all()
        assert frame["margin"].isna().all()
        assert result.passes == (len(task.test) if name == "isolated" else 0)
        assert overall(result.rows, "router_accuracy") == 1.0
        assert overall(result.rows, "routing_loss") == overall(result.rows, "misroute_luck") == 0
    np.testing.assert_array_equal(w.evaluator.oracle, w.evaluator.routed)


def test_nearly_equal_logits_have_one_answer_for_both_routes():
    w = weak(Isolated(), Oracle())
    task = w.stream.tasks[0]
    w.learner.learn(task)

    def close(inputs, units, title=""):
        out = torch.full((len(inputs), 9), float("-inf"))
        low, high = task.classes[:2]
        out[:, low] = 0.1
        out[:, high] = torch.nextafter(torch.tensor(0.1), torch.tensor(1.0))
        return out

    assert len(set(close([""], None).softmax(1)[0, list(task.classes[:2])].tolist())) == 1
    w.learner.logits = close
    frame = w.evaluator.after(task, {}).predictions
    assert set(frame["oracle_prediction"]) == {task.classes[1]}
    assert set(frame["routed_prediction"]) == {task.classes[1]}


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_the_batch_size_and_the_order_of_a_test_set_change_nothing(isolated, batch_size):
    w, results = isolated
    trainer = Trainer(epochs=1, batch_size=8, eval_batch_size=batch_size)
    other = weak(stream=w.stream, trainer=trainer)
    rng = np.random.default_rng(batch_size)
    for task in w.stream.tasks:
        other.learner.learn(task)
        other.fit_router(task)
        order = rng.permutation(len(task.test))
        test = task.test
        mixed = [test.inputs[i] for i in order]
        other.stream.tasks[task.index].test.inputs[:] = mixed
        rows, labels = test.rows[order], test.labels[order]
        test.rows[:], test.labels[:] = rows, labels
        ours = other.evaluator.after(task, {}).predictions
        theirs = results[task.index].predictions
        ours, theirs = (
            f.sort_values(["eval_task", "row"], ignore_index=True) for f in (ours, theirs)
        )
        columns = [c for c in ours if c not in ("margin", "confidence")]
        pd.testing.assert_frame_equal(ours[columns], theirs[columns])
        np.testing.assert_allclose(ours["margin"], theirs["margin"], atol=1e-5)


def test_evaluation_changes_no_tensor(isolated):
    w, _ = isolated
    before = {u: unit.fingerprint for u, unit in w.learner.units.items()}
    state = {n: t.clone() for n, t in w.router.state().items()}
    w.evaluator.memo = Memo()
    w.evaluator.after(w.stream.tasks[2], {})
    for key, fingerprint in before.items():
        assert w.learner._unit(key, w.learner.units[key].head).fingerprint == fingerprint
    assert all(torch.equal(t, state[n]) for n, t in w.router.state().items())
    assert w.backbone.weights_fingerprint() == w.backbone.fingerprint


def test_a_unit_without_the_true_classes_has_no_answer_within_them():
    w = weak(Isolated(), Prototype())
    for task in w.stream.tasks:
        w.step(task)
    memo = w.evaluator.memo
    first = w.learner.units[0]
    other = [key for key in memo._entries if key[0] == first.fingerprint and key[1] != 0]
    assert other
    assert memo.get(other).shape == (len(other), len(first.head.classes))
    units = w.learner.logits(["anything"], np.array([0]))
    wrong = torch.full((1, len(w.stream.class_names)), float("-inf"))
    wrong[:, list(w.stream.tasks[1].classes)] = 0.0
    assert _best(units + wrong).tolist() == [-1]
