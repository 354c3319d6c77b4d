"""Decay schedules against printed values, closed forms and the identities that define them."""

import copy
import math
import pickle
import random
from fractions import Fraction
from functools import partial
from itertools import pairwise

import pytest
import torch

from ema_optim import EMAOptimizer, schedules
from ema_optim.schedules import (
    as_decay,
    compute_optimal_decay,
    debiased_decay,
    decay_factor,
    decay_from_half_life,
    equal_average,
    exponential_warmup_decay,
    gamma_from_sigma_rel,
    half_life_from_decay,
    initial_share,
    inverse_gamma_decay,
    power_decay,
    samples_half_life_decay,
    sigma_rel_from_gamma,
    warmup_decay,
)

TIMES = (1, 2, 10, 100, 1000, 10_000, 100_000)
LINEAR = [t / 1000 for t in range(1001)]
PATHS = {
    "step": [0.0] + [1.0] * 1000,
    "linear": LINEAR,
    "exponential": [0.995**t for t in range(1001)],
    "alternating": [(-1.0) ** t for t in range(1001)],
}
SCHEDULES = {
    "warmup": warmup_decay(0.999),
    "inverse_gamma": inverse_gamma_decay(0.9999, inv_gamma=2.0, power=3 / 4, min_decay=0.1),
    "exponential_warmup": exponential_warmup_decay(0.9999, tau=50),
    "debiased": debiased_decay(0.999),
    "power": power_decay(0.1),
    "samples_half_life": samples_half_life_decay(500_000, batch_size=512, ramp_up=0.05),
    "equal": equal_average(),
}
each_schedule = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())


def average(decay, path, span=1):
    ema = path[0]
    for update in range(span, len(path), span):
        ema += (1 - decay_factor(decay, update, span)) * (path[update] - ema)
    return ema


def weights_in_average(decay, steps):
    """Return the share of the weights of step 0, 1, ..., steps in the average."""
    impulses = ([float(t == at) for t in range(steps + 1)] for at in range(steps + 1))
    return [average(decay, impulse) for impulse in impulses]


def noise(length):
    generator = random.Random(0)
    return [generator.gauss(0.0, 1.0) for _ in range(length)]


@pytest.mark.parametrize(
    ("update", "expected"),
    [
        (1, [0.181818182, 0.370039475, 0.405396442, 0.000499825, 0.000000000, 0.000000954]),
        (2, [0.250000000, 0.519250143, 0.561308662, 0.000999400, 0.499749875, 0.000976562]),
        (10, [0.550000000, 0.797819992, 0.834439974, 0.004987022, 0.899549175, 0.250000000]),
        (100, [0.918181818, 0.953890995, 0.968612338, 0.048765698, 0.989496665, 0.870550563]),
        (1000, [0.991089109, 0.990006661, 0.994380801, 0.393429993, 0.998418484, 0.986232704]),
        (10_000, [0.999100899, 0.997845709, 0.999000075, 0.993162727, 0.998999955, 0.998614666]),
        (100_000, [0.999910009, 0.999535844, 0.999822173, 0.999900000, 0.999, 0.999290469]),
    ],
)
def test_schedules_have_the_tabulated_values(update, expected):
    schedules = [
        warmup_decay(1.0),
        inverse_gamma_decay(1.0),
        inverse_gamma_decay(1.0, power=3 / 4),
        exponential_warmup_decay(0.9999),
        debiased_decay(0.999),
        samples_half_life_decay(500_000, batch_size=512, ramp_up=0.05),
    ]
    assert [schedule(update) for schedule in schedules] == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(
    ("update", "narrow", "wide"),
    [
        (1, 0.0, 0.0),
        (2, 2**-17.9721986023035, 0.004080031660),
        (10, 0.150534932477, 0.433324720682),
        (100, 0.834746968343, 0.923327242270),
        (1000, 0.982179506297, 0.992090272645),
        (10_000, 0.998204304467, 0.999206554862),
        (100_000, 0.999820293265, 0.999920630714),
        (1_000_000, 0.999982027954, 0.999992062824),
    ],
)
def test_power_decay_has_the_tabulated_values(update, narrow, wide):
    assert power_decay(0.05)(update) == pytest.approx(narrow, abs=1e-12)
    assert power_decay(0.10)(update) == pytest.approx(wide, abs=1e-12)


