"""The lists that one multi-tensor call works on, and when they are stale."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import UninitializedParameter

from .._arithmetic.average import Casts, casts_of
from .._arithmetic.formats import Format, Update
from .._arithmetic.fused import Plan, plan_for
from .._arithmetic.guard import guarded_update_
from .._arithmetic.noise import Words
from .._engines.offload import Offload, Staging
from .._engines.quantized import dense, is_quantized
from .._engines.sharding import PLAIN, first_element, is_sharded, local, local_parts
from ..schedules import Decay, decay_factor
from .options import Options
from .slots import Counter, Group, Slot, place_of

_dtype, _size = attrgetter("dtype"), Tensor.numel
_trainable, _grad = attrgetter("requires_grad"), attrgetter("grad")


@dataclass(eq=False, slots=True)
class Bucket:
    """Slots that one multi-tensor call can update: same devices, dtypes, decay and counts.

    ``emas`` (and ``lows``, see ``Slot``) are the tensors of this rank, ``weights()`` their weights;
    ``starts`` number their elements, see ``formats.Update``. ``staging`` is there where the EMA is
    in host memory and the weights are not (a worker thread averages then), ``met`` where non-finite
    weights are to be skipped, see ``guard``.
    """

    decay: Decay
    counter: Counter
    format: Format
    sharded: bool = False
    quantized: bool = False
    staging: Staging | None = None
    casts: Casts | None = None
    met: Tensor | None = None
    words: Words | None = None
    plan: Plan | None = None
    params: list[Tensor] = field(default_factory=list)
    emas: list[Tensor] = field(default_factory=list)
    lows: list[Tensor] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    slots: list[Slot] = field(default_factory=list)

    def add(self, param: Tensor, slot: Slot, start: int) -> None:
        self.params.append(param)
        self.slots.append(slot)
        self.emas.append(local(slot.ema) if self.sharded else slot.ema)
        self.starts.append(start)
        if slot.low is not None:
            self.lows.append(local(slot.low))
        if self.staging is not None and slot.staging is not None:
            self.staging.add(slot.staging)

    @property
    def is_placeholder(self) -> bool:
        """Whether no average has begun; of all its slots or of none, see ``make_buckets``."""
        return self.slots[0].age == 0

    def factor(self, every: int, after: int) -> float | None:
        """The factor of the update that the next counted step makes; None if it makes none."""
        tick = self.counter.steps + 1 - after
        if tick <= 0 or tick % every:
            return None
        age = self.slots[0].age + 1
        return decay_factor(self.decay, age, min(every, age))

    def average(self, factor: float) -> None:
        """``ema <- factor * ema + (1 - factor) * weights``; the clock numbers the update."""
        update, weights = self._update(factor), self.weights()
        if self.plan is not None and self.plan.aim(weights, factor):
            self.plan.launch(update)
        elif self.staging is None:
            self._updates(update)(weights)
        else:
            self.staging.average(weights, self._updates(update))
        self.counter.share *= factor

    def watch(self) -> None:
        """Skip weights that are not finite from now on, and remember where some were met."""
        device = self.emas[0].device
        known = [torch.tensor(False) if s.met is None else s.met for s in self.slots]
        self.met = torch.stack([met.to(device) for met in known])
        for slot, met in zip(self.slots, self.met.unbind(), strict=True):
            slot.met = met

    def is_steady(self, after: int) -> bool:
        """Whether neither the factor nor a random bit of the next updates depends on the count."""
        drawn = callable(self.decay) or self.plan is None or self.plan.draws
        return not drawn and not self.is_placeholder and self.counter.steps >= after

    def aims(self, factor: float) -> bool:
        """Whether the kernel can make an update now."""
        return self.plan is not None and self.plan.aim(self.weights(), factor)

    def launch(self, factor: float, found_inf: Tensor) -> None:
        """Average what was aimed at unless ``found_inf`` says to skip; counts nothing."""
        if self.plan is not None:
            self.plan.launch(self._update(factor), found_inf)

    def _update(self, factor: float) -> Update:
        return Update(factor, self.counter.steps, self.starts, self.casts, self.words)

    def _updates(self, update: Update) -> Callable[[list[Tensor]], None]:
        """What is to be called with the weights, in this thread or another."""
        if self.met is None:
            return partial(self.format.update_, self.emas, self.lows, update=update)
        parts = self.emas, self.lows
        return partial(guarded_update_, self.format, parts, update=update, met=self.met)

    def seed(self) -> None:
        """Begin at the weights."""
        weights = self.weights()
        if self.staging is not None:
            weights = self.staging.fetched(weights)
        self.format.encode_(self.emas, self.lows, weights)

    def weights(self) -> list[Tensor]:
        if self.sharded:
            return local_parts(self.params)
        return list(map(dense, self.params)) if self.quantized else self.params


def params_of(groups: Sequence[Group]) -> list[Tensor]:
    """All parameters of param groups, in their order."""
    return [param for group in groups for param in group["params"]]


def make_buckets(
    groups: Sequence[Group],
    slots: Mapping[Tensor, Slot],
    options: Options,
    every: int,
    clock_of: Callable[[Group], int],
    offload: Offload,
) -> list[Bucket]:
    """Sort the slots of param groups into buckets.

    Args:
        groups: The param groups.
        slots: What is kept for their parameters.
        options: Those of a group without any of its own.
        every: Optimizer steps between two updates.
        clock_of: The clock of a group.
        offload: Averages what is in host memory.
    """
    buckets: dict[tuple[Any, ...], Bucket] = {}
    seen: set[Tensor] = set()
    first = 0  # in a numbering of all elements
    for group in groups:
        decay, clock = options.of(group).decay, clock_of(group)
        for param in group["params"]:
            slot = slots.get(param)
            if slot is not None and param not in seen:
                plain, age, share = type(param) in PLAIN, slot.age, slot.share
                sharded = not plain and is_sharded(param)
                # Quantized weights are dense one at a time: each has a bucket of its own.
                alone = id(param) if not plain and is_quantized(param) else None
                kind = (place_of(param), place_of(slot.ema), slot.format, sharded, alone)
                # A constant decay applies the same factor at every age but the first stride's.
                stage = age if callable(decay) else min(age, every)
                source = id(decay) if callable(decay) else decay
                counter = Counter(clock, age, share)
                made = Bucket(decay, counter, slot.format, sharded, alone is not None)
                host = slot.staging is not None
                made.staging = offload.staging() if host else None
                key = (*kind, host, source, clock, stage, share == 0.0)
                bucket = buckets.setdefault(key, made)
                slot.count_with(bucket.counter, age, share)
                bucket.add(param, slot, first + first_element(param) if sharded else first)
            seen.add(param)
            first += 0 if slot is None and is_lazy(param) else param.numel()
    _share_scratch(bucket for bucket in buckets.values() if bucket.staging is None)
    if hosted := [bucket for bucket in buckets.values() if bucket.staging is not None]:
        _share_scratch(hosted)  # the worker has its own: it averages while others do
    return list(buckets.values())


def fuse(buckets: Iterable[Bucket]) -> None:
    """Have a kernel make the updates from now on, where there is one for them."""
    for bucket in buckets:
        # Quantized weights are made for the moment; what is in host memory a worker averages.
        if not bucket.quantized and bucket.staging is None:
            dtype, emas = bucket.params[0].dtype, bucket.emas
            parts = emas, bucket.lows, bucket.starts
            bucket.plan = plan_for(bucket.format, *parts, dtype, bucket.met)


def is_lazy(param: Tensor) -> bool:
    """Whether a parameter has no shape yet."""
    return isinstance(param, UninitializedParameter)


def _share_scratch(buckets: Iterable[Bucket]) -> None:
    """Give the buckets of narrower weights one buffer between them, and all the same noise."""
    rounding, mixed = list[Bucket](), list[Bucket]()
    for bucket in buckets:
        if bucket.format.rounds:
            rounding.append(bucket)
        elif bucket.emas[0].dtype != bucket.params[0].dtype:
            mixed.append(bucket)
    if rounding:
        words = Words()
        for bucket in rounding:
            bucket.words = words
    if mixed:
        for bucket, casts in zip(mixed, casts_of([b.emas for b in mixed]), strict=True):
            bucket.casts = casts


def follows(group: Group, param: Tensor) -> bool:
    """Whether an EMA of a parameter that has none is to be born."""
    # "ema_buffers" marks the group of a model's averaged buffers, which never require a gradient.
    wanted = param.requires_grad or param.grad is not None or group.get("ema_buffers", False)
    return wanted and not isinstance(param, UninitializedParameter)


def is_dry(groups: Sequence[Group]) -> bool:
    """Whether every learning rate is exactly 0."""
    rates = [group.get("lr") for group in groups]
    return bool(rates) and all(rate is not None and float(rate) == 0.0 for rate in rates)
