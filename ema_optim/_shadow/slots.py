"""What is kept for a parameter: its slot, how values get in and out of it, and its counts."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from .._arithmetic.formats import Format, format_of
from .._engines.offload import decode_across_, host_like
from .._engines.quantized import (
    check_quantized,
    copy_like,
    dense,
    dense_like,
    is_quantized,
    write_,
)
from .._engines.sharding import PLAIN, copy_part_, local, locals_of, part_for

Group = dict[str, Any]

Parts = tuple[Tensor, Tensor | None]

place_of = attrgetter("device", "dtype")


@dataclass(eq=False, slots=True)
class Counter:
    """Counts that slots of one bucket share, so that a step costs nothing per parameter.

    Attributes:
        steps: The clock of their param group: its counted optimizer steps.
        age: Counted steps since averaging began.
        share: The share of the initial weights that is still inside the EMA.
    """

    steps: int = 0
    age: int = 0
    share: float = 1.0

    def tick(self, update_after_step: int) -> None:
        """Count one step."""
        self.steps += 1
        self.age += self.steps > update_after_step

    def advance(self, steps: int, factor: float) -> None:
        """Count so many steps at once, of which each was an update by this factor."""
        share = self.share
        for _ in range(steps):  # not a power: the same roundings as step by step
            share *= factor
        self.steps, self.age, self.share = self.steps + steps, self.age + steps, share


@dataclass(eq=False, slots=True)
class Slot:
    """What is kept for one parameter.

    Attributes:
        ema: The EMA tensor, or the main one of a format that has two. During an exchange it holds
            the training weights (see ``parked``).
        low: The low-order tensor of a format that has one.
        parked: The training weights while the EMA weights are in a parameter that could not take
            them by exchange (another dtype, quantized, memory shared with another parameter).
        format: How it is stored.
        counter: Shared with the other slots of its bucket.
        ahead: By how much ``age`` is larger than the counter's.
        ratio: By what factor ``share`` is larger than the counter's.
        met: Whether a weight was met that was not finite (0-dim, on the device); None where
            nobody looks.
        staging: Where the EMA is in host memory and its parameter is not: host memory in the form
            of the parameter, for its weights on their way into an update, or parked.
    """

    ema: Tensor
    low: Tensor | None
    format: Format
    parked: Tensor | None = None
    counter: Counter = field(default_factory=Counter)
    ahead: int = 0
    ratio: float = 1.0
    met: Tensor | None = None
    staging: Tensor | None = None

    @classmethod
    def of(
        cls,
        param: Tensor,
        parts: Parts,
        format: Format,
        weights: Tensor | None = None,
        host: bool = False,
    ) -> "Slot":
        """A slot of what ``parts`` hold, in a format of its own.

        Args:
            param: The parameter.
            parts: What it is to hold.
            format: How it is stored.
            weights: Training weights to be parked, if any.
            host: Whether it is to be in host memory.
        """
        slot = cls(*restored(param, parts, format, host), format)
        slot.staging = host_like(param, param.dtype) if host else None
        if weights is not None:
            slot.parked = slot.aside(param, weights)
        return slot

    def __getstate__(self) -> Any:
        # A copy would not be pinned: it is made anew at the next step.
        return None, {name: getattr(self, name) for name in self.__slots__} | {"staging": None}

    @property
    def host(self) -> bool:
        """Whether it is in host memory, unlike its parameter."""
        return self.staging is not None

    def lies(self, param: Tensor, host: bool) -> bool:
        """Whether it is where it is to be: in host memory, or beside its parameter."""
        if self.staging is None:
            return not host and self.ema.device == param.device
        return host and self.staging.dtype == param.dtype

    def convert(self, param: Tensor, format: Format, host: bool | None = None) -> None:
        """Keep the same EMA in another format, or where it is to be now (default: where it is)."""
        host = self.host if host is None else host
        self.ema, self.low = restored(param, (self.ema, self.low), format, host)
        self.staging = host_like(param, param.dtype) if host else None
        self.format = format

    def hold(self, param: Tensor, parts: Parts) -> None:
        """Hold what ``parts`` hold, in the slot's own format."""
        self.ema, self.low = restored(param, parts, self.format, self.host)

    def park(self, param: Tensor, weights: Tensor) -> None:
        """Take other training weights for those that are parked, if any are."""
        if self.parked is not None:
            self.parked = self.aside(param, weights)

    def aside(self, param: Tensor, weights: Tensor) -> Tensor:
        """A copy of weights in the form of the parameter, to be parked."""
        if self.staging is None:
            return copy_like(param, weights)
        copy_part_(self.staging, weights.detach(), param)
        return self.staging

    @property
    def age(self) -> int:
        """Counted steps since averaging began for this parameter.

        0 marks a placeholder, which is seeded again from the weights.
        """
        return self.counter.age + self.ahead

    @property
    def share(self) -> float:
        """The share of the initial weights that is still inside the EMA."""
        return self.counter.share * self.ratio

    def count_with(self, counter: Counter, age: int, share: float) -> None:
        """Go on from these counts with a counter that was made for a slot of the same kind."""
        self.ahead = age - counter.age
        self.ratio = share / counter.share if share != counter.share else 1.0
        self.counter = counter

    def set_counts(self, steps: int, age: int, share: float) -> None:
        """Count from given numbers on, apart from other slots."""
        self.counter, self.ahead, self.ratio = Counter(steps, age, share), 0, 1.0


