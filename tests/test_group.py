"""What tells the runs of a group apart, in words."""

from fake_run import config
from running import config as composed

from cl_peft.config import validate
from cl_peft.group import differences


def test_settings_in_which_runs_differ():
    one, other = config(), config(seed__data=3, trainer__epochs=5)
    assert differences([one, other]) == [
        "trainer.epochs=3 seed.data=0",
        "trainer.epochs=5 seed.data=3",
    ]
    assert differences([one, one]) == ["", ""]
    assert differences([]) == []


def test_an_axis_that_differs_is_shown_by_its_name():
    prompt = config()
    prompt["module"] = {"_target_": "cl_peft.modules.prompt.Prompt", "name": "prompt", "length": 20}
    assert differences([config(), prompt]) == ["module=lora", "module=prompt"]


def test_a_key_is_shown_among_runs_whose_axis_has_the_same_name():
    narrow = config(module__rank=4)
    prompt = config(module__name="prompt", module__length=20)
    assert differences([config(), narrow, prompt]) == [
        "module=lora module.rank=8",
        "module=lora module.rank=4",
        "module=prompt",
    ]


def test_a_key_without_a_name_beside_it_is_compared_among_all():
    assert differences([config(), config(seed__init=1, learner__name="joint")]) == [
        "learner=isolated seed.init=0",
        "learner=joint seed.init=1",
    ]


def test_what_was_never_completed_says_nothing():
    assert differences([config(), {}, config(module__rank=4)]) == [
        "module.rank=8",
        "",
        "module.rank=4",
    ]


def test_whole_configurations_by_what_was_asked():
    asked = [
        ("module=lora", "learner=isolated"),
        ("module=prompt", "learner=isolated"),
        ("module=prompt", "module.tokens=4", "learner=isolated"),
        ("module=lora", "learner=sequential"),
    ]
    configs = [validate(composed("debug=smoke", *overrides)) for overrides in asked]
    assert differences(configs) == [
        "module=lora router=prototype learner=isolated",
        "module=prompt module.tokens=20 router=prototype learner=isolated",
        "module=prompt module.tokens=4 router=prototype learner=isolated",
        "module=lora router=none learner=sequential",
    ]