@pytest.mark.parametrize(
    ("sigma_rel", "gamma"),
    [
        (0.01, 96.9948978237098),
        (0.025, 36.9868397124253),
        (0.05, 16.9721986023035),
        (0.075, 10.2891164489839),
        (0.10, 6.93720393760181),
        (0.13, 4.60359678147986),
        (0.15, 3.55786877489947),
        (0.20, 1.82621377989584),
        (0.25, 0.719823958000710),
        (0.28, 0.169343993769499),
        (0.235702260396, 1.0),
        (0.193649167310, 2.0),
        (0.018864435314, 50.0),
    ],
)
def test_sigma_rel_and_gamma_convert_into_each_other(sigma_rel, gamma):
    # The last three rows print sigma_rel to 12 digits, which gamma amplifies by 1 / sigma_rel**2.
    assert gamma_from_sigma_rel(sigma_rel) == pytest.approx(gamma, abs=1e-8)
    assert sigma_rel_from_gamma(gamma) == pytest.approx(sigma_rel, abs=1e-12)


@pytest.mark.parametrize("sigma_rel", [1e-200, 1e-8, 0.01, 0.1, 0.2886, 0.28867513])
def test_gamma_from_sigma_rel_keeps_full_precision_up_to_both_limits(sigma_rel):
    back = sigma_rel_from_gamma(gamma_from_sigma_rel(sigma_rel))
    assert back == pytest.approx(sigma_rel, rel=1e-13, abs=0)


def test_plain_mean_is_the_limit_of_the_power_function():
    assert sigma_rel_from_gamma(0) == pytest.approx(12**-0.5, rel=1e-14, abs=0)
    assert 0.0 <= gamma_from_sigma_rel(math.nextafter(12**-0.5, 0.0)) < 1e-13


@pytest.mark.parametrize(
    ("decay", "expected"),
    [
        (0.9, [1.000000000000, 0.991000000000, 0.006969156564, 0.052631578947]),
        (0.99, [0.999956828753, 0.901004273953, 0.013198657937, 0.005068079935]),
        (0.999, [0.632304575229, 0.368327729346, 0.457504486999, 0.368011735214]),
        (0.9999, [0.095167106441, 0.048424102692, 0.923071424790, 0.904837652152]),
    ],
)
def test_constant_decay_follows_the_closed_form_paths(decay, expected):
    averages = [average(decay, path) for path in PATHS.values()]
    assert averages == pytest.approx(expected, abs=1e-11)


@pytest.mark.parametrize(
    ("sigma_rel", "span", "expected"),
    [
        (0.05, 1, 0.947789798342),
        (0.05, 10, 0.952141595330),
        (0.05, 100, 0.982958695192),
        (0.10, 1, 0.888607520166),
        (0.10, 10, 0.893042042773),
        (0.10, 100, 0.931539039906),
    ],
)
def test_power_average_of_the_linear_path_keeps_its_centre_at_any_stride(sigma_rel, span, expected):
    assert average(power_decay(sigma_rel), LINEAR, span) == pytest.approx(expected, abs=1e-11)


@pytest.mark.parametrize("sigma_rel", [0.05, 0.10, 0.20])
def test_power_decay_gives_the_power_function_profile(sigma_rel):
    exponent, steps = gamma_from_sigma_rel(sigma_rel) + 1, 200
    cumulative = [(t / steps) ** exponent for t in range(steps + 1)]
    profile = [0.0, *(after - before for before, after in pairwise(cumulative))]
    assert weights_in_average(power_decay(sigma_rel), steps) == pytest.approx(profile, abs=1e-13)


@pytest.mark.parametrize("sigma_rel", [0.10, 0.15, 0.25])
def test_sigma_rel_is_the_relative_standard_deviation_of_the_profile(sigma_rel):
    shares = weights_in_average(power_decay(sigma_rel), 400)
    mean = sum(t * share for t, share in enumerate(shares))
    variance = sum((t - mean) ** 2 * share for t, share in enumerate(shares))
    assert math.sqrt(variance) / 400 == pytest.approx(sigma_rel, rel=1e-3, abs=0)


