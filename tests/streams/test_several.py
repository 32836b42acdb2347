"""Several data sets as one stream."""

import datasets
import numpy as np
import pytest
from running import config

from cl_peft.config import Protocol, run_id, split_stream, validate
from cl_peft.errors import ConfigError, DataError
from cl_peft.streams.protocol import make_stream
from cl_peft.streams.several import Several

FILES = "cl_peft.streams.files.Files"
LABELS = {"news": ("world", "sports"), "topics": ("sports", "health", "world"), "stars": ("2", "1")}


def write(folder, name, labels, splits=("train", "valid", "test"), each=3):
    place = folder / name / "draw_1"
    place.mkdir(parents=True)
    for split in splits:
        rows = [
            f"{name} {split} {i} says {label}\t{label}" for label in labels for i in range(each)
        ]
        (place / f"{split}.tsv").write_text("\n".join(rows) + "\n")


@pytest.fixture
def folder(tmp_path):
    for name, labels in LABELS.items():
        write(tmp_path, name, labels)
    return tmp_path


def node(**options):
    return {
        "_target_": FILES,
        "train": "train.tsv",
        "test": "test.tsv",
        "validation": "valid.tsv",
        "header": False,
        **options,
    }


def several(folder, **options):
    sets = options.pop("sets", {name: node() for name in LABELS})
    return Several(sets=sets, path=str(folder), sample="draw_1", **options)


def cut(data, seed=0, **protocol):
    return make_stream(data, Protocol(name="s", **protocol), order_seed=seed, data_seed=0)


def test_labels_of_different_data_sets_do_not_collide(folder, tmp_path):
    data = several(folder).load(tmp_path)
    assert data.class_names == (
        "news: sports", "news: world",
        "topics: health", "topics: sports", "topics: world",
        "stars: 1", "stars: 2",
    )  # fmt: skip
    for split in ("train", "validation", "test"):
        part = getattr(data, split)
        assert len(part) == 3 * 7
        for text, label in zip(part.inputs, part.labels, strict=True):
            name, _, word = data.class_names[label].partition(": ")
            assert text.startswith(name)
            assert text.endswith(f"says {word}")


def test_each_data_set_is_one_task(folder, tmp_path):
    data = several(folder).load(tmp_path)
    orders = {tuple(task.name for task in cut(data, seed).tasks) for seed in range(12)}
    assert len(orders) > 3
    stream = cut(data)
    for task in stream.tasks:
        assert {data.class_names[c].split(":")[0] for c in task.classes} == {task.name}
        assert set(task.train.labels) == set(task.test.labels) == set(task.classes)
    assert sorted(c for task in stream.tasks for c in task.classes) == list(range(7))
    prints = {frozenset(t.classes for t in cut(data, seed).tasks) for seed in range(4)}
    assert len(prints) == 1  # the order moves no class
    assert len(cut(data, tasks=2).tasks) == 2


def test_orders(folder, tmp_path):
    orders = {1: ["topics", "news", "stars"], 7: ["stars", "topics", "news"]}
    data = several(folder, orders=orders).load(tmp_path)
    for number, names in orders.items():
        for order in (number, names):
            assert [t.name for t in cut(data, seed=5, order=order).tasks] == names
    assert [t.name for t in cut(data, order=7, tasks=2).tasks] == ["stars", "topics"]
    for order, message in (
        (2, r"stream\.order=2: published orders of stream=s: 1, 7\. Choose one, or list all data"),
        (["news", "topic", "stars"], r"no data set 'topic'\. Did you mean 'topics'"),
        (["news", "topics"], "each of the 3 data set names exactly once"),
    ):
        with pytest.raises(DataError, match=message):
            cut(data, order=order)
    with pytest.raises(DataError, match="only 3 data sets"):
        cut(data, tasks=4)


def test_shots_blurry_and_repetition_apply_to_data_sets(folder, tmp_path):
    data = several(folder).load(tmp_path)
    assert all(
        (np.bincount(t.train.labels, minlength=7)[list(t.classes)] == 2).all()
        for t in cut(data, shots=2, test_shots=1).tasks
    )
    blurry = cut(data, order=["news", "topics", "stars"], blurry=0.5)
    assert set(blurry.tasks[0].borrowed) == set(range(2, 5))
    assert [len(t.test) for t in cut(data, repetitions=3).tasks] == [
        len(t.classes) for t in cut(data, repetitions=3).tasks
    ]


def test_sources_may_differ(folder, tmp_path):
    """One from files, one saved to disk with class labels, each with its own columns."""
    features = datasets.Features(
        {"a": datasets.Value("string"), "y": datasets.ClassLabel(names=["no", "yes"])}
    )
    split = datasets.Dataset.from_dict({"a": ["x", "z"], "y": [1, 0]}, features=features)
    whole = datasets.DatasetDict(train=split, test=split, validation=split)
    whole.save_to_disk(tmp_path / "saved")
    hub = {
        "_target_": "cl_peft.streams.hub.Hub",
        "path": str(tmp_path / "saved"),
        "text": "a",
        "label": "y",
    }
    place = str(folder / "news" / "draw_1")
    data = Several(sets={"answers": hub, "news": node(path=place)}).load(tmp_path)
    assert data.class_names == ("answers: no", "answers: yes", "news: sports", "news: world")
    assert data.train.labels.tolist()[:2] == [1, 0]