def stored(param: Tensor, value: Tensor, format: Format, host: bool = False) -> Parts:
    """``value`` as the EMA of ``param`` is kept: its format, device, strides, part of this rank."""
    main, low = _empty(param, format, host)
    lows, part = [] if low is None else [local(low)], part_for(param, dense(value.detach()))
    format.encode_([local(main)], lows, [part.to(local(main).device)])
    return main, low


def restored(param: Tensor, parts: Parts, format: Format, host: bool = False) -> Parts:
    """What a checkpoint holds, as the EMA of ``param`` is kept: bit for bit in the same format."""
    if type(param) not in PLAIN:
        check_quantized(param, local(param))
    parts = main, low = dense(parts[0]), parts[1]
    if format_of(main.dtype, None if low is None else low.dtype) != format:
        # The remainder of an fp32 tensor needs more digits than fp32 has.
        exact = main if low is None else _decoded(main, low, torch.float64)
        return stored(param, exact, format, host)
    kept = _empty(param, format, host)
    for target, source in zip(kept, parts, strict=True):
        if target is not None and source is not None:
            copy_part_(target, source.detach(), param)
    return kept


def value_of(main: Tensor, low: Tensor | None) -> Tensor:
    """The EMA weights in one tensor, as a swap shows them; the main tensor where that is all."""
    return main if low is None else _decoded(main, low, torch.float32)


def _decoded(main: Tensor, low: Tensor, dtype: torch.dtype) -> Tensor:
    value = torch.empty_like(main, dtype=dtype)
    format_of(main.dtype, low.dtype).decode_([local(value)], [local(main)], [local(low)])
    return value


def read_(targets: Iterable[Tensor], slots: Sequence[Slot]) -> None:
    """Copy the EMA of each slot into a tensor of any float dtype, to nearest or as ``write_``."""
    groups: dict[object, tuple[list[Tensor], list[Slot]]] = {}
    for target, slot in zip(targets, slots, strict=True):
        if is_quantized(target):
            write_(target, value_of(slot.ema, slot.low))
            continue
        key = (place_of(target), place_of(slot.ema), slot.format)
        kept = groups.setdefault(key, ([], []))
        kept[0].append(local(target))
        kept[1].append(slot)
    for whole, members in groups.values():
        lows = [local(slot.low) for slot in members if slot.low is not None]
        mains, format = locals_of(slot.ema for slot in members), members[0].format
        if whole[0].device == mains[0].device:
            format.decode_(whole, mains, lows)
        else:
            decode_across_(format, whole, mains, lows)


def _empty(param: Tensor, format: Format, host: bool) -> Parts:
    like = host_like if host else dense_like
    main = like(param, format.main)
    return main, None if format.low is None else like(param, format.low)
