"""Which param groups step together: their cached lists, kept until they are stale."""

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import repeat
from operator import attrgetter, is_
from typing import Any

import torch
from torch import Tensor

from .buckets import Bucket, is_lazy, params_of
from .slots import Counter, Group, Slot

_dtype, _size = attrgetter("dtype"), Tensor.numel
_trainable, _grad = attrgetter("requires_grad"), attrgetter("grad")


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
        others: The shadow sets of further windows with their lanes, which count by
            themselves.
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
    others: list[tuple[Any, "Lane"]] = field(default_factory=list)

    @classmethod
    def of(
        cls,
        groups: Sequence[Group],
        params: list[Tensor],
        slots: Mapping[Tensor, Slot],
        buckets: list[Bucket],
    ) -> "Lane":
        """The lane of buckets that were just made from these groups and their parameters."""
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

    def mark(self, step: int) -> None:
        """Write the clocks into the groups; those without an EMA show the largest one."""
        for group, clock in zip(self.groups, self.clocks, strict=True):
            group["ema_step"] = step if clock is None else clock.steps

    def all_windows(self) -> list["Lane"]:
        """This lane and those of further windows."""
        return [self, *(lane for _, lane in self.others)]

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


class Lanes:
    """The lanes in use, each with parameters and groups that no other has."""

    def __init__(self) -> None:
        self._lanes: OrderedDict[tuple[int, int], Lane] = OrderedDict()
        self._uses = 0  # steps over all lanes

    def __len__(self) -> int:
        return len(self._lanes)

    def __iter__(self) -> Iterator[Lane]:
        return iter(self._lanes.values())

    def find(self, groups: Sequence[Group]) -> Lane | None:
        """The lane of these groups, unless it is stale."""
        lane = self._lanes.get(_key(groups))
        return lane if lane is not None and lane.fits(groups) else None

    def leave(self, groups: Sequence[Group]) -> None:
        """Forget the lanes that share a parameter or a group with these groups."""
        ids = {*map(id, params_of(groups)), *map(id, groups)}
        for key, lane in list(self._lanes.items()):
            if not ids.isdisjoint(map(id, [*lane.params, *lane.groups])):
                del self._lanes[key]

    def add(self, lane: Lane) -> None:
        """Keep a lane that was just made."""
        self._lanes[_key(lane.groups)] = lane

    def use(self, lane: Lane) -> Iterable[Tensor]:
        """Note a step of a lane.

        Returns:
            The parameters of a lane that is forgotten now: it has not stepped for several rounds.
        """
        self._uses += 1
        lane.used = self._uses
        if len(self._lanes) < 2:
            return ()
        self._lanes.move_to_end(_key(lane.groups))
        oldest = next(iter(self))
        if self._uses - oldest.used <= 4 * len(self._lanes):
            return ()
        return self._lanes.popitem(last=False)[1].params

    def clear(self) -> None:
        """Forget all of them."""
        self._lanes.clear()

    def params(self) -> Iterator[Tensor]:
        """The parameters of all lanes."""
        return (param for lane in self for param in lane.params)


def _key(groups: Sequence[Group]) -> tuple[int, int]:
    params = groups[0]["params"] if groups else []
    return len(groups), id(params[0]) if params else 0


def group_options(groups: Sequence[Group]) -> list[tuple[Any, ...]]:
    """What a lane depends on beside the parameters themselves."""
    return [
        (len(g["params"]), g.get("ema_decay"), g.get("ema_enabled"), g.get("ema_dtype"))
        for g in groups
    ]


def _clock_of(group: Group, slots: Mapping[Tensor, Slot]) -> Counter | None:
    return next((slots[p].counter for p in group["params"] if p in slots), None)