@pytest.mark.parametrize("sigma_rel", [0.05, 0.10, 0.25])
@pytest.mark.parametrize(("span", "update"), [(1, 7), (3, 7), (10, 10), (10, 1000), (100, 5000)])
def test_power_decay_over_a_stride_is_one_step_of_that_length(sigma_rel, span, update):
    expected = (1 - span / update) ** (gamma_from_sigma_rel(sigma_rel) + 1)
    factor = decay_factor(power_decay(sigma_rel), update, span)
    assert factor == pytest.approx(expected, rel=1e-12, abs=0)


@pytest.mark.parametrize(
    ("decay", "span", "expected"),
    [
        (0.9999, 10, 0.999000449880),
        (0.9999, 32, 0.996804955044),
        (0.999, 10, 0.990044880210),
        (0.0, 3, 0.0),
        (1.0, 3, 1.0),
    ],
)
def test_constant_decay_over_a_stride_is_its_power(decay, span, expected):
    assert decay_factor(decay, 320, span) == pytest.approx(expected, abs=1e-12)
    assert decay_factor(lambda update: decay, 320, span) == pytest.approx(expected, abs=1e-12)


@each_schedule
def test_a_stride_ends_at_the_update_it_is_asked_for(schedule):
    assert decay_factor(schedule, 7, 1) == schedule(7)
    expected = schedule(5) * schedule(6) * schedule(7)
    assert decay_factor(schedule, 7, 3) == pytest.approx(expected, rel=1e-14, abs=0)


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9, 0.99, 0.9999])
def test_debiased_decay_equals_zero_initialised_ema(decay):
    path, zero_start = noise(300), 0.0
    for step in range(1, len(path)):
        zero_start = decay * zero_start + (1 - decay) * path[step]
        expected = zero_start / (1 - decay**step)
        actual = average(debiased_decay(decay), path[: step + 1])
        assert actual == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize("decay", [1 - 1e-9, 1 - 1e-15, 1.0])
def test_debiased_decay_tends_to_the_plain_mean(decay):
    actual = [debiased_decay(decay)(t) for t in TIMES[:5]]
    assert actual == pytest.approx([1 - 1 / t for t in TIMES[:5]], abs=1e-9)


@pytest.mark.parametrize("decay", [1 - 1e-7, 1 - 1e-8, 1 - 1e-10])
def test_debiased_decay_keeps_full_precision_near_one(decay):
    exact = Fraction(decay)
    expected = [float(exact * (1 - exact ** (t - 1)) / (1 - exact**t)) for t in (2, 3, 10, 100)]
    actual = [debiased_decay(decay)(t) for t in (2, 3, 10, 100)]
    assert actual == pytest.approx(expected, rel=1e-14, abs=0)


def test_debiased_decay_of_zero_is_zero():
    assert [debiased_decay(0)(t) for t in TIMES] == [0.0] * len(TIMES)


def test_equal_average_is_the_mean_without_the_initial_weights():
    path = noise(300)
    assert average(equal_average(), path) == pytest.approx(sum(path[1:]) / 299, abs=1e-13)


@pytest.mark.parametrize(
    "schedule", [power_decay(0.05), debiased_decay(0.9), debiased_decay(1), equal_average()]
)
def test_first_update_forgets_the_initial_weights_exactly(schedule):
    assert schedule(1) == 0.0
    assert initial_share(schedule, 1) == 0.0


@pytest.mark.parametrize(
    ("decay", "tail_mass"),
    [
        (0.99, lambda s: 1 - 0.99 ** (101 - s)),
        (equal_average(), lambda s: (101 - s) / 100),
        (power_decay(0.1), lambda s: 1 - ((s - 1) / 100) ** (gamma_from_sigma_rel(0.1) + 1)),
    ],
)
def test_averaging_sgd_is_decaying_its_learning_rate(decay, tail_mass):
    gradients, weights = noise(101)[1:], [1.0]
    for gradient in gradients:
        weights.append(weights[-1] - 0.1 * gradient)
    decayed = 1.0 - sum(0.1 * tail_mass(s) * g for s, g in enumerate(gradients, start=1))
    assert average(decay, weights) == pytest.approx(decayed, abs=1e-12)


