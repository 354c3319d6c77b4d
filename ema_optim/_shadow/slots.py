"""What is kept for a parameter, and the counters that slots averaged together share."""

from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

from torch import Tensor

from .._arithmetic.formats import Format, format_of

Group = dict[str, Any]

place_of = attrgetter("dtype", "device")


@dataclass(eq=False, slots=True)
class Counter:
    """Counts that slots of one bucket share, so that a step costs nothing per parameter.

    Attributes:
        steps: The clock of their param group: its counted optimizer steps.
        updates: Counted steps since averaging began.
        share: The share of the initial weights that is still inside the EMA.
    """

    steps: int = 0
    updates: int = 0
    share: float = 1.0

    def tick(self, update_after_step: int) -> None:
        """Count one step."""
        self.steps += 1
        self.updates += self.steps > update_after_step


@dataclass(eq=False, slots=True)
class Slot:
    """What is kept for one parameter.

    Attributes:
        ema: The EMA tensor, or the main one of a format that has two. During an exchange it holds
            the training weights (see ``parked``).
        low: The low-order tensor of a format that has one.
        parked: The training weights while the EMA weights are in a parameter that could not take
            them by exchange (another dtype, quantized, memory shared with another parameter).
        counter: Shared with the other slots of its bucket.
        ahead: By how much ``updates`` is larger than the counter's.
        ratio: By what factor ``share`` is larger than the counter's.
    """

    ema: Tensor
    low: Tensor | None = None
    parked: Tensor | None = None
    counter: Counter = field(default_factory=Counter)
    ahead: int = 0
    ratio: float = 1.0

    @property
    def format(self) -> Format:
        return format_of(self.ema.dtype, None if self.low is None else self.low.dtype)

    @property
    def updates(self) -> int:
        """Counted steps since averaging began for this parameter.

        0 marks a placeholder, which is seeded again from the weights.
        """
        return self.counter.updates + self.ahead

    @property
    def share(self) -> float:
        """The share of the initial weights that is still inside the EMA."""
        return self.counter.share * self.ratio

    def count_with(self, counter: Counter) -> None:
        """Go on counting with a counter that was made for a slot of the same kind."""
        self.ahead = self.updates - counter.updates
        self.ratio = self.share / counter.share if self.share != counter.share else 1.0
        self.counter = counter

    def set_counts(self, steps: int, updates: int, share: float) -> None:
        """Count from given numbers on, apart from other slots."""
        self.counter, self.ahead, self.ratio = Counter(steps, updates, share), 0, 1.0
