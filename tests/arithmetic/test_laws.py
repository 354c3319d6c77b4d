import json
import pickle
from functools import partial

import pytest

from ema_optim import (
    debiased_decay,
    equal_average,
    exponential_warmup_decay,
    gamma_from_sigma_rel,
    inverse_gamma_decay,
    power_decay,
    samples_half_life_decay,
    schedules,
    warmup_decay,
)
from ema_optim._arithmetic.laws import decay_of, law_of, law_text

LAWS = [
    (0.0, 0.0),
    (1, 1.0),
    (0.9995, 0.9995),
    (warmup_decay(0.99), {"schedule": "warmup", "max_decay": 0.99}),
    (
        exponential_warmup_decay(0.9),
        {"schedule": "exponential_warmup", "max_decay": 0.9, "tau": 2000.0},
    ),
    (
        inverse_gamma_decay(0.9, inv_gamma=2, power=0.75, min_decay=0.5),
        {"schedule": "inverse_gamma", "max_decay": 0.9}
        | {"inv_gamma": 2.0, "power": 0.75, "min_decay": 0.5},
    ),
    (debiased_decay(0.9), {"schedule": "debiased", "decay": 0.9}),
    (power_decay(0.05), {"schedule": "power", "exponent": gamma_from_sigma_rel(0.05) + 1}),
    (power_decay(0.13), {"schedule": "power", "exponent": gamma_from_sigma_rel(0.13) + 1}),
    (
        samples_half_life_decay(64, batch_size=4),
        {"schedule": "half_life", "half_life": 16.0, "ramp_up": None},
    ),
    (
        samples_half_life_decay(3, batch_size=7, ramp_up=0.05),
        {"schedule": "half_life", "half_life": 3 / 7, "ramp_up": 0.05},
    ),
    (equal_average(), {"schedule": "equal"}),
]


@pytest.mark.parametrize(("decay", "law"), LAWS)
def test_a_law_through_json_is_the_decay_again(decay, law):
    assert law_of(decay) == law
    text = law_text(law)
    read = decay_of(json.loads(text))
    assert read == decay
    assert law_text(law_of(read)) == text


@pytest.mark.parametrize("decay", [decay for decay, _ in LAWS if callable(decay)])
def test_a_schedule_that_was_read_gives_the_same_bits_and_reads_as_a_call(decay):
    read = decay_of(json.loads(law_text(law_of(decay))))
    steps = (1, 2, 3, 10, 999, 123_457)
    assert [read(step) for step in steps] == [decay(step) for step in steps]
    made = repr(pickle.loads(pickle.dumps(read)))
    assert eval(made, vars(schedules))(999) == pytest.approx(decay(999), rel=1e-6)


def test_a_schedule_pickled_by_an_earlier_version_has_its_law():
    earlier = partial(schedules._power, exponent=17.5)  # before schedules had a class of their own
    assert law_of(earlier) == {"schedule": "power", "exponent": 17.5}


@pytest.mark.parametrize("decay", [lambda step: 0.9, partial(pow, 0.5), schedules._equal])
def test_a_function_of_the_users_has_no_law(decay):
    with pytest.raises(TypeError, match=r"a float or one of ema_optim's schedules, got .*function"):
        law_of(decay)


WRONG = [
    True,
    None,
    "0.9",
    1.5,
    float("nan"),
    [],
    {},
    {"schedule": "cosine"},
    {"schedule": ["power"]},
    {"schedule": "power"},
    {"schedule": "power", "exponent": 0.5},
    {"schedule": "power", "exponent": None},
    {"schedule": "power", "exponent": 17.0, "more": 1},
    {"schedule": "warmup", "max_decay": 1.5},
    {"schedule": "debiased", "decay": "0.9"},
    {"schedule": "half_life", "half_life": -1.0, "ramp_up": None},
]


@pytest.mark.parametrize("law", WRONG)
def test_reading_refuses_what_is_no_law(law):
    with pytest.raises(ValueError, match=r"decay must be a number in .0, 1. or a schedule of this"):
        decay_of(law)
