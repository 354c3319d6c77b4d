"""Decay schedules: how much of the old average each update keeps.

A schedule is a picklable callable ``update number t (from 1) -> decay``, without state, for the
average ``ema = decay * ema + (1 - decay) * weights``. An argument outside the range given for it
raises ValueError; one that is no number, such as a bool or a string, raises TypeError.
"""

import math
from collections.abc import Callable
from functools import partial

Schedule = Callable[[int], float]
Decay = float | Callable[[int], float]


def warmup_decay(max_decay: float) -> Schedule:
    """Schedule ``min(max_decay, (1 + t) / (10 + t))``, which follows early training closely.

    The initial weights hold 6e-5 of the average after 10 updates. 0.99 is reached at 890 updates,
    0.999 at 9.0k and 0.9999 at 90k. Source: torch-ema, ``use_num_updates=True``.

    Args:
        max_decay: Decay per optimizer step once warmed up, in [0, 1].
    """
    upper = _unit("max_decay", max_decay)
    return _schedule(f"warmup_decay({upper})", _warmup, max_decay=upper)


def inverse_gamma_decay(
    max_decay: float, *, inv_gamma: float = 1.0, power: float = 2 / 3, min_decay: float = 0.0
) -> Schedule:
    """Schedule ``1 - (1 + t / inv_gamma) ** -power``, clipped to [min_decay, max_decay].

    Power 2/3 reaches 0.999 at 31.6k updates and 0.9999 at 1M, for runs of a million steps and
    more; 3/4 reaches them at 10k and 215.4k, for shorter ones. Source: k-diffusion, ``EMAWarmup``.

    Args:
        max_decay: Upper limit of the decay per optimizer step, in [0, 1].
        inv_gamma: Time scale in optimizer steps; a larger one ramps up more slowly (default: 1).
        power: Exponent; a larger one ramps up faster (default: 2/3, as in diffusers).
        min_decay: Lower limit of the decay, in [0, max_decay] (default: 0, no limit).
    """
    upper = _unit("max_decay", max_decay)
    options = {
        "inv_gamma": _positive("inv_gamma", inv_gamma, "1 is the usual value"),
        "power": _positive("power", power, "2/3 and 3/4 are the usual values"),
        "min_decay": _inside(
            "min_decay", min_decay, f"[0, {upper}]", "it may not exceed max_decay"
        ),
    }
    shown = ", ".join(f"{name}={value}" for name, value in options.items())
    call = f"inverse_gamma_decay({upper}, {shown})"
    return _schedule(call, _inverse_gamma, max_decay=upper, **options)


def exponential_warmup_decay(max_decay: float, *, tau: float = 2000) -> Schedule:
    """Schedule ``max_decay * (1 - exp(-t / tau))``. Source: Ultralytics, ``ModelEMA``.

    Args:
        max_decay: Limit of the decay per optimizer step, in [0, 1].
        tau: Time constant in optimizer steps (default: 2000, as in Ultralytics): the ramp is at
            63 % of ``max_decay`` after ``tau`` updates and at 99.3 % after ``5 * tau``.
    """
    upper, scale = _unit("max_decay", max_decay), _positive("tau", tau, "2000 is the usual value")
    call = f"exponential_warmup_decay({upper}, tau={scale})"
    return _schedule(call, _exponential_warmup, max_decay=upper, tau=scale)


def debiased_decay(decay: float) -> Schedule:
    """Schedule ``decay * (1 - decay**(t-1)) / (1 - decay**t)``: bias correction, no zero start.

    The average equals one that starts at zero and is divided by ``1 - decay**t``, as in Adam
    (Kingma and Ba 2015, arXiv 1412.6980), but is a valid model at any time. The first update
    forgets the initial weights; well before ``1 / (1 - decay)`` updates it is the plain mean.

    Args:
        decay: Final decay per optimizer step, in [0, 1]; at 1 the schedule is ``equal_average()``.
    """
    final = _unit("decay", decay)
    return _schedule(f"debiased_decay({final})", _debiased, decay=final)


def power_decay(sigma_rel: float) -> Schedule:
    """Schedule ``(1 - 1/t) ** (gamma + 1)``: the window is a fixed fraction of the run so far.

    Step ``t`` weighs as ``t**gamma``, so one setting fits every run length; the initial weights
    are forgotten. Source: EDM2, Karras et al. 2024, arXiv 2312.02696, equation 127.

    Args:
        sigma_rel: Standard deviation of the average as a fraction of the run, in (0, 0.2887); EDM2
            keeps 0.05 and 0.10. Compare a constant decay of ``1 - 1/(sigma_rel * steps)``.
    """
    exponent = gamma_from_sigma_rel(sigma_rel) + 1.0
    return _schedule(f"power_decay({float(sigma_rel)})", _power, exponent=exponent)


