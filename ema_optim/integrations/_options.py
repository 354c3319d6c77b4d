"""The options of ``EMAOptimizer`` that a trainer's callback hands on."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from .._arithmetic.formats import EMADtype
from .._shadow.options import as_count, as_device, as_dtype, same_option
from .._shadow.windows import Decays, as_decays
from .._warnings import log
from ..optimizer import EMAOptimizer
from ..schedules import Schedule, compute_optimal_decay, warmup_decay


def shown_in_logs(metrics: Mapping[str, float]) -> dict[str, float]:
    """The metrics of ``EMAOptimizer.ema_metrics`` that a trainer logs, of every window."""
    shown = ("ema_decay", "ema_distance")
    return {name: value for name, value in metrics.items() if name.partition("/")[0] in shown}


def option_of(optimizer: EMAOptimizer, name: str) -> Any:
    """What an optimizer was given for one of the options below."""
    return optimizer.decay if name == "decay" else getattr(optimizer._ema, name)


@dataclass(frozen=True, eq=False)
class EMAOptions:
    """What a callback was given; a value that is its default leaves the choice to the optimizer.

    Args:
        decay: As for ``EMAOptimizer``, or "auto", or None.
        update_every: As for ``EMAOptimizer``.
        update_after_step: As for ``EMAOptimizer``.
        dtype: As for ``EMAOptimizer``.
        device: As for ``EMAOptimizer``.

    Raises:
        ValueError, TypeError: A value is out of its range.
    """

    decay: Decays | Literal["auto"] | None = None
    update_every: int = 1
    update_after_step: int = 0
    dtype: EMADtype = None
    device: torch.device | str | None = None

    def __post_init__(self) -> None:
        if self.decay is not None and self.decay != "auto":
            as_decays(self.decay)
        as_count("update_every", self.update_every, least=1)
        as_count("update_after_step", self.update_after_step, least=0)
        as_dtype(self.dtype)
        as_device(self.device)

    @property
    def chooses(self) -> bool:
        """Whether the decay is chosen here, from the length of the run."""
        return self.decay is None or self.decay == "auto"

    def resolved(self, steps: float) -> dict[str, Any]:
        """What ``EMAOptimizer`` takes, in a run of so many optimizer steps.

        Raises:
            ValueError: ``decay`` is "auto" and the run has no end.
        """
        given: dict[str, Any] = dict(vars(self))  # not asdict(): it would copy a schedule
        decay = self._chosen(steps) if self.chooses else self.decay
        return {**given, "decay": decay, "device": as_device(self.device)}

    def _chosen(self, steps: float) -> Schedule:
        # With a warm-up: else evaluations in the first third of a run are of the initial weights.
        if 1 <= steps < float("inf"):
            return warmup_decay(compute_optimal_decay(int(steps)))
        if self.decay == "auto":
            raise ValueError(
                f"decay='auto' must know the steps of the run, got {steps}: set max_steps"
            )
        return warmup_decay(0.999)

    def log_choice(self, steps: float) -> None:
        """Log the decay that was chosen for a run."""
        if self.chooses:
            known = (
                f"chosen for {steps:.0f} steps" if steps < float("inf") else "of no known length"
            )
            log("EMA decay: %s, %s", self._chosen(steps), known)

    def differences(self, optimizer: EMAOptimizer, steps: float) -> dict[str, tuple[Any, Any]]:
        """The options that were set here otherwise than in an optimizer: (here, there)."""
        wanted = self.resolved(steps)
        return {
            name: (wanted[name], own)
            for name, default in vars(EMAOptions()).items()
            if getattr(self, name) != default
            and not same_option(wanted[name], own := option_of(optimizer, name))
        }

    def check_same(self, optimizer: EMAOptimizer, steps: float, whose: str) -> None:
        """Raise ValueError where an option is not that of the user's own optimizer.

        Args:
            optimizer: The user's own.
            steps: The optimizer steps of the run.
            whose: Which optimizer that is, for the message.
        """
        for name, (here, there) in self.differences(optimizer, steps).items():
            raise ValueError(
                f"{name} must be that of the EMAOptimizer {whose} ({there}), got {here}: leave it "
                "out of the callback, or set it there"
            )
