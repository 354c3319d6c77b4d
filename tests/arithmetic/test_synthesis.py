"""The combinations: figures with 50 digits, walks and lines, and the published metric beside."""

import math
from itertools import product

import pytest
import torch

from ema_optim import (
    EMAOptimizer,
    debiased_decay,
    equal_average,
    exponential_warmup_decay,
    inverse_gamma_decay,
    power_decay,
    samples_half_life_decay,
    warmup_decay,
)
from ema_optim._arithmetic import synthesis
from ema_optim._arithmetic.synthesis import Average, Solver, factors, lags
from ema_optim.schedules import decay_factor


def powers(steps, widths):
    return [Average(power_decay(width), step) for step, width in product(steps, widths)]


QUARTERS, HUNDREDS = (250, 500, 750, 1000), range(100, 1001, 100)
TWO, THREE = powers([1000], (0.05, 0.10)), powers([1000], (0.05, 0.10, 0.20))
FOUR_TWICE = powers(QUARTERS, (0.05, 0.10))
CONSTANT = [Average(0.99, step) for step in HUNDREDS]
STRIDES = [Average(0.99, step, 5, 50) for step in range(200, 1001, 200)]
WEIGHTS = [Average(0.0, step) for step in HUNDREDS]
# Computed with 50 digits, straight from the definition: inputs, target, coefficients, error.
FIGURES = [
    (TWO, power_decay(0.075), [0.475159712827, 0.524840287173], 0.0441494577346),
    (TWO, power_decay(0.15), [-0.791523443137, 1.79152344314], 0.155991888333),
    (TWO, power_decay(0.20), [-1.41890706052, 2.41890706052], 0.32053419153),
    (THREE, power_decay(0.12), [-0.171712548341, 1.05279284692, 0.118919701425], 0.0194269936629),
    (
        FOUR_TWICE,
        power_decay(0.075),
        [
            -0.000151363426386,
            6.25786472228e-5,
            -0.00238801047306,
            0.000180238805326,
            -0.0049535886206,
            -0.032733110088,
            0.364787997143,
            0.675195258012,
        ],
        0.012574277723,
    ),
    (
        FOUR_TWICE,
        power_decay(0.15),
        [
            0.00379479195713,
            0.000642582556217,
            -0.00218612284662,
            0.0373832556304,
            -0.0657819039696,
            0.197460487696,
            -0.297052652669,
            1.12573956165,
        ],
        0.0178102998069,
    ),
    (FOUR_TWICE, power_decay(0.20), None, 0.0257692535967),
    (
        CONSTANT,
        0.997,
        [
            0.071518275212,
            -0.00249879451751,
            0.0311747343621,
            0.0333233149885,
            0.0473362324327,
            0.0628945051838,
            0.0869375772384,
            0.110031040579,
            0.177585505875,
            0.381697608646,
        ],
        0.0146382133913,
    ),
    (
        STRIDES,
        0.995,
        [0.0154667027366, 0.0252388380634, 0.0589527474915, 0.227518599242, 0.672823112466],
        0.0500643679634,
    ),
    (WEIGHTS, power_decay(0.15), None, 0.145845880373),
]


@pytest.mark.parametrize(("inputs", "decay", "coefficients", "told"), FIGURES)
def test_coefficients_and_error_are_those_of_fifty_digits(inputs, decay, coefficients, told):
    found, error = Solver(inputs).solve(inputs[-1]._replace(decay=decay))
    assert error == pytest.approx(told, rel=1e-9)
    assert math.fsum(found) == pytest.approx(1.0, abs=1e-12)
    if coefficients is not None:
        assert found == pytest.approx(coefficients, abs=1e-9)


def test_weights_of_single_steps_are_the_average_with_decay_zero():
    found, _ = Solver(WEIGHTS).solve(Average(power_decay(0.15), 1000))
    assert found[-1] == pytest.approx(0.204446801353, abs=1e-9)
    assert max(found) == pytest.approx(0.315614530623, abs=1e-9)


@pytest.mark.parametrize("kept", range(8))
def test_a_target_that_is_an_input_is_exactly_that_input(kept):
    inputs = FOUR_TWICE[:4] + STRIDES[:2] + WEIGHTS[-2:]
    found, error = Solver(inputs).solve(inputs[kept])
    assert found == [float(index == kept) for index in range(8)]
    assert error == 0.0


