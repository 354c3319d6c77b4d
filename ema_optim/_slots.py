"""What is kept for a parameter, and the lists that one multi-tensor call works on."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import attrgetter, is_
from typing import Any

import torch
from torch import Tensor

from .schedules import Decay

Group = dict[str, Any]

trainable_flag = attrgetter("requires_grad")
place_of = attrgetter("dtype", "device")


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
    """Slots that one multi-tensor call can update: same devices, dtypes, decay and counter."""

    decay: Decay
    start: int
    share: float
    place: tuple[torch.dtype, torch.device]
    params: list[Tensor] = field(default_factory=list)
    emas: list[Tensor] = field(default_factory=list)
    slots: list[Slot] = field(default_factory=list)

    def updates(self, step: int) -> int:
        return max(0, step - self.start)

    def fits(self) -> bool:
        # Two samples tell of a model that was moved or cast; a sweep over the dtypes of all would
        # cost a tenth of the update of many small tensors.
        ends = self.params[0], self.params[-1]
        return all(place_of(param) == self.place for param in ends)


@dataclass(eq=False, slots=True)
class Cache:
    """Buckets, and what they were made from: they are stale when that is no longer so."""

    params: list[Tensor]
    trainable: list[bool]
    options: list[tuple[int, Any, Any]]
    buckets: list[Bucket]

    def fits(self, groups: Sequence[Group]) -> bool:
        params = [param for group in groups for param in group["params"]]
        return (
            len(params) == len(self.params)
            # Identity: comparing lists of tensors with == would compare their values.
            and all(map(is_, params, self.params))
            and list(map(trainable_flag, params)) == self.trainable
            and group_options(groups) == self.options
            and all(bucket.fits() for bucket in self.buckets)
        )


def group_options(groups: Sequence[Group]) -> list[tuple[int, Any, Any]]:
    """What a cache depends on beside the parameters themselves."""
    return [(len(g["params"]), g.get("ema_decay"), g.get("ema_enabled")) for g in groups]
