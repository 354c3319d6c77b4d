"""Keep an exponential moving average (EMA) of the weights inside the optimizer."""

from importlib import import_module
from typing import TYPE_CHECKING

from ._checkpoint.strip import strip_ema_state_dict
from ._shadow.blocks import swap_ema_weights
from ._version import __version__ as __version__
from ._warnings import EMAWarning
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
    "EMASnapshots",
    "EMAWarning",
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

# On demand: the first two import their trainers, the others are seldom needed.
_LAZY = {
    "EMACallback": ".integrations.transformers",
    "EMAWeights": ".integrations.lightning",
    "EMASnapshots": ".snapshots",
    "export_ema": "._tools.export",
}

if TYPE_CHECKING:  # a type checker would take every name for one that is there
    from ._tools.export import export_ema as export_ema
    from .integrations.lightning import EMAWeights as EMAWeights
    from .integrations.transformers import EMACallback as EMACallback
    from .snapshots import EMASnapshots as EMASnapshots
else:

    def __getattr__(name):
        if name in _LAZY:
            return getattr(import_module(_LAZY[name], __name__), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
