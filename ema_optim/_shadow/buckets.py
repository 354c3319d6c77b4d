"""The lists that one multi-tensor call works on, and when they are stale."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter, is_
from typing import Any

import torch
from torch import Tensor

from .._arithmetic.average import Casts, ema_update_
from .._arithmetic.formats import EMADtype, encode_, update_
from .._engines.quantized import dense, is_quantized
from .._engines.sharding import first_element, is_sharded, local, local_parts
from ..schedules import Decay
from .slots import Group, Slot, place_of

_trainable, _dtype = attrgetter("requires_grad"), attrgetter("dtype")


@dataclass(eq=False, slots=True)
class Bucket:
    """Slots that one multi-tensor call can update: same devices, dtypes, decay and counter.

    ``emas`` (and ``lows``, see ``Slot``) are the tensors of this rank, ``weights()`` their weights;
    ``starts`` number their elements, see ``_formats.update_``.
    """

    decay: Decay
    start: int
    share: float
    sharded: bool = False
    quantized: bool = False
    casts: Casts | None = None
    params: list[Tensor] = field(default_factory=list)
    emas: list[Tensor] = field(default_factory=list)
    lows: list[Tensor] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    slots: list[Slot] = field(default_factory=list)

    def add(self, param: Tensor, slot: Slot, start: int) -> None:
        self.params.append(param)
        self.slots.append(slot)
        self.emas.append(local(slot.ema))
        self.starts.append(start)
        if slot.low is not None:
            self.lows.append(local(slot.low))

    def average(self, factor: float, stream: int) -> None:
        """``ema <- factor * ema + (1 - factor) * weights``; the stream numbers the update."""
        if self.slots[0].format.rounds:
            update_(self.emas, self.lows, self.weights(), factor, stream, self.starts)
        else:
            ema_update_(self.emas, self.weights(), factor, self.casts)
        self.share *= factor

    def seed(self) -> None:
        """Begin at the weights."""
        encode_(self.emas, self.lows, self.weights())

    def weights(self) -> list[Tensor]:
        if self.sharded:
            return local_parts(self.params)
        return list(map(dense, self.params)) if self.quantized else self.params

    def updates(self, step: int) -> int:
        return max(0, step - self.start)


@dataclass(eq=False, slots=True)
class Cache:
    """Buckets, and what they were made from: they are stale when that is no longer so."""

    params: list[Tensor]
    trainable: list[bool]
    dtypes: list[torch.dtype]
    device: torch.device | None
    options: list[tuple[Any, ...]]
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


def group_options(groups: Sequence[Group]) -> list[tuple[Any, ...]]:
    """What a cache depends on beside the parameters themselves."""
    return [
        (len(g["params"]), g.get("ema_decay"), g.get("ema_enabled"), g.get("ema_dtype"))
        for g in groups
    ]


def make_buckets(
    groups: Sequence[Group], slots: Mapping[Tensor, Slot], decay: Decay, clock: int
) -> list[Bucket]:
    """Sort slots into buckets.

    Args:
        groups: The param groups.
        slots: What is kept for their parameters.
        decay: That of groups without one of their own.
        clock: The step that the updates of a slot are counted back from.
    """
    buckets: dict[tuple[Any, ...], Bucket] = {}
    seen: set[Tensor] = set()
    first = 0  # in a numbering of all elements
    for group in groups:
        own = group.get("ema_decay")
        source = decay if own is None else own
        for param in group["params"]:
            slot = slots.get(param)
            if slot is not None and param not in seen and follows(group, param):
                sharded, start = is_sharded(param), clock - slot.updates
                # Quantized weights are dense one at a time: each has a bucket of its own.
                alone = id(param) if is_quantized(param) else None
                kind = (place_of(param), place_of(slot.ema), slot.format, sharded, alone)
                bucket = buckets.setdefault(
                    (*kind, own, start, slot.share),
                    Bucket(source, start, slot.share, sharded, alone is not None),
                )
                bucket.add(param, slot, first + first_element(param))
            seen.add(param)
            first += param.numel()
    _share_scratch(buckets.values())
    return list(buckets.values())


def _share_scratch(buckets: Iterable[Bucket]) -> None:
    """Give the buckets of narrower weights one buffer between them."""
    buffers: dict[Any, Tensor] = {}
    for bucket in buckets:
        ema = bucket.emas[0]
        if ema.dtype != bucket.params[0].dtype and not bucket.slots[0].format.rounds:
            bucket.casts = Casts(bucket.emas, buffers.get(place_of(ema)))
            buffers[place_of(ema)] = bucket.casts.scratch


def own_dtypes(groups: Sequence[Group]) -> dict[Tensor, EMADtype]:
    """The ``ema_dtype`` of the parameters whose group has one."""
    named = [group for group in groups if group.get("ema_dtype") is not None]
    return {param: group["ema_dtype"] for group in named for param in group["params"]}


def follows(group: Group, param: Tensor) -> bool:
    """Whether the EMA of a parameter moves, or is to be born."""
    # "ema_buffers" marks the group of a model's float buffers, which never require a gradient.
    return param.requires_grad or bool(group.get("ema_buffers"))


def is_dry(groups: Sequence[Group]) -> bool:
    """Whether every learning rate is exactly 0."""
    rates = [group.get("lr") for group in groups]
    return bool(rates) and all(rate is not None and float(rate) == 0.0 for rate in rates)
