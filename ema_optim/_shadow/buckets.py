"""The lists that one multi-tensor call works on, and when they are stale."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import repeat
from operator import attrgetter, is_
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import UninitializedParameter

from .._arithmetic.average import Casts
from .._arithmetic.formats import EMADtype, Format
from .._engines.quantized import dense, is_quantized
from .._engines.sharding import first_element, is_sharded, local, local_parts
from ..schedules import Decay, decay_factor
from .slots import Counter, Group, Slot, place_of

_dtype, _size = attrgetter("dtype"), Tensor.numel
_trainable, _grad = attrgetter("requires_grad"), attrgetter("grad")


@dataclass(eq=False, slots=True)
class Bucket:
    """Slots that one multi-tensor call can update: same devices, dtypes, decay and counts.

    ``emas`` (and ``lows``, see ``Slot``) are the tensors of this rank, ``weights()`` their weights;
    ``starts`` number their elements, see ``formats.update_``.
    """

    decay: Decay
    counter: Counter
    format: Format
    sharded: bool = False
    quantized: bool = False
    casts: Casts | None = None
    params: list[Tensor] = field(default_factory=list)
    emas: list[Tensor] = field(default_factory=list)
    lows: list[Tensor] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    slots: list[Slot] = field(default_factory=list)

    def add(self, param: Tensor, slot: Slot, start: int) -> None:
        slot.count_with(self.counter)
        self.params.append(param)
        self.slots.append(slot)
        self.emas.append(local(slot.ema))
        self.starts.append(start)
        if slot.low is not None:
            self.lows.append(local(slot.low))

    @property
    def is_placeholder(self) -> bool:
        """Whether no average has begun; of all its slots or of none, see ``make_buckets``."""
        return self.slots[0].updates == 0

    def factor(self, every: int, after: int) -> float | None:
        """The factor of the update that the next counted step makes; None if it makes none."""
        tick = self.counter.steps + 1 - after
        if tick <= 0 or tick % every:
            return None
        updates = self.slots[0].updates + 1
        return decay_factor(self.decay, updates, min(every, updates))

    def average(self, factor: float) -> None:
        """``ema <- factor * ema + (1 - factor) * weights``; the clock numbers the update."""
        parts, step = (self.emas, self.lows), self.counter.steps
        self.format.update_(parts, self.weights(), factor, step, self.starts, self.casts)
        self.counter.share *= factor

    def seed(self) -> None:
        """Begin at the weights."""
        self.format.encode_(self.emas, self.lows, self.weights())

    def weights(self) -> list[Tensor]:
        if self.sharded:
            return local_parts(self.params)
        return list(map(dense, self.params)) if self.quantized else self.params


@dataclass(eq=False, slots=True)
class Lane:
    """The buckets of the param groups that step together, and what they were made from.

    Attributes:
        groups: The param groups.
        params: All their parameters.
        followed: Those that have an EMA, their ``dtypes`` and ``sizes`` in elements.
        waiting: Those that have none yet, though their group has the EMA enabled.
        lazy: Those of ``waiting`` that have no shape yet.
        clocks: For each group the counter of its clock; None for a group without an EMA.
        used: The number of the step that has used it last, over all lanes.
        plan: The updates that the step under way will make, with their factors.
    """

    groups: list[Group]
    params: list[Tensor]
    followed: list[Tensor]
    dtypes: list[torch.dtype]
    sizes: list[int]
    waiting: list[Tensor]
    lazy: list[Tensor]
    device: torch.device | None
    options: list[tuple[Any, ...]]
    buckets: list[Bucket]
    clocks: list[Counter | None]
    used: int = 0
    plan: list[tuple[Bucket, float]] = field(default_factory=list)

    @classmethod
    def of(
        cls, groups: Sequence[Group], buckets: list[Bucket], slots: Mapping[Tensor, Slot]
    ) -> "Lane":
        """The lane of buckets that were just made from these groups."""
        params = params_of(groups)
        followed = [param for bucket in buckets for param in bucket.params]
        waiting = [
            p for g in groups if g.get("ema_enabled", True) for p in g["params"] if p not in slots
        ]
        lazy = [param for param in waiting if is_lazy(param)]
        return cls(
            list(groups),
            params,
            followed,
            list(map(_dtype, followed)),
            list(map(_size, followed)),
            [param for param in waiting if not is_lazy(param)],
            lazy,
            params[0].device if params else None,
            group_options(groups),
            buckets,
            [_clock_of(group, slots) for group in groups],
        )

    def fits(self, groups: Sequence[Group]) -> bool:
        """Whether the buckets are still those of the groups."""
        params = params_of(groups)
        return (
            len(params) == len(self.params)
            # Identity: comparing lists of tensors with == would compare their values.
            and all(map(is_, params, self.params))
            and all(map(is_, map(_dtype, self.followed), self.dtypes))
            and list(map(_size, self.followed)) == self.sizes
            and not any(map(_trainable, self.waiting))
            and all(map(is_, map(_grad, self.waiting), repeat(None)))
            and all(map(is_lazy, self.lazy))
            and group_options(groups) == self.options
            # One sample tells of a model that was moved.
            and (not params or params[0].device == self.device)
        )


def params_of(groups: Sequence[Group]) -> list[Tensor]:
    """All parameters of param groups, in their order."""
    return [param for group in groups for param in group["params"]]


def begins(param: Tensor) -> bool:
    """Whether an EMA of the parameter is to be born: it requires a gradient or has one."""
    wanted = param.requires_grad or param.grad is not None
    return wanted and not isinstance(param, UninitializedParameter)


def group_options(groups: Sequence[Group]) -> list[tuple[Any, ...]]:
    """What a lane depends on beside the parameters themselves."""
    return [
        (len(g["params"]), g.get("ema_decay"), g.get("ema_enabled"), g.get("ema_dtype"))
        for g in groups
    ]


def make_buckets(
    groups: Sequence[Group],
    slots: Mapping[Tensor, Slot],
    decay: Decay,
    every: int,
    clock_of: Callable[[Group], int],
) -> list[Bucket]:
    """Sort the slots of param groups into buckets.

    Args:
        groups: The param groups.
        slots: What is kept for their parameters.
        decay: That of groups without one of their own.
        every: Optimizer steps between two updates.
        clock_of: The clock of a group.
    """
    buckets: dict[tuple[Any, ...], Bucket] = {}
    seen: set[Tensor] = set()
    first = 0  # in a numbering of all elements
    for group in groups:
        own = group.get("ema_decay")
        source, clock = decay if own is None else own, clock_of(group)
        for param in group["params"]:
            slot = slots.get(param)
            if slot is not None and param not in seen:
                sharded = is_sharded(param)
                # Quantized weights are dense one at a time: each has a bucket of its own.
                alone = id(param) if is_quantized(param) else None
                format = slot.format
                kind = (place_of(param), place_of(slot.ema), format, sharded, alone)
                counts = (clock, _age(source, slot.updates, every), slot.share == 0.0)
                counter = Counter(clock, slot.updates, slot.share)
                bucket = buckets.setdefault(
                    (*kind, own, counts),
                    Bucket(source, counter, format, sharded, alone is not None),
                )
                bucket.add(param, slot, first + first_element(param))
            seen.add(param)
            first += 0 if slot is None and is_lazy(param) else param.numel()
    _share_scratch(buckets.values())
    return list(buckets.values())


def is_lazy(param: Tensor) -> bool:
    """Whether a parameter has no shape yet."""
    return isinstance(param, UninitializedParameter)


def _age(decay: Decay, updates: int, every: int) -> int:
    # A constant decay applies the same factor at every age but the first stride's.
    return updates if callable(decay) else min(updates, every)


def _clock_of(group: Group, slots: Mapping[Tensor, Slot]) -> Counter | None:
    return next((slots[p].counter for p in group["params"] if p in slots), None)


def _share_scratch(buckets: Iterable[Bucket]) -> None:
    """Give the buckets of narrower weights one buffer between them."""
    buffers: dict[Any, Tensor] = {}
    for bucket in buckets:
        ema = bucket.emas[0]
        if ema.dtype != bucket.params[0].dtype and not bucket.format.rounds:
            bucket.casts = Casts(bucket.emas, buffers.get(place_of(ema)))
            buffers[place_of(ema)] = bucket.casts.scratch


def own_dtypes(groups: Sequence[Group]) -> dict[Tensor, EMADtype]:
    """The ``ema_dtype`` of the parameters whose group has one."""
    named = [group for group in groups if group.get("ema_dtype") is not None]
    return {param: group["ema_dtype"] for group in named for param in group["params"]}


def follows(group: Group, param: Tensor) -> bool:
    """Whether an EMA of a parameter that has none is to be born."""
    # "ema_buffers" marks the group of a model's averaged buffers, which never require a gradient.
    return bool(group.get("ema_buffers")) or begins(param)


def is_dry(groups: Sequence[Group]) -> bool:
    """Whether every learning rate is exactly 0."""
    rates = [group.get("lr") for group in groups]
    return bool(rates) and all(rate is not None and float(rate) == 0.0 for rate in rates)