def samples_half_life_decay(
    half_life: float, *, batch_size: float, ramp_up: float | None = None
) -> Schedule:
    """Schedule ``0.5 ** (batch_size / h)`` with ``h = min(half_life, ramp_up * batch_size * t)``.

    Stated in samples, the window stays the same when the batch size changes.
    Source: NVlabs/edm2, ``TraditionalEMA``; NVlabs/edm counts the samples seen before the step.

    Args:
        half_life: Half-life in samples; NVlabs/edm uses 500 000.
        batch_size: Samples per optimizer step, over all devices and accumulated micro-batches.
        ramp_up: Upper limit of the half-life as a fraction of the samples seen, this step's
            included (default: None, no limit); NVlabs/edm uses 0.05 and NVlabs/edm2 0.09.
    """
    samples = _positive("half_life", half_life, "give it in samples")
    batch = _positive("batch_size", batch_size, "give the samples per optimizer step")
    ramp = None if ramp_up is None else _positive("ramp_up", ramp_up, "None means no ramp")
    call = f"samples_half_life_decay({samples}, batch_size={batch}, ramp_up={ramp})"
    limit = math.inf if ramp is None else ramp
    return _schedule(call, _half_life, half_life=samples / batch, ramp_up=limit)


def equal_average() -> Schedule:
    """Schedule ``1 - 1/t``: the plain mean of all weights so far, without the initial ones.

    Source: stochastic weight averaging, Izmailov et al. 2018, arXiv 1803.05407.
    """
    return _schedule("equal_average()", _equal)


def decay_from_half_life(half_life: float) -> float:
    """Return ``0.5 ** (1 / half_life)``: 0.999 for 692.8 steps, 0.9999 for 6931.1.

    Args:
        half_life: Optimizer steps after which the weights of a step count half as much.
    """
    return math.pow(0.5, 1.0 / _positive("half_life", half_life, "give it in optimizer steps"))


def half_life_from_decay(decay: float) -> float:
    """Return ``log(0.5) / log(decay)`` in optimizer steps: 692.8 for 0.999, 6931.1 for 0.9999.

    Args:
        decay: Decay per optimizer step, in (0, 1).
    """
    return math.log(0.5) / math.log(_inside("decay", decay, "(0, 1)", "0 and 1 have no half-life"))


def compute_optimal_decay(total_steps: float, *, initial_weight: float = 1e-3) -> float:
    """Return ``initial_weight ** (1 / total_steps)``, a rule of thumb for a constant decay.

    It is 0.9931 for 1 000 steps and 0.9993 for 10 000. "Optimal" is a name, not a theorem:
    ``1 - 10/total_steps`` is as good. A shorter window is better when the loss still falls fast at
    the end (``1 - 30/total_steps``) or the learning rate decays to zero (1 % of the run).

    Args:
        total_steps: Length of the run in optimizer steps, at least 1.
        initial_weight: Share of the initial weights left in the average at the end of the run, in
            (0, 1) (default: 1e-3, which makes the window about a seventh of the run).
    """
    steps = _inside("total_steps", total_steps, "[1, inf)", "pass the optimizer steps of the run")
    share = _inside("initial_weight", initial_weight, "(0, 1)", "1e-3 is the usual value")
    return math.pow(share, 1.0 / steps)


def gamma_from_sigma_rel(sigma_rel: float) -> float:
    """Return the largest root of ``(g + 2)**2 * (g + 3) * sigma_rel**2 = g + 1``, in closed form.

    It is 16.97 for 0.05 and 6.94 for 0.10. Source: Karras et al. 2024, arXiv 2312.02696.

    Args:
        sigma_rel: Width of a power-function average as a fraction of the run, in (0, 0.2887).
    """
    remedy = "0.05 and 0.10 are usual, equal_average() is the upper limit"
    sigma = _inside("sigma_rel", sigma_rel, f"(0, {12**-0.5})", remedy)
    # The cubic's textbook solution, multiplied through by sigma: sigma**-2 would overflow.
    root = math.sqrt(3.0 + sigma * sigma)
    angle = math.acos(-sigma * (18.0 + sigma * sigma) / root**3) / 3.0
    return max(0.0, (2.0 * root / sigma * math.cos(angle) - 7.0) / 3.0)


def sigma_rel_from_gamma(gamma: float) -> float:
    """Return ``sqrt((gamma + 1) / ((gamma + 2)**2 * (gamma + 3)))``, a fraction of the run.

    Args:
        gamma: Exponent of a power-function average, 0 (the plain mean) or more.
    """
    number = _inside("gamma", gamma, "[0, inf)", "0 is the plain mean")
    return math.sqrt((number + 1.0) / (number + 3.0)) / (number + 2.0)


def as_decay(decay: Decay) -> Decay:
    """Return a constructor's ``decay`` as a float, or the schedule after calling it once with 1.

    Raises:
        TypeError: If it is no float, int or callable, or the callable returns no number.
        ValueError: If it, or what the callable returns, is outside [0, 1].
    """
    if callable(decay):
        _call(decay, 1)
        return decay
    if not isinstance(decay, (int, float)):  # a tensor might be meant to change later
        remedy = "0.999 is usual"
        if decay == "auto":  # only the trainers' callbacks know the steps of the run
            remedy = "pass compute_optimal_decay(total_steps)"
        raise TypeError(f"decay must be a float or a callable, got {decay!r}: {remedy}")
    return _unit("decay", decay)


