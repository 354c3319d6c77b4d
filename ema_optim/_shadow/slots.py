"""What is kept for a parameter."""

from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from torch import Tensor

from .._arithmetic.formats import Format

Group = dict[str, Any]

place_of = attrgetter("dtype", "device")


@dataclass(eq=False, slots=True)
class Slot:
    """What is kept for one parameter.

    Attributes:
        ema: The EMA tensor, of a format of two the main one; while an exchange is on, the training
            weights (see ``parked``).
        updates: Counted steps since averaging began for this parameter; 0 marks a placeholder
            that is seeded again from the weights.
        share: The share of the initial weights that is still inside the EMA.
        parked: The training weights while the EMA weights are in a parameter that could not take
            them by exchange (another dtype, quantized, memory shared with another parameter).
        low: The low-order tensor of a format that has one.
    """

    ema: Tensor
    updates: int = 0
    share: float = 1.0
    parked: Tensor | None = None
    low: Tensor | None = None

    @property
    def format(self) -> Format:
        return Format(self.ema.dtype, None if self.low is None else self.low.dtype)