@pytest.mark.parametrize("last", [250, 500, 750])
def test_later_inputs_are_not_used(last):
    target = Average(power_decay(0.15), last)
    among = Solver(FOUR_TWICE).solve(target)
    alone = Solver([average for average in FOUR_TWICE if average.step <= last]).solve(target)
    assert among == (alone[0] + [0.0] * (8 - len(alone[0])), alone[1])


def test_without_an_input_as_old_as_the_target_there_is_no_answer():
    with pytest.raises(ValueError, match="no average is known at step 249 or before it"):
        Solver(FOUR_TWICE).solve(Average(0.5, 249))


def test_duplicates_and_the_weights_of_now_do_no_harm():
    inputs = [*TWO, *TWO, Average(0.0, 1000), Average(0.0, 1000)]
    target = Average(power_decay(0.075), 1000)
    found, error = Solver(inputs).solve(target)
    alone, limit = Solver([*TWO, Average(0.0, 1000)]).solve(target)
    assert error == pytest.approx(limit, rel=1e-9)
    assert [found[0] + found[2], found[1] + found[3]] == pytest.approx(alone[:2], abs=1e-9)


def test_a_target_between_snapshots_and_one_without_memory_are_answered():
    found, error = Solver(FOUR_TWICE).solve(Average(power_decay(0.075), 1100))
    assert 0.3 < error < 1.5
    assert math.fsum(found) == pytest.approx(1.0, abs=1e-12)
    assert Solver(FOUR_TWICE).solve(Average(0.0, 1000))[1] == math.inf  # no distance to divide by


def test_hundreds_of_nearly_equal_snapshots_stay_usable():
    inputs = powers(range(16, 4097, 16), (0.05, 0.10))  # condition 5e12
    found, error = Solver(inputs).solve(Average(power_decay(0.15), 4096))
    assert error < 1e-5
    assert math.fsum(map(abs, found)) < 5


def averages(wanted, path):
    """Return the averages of ``path``, one row a step, as an EMAOptimizer makes them."""
    found = {}
    for law in {average._replace(step=0) for average in wanted}:
        weights = torch.nn.Parameter(torch.zeros_like(path[0]))
        model = torch.nn.ParameterList([weights])
        ema = EMAOptimizer(
            torch.optim.SGD([weights], lr=1.0),
            law.decay,
            update_every=law.update_every,
            update_after_step=law.update_after_step,
        )
        for step, row in enumerate(path, start=1):
            weights.grad = weights.detach() - row
            ema.step()
            if law._replace(step=step) in wanted:
                found[law._replace(step=step)] = ema.get_ema_state(model)["0"]
    return [found[average] for average in wanted]


LINES = [
    (powers((50, 100, 150, 200), (0.05, 0.10)), power_decay(0.075)),
    (STRIDES[:2], 0.995),
    ([Average(power_decay(0.10), 200)], 0.98),
]


@pytest.mark.filterwarnings("ignore:.* of the initial weights")
@pytest.mark.parametrize(("inputs", "decay"), LINES)
def test_on_a_line_the_combination_keeps_the_scale(inputs, decay):
    target = inputs[-1]._replace(decay=decay)
    steps = target.step
    line = torch.arange(1, steps + 1, dtype=torch.float64)[:, None] / steps
    *kept, true = averages([*inputs, target], line)
    found, told = Solver(inputs).solve(target)
    made = sum(x * average for x, average in zip(found, kept, strict=True))
    lag = lags(factors(target, steps), [(0, steps)])
    assert abs(made - true) <= told * lag.norm() / steps**0.5 + 1e-12  # all updates of one sign


WALKS = [
    (powers((200, 400), (0.05, 0.10)), power_decay(0.075)),
    (powers((100, 200, 300, 400), (0.08,)), power_decay(0.15)),
    ([Average(0.95, step) for step in range(20, 401, 20)], 0.98),
    ([Average(warmup_decay(0.95), step) for step in range(40, 401, 40)], debiased_decay(0.98)),
    ([Average(0.95, step, 4, 13) for step in range(40, 401, 40)], 0.98),
    ([Average(0.0, step) for step in range(20, 401, 20)], power_decay(0.10)),
]


