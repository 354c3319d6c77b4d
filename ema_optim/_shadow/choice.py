"""Which average is meant by ``decay`` where the EMA is read: a window, or a combination of all."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from .._arithmetic.combination import combined
from .._arithmetic.synthesis import Average, Solver
from .._engines.quantized import write_
from .._engines.sharding import local
from ..schedules import Decay, _number, as_decay
from .shadow_set import ShadowSet
from .slots import Slot, read_

Choice = str | Decay | None


class Shown(Protocol):
    """An average that is not the first window."""

    @property
    def windows(self) -> Sequence[ShadowSet]:
        """The shadow sets that it is read from."""

    def value(self, param: Tensor) -> Tensor:
        """The average of a parameter."""

    def write_(self, params: Mapping[Tensor, Slot]) -> None:
        """Write the average into parameters."""


def choose(shadow: ShadowSet, decay: Choice, max_error: float) -> Shown | None:
    """The average that ``decay`` names, or None for the first window.

    Args:
        shadow: The shadow set.
        decay: The name of a window, or the decay of an average that is combined from them.
        max_error: The largest error of a combination, as it is told in advance: its expected
            distance from the average over that of the average from the training weights.

    Raises:
        ValueError: There is no such window, the told error is larger than ``max_error``, or the
            decay of a window was changed, so that nothing can be combined.
        TypeError: ``decay`` is neither a name nor a decay.
    """
    if decay is None and max_error == 0.05:
        return None  # nothing was asked for
    limit = _as_limit(max_error)
    if decay is None:
        return None
    if isinstance(decay, str):
        return _named(shadow, decay)
    wanted, known = as_decay(decay), shadow.averages(f"decay={decay}")
    same = next((name for name, average in known.items() if average.decay == wanted), None)
    return _Combination.of(shadow, known, wanted, limit) if same is None else _named(shadow, same)


def read_from(shadow: ShadowSet, shown: Shown | None) -> Sequence[ShadowSet]:
    """The shadow sets that an average is read from."""
    return [shadow] if shown is None else shown.windows


def in_place(shadow: ShadowSet, shown: Shown | None) -> ShadowSet:
    """The shadow set whose tensors are the average; raise ValueError for a combination."""
    if isinstance(shown, _Combination):
        raise ValueError(
            "decay must be None or the name of a window with copy=False, got one that is combined "
            f"from the windows {list(shadow.windows)}: a combination is a copy"
        )
    return shadow if shown is None else shown.windows[0]


def _named(shadow: ShadowSet, name: str) -> Shown | None:
    if name not in shadow.windows:
        raise ValueError(
            f"decay must be one of the windows {list(shadow.windows)} or a decay, got {name!r}: "
            "name further windows when the EMA is built, decay={'short': 0.99, 'long': 0.999}"
        )
    return None if name == shadow.name else _Window(shadow.others[name])


def _as_limit(max_error: float) -> float:
    limit = _number("max_error", max_error)
    if not limit >= 0.0:
        raise ValueError(f"max_error must be at least 0, got {max_error}: 0.05 is the default")
    return limit


class _Window:
    """A further window."""

    def __init__(self, window: ShadowSet) -> None:
        self.windows: Sequence[ShadowSet] = [window]

    def value(self, param: Tensor) -> Tensor:
        return self.windows[0].ema_of(param)

    def write_(self, params: Mapping[Tensor, Slot]) -> None:
        kept = {param: self.windows[0].find(param) for param in params}
        found = {param: slot for param, slot in kept.items() if slot is not None and slot.age}
        read_(found, list(found.values()))


@dataclass(frozen=True)
class _Combination:
    """A combination of all windows; by the counter of a parameter, which may have begun later."""

    windows: Sequence[ShadowSet]
    coefficients: Mapping[int, Sequence[float]]

    @classmethod
    def of(
        cls, shadow: ShadowSet, known: Mapping[str, Average], decay: Decay, limit: float
    ) -> "_Combination":
        steps = {shadow.ema_step(slot) for slot in shadow.counted().values()}
        found = {}
        for step in sorted(steps):
            inputs = [average._replace(step=step) for average in known.values()]
            found[step], error = Solver(inputs).solve(inputs[0]._replace(decay=decay))
            if not error <= limit:
                raise ValueError(_too_far(known, decay, error, limit))
        return cls(list(shadow.windows.values()), found)

    def value(self, param: Tensor) -> Tensor:
        first = self.windows[0]
        slot, emas = first.find(param), [window.ema_of(param) for window in self.windows]
        if slot is None or not slot.age:
            return emas[0]
        parts = combined([local(ema) for ema in emas], self.coefficients[first.ema_step(slot)])
        if local(emas[0]) is emas[0]:
            return parts
        whole = torch.empty_like(emas[0], dtype=parts.dtype)
        local(whole).copy_(parts)
        return whole

    def write_(self, params: Mapping[Tensor, Slot]) -> None:
        for param in params:
            write_(local(param), local(self.value(param)))


def _too_far(known: Mapping[str, Any], decay: Decay, error: float, limit: float) -> str:
    kept = ", ".join(f"{name} ({average.decay})" for name, average in known.items())
    return (
        f"decay must be one that the windows give within max_error={limit:g}, got {decay}, whose "
        f"told error is {error:.2g} of the distance between training weights and EMA: take one "
        f"nearer to {kept}, keep a further window from the start, or pass a larger max_error"
    )