@each_schedule
@pytest.mark.parametrize("again", [lambda s: pickle.loads(pickle.dumps(s)), copy.deepcopy])
def test_copies_of_a_schedule_are_equal_and_give_its_values(schedule, again):
    other = again(schedule)
    assert [other(t) for t in TIMES] == [schedule(t) for t in TIMES]
    assert other == schedule
    assert repr(other) == repr(schedule)


# As functools.partial, as which schedules were pickled once.
@pytest.mark.parametrize(
    ("name", "options", "schedule"),
    [
        ("_warmup", {"max_decay": 0.999}, warmup_decay(0.999)),
        (
            "_exponential_warmup",
            {"max_decay": 0.9999, "tau": 50.0},
            SCHEDULES["exponential_warmup"],
        ),
        ("_debiased", {"decay": 0.999}, debiased_decay(0.999)),
        ("_power", {"exponent": gamma_from_sigma_rel(0.1) + 1}, power_decay(0.1)),
        ("_equal", {}, equal_average()),
    ],
)
def test_old_pickles_of_schedules_load(name, options, schedule):
    function = getattr(schedules, name)
    old = pickle.loads(pickle.dumps(partial(function, **options) if options else function))
    assert [old(t) for t in TIMES] == [schedule(t) for t in TIMES]