def test_problems_say_which_data_set(folder, tmp_path):
    sets = {name: node() for name in LABELS} | {"stars": node(validation=None)}
    with pytest.raises(DataError, match=r"not stars\. Give them some, or set validation_split"):
        several(folder, sets=sets).load(tmp_path)
    sets = {name: node() for name in LABELS} | {"topics": node(label="lable")}
    with pytest.raises(DataError, match=r"data set 'topics': .* with stream\.sets\.topics\.label="):
        several(folder, sets=sets).load(tmp_path)
    with pytest.raises(DataError, match=r"data set 'more': There is no file .*more/draw_1/train"):
        several(folder, sets={"more": node()}).load(tmp_path)


# ------------------------------------------------------------------ configuration

BENCHMARK = ("stream=standard_cl_fewshot", "stream.path=here")


def valid(*overrides):
    """With the few-shot benchmark where no other stream is named."""
    stream = () if any(o.startswith("stream=") for o in overrides) else BENCHMARK
    return validate(config("debug=smoke", *stream, *overrides))


def refused(*overrides):
    with pytest.raises(ConfigError) as error:
        valid(*overrides)
    return str(error.value)


def test_a_data_set_is_checked_like_a_stream():
    checked = valid()
    assert checked["stream"]["sets"]["yahoo"]["drop_empty"] is False  # defaults are filled in
    protocol, source = split_stream(checked["stream"])
    assert protocol.order == 1
    assert set(source) == {"_target_", "sets", "orders", "path", "sample"}
    assert "Did you mean 'stream.sets.yahoo.header'" in refused("+stream.sets.yahoo.heder=true")
    assert "stream.sets.amazon.header=3" in refused("stream.sets.amazon.header=3")
    assert "stream.sets.more: say what it is" in refused("+stream.sets.more={train: a}")
    assert "stream.sets.more" in refused("+stream.sets.more={_target_: cl_peft.router.X}")
    assert "stream.sets._a: '_a' cannot name a folder" in refused("+stream.sets._a={}")
    assert "joins data sets itself" in refused(
        "+stream.sets.more={_target_: cl_peft.streams.several.Several, sets: {}}"
    )
    missing = refused("+stream.sets.more={_target_: cl_peft.streams.files.Files, test: b}")
    assert "stream.sets.more.train: a value is needed" in missing


def test_every_order_and_sample_is_a_run_of_its_own():
    runs = {
        run_id(valid(f"stream.order={order}", f"stream.sample={sample}"))
        for order in (1, 2, 3)
        for sample in ("seed_42", "seed_142")
    }
    assert len(runs) == 6


def test_stopping_on_validation_accuracy_finds_the_data_sets_splits():
    valid("stream.validation_share=0", "trainer.patience=1")
    gone = [f"stream.sets.{n}.validation=null" for n in ("dbpedia", "amazon", "yahoo", "ag_news")]
    text = refused("stream.validation_share=0", "trainer.patience=1", *gone)
    assert "trainer.patience" in text


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("stream.order=9", "published orders of stream=standard_cl_fewshot: 1, 2, 3"),
        ("stream.scenario=domain", "one task with classes of its own. Use class or task"),
        ("stream.sizes=[20,13]", "stream.sizes=[20, 13] has no meaning"),
        ("stream.max_classes=4", "stream.max_classes=4 has no meaning"),
        ("stream=newsgroups stream.order=1", "published orders of stream=newsgroups: none"),
        ("stream=newsgroups stream.sizes=[12,8]", "makes 2 tasks, but stream.tasks=5"),
        ("stream=newsgroups stream.sizes=[0,20]", "stream.sizes.0=0"),
        ("stream=newsgroups stream.sizes=some", "stream.sizes='some'"),
        ("stream=newsgroups stream.blurry=1.0", "stream.blurry=1.0"),
        ("stream=newsgroups stream.repetitions=0", "stream.repetitions=0"),
        ("stream=sentiment4 stream.sizes=random", "tasks are domains with all classes"),
        (
            "stream=newsgroups stream.scenario=task router=oracle stream.blurry=0.1",
            "stream.scenario=task forbids",
        ),
    ],
)
def test_protocol_that_does_not_fit_is_refused_before_anything_is_read(overrides, message):
    assert message in refused(*overrides.split())


@pytest.mark.parametrize(
    "overrides",
    [
        "stream.scenario=task router=oracle",
        "stream.tasks=2 stream.blurry=0.2 stream.repetitions=2",
        "stream=newsgroups stream.sizes=[12,8] stream.tasks=null",
        "stream=newsgroups stream.sizes=[12,8] stream.tasks=2",
        "stream=newsgroups stream.sizes=random stream.blurry=0.3",
        "stream=sentiment4 stream.blurry=0.3 stream.repetitions=2",
    ],
)
def test_protocol_that_fits(overrides):
    valid(*overrides.split())
