"""The shadow set: the one owner of every EMA tensor, the counters and the cached lists.

``EMAOptimizer`` and ``EMAModel`` are two front doors over it. A tensor meets five steps here:

    param --birth--> slot.ema --update--> slot.ema --swap--> param --swap--> slot.ema

Everything mutable sits in this object, so that a proxy of the optimizer (Lightning re-classes it
to one with a ``__dict__`` of its own) and the optimizer itself can never disagree.
"""

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .._arithmetic.formats import FORMATS
from .._engines.replaced import kinds_of, refuse_replaced
from .._engines.sharding import local, refuse_flat
from ..schedules import decay_factor
from .buckets import fuse, is_dry, make_buckets, params_of
from .holdings import no_autograd
from .lanes import Lane
from .mistakes import BFLOAT16, NOTHING
from .options import check_options, format_name
from .origin import Origin
from .reserved import ReservedKeys
from .slots import Group, Slot, value_of
from .windows import Windows


class ShadowSet(Windows):
    """The EMA of the parameters in the param groups of a source.

    The arguments are those of ``Settings``; ``decay`` may be several by name, see ``windows``.
    """

    def __init__(self, *settings: Any, **named: Any) -> None:
        super().__init__(*settings, **named)
        self.dry = False  # whether the inner optimizer has made a step that moved nothing
        self._notes: Mapping[str, Any] = {}  # of who has saved what was loaded
        self.held: Any = None  # what the model held when what was loaded was saved, see pending
        self.given: list[Group] = []  # the options that each group had when wrapped or added
        self.compiled: Any = None  # what stands in for the inner step after compile()
        self._known = kinds_of(params_of(self.groups))
        self.keys = ReservedKeys()
        self.origin = Origin()

    def __getstate__(self) -> dict[str, Any]:
        fresh: dict[str, Any] = {"compiled": None, "_known": {}, "origin": Origin.at(self.step)}
        return {**super().__getstate__(), **fresh}

    def begin_step(self, moved: bool = False) -> Lane | None:
        """Prepare one step, before the weights move.

        Gives birth to missing slots, seeds placeholders from the weights and checks the factors, so
        that a bad decay raises before anything has moved.

        Args:
            moved: Whether the weights have moved already: placeholders keep what they hold.

        Returns:
            What ``finish_step`` is to be given, or None for a step that does not count: one at
            which nothing has an EMA, and a first step with every learning rate exactly 0, the dry
            initialisation of distributed checkpoints, which is made before the weights are loaded.
        """
        self.keys.refuse()
        if self.device is not None:
            self.offload.before_write()
            # The next write is not ours either; or it may be one by hand, with every step averaged.
            self.offload.at_once = moved or not self.sees_steps or self.update_every == 1
        groups = self.source.param_groups
        lane = self._lane(groups)
        # Before a dry step returns: a distributed checkpoint asks for what every window has.
        others = [(other, other.begin_step(moved)) for other in self.others.values()]
        if self.sees_steps and not moved:
            for bucket in lane.buckets:
                if bucket.counter.steps >= self.update_after_step and bucket.is_placeholder:
                    with no_autograd():
                        bucket.seed()
        if not lane.buckets:
            if any(group["params"] and self.options.of(group).enabled for group in groups):
                self.warned.once("nothing", NOTHING)
            return None
        # In this order: to look at a learning rate on an accelerator is to wait for it.
        if not any(bucket.counter.steps for bucket in lane.buckets) and is_dry(groups):
            self.dry = True
            return None
        lane.plan = [
            (bucket, factor)
            for bucket in lane.buckets
            if (factor := bucket.factor(self.update_every, self.update_after_step)) is not None
        ]
        if others:
            lane.others = [(other, theirs) for other, theirs in others if theirs is not None]
        return lane

    def finish_step(self, lane: Lane | None, found_inf: Any = None) -> None:
        """Count the step and average, after the weights have moved.

        Args:
            lane: From ``begin_step``.
            found_inf: True, or a tensor that is, where a scaler had the inner optimizer skip it.
        """
        if lane is None:
            return
        for other, theirs in lane.others:
            other.finish_step(theirs, found_inf)
        if found_inf is not None and self._defers(lane, found_inf):
            return
        if found_inf:  # on an accelerator that is a wait
            return
        with no_autograd():
            for bucket, factor in lane.plan:
                bucket.average(factor)
            for bucket in lane.buckets:
                bucket.counter.tick(self.update_after_step)
                self._step = max(self._step, bucket.counter.steps)
                # The next step may be made without a look at the weights before it.
                begins = bucket.counter.steps == self.update_after_step
                if begins and (bucket.is_placeholder or not self.sees_steps):
                    bucket.seed()
        if self.device is not None and self.offload.at_once:
            self.offload.hold_writes()
        lane.mark(self._step)

    def _defers(self, lane: Lane, found_inf: Any) -> bool:
        """Whether the device itself averages or does not; the step is counted at the next read."""
        with no_autograd():
            takes = self.deferred.takes(lane, found_inf, self.update_every, self.update_after_step)
            if takes:
                self.deferred.average(lane, found_inf)
        return takes

    def has_stepped(self) -> bool:
        """Whether the weights have moved, as far as can be seen, though nothing was averaged."""
        if self.step:
            return self.step > self.update_after_step
        if self.sees_steps:
            return not self.dry and any(map(bool, self.source.state.values()))
        kept = self.all_slots().items()
        return not all(torch.equal(local(value_of(s.ema, s.low)), local(p)) for p, s in kept)

    def clear(self) -> None:
        """Forget every average and begin anew, as newly built."""
        self.load({})

    def load(
        self,
        slots: dict[Tensor, Slot],
        step: int = 0,
        swapped: bool = False,
        held: Any = None,
        notes: Mapping[str, Any] | None = None,
        windows: Mapping[str, dict[Tensor, Slot]] = MappingProxyType({}),
        law_changed: bool = False,
    ) -> None:
        """Hold these slots alone; what was swapped in before is forgotten.

        Args:
            slots: By parameter.
            step: The largest clock.
            swapped: Whether their EMA weights were in the model that they were saved with.
            held: What that model held, see ``pending``.
            notes: Of who has saved them, see ``take_notes``.
            windows: The slots of the further windows, by name.
            law_changed: Whether their law is not known.
        """
        self.law_changed = law_changed
        if self.others:
            self.load_windows(windows, step)
        if self.device is not None:
            self.offload.forget()
        self.forget_lanes()
        self.take(slots, swapped)
        self._step, self.held, self._notes = step, held, notes or {}
        self.origin = Origin.at(step)

    def take_notes(self) -> Mapping[str, Any]:
        """The notes of who has saved what was loaded; handed out once after a load."""
        notes, self._notes = self._notes, {}
        return notes

    def follow_members(self) -> None:
        """Have every EMA that is to be begin at the weights of this moment."""
        self.clear()
        members = self.members()
        refuse_flat(members)
        with no_autograd():
            self.slots = {param: self.new_slot(param, self.options) for param in members}
        for other in self.others.values():
            other.follow_members()

    def note_given(self, options: Iterable[Group]) -> None:
        """Remember what groups were given when they were wrapped or added: it outlives a load."""
        self.given.extend(options)

    def compile(self, step: Any, inner: Optimizer) -> None:
        """Have a compiled step stand in for the inner one."""
        self.compiled = step
        step.check(inner)

    def marks(self, group: Group) -> dict[str, Any]:
        """The entries that a live param group carries."""
        return {
            "ema_step": self.clock_of(group),
            "ema_swapped": "swapped" if self.swapped else False,
            "ema_format": format_name(self.options.of(group).dtype),
        }

    def mark_swapped(self) -> None:
        """Write what a swap has changed of the marks."""
        swapped = "swapped" if self.swap.swapped else False
        for group in self.source.param_groups if self.sees_steps else ():
            group["ema_swapped"] = swapped

    def mark(self) -> None:
        """Write the marks into the live groups: flattened distributed checkpoints ask for them."""
        for group in self.source.param_groups if self.sees_steps else ():
            group.update(self.marks(group))

    def counted(self) -> dict[Tensor, Slot]:
        """The slots that hold an average, by parameter; placeholders are left out."""
        # By id: a tensor's own hash is a call into Python.
        here = {id(p): g.get("ema_enabled", True) for g in self.groups for p in g["params"]}
        absent = self.sees_steps  # else the source is a whole model
        slots = self.all_slots().items()
        return {p: slot for p, slot in slots if slot.age and here.get(id(p), absent)}

    def decay_in_force(self) -> float:
        """The decay of one step now: that of the first group with an EMA."""
        all_options = map(self.options.of, self.groups)
        decay = next((o.decay for o in all_options if o.enabled), self.decay)
        return decay_factor(decay, max(1, self.step - self.update_after_step), 1)

    def _lane(self, groups: Sequence[Group]) -> Lane:
        lane = self._lanes.find(groups)
        if lane is None:
            lane = self._new_lane(groups)
            self._lanes.add(lane)
        lane.groups = list(groups)  # torch may have replaced the dicts of the same parameters
        for param in self._lanes.use(lane):
            if (slot := self.slots.pop(param, None)) is not None:
                self.absent[param] = slot
        return lane

    def _new_lane(self, groups: Sequence[Group]) -> Lane:
        params = params_of(groups)
        for group in groups:
            check_options(group)
        if self.others:
            self.refuse_own_decays(groups)
        refuse_replaced(self._known, params)
        self.forget_memory()
        self._lanes.leave(groups)
        self._known = kinds_of([*params, *self._lanes.params()])
        with no_autograd():
            self.look_after_slots(groups)
        slots = self._slots
        if any(slot.format == FORMATS[torch.bfloat16] for slot in slots.values()):
            self.warned.once("bfloat16", BFLOAT16)
        with no_autograd():
            options, every, offload = self.options, self.update_every, self.offload
            buckets = make_buckets(groups, slots, options, every, self.clock_of, offload)
            for bucket in buckets if self.skip_non_finite else ():
                bucket.watch()
            fuse(buckets)
        return Lane.of(groups, params, slots, buckets)
