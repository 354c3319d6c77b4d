"""Keep an exponential moving average (EMA) of the weights inside the optimizer."""

from typing import Any

from ._checkpoint.strip import strip_ema_state_dict
from ._shadow.blocks import swap_ema_weights
from ._version import __version__ as __version__
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

__all__ = [
    "EMAModel",
    "EMAOptimizer",
    "compute_optimal_decay",
    "debiased_decay",
    "decay_from_half_life",
    "equal_average",
    "exponential_warmup_decay",
    "export_ema",
    "gamma_from_sigma_rel",
    "half_life_from_decay",
    "inverse_gamma_decay",
    "power_decay",
    "samples_half_life_decay",
    "sigma_rel_from_gamma",
    "strip_ema_state_dict",
    "swap_ema_weights",
    "warmup_decay",
]


def __getattr__(name: str) -> Any:
    # On demand: the first imports transformers, the second is seldom needed.
    if name == "EMACallback":
        from .integrations.transformers import EMACallback

        return EMACallback
    if name == "export_ema":
        from ._tools.export import export_ema

        return export_ema
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