REPRS = {
    "warmup": "warmup_decay(0.999)",
    "inverse_gamma": "inverse_gamma_decay(0.9999, inv_gamma=2.0, power=0.75, min_decay=0.1)",
    "exponential_warmup": "exponential_warmup_decay(0.9999, tau=50.0)",
    "debiased": "debiased_decay(0.999)",
    "power": "power_decay(0.1)",
    "samples_half_life": "samples_half_life_decay(500000.0, batch_size=512.0, ramp_up=0.05)",
    "equal": "equal_average()",
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_reads_as_the_call_that_makes_it(name):
    assert repr(SCHEDULES[name]) == REPRS[name]
    assert eval(REPRS[name], vars(schedules)) == SCHEDULES[name]


def test_an_optimizer_shows_its_schedule():
    optimizer = EMAOptimizer(torch.optim.SGD([torch.zeros(1)], lr=0.1), warmup_decay(0.999))
    assert "(decay=warmup_decay(0.999), " in repr(optimizer)


@each_schedule
def test_a_schedule_equals_only_one_of_the_same_values(schedule):
    others = [other for other in SCHEDULES.values() if other is not schedule]
    assert schedule not in others
    assert len({schedule, copy.copy(schedule), *others}) == len(SCHEDULES)
    assert warmup_decay(0.9) not in (warmup_decay(0.99), 0.9, None)


@each_schedule
def test_schedules_never_leave_the_unit_interval_and_never_fall(schedule):
    values = [schedule(t) for t in (*range(1, 2000), 10**6, 10**9, 10**15)]
    assert values == sorted(values)
    assert values[0] >= 0.0
    assert values[-1] <= 1.0
    assert all(type(value) is float for value in values)


@pytest.mark.parametrize(
    ("power", "update", "decay"),
    [
        (2 / 3, 31_600, 0.999),
        (2 / 3, 1_000_000, 0.9999),
        (3 / 4, 10_000, 0.999),
        (3 / 4, 215_400, 0.9999),
    ],
)
def test_inverse_gamma_decay_reaches_the_documented_values(power, update, decay):
    assert inverse_gamma_decay(1.0, power=power)(update) == pytest.approx(decay, abs=1e-6)


@pytest.mark.parametrize(
    ("schedule", "update", "expected"),
    [
        (warmup_decay(0.5), 100, 0.5),
        (warmup_decay(0), 100, 0.0),
        (inverse_gamma_decay(0.7), 10, 0.7),
        (inverse_gamma_decay(0.7, min_decay=0.6), 1, 0.6),
        (inverse_gamma_decay(0.7, min_decay=0.7), 1, 0.7),
        (inverse_gamma_decay(1.0, inv_gamma=4.0, power=1.0), 4, 0.5),
        (inverse_gamma_decay(1.0, inv_gamma=1e9), 1, 2 / 3 * 1e-9 * (1 - 5 / 6 * 1e-9)),
        (exponential_warmup_decay(1.0, tau=1e9), 1, 1e-9 * (1 - 1e-9 / 2)),
        (exponential_warmup_decay(0.5, tau=3), 3, 0.5 * (1 - math.exp(-1))),
        (exponential_warmup_decay(0.9, tau=1), 10**6, 0.9),
        (samples_half_life_decay(1000, batch_size=100), 1, 0.5**0.1),
        (samples_half_life_decay(1000, batch_size=100), 10**6, 0.5**0.1),
        (samples_half_life_decay(1000, batch_size=100, ramp_up=0.5), 4, 0.5**0.5),
        (samples_half_life_decay(1000, batch_size=100, ramp_up=0.5), 40, 0.5**0.1),
        (samples_half_life_decay(1000, batch_size=100, ramp_up=1e-300), 1, 0.0),
    ],
)
def test_arguments_set_the_limits_and_time_scales(schedule, update, expected):
    assert schedule(update) == pytest.approx(expected, rel=1e-14, abs=0)


@pytest.mark.parametrize(
    ("decay", "half_life"),
    [(0.99, 68.9676), (0.999, 692.8005), (0.999309463, 1003.4333), (0.9999, 6931.1252)],
)
def test_half_life_and_decay_convert_into_each_other(decay, half_life):
    assert half_life_from_decay(decay) == pytest.approx(half_life, abs=1e-4)
    assert decay_from_half_life(half_life_from_decay(decay)) == pytest.approx(decay, abs=1e-14)
    assert decay_from_half_life(half_life) ** half_life == pytest.approx(0.5, rel=1e-10, abs=0)


def test_half_life_in_samples_is_half_life_in_steps_times_batch_size():
    assert samples_half_life_decay(5120, batch_size=512)(1) == decay_from_half_life(10)


@pytest.mark.parametrize(
    ("total_steps", "initial_weight", "expected"),
    [
        (1_000, 1e-3, 0.993116048),
        (10_000, 1e-3, 0.9993094630025899),
        (100_000, 1e-3, 0.999930925),
        (10_000, 1e-2, 0.999539589),
        (1, 1e-3, 1e-3),
    ],
)
def test_compute_optimal_decay_leaves_the_initial_weight(total_steps, initial_weight, expected):
    decay = compute_optimal_decay(total_steps, initial_weight=initial_weight)
    assert decay == pytest.approx(expected, abs=1e-9)
    assert initial_share(decay, total_steps) == pytest.approx(initial_weight, rel=1e-11, abs=0)


def test_compute_optimal_decay_leaves_a_thousandth_unless_told():
    assert compute_optimal_decay(10_000) == pytest.approx(0.9993094630025899, abs=1e-15)


@pytest.mark.parametrize(
    ("decay", "updates", "expected", "rel"),
    [
        (0.9999, 1_000, 0.905, 1e-3),
        (0.9999, 10_000, 0.368, 1e-3),
        (0.9993, 10_000, 0.001, 0.1),
        (0.5, 0, 1.0, 0.0),
        (0.0, 1, 0.0, 0.0),
        (1.0, 10**9, 1.0, 0.0),
        (warmup_decay(1.0), 0, 1.0, 0.0),
        (warmup_decay(1.0), 10, 6.0e-5, 1e-2),
        (warmup_decay(1.0), 100, 101 * math.factorial(10) / math.perm(110, 10), 1e-12),
        (inverse_gamma_decay(1.0), 10, 1.4e-2, 1e-2),
        (inverse_gamma_decay(1.0), 100, 7.0e-6, 1e-2),
        (inverse_gamma_decay(1.0, power=1.0), 50, 1 / 51, 1e-12),
        (exponential_warmup_decay(0.9999), 10, 0.0, 0.0),
    ],
)
def test_initial_share_is_the_product_of_the_decays(decay, updates, expected, rel):
    assert initial_share(decay, updates) == pytest.approx(expected, rel=rel, abs=0)


@each_schedule
def test_initial_share_is_what_the_average_keeps_of_its_start(schedule):
    for updates in (1, 2, 5):
        kept = average(schedule, [1.0] + [0.0] * updates)
        assert initial_share(schedule, updates) == pytest.approx(kept, abs=1e-12)


def test_initial_share_stops_once_nothing_is_left():
    calls = []
    assert initial_share(lambda update: calls.append(update) or 0.5, 10**9) == 0.0
    assert calls == list(range(1, 41))


@pytest.mark.parametrize("decay", [0, 1, 0.0, 0.999, 1.0])
def test_check_decay_returns_numbers_as_floats(decay):
    assert as_decay(decay) == decay
    assert type(as_decay(decay)) is float


def test_check_decay_calls_a_schedule_once_with_one_and_returns_it():
    calls = []

    def schedule(update):
        calls.append(update)
        return 0.5

    assert as_decay(schedule) is schedule
    assert calls == [1]


@pytest.mark.parametrize("value", [0, 1, 0.5, Fraction(1, 2), torch.tensor(0.5)])
def test_schedules_may_return_any_real_scalar(value):
    factor = decay_factor(lambda update: value, 2, 2)
    assert type(factor) is float
    assert factor == float(value) ** 2


@pytest.mark.parametrize(
    ("value", "exception", "message"),
    [
        (1.5, ValueError, r"decay\(1\) must be in \[0, 1\], got 1.5: clip"),
        (-1e-9, ValueError, r"decay\(1\) must be in \[0, 1\], got -1e-09: clip"),
        (math.nan, ValueError, r"decay\(1\) must be in \[0, 1\], got nan: clip"),
        (math.inf, ValueError, r"decay\(1\) must be in \[0, 1\], got inf: clip"),
        (2, ValueError, r"decay\(1\) must be in \[0, 1\], got 2.0: clip"),
        (torch.tensor(2.0), ValueError, r"decay\(1\) must be in \[0, 1\], got 2.0: clip"),
        (True, TypeError, r"decay\(1\) must be a real number, got True"),
        (None, TypeError, r"decay\(1\) must be a real number, got None"),
        ("0.5", TypeError, r"decay\(1\) must be a real number, got '0.5'"),
        (b"1", TypeError, r"decay\(1\) must be a real number, got b'1'"),
        (0.5 + 0j, TypeError, r"decay\(1\) must be a real number, got \(0.5\+0j\)"),
        (torch.tensor([0.5, 0.5]), TypeError, r"decay\(1\) must be a real number, got tensor"),
        (torch.tensor(0.5, device="meta"), TypeError, r"decay\(1\) must be .*, got tensor"),
        (torch.tensor(True), TypeError, r"decay\(1\) must be a real number, got tensor"),
        (torch.tensor(0j), TypeError, r"decay\(1\) must be a real number, got tensor"),
        (warmup_decay(0.5), TypeError, r"a factory is called first: warmup_decay\(0.999\)"),
    ],
)
@pytest.mark.parametrize(
    "use", [as_decay, lambda decay: decay_factor(decay, 1, 1), lambda d: initial_share(d, 1)]
)
def test_whatever_reads_a_schedule_checks_what_it_returns(use, value, exception, message):
    with pytest.raises(exception, match=message):
        use(lambda update: value)


def test_a_bad_value_is_reported_with_its_update_number():
    with pytest.raises(ValueError, match=r"decay\(5\) must be in \[0, 1\], got 1.25"):
        decay_factor(lambda update: update / 4, 5, 1)


UNIT_INTERVAL = [
    (1.5, ValueError, r"must be in \[0, 1\], got 1.5: 1 - 1/n averages"),
    (-0.1, ValueError, r"must be in \[0, 1\], got -0.1"),
    (math.nan, ValueError, r"must be in \[0, 1\], got nan"),
    (True, TypeError, r"must be a real number, got True: pass a float"),
    ("0.9", TypeError, r"must be a .*, got '0.9'"),
    (None, TypeError, r"must be a .*, got None"),
    (torch.tensor([0.9, 0.9]), TypeError, r"must be a .*, got tensor"),
]


@pytest.mark.parametrize(("value", "exception", "message"), UNIT_INTERVAL)
@pytest.mark.parametrize(
    ("function", "name"),
    [
        (as_decay, "decay"),
        (debiased_decay, "decay"),
        (warmup_decay, "max_decay"),
        (inverse_gamma_decay, "max_decay"),
        (exponential_warmup_decay, "max_decay"),
    ],
)
def test_decays_outside_the_unit_interval_are_refused(function, name, value, exception, message):
    with pytest.raises(exception, match=f"^{name} {message}"):
        function(value)


SAMPLES = {"half_life": 1000, "batch_size": 10}


@pytest.mark.parametrize(
    ("function", "kwargs", "exception", "message"),
    [
        (as_decay, {"decay": torch.tensor(0.9)}, TypeError, "float or a callable, got tensor"),
        (inverse_gamma_decay, {"max_decay": 0.5, "min_decay": 0.6}, ValueError, r"\[0, 0.5\]"),
        (inverse_gamma_decay, {"max_decay": 0.5, "min_decay": -0.1}, ValueError, "min_decay must"),
        (inverse_gamma_decay, {"max_decay": 0.5, "min_decay": "0"}, TypeError, "min_decay must"),
        (inverse_gamma_decay, {"max_decay": 0.5, "inv_gamma": 0}, ValueError, "inv_gamma must"),
        (inverse_gamma_decay, {"max_decay": 0.5, "inv_gamma": True}, TypeError, "inv_gamma must"),
        (inverse_gamma_decay, {"max_decay": 0.5, "power": -1}, ValueError, "power must be in"),
        (inverse_gamma_decay, {"max_decay": 0.5, "power": None}, TypeError, "power must be a"),
        (exponential_warmup_decay, {"max_decay": 0.5, "tau": 0}, ValueError, "tau .* got 0: 2000"),
        (exponential_warmup_decay, {"max_decay": 0.5, "tau": "1"}, TypeError, "tau must be a real"),
        (power_decay, {"sigma_rel": 0.3}, ValueError, r"got 0.3: 0.05 and 0.10 are usual"),
        (gamma_from_sigma_rel, {"sigma_rel": 0}, ValueError, r"sigma_rel must be in \(0, 0.2886"),
        (gamma_from_sigma_rel, {"sigma_rel": 12**-0.5}, ValueError, "equal_average"),
        (gamma_from_sigma_rel, {"sigma_rel": math.nan}, ValueError, "got nan"),
        (gamma_from_sigma_rel, {"sigma_rel": "0.1"}, TypeError, "sigma_rel must be a real number"),
        (sigma_rel_from_gamma, {"gamma": -0.5}, ValueError, r"gamma must be in \[0, inf\), got"),
        (sigma_rel_from_gamma, {"gamma": math.inf}, ValueError, r"gamma must be in \[0, inf\)"),
        (sigma_rel_from_gamma, {"gamma": False}, TypeError, "gamma must be a real number"),
        (samples_half_life_decay, SAMPLES | {"half_life": 0}, ValueError, "give it in samples"),
        (samples_half_life_decay, SAMPLES | {"batch_size": -1}, ValueError, "batch_size .* got -1"),
        (samples_half_life_decay, SAMPLES | {"ramp_up": 0.0}, ValueError, "None means no ramp"),
        (samples_half_life_decay, SAMPLES | {"ramp_up": True}, TypeError, "ramp_up must be a real"),
        (samples_half_life_decay, SAMPLES | {"batch_size": "8"}, TypeError, "batch_size must be"),
        (decay_from_half_life, {"half_life": 0}, ValueError, r"\(0, inf\), got 0: give it in opt"),
        (decay_from_half_life, {"half_life": math.inf}, ValueError, r"half_life .* got inf"),
        (decay_from_half_life, {"half_life": "10"}, TypeError, "half_life must be a real number"),
        (half_life_from_decay, {"decay": 1.0}, ValueError, "got 1.0: 0 and 1 have no half-life"),
        (half_life_from_decay, {"decay": 0}, ValueError, r"decay must be in \(0, 1\), got 0"),
        (half_life_from_decay, {"decay": True}, TypeError, "decay must be a real number"),
        (compute_optimal_decay, {"total_steps": -1}, ValueError, "got -1: pass the optimizer"),
        (compute_optimal_decay, {"total_steps": math.inf}, ValueError, "total_steps .* got inf"),
        (compute_optimal_decay, {"total_steps": "10"}, TypeError, "total_steps must be a real"),
        (compute_optimal_decay, {"total_steps": 9, "initial_weight": 1}, ValueError, "got 1: 1e-3"),
        (compute_optimal_decay, {"total_steps": 9, "initial_weight": 0}, ValueError, r"\(0, 1\)"),
        (decay_factor, {"decay": abs, "update": 3, "span": 4}, ValueError, "at most update=3"),
    ],
)
def test_arguments_out_of_range_are_refused(function, kwargs, exception, message):
    with pytest.raises(exception, match=message):
        function(**kwargs)