def decay_factor(decay: Decay, update: int, span: int) -> float:
    """Return ``decay**span``, or ``decay(update - span + 1) * ... * decay(update)`` of a schedule.

    Args:
        decay: Decay per optimizer step, or a schedule.
        update: Number of the last step covered, from 1.
        span: Steps covered; a schedule is not defined before 1, so it may not exceed ``update``.

    Raises:
        TypeError: If the schedule returns no real number.
        ValueError: If the schedule returns a value outside [0, 1], or ``span`` exceeds ``update``.
    """
    if not callable(decay):
        return float(decay**span)
    if span > update:
        raise ValueError(f"span must be at most update={update}, got {span}: steps count from 1")
    return math.prod(_call(decay, step) for step in range(update - span + 1, update + 1))


def initial_share(decay: Decay, updates: int) -> float:
    """Return ``decay(1) * ... * decay(updates)``, the share the initial weights still hold.

    At 0.9999 it is 90.5 % after 1 000 updates and 36.8 % after 10 000. A schedule is called for
    every update until the share is below 1e-12, which is returned as 0; from the millionth update
    on for one in a thousand, which stands for its neighbours. Raises as ``decay_factor``.
    """
    if not callable(decay):
        return float(decay**updates)
    share, update = 1.0, 1
    while update <= updates:
        # A counter may be absurdly large (a damaged file), and its end must be reached.
        length = 1 if update < 10**6 else min(update // 1000, updates - update + 1)
        share *= _call(decay, update + length // 2) ** length
        if share < 1e-12:
            return 0.0
        update += length
    return share


class _Schedule(partial[float]):
    """A schedule that reads as the call that made it, and compares by what it computes."""

    call: str

    def __repr__(self) -> str:
        return self.call

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Schedule) and self._value() == other._value()

    def __hash__(self) -> int:
        return hash(self._value())

    def _value(self) -> tuple[object, ...]:
        return self.func, *sorted(self.keywords.items())


def _schedule(call: str, function: Callable[..., float], **options: float) -> Schedule:
    made = _Schedule(function, **options)
    made.call = call  # what was given: the options may hold what is computed from it
    return made


# Pickles find the functions below by name, also those of versions without the class above.


def _warmup(update: int, *, max_decay: float) -> float:
    return min(max_decay, (1 + update) / (10 + update))


def _inverse_gamma(
    update: int, *, max_decay: float, inv_gamma: float, power: float, min_decay: float
) -> float:
    ramp = -math.expm1(-power * math.log1p(update / inv_gamma))
    return min(max_decay, max(min_decay, ramp))


def _exponential_warmup(update: int, *, max_decay: float, tau: float) -> float:
    return -max_decay * math.expm1(-update / tau)


def _debiased(update: int, *, decay: float) -> float:
    if decay in (0.0, 1.0):
        return decay * _equal(update)
    rate = math.log(decay)
    return decay * math.expm1((update - 1) * rate) / math.expm1(update * rate)


def _power(update: int, *, exponent: float) -> float:
    return 0.0 if update == 1 else math.exp(exponent * math.log1p(-1.0 / update))


def _half_life(update: int, *, half_life: float, ramp_up: float) -> float:
    return math.pow(0.5, 1.0 / min(half_life, ramp_up * update))


def _equal(update: int) -> float:
    return 1.0 - 1.0 / update


def _call(schedule: Schedule, update: int) -> float:
    value = schedule(update)
    if type(value) is not float:
        value = _number(f"decay({update})", value, "a factory is called first: warmup_decay(0.999)")
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"decay({update}) must be in [0, 1], got {value}: clip what it returns")
    return value


def _number(name: str, value: float, remedy: str = "pass a float") -> float:
    dtype = str(getattr(value, "dtype", ""))
    # float() would let strings, booleans and boolean or complex arrays of one element through.
    wrong = isinstance(value, (bool, complex)) or "bool" in dtype or "complex" in dtype
    try:
        if not wrong and hasattr(value, "__float__"):
            return float(value)
    except (TypeError, ValueError, RuntimeError):
        pass
    raise TypeError(f"{name} must be a real number, got {value!r}: {remedy}")


def _inside(name: str, value: float, interval: str, remedy: str) -> float:
    number = _number(name, value)
    low, high = map(float, interval[1:-1].split(","))
    inside = low < number if interval[0] == "(" else low <= number
    if inside and (number < high if interval[-1] == ")" else number <= high):
        return number
    raise ValueError(f"{name} must be in {interval}, got {value}: {remedy}")


def _unit(name: str, value: float) -> float:
    return _inside(name, value, "[0, 1]", "1 - 1/n averages over about n steps")


def _positive(name: str, value: float, remedy: str) -> float:
    return _inside(name, value, "(0, inf)", remedy)
