"""Keep an exponential moving average (EMA) of the weights inside the optimizer."""

from typing import Any

from ._checkpoint.strip import strip_ema_state_dict
from .model import EMAModel
from .optimizer import EMAOptimizer
from .schedules import (
    compute_optimal_decay,
    debiased_decay,
    decay_from_half_life,
    equal_average,
    exponential_warmup_decay,
    gamma_from_sigma_rel,
    half_life_from_decay,
    inverse_gamma_decay,
    power_decay,
    samples_half_life_decay,
    sigma_rel_from_gamma,
    warmup_decay,
)

__version__ = "0.1.0"

__all__ = [
    "EMAModel",
    "EMAOptimizer",
    "compute_optimal_decay",
    "debiased_decay",
    "decay_from_half_life",
    "equal_average",
    "exponential_warmup_decay",
    "gamma_from_sigma_rel",
    "half_life_from_decay",
    "inverse_gamma_decay",
    "power_decay",
    "samples_half_life_decay",
    "sigma_rel_from_gamma",
    "strip_ema_state_dict",
    "warmup_decay",
]


def __getattr__(name: str) -> Any:
    # On demand: importing it imports transformers.
    if name == "EMACallback":
        from .integrations.transformers import EMACallback

        return EMACallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
