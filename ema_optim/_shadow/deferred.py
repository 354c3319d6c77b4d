"""Steps that only the device knows to be made or skipped, counted when somebody asks.

A fused inner optimizer under ``torch.amp.GradScaler`` is stepped in any case; ``found_inf``, on the
device, tells its kernel to do nothing. To read it would stall the host at every step. Where the
average is a kernel too and no factor depends on the count, that kernel reads it as well:

    found_inf  ->  kernel: averages, or does not     ->  skips += found_inf != 0, on the device
    settle()   ->  counts += calls - skips           (the one wait, at the next read)
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .buckets import Bucket
from .lanes import Lane


@dataclass(eq=False, slots=True)
class _Waiting:
    """Steps of a lane that are not counted yet: how many were called, how many were skipped."""

    plan: list[tuple[Bucket, float]]
    skips: Tensor
    calls: int = 0


class Deferred:
    """What is still to be counted, in ``waiting`` by lane."""

    def __init__(self) -> None:
        self.waiting: dict[Lane, _Waiting] = {}

    def takes(self, lane: Lane, found_inf: Any, every: int, after: int) -> bool:
        """Whether a step of a lane can be left to the device.

        Args:
            lane: The lane, with its plan.
            found_inf: What the scaler has told the inner optimizer.
            every: Optimizer steps between two updates.
            after: Optimizer steps until averaging begins.
        """
        if every != 1 or not isinstance(found_inf, Tensor) or found_inf.numel() != 1:
            return False
        return len(lane.plan) == len(lane.buckets) and all(
            bucket.is_steady(after) and bucket.aims(factor) for bucket, factor in lane.plan
        )

    def average(self, lane: Lane, found_inf: Tensor) -> None:
        """Average, unless the device finds the step skipped."""
        waiting = self.waiting.get(lane)
        if waiting is None:
            skips = torch.zeros((), dtype=torch.int64, device=found_inf.device)
            waiting = self.waiting[lane] = _Waiting(lane.plan, skips)
        for bucket, factor in lane.plan:
            bucket.launch(factor, found_inf)
        waiting.calls += 1
        waiting.skips.add_(found_inf.reshape(()) != 0)

    def settle(self) -> Iterator[Lane]:
        """Count what was made; yields the lanes whose counts have moved."""
        for lane, waiting in list(self.waiting.items()):
            made = waiting.calls - int(waiting.skips)
            del self.waiting[lane]
            for bucket, factor in waiting.plan:
                bucket.counter.advance(made, factor)
            yield lane
