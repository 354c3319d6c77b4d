"""What is kept for a parameter, and the lists that one multi-tensor call works on."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import attrgetter, is_
from typing import Any

import torch
from torch import Tensor

from ._sharding import local_parts
from ._update import Casts, ema_update_
from .schedules import Decay

Group = dict[str, Any]

place_of = attrgetter("dtype", "device")
_trainable, _dtype = attrgetter("requires_grad"), attrgetter("dtype")


@dataclass(eq=False, slots=True)
class Slot:
    """What is kept for one parameter.

    Attributes:
        ema: The EMA tensor; while an exchange is on, the training weights (see ``parked``).
        updates: Counted steps since averaging began for this parameter; 0 marks a placeholder
            that is seeded again from the weights.
        share: The share of the initial weights that is still inside the EMA.
        parked: The training weights while the EMA weights are in a parameter that could not take
            them by exchange (another dtype, or memory shared with another parameter).
    """

    ema: Tensor
    updates: int = 0
    share: float = 1.0
    parked: Tensor | None = None


@dataclass(eq=False, slots=True)
class Bucket:
    """Slots that one multi-tensor call can update: same devices, dtypes, decay and counter.

    ``emas`` are the tensors of this rank; ``weights()`` are their weights.
    """

    decay: Decay
    start: int
    share: float
    sharded: bool = False
    casts: Casts | None = None
    params: list[Tensor] = field(default_factory=list)
    emas: list[Tensor] = field(default_factory=list)
    slots: list[Slot] = field(default_factory=list)

    def average(self, factor: float) -> None:
        """``ema <- factor * ema + (1 - factor) * weights``."""
        ema_update_(self.emas, self.weights(), factor, self.casts)
        self.share *= factor

    def weights(self) -> list[Tensor]:
        return local_parts(self.params) if self.sharded else self.params

    def updates(self, step: int) -> int:
        return max(0, step - self.start)


@dataclass(eq=False, slots=True)
class Cache:
    """Buckets, and what they were made from: they are stale when that is no longer so."""

    params: list[Tensor]
    trainable: list[bool]
    dtypes: list[torch.dtype]
    device: torch.device | None
    options: list[tuple[int, Any, Any]]
    buckets: list[Bucket]

    def fits(self, groups: Sequence[Group]) -> bool:
        params = [param for group in groups for param in group["params"]]
        return (
            len(params) == len(self.params)
            # Identity: comparing lists of tensors with == would compare their values.
            and all(map(is_, params, self.params))
            and all(map(is_, map(_trainable, params), self.trainable))
            and all(map(is_, map(_dtype, params), self.dtypes))
            and group_options(groups) == self.options
            # One sample tells of a model that was moved.
            and (not params or params[0].device == self.device)
        )


def group_options(groups: Sequence[Group]) -> list[tuple[int, Any, Any]]:
    """What a cache depends on beside the parameters themselves."""
    return [(len(g["params"]), g.get("ema_decay"), g.get("ema_enabled")) for g in groups]