@pytest.mark.filterwarnings("ignore:.* of the initial weights")
@pytest.mark.parametrize(("inputs", "decay"), WALKS)
def test_on_a_random_walk_the_error_is_as_told(inputs, decay):
    target = inputs[-1]._replace(decay=decay)
    noise = torch.randn(400, 93, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    path = noise.cumsum(0)
    *kept, true = averages([*inputs, target], path)
    found, told = Solver(inputs).solve(target)
    made = sum(x * average for x, average in zip(found, kept, strict=True))
    measured = (made - true).norm() / (path[-1] - true).norm()
    assert 0.7 < measured / told < 1.4


# The published reconstruction (EDM2): inner products of the weights of steps, x over its sum.
PUBLISHED = [
    (
        0.075,
        [
            5.546456341e-8,
            -9.914806777e-7,
            1.308978315e-4,
            -7.879841739e-4,
            1.158169601e-2,
            -4.466504858e-2,
            3.364241579e-1,
            6.973172170e-1,
        ],
    ),
    (
        0.15,
        [
            -5.620351079e-4,
            1.944069304e-3,
            -1.314786559e-2,
            3.801996664e-2,
            -7.795837215e-2,
            2.004086401e-1,
            -2.640619708e-1,
            1.115357568,
        ],
    ),
]


@pytest.mark.parametrize(("width", "published"), PUBLISHED)
def test_the_published_coefficients_are_further_off_on_a_random_walk(width, published):
    target = Average(power_decay(width), 1000)
    found, told = Solver(FOUR_TWICE).solve(target)
    known = torch.stack([whole_lag(average) for average in FOUR_TWICE])
    lag = whole_lag(target)

    def off(coefficients):
        made = torch.tensor(coefficients, dtype=torch.float64) @ known
        return ((made - lag).norm() / lag.norm()).item()

    assert off(found) == pytest.approx(told, rel=1e-9)
    assert told < off(published) < 10 * told
    assert found[-3:] == pytest.approx(published[-3:], abs=0.1)  # another metric, not another idea


def whole_lag(average):
    late = torch.ones(1000 - average.step, dtype=torch.float64)
    return torch.cat([lags(factors(average, average.step), [(0, average.step)]), late])


OWN = [
    power_decay(0.07),
    warmup_decay(0.99),
    warmup_decay(0.5),
    inverse_gamma_decay(0.9, inv_gamma=3.0, power=0.7, min_decay=0.4),
    exponential_warmup_decay(0.99, tau=20.0),
    debiased_decay(0.98),
    debiased_decay(1.0),
    debiased_decay(0.0),
    samples_half_life_decay(400.0, batch_size=16, ramp_up=0.3),
    samples_half_life_decay(400.0, batch_size=16),
    equal_average(),
]
DECAYS = [0.0, 1.0, 0.9, *OWN, lambda t: 1 / t]


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize(("every", "after"), [(1, 0), (3, 0), (7, 10), (50, 0), (1, 99)])
def test_factors_are_those_of_the_updates(decay, every, after):
    made = factors(Average(decay, 40, every, after), 40).tolist()
    due = [u > 0 and u % every == 0 for u in range(1 - after, 41 - after)]
    steps = [
        decay_factor(decay, step - after, every) if update else float(step > after)
        for step, update in enumerate(due, start=1)
    ]
    assert made == pytest.approx(steps, rel=1e-13, abs=0.0)


@pytest.mark.parametrize("value", [1.5, -0.1, math.nan])
def test_a_schedule_that_leaves_its_range_is_named_with_the_step(value):
    with pytest.raises(ValueError, match=rf"decay\(7\) must be in \[0, 1\], got {value}"):
        factors(Average(lambda step: value if step == 7 else 0.5, 10), 10)


@pytest.mark.parametrize("decay", OWN)
def test_no_schedule_of_the_package_is_called_for_each_step(decay, monkeypatch):
    # A run of a million steps: a call for each takes over a second, and a sweep has many targets.
    monkeypatch.setattr(synthesis, "_called", None)
    assert len(factors(Average(decay, 10**5), 10**5)) == 10**5
