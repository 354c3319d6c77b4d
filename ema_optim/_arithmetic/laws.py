"""Laws: a decay as a file holds it, a number or one of the package's schedules by name.

``{"schedule": "power", "exponent": 17.97}`` has the name and the arguments of the function that
computes it; a limit of infinity is null. A function of the user's has no law.
"""

import json
from collections.abc import Callable, Mapping
from functools import partial
from math import inf, isinf

from .. import schedules
from ..schedules import Decay, Schedule

Law = float | dict[str, str | float | None]


def law_of(decay: Decay) -> Law:
    """Return ``decay`` in plain values that JSON can hold; ``decay_of`` reads them.

    Raises:
        TypeError: If it is a function that is none of the package's own schedules.
    """
    if not callable(decay):
        return float(decay)
    name = _name(decay)
    if name is None:
        raise TypeError(
            f"decay must be a float or one of ema_optim's schedules, got {decay!r}: "
            "a file cannot hold a function"
        )
    options = decay.keywords.items()  # type: ignore[attr-defined]  # a name means a partial
    return {"schedule": name} | {key: None if isinf(value) else value for key, value in options}


def decay_of(law: object) -> Decay:
    """Return the float or the schedule that ``law`` was written from, equal to it.

    Raises:
        ValueError: If no version of this package up to this one writes such a law.
    """
    try:
        if not isinstance(law, Mapping):
            return schedules.as_decay(law)  # type: ignore[arg-type]  # it checks what it gets
        options = dict(law)
        make = _MAKE[options.pop("schedule")]
        return make(**{key: inf if value is None else value for key, value in options.items()})
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"decay must be a number in [0, 1] or a schedule of this version of ema_optim, got "
            f"{law!r}: a newer version may read it"
        ) from error


def law_text(law: Law) -> str:
    """Return ``law`` as JSON in which equal laws are equal texts; ``json.loads`` reads it."""
    return json.dumps(law, sort_keys=True, allow_nan=False)


def _name(decay: Schedule) -> str | None:
    # A plain partial too: pickles of earlier versions hold these.
    if not isinstance(decay, partial) or decay.args:
        return None
    return _NAMES.get(decay.func)


def _power(exponent: float) -> Schedule:
    # Not through the width: its inverse is right but for the last bits.
    width = schedules.sigma_rel_from_gamma(exponent - 1.0)
    return schedules._schedule(f"power_decay({width:.6g})", schedules._power, exponent=exponent)


def _half_life(half_life: float, ramp_up: float) -> Schedule:
    ramp = None if isinf(ramp_up) else ramp_up
    return schedules.samples_half_life_decay(half_life, batch_size=1, ramp_up=ramp)


_NAMES: dict[Callable[..., float], str] = {
    schedules._warmup: "warmup",
    schedules._inverse_gamma: "inverse_gamma",
    schedules._exponential_warmup: "exponential_warmup",
    schedules._debiased: "debiased",
    schedules._power: "power",
    schedules._half_life: "half_life",
    schedules._equal: "equal",
}
_MAKE: dict[object, Callable[..., Schedule]] = {
    "warmup": schedules.warmup_decay,
    "inverse_gamma": schedules.inverse_gamma_decay,
    "exponential_warmup": schedules.exponential_warmup_decay,
    "debiased": schedules.debiased_decay,
    "power": _power,
    "half_life": _half_life,
    "equal": schedules.equal_average,
}
