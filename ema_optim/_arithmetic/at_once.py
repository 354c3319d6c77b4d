"""The package's own schedules for all updates at once, by the names that they have in a law.

The formulas are those of ``schedules``: a call for each of a million steps takes over a second.
"""

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType

from torch import Tensor


def _warmup(updates: Tensor, *, max_decay: float) -> Tensor:
    return ((1 + updates) / (10 + updates)).clamp(max=max_decay)


def _inverse_gamma(
    updates: Tensor, *, max_decay: float, inv_gamma: float, power: float, min_decay: float
) -> Tensor:
    ramp = -(-power * (updates / inv_gamma).log1p()).expm1()
    return ramp.clamp(min=min_decay).clamp(max=max_decay)


def _exponential_warmup(updates: Tensor, *, max_decay: float, tau: float) -> Tensor:
    return -max_decay * (-updates / tau).expm1()


def _debiased(updates: Tensor, *, decay: float) -> Tensor:
    if decay in (0.0, 1.0):
        return decay * _equal(updates)
    rate = math.log(decay)
    return decay * ((updates - 1) * rate).expm1() / (updates * rate).expm1()


def _power(updates: Tensor, *, exponent: float) -> Tensor:
    return (exponent * (-1 / updates).log1p()).exp()


def _half_life(updates: Tensor, *, half_life: float, ramp_up: float) -> Tensor:
    return 0.5 ** (1 / (ramp_up * updates).clamp(max=half_life))


def _equal(updates: Tensor) -> Tensor:
    return 1 - 1 / updates


AT_ONCE: Mapping[object, Callable[..., Tensor]] = MappingProxyType(
    {
        "warmup": _warmup,
        "inverse_gamma": _inverse_gamma,
        "exponential_warmup": _exponential_warmup,
        "debiased": _debiased,
        "power": _power,
        "half_life": _half_life,
        "equal": _equal,
    }
)
