"""The shadow set: the one owner of every EMA tensor, the counters and the cached lists.

``EMAOptimizer`` and ``EMAModel`` are two front doors over it. A tensor meets five steps here:

    param --birth--> slot.ema --update--> slot.ema --swap--> param --swap--> slot.ema

Everything mutable sits in this object, so that a proxy of the optimizer (Lightning re-classes it
to one with a ``__dict__`` of its own) and the optimizer itself can never disagree.
"""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from .._arithmetic.formats import FORMATS, EMADtype
from .._engines.quantized import dense, is_quantized
from .._engines.replaced import kinds_of, refuse_replaced
from .._engines.sharding import local, refuse_flat
from .._warnings import warn
from ..schedules import Decay, check_decay, decay_factor, initial_share
from .buckets import Lane, follows, is_dry, make_buckets, own_dtypes, params_of
from .memory import shared_memory
from .options import check_count, check_dtype, check_module, check_options, ema_format
from .slots import Group, Slot, place_of
from .store import Parts, restored, stored, value_of
from .swap_state import Mode, SwapState


@contextmanager
def no_autograd() -> Iterator[None]:
    """Plain tensors inside: no graph, no inference tensors, which would refuse later writes."""
    if not torch.is_inference_mode_enabled():
        with torch.no_grad():
            yield
        return
    # In this order: inference_mode(False) turns grad mode on.
    with torch.inference_mode(False), torch.no_grad():
        yield


class ShadowSet:
    """The EMA of the parameters in the param groups of a source.

    Args:
        source: What has the ``param_groups``: the inner optimizer, which replaces them on load, or
            a ``ModelGroups``. Asked whenever they are needed.
        decay: Float or schedule.
        update_every: Optimizer steps between two updates.
        update_after_step: Optimizer steps until averaging begins.
        dtype: How an EMA tensor is stored, see ``formats``; None is fp32 for every narrower float,
            else the parameter's own dtype. A group's own ``ema_dtype`` goes before.
        module: The module that holds the FSDP2 modules, where they are not found by themselves.
        sees_steps: Whether the source is an optimizer, so that an average can begin at the weights
            before a step. The average of a model begins at the weights of its birth.
    """

    def __init__(
        self,
        source: Any,
        decay: Decay,
        update_every: int,
        update_after_step: int,
        dtype: EMADtype,
        module: nn.Module | None = None,
        sees_steps: bool = True,
    ) -> None:
        self.source = source
        self.decay = check_decay(decay)
        self.update_every = check_count("update_every", update_every, least=1)
        self.update_after_step = check_count("update_after_step", update_after_step, least=0)
        self.dtype = check_dtype(dtype)
        self.module = check_module(module)
        self.sees_steps = sees_steps
        self.step = 0  # the largest clock: counted optimizer steps
        self.slots: dict[Tensor, Slot] = {}
        # Slots of parameters that have left the groups, for as long as somebody else has them.
        # Weak only then: torch.utils.swap_tensors refuses a tensor that is referred to weakly.
        self.absent: Any = WeakTensorKeyDictionary()  # Any: torch does not type it
        self.swap = SwapState()
        self.dry = False  # whether the inner optimizer has made a step that moved nothing
        self.trainer_step: int | None = None  # at which a trainer has saved what was loaded
        self.warned: set[str] = set()
        self.held: Any = None  # what the model held when what was loaded was saved, see pending
        self.given: list[Group] = []  # the options that each group had when wrapped or added
        self.compiled: Any = None  # what stands in for the inner step after compile()
        self._lanes: OrderedDict[tuple[int, int], Lane] = OrderedDict()
        self._uses = 0  # steps over all lanes
        self._known = kinds_of(params_of(self.groups))
        self._shared: set[Tensor] | None = None  # parameters that share memory
        self._share: tuple[Any, float] | None = None
        self._entries = 0  # entries of the inner optimizer's state when last looked at
        self._taken: TypeError | None = None  # what the inner optimizer's own keys are refused with

    def __getstate__(self) -> dict[str, Any]:
        fresh: dict[str, Any] = {**dict.fromkeys(("compiled", "_shared", "_share")), "_known": {}}
        absent = list(self.absent.items())
        return {**self.__dict__, **fresh, "_lanes": OrderedDict(), "absent": absent}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.absent = WeakTensorKeyDictionary(dict(state["absent"]))

    @property
    def groups(self) -> list[Group]:
        """The param groups of the moment."""
        groups: list[Group] = self.source.param_groups
        return groups

    @property
    def mode(self) -> Mode:
        """What the parameters are used for now."""
        return self.swap.mode

    @property
    def swapped(self) -> dict[Tensor, Slot]:
        """The slots whose EMA weights are in the parameters now."""
        return self.swap.swapped

    def begin_step(self) -> Lane | None:
        """Prepare one step, before the weights move.

        Gives birth to missing slots, seeds placeholders from the weights and checks the factors, so
        that a bad decay raises before anything has moved.

        Returns:
            What ``finish_step`` is to be given, or None for a step that does not count: one at
            which nothing has an EMA, and a first step with every learning rate exactly 0, the dry
            initialisation of distributed checkpoints, which is made before the weights are loaded.
        """
        if self._taken is not None:
            raise self._taken
        groups = self.groups
        lane = self._lane(groups)
        if self.sees_steps:
            for bucket in lane.buckets:
                if bucket.counter.steps >= self.update_after_step and bucket.is_placeholder:
                    with no_autograd():
                        bucket.seed()
        if not lane.buckets:
            self._warn_of_nothing(groups)
            return None
        if is_dry(groups) and not any(bucket.counter.steps for bucket in lane.buckets):
            self.dry = True
            return None
        lane.plan = [
            (bucket, factor)
            for bucket in lane.buckets
            if (factor := bucket.factor(self.update_every, self.update_after_step)) is not None
        ]
        return lane

    def finish_step(self, lane: Lane | None) -> None:
        """Count the step and average, after the weights have moved."""
        if lane is None:
            return
        with no_autograd():
            for bucket, factor in lane.plan:
                bucket.average(factor)
            for bucket in lane.buckets:
                bucket.counter.tick(self.update_after_step)
                self.step = max(self.step, bucket.counter.steps)
                # Without a look at the weights before a step, averaging begins here.
                if not self.sees_steps and bucket.counter.steps == self.update_after_step:
                    bucket.seed()

    def check_keys(self, keys: Sequence[str]) -> None:
        """Raise TypeError once the inner optimizer keeps something of its own under these keys.

        Looked for whenever its state has grown; from then on every step raises before it moves.
        """
        state = [e for e in self.source.state.values() if isinstance(e, dict)]
        entries = sum(map(len, state))
        if entries == self._entries:
            return
        self._entries = entries
        if taken := sorted({key for entry in state for key in keys if key in entry}):
            name = type(self.source).__name__
            self._taken = TypeError(
                f"optimizer must not use the state keys {tuple(keys)}, got {taken} in the state "
                f"of {name}: use EMAModel beside {name} instead"
            )
            raise self._taken

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
        self.forget_lanes()
        self.slots, self.step, self.held = {}, 0, None
        self.swap.load({})
        self.absent.clear()

    def forget_lanes(self) -> None:
        """Have the buckets made anew at the next step (a slot was changed from outside)."""
        self._lanes.clear()
        self._shared = None

    def all_slots(self) -> dict[Tensor, Slot]:
        """Every slot by parameter, those of absent parameters too."""
        return {**dict(self.absent.items()), **self.slots} if self.absent else self.slots

    def find(self, param: Tensor) -> Slot | None:
        """The slot of a parameter, if it has one."""
        slot = self.slots.get(param)
        return self.absent.get(param) if slot is None and self.absent else slot

    def remove(self, param: Tensor) -> None:
        """Forget the slot of a parameter."""
        self.forget_lanes()
        self.slots.pop(param, None)
        self.absent.pop(param, None)

    def counted(self) -> dict[Tensor, Slot]:
        """The slots that hold an average, by parameter; placeholders are left out."""
        # By id: a tensor's own hash is a call into Python.
        here = {id(p): g.get("ema_enabled", True) for g in self.groups for p in g["params"]}
        absent = self.sees_steps  # else the source is a whole model
        slots = self.all_slots().items()
        return {p: slot for p, slot in slots if slot.updates and here.get(id(p), absent)}

    def clock_of(self, group: Group) -> int:
        """The clock of a param group: how many of its steps were counted."""
        slots = filter(None, map(self.find, group["params"]))
        marked = min(self.step, group.get("ema_step", self.step))  # an old mark after a new start
        return max((s.counter.steps for s in slots), default=marked)

    def ema_step(self, slot: Slot) -> int:
        """The counter of one slot in optimizer steps, as checkpoints hold it."""
        return min(slot.counter.steps, self.update_after_step) + slot.updates

    def counter_at(self, ema_step: int, step: int, decay: float | None) -> tuple[int, float]:
        """Updates and share that a checkpoint's counter stands for when the clock shows ``step``.

        ``decay`` is the group's own, if it has one.
        """
        updates = max(0, ema_step - min(step, self.update_after_step))
        made = updates // self.update_every * self.update_every
        source = self.decay if decay is None else decay
        key = (id(source) if callable(source) else source, made)
        # Remembered: a slowly forgetting schedule is multiplied out, once and not per parameter.
        if self._share is None or self._share[0] != key:
            self._share = key, initial_share(source, made)
        return updates, self._share[1]

    def parks(self, param: Tensor, slot: Slot) -> bool:
        """Whether a swap parks the weights, because an exchange would round or mix values."""
        if self._shared is None:
            self.look_at_memory()
        alike = place_of(param) == place_of(slot.ema) and not is_quantized(param)
        return not alike or param in (self._shared or ())

    def look_at_memory(self) -> None:
        """Find out anew which parameters share memory: ``param.data = ...`` may have changed it."""
        self._shared = shared_memory(self.all_slots())

    def ema_of(self, param: Tensor) -> Tensor:
        """The EMA weights of a parameter, wherever they are now; the weights before averaging."""
        slot = self.find(param)
        if slot is None or not slot.updates:
            return dense(param.detach())
        return value_of(self.main_of(param), slot.low)

    def main_of(self, param: Tensor) -> Tensor:
        """The main tensor of the EMA of a parameter that has one, wherever it is now."""
        slot = self.find(param)
        assert slot is not None
        exchanged = param in self.swapped and slot.parked is None
        return param.detach() if exchanged else slot.ema

    def weights_of(self, param: Tensor) -> Tensor:
        """The training weights of a parameter, wherever they are now."""
        slot = self.swapped.get(param)
        if slot is None:
            return param.detach()
        return slot.ema if slot.parked is None else slot.parked

    def members(self) -> list[Tensor]:
        """Unique parameters that have, or at the next step will have, an EMA."""
        return list(dict.fromkeys([*self._enabled(self.groups), *self.absent.keys()]))

    def birth(self, param: Tensor, dtype: EMADtype = None, steps: int | None = None) -> Slot:
        """A new slot that holds the parameter's weights.

        Args:
            param: The parameter.
            dtype: Its group's own, if any.
            steps: The clock of its group; None for the largest.
        """
        refuse_flat([param])
        slot = self.slot_of(param, (param, None), dtype)
        slot.counter.steps = self.step if steps is None else steps
        return slot

    def slot_of(self, param: Tensor, parts: Parts, dtype: EMADtype = None) -> Slot:
        """A slot of what ``parts`` hold, in the format that is wanted for the parameter."""
        format = ema_format(param.dtype, self.dtype if dtype is None else dtype)
        with no_autograd():
            main, low = restored(param, parts, format)
        return Slot(main, low)

    def hand_over(self, old: Tensor, new: Tensor) -> None:
        """Let the slot of a tensor that was replaced be its successor's."""
        slot = self.find(old)
        self.remove(old)
        if slot is not None:
            self.slots[new] = slot

    def renew_placeholders(self) -> None:
        """Have placeholders hold the weights of this moment, as a checkpoint is to show them.

        In new tensors: the old one may be the template that a distributed load has written into.
        """
        for param, slot in self.slots.items():
            waits = self.sees_steps or slot.counter.steps < self.update_after_step
            if waits and not slot.updates:
                with no_autograd():
                    slot.ema, slot.low = stored(param, param, slot.format)
                self._lanes.clear()

    def decay_in_force(self) -> float:
        """The decay of one step now: that of the first group with an EMA."""
        own = next((g.get("ema_decay") for g in self.groups if g.get("ema_enabled", True)), None)
        decay = self.decay if own is None else own
        return decay_factor(decay, max(1, self.step - self.update_after_step), 1)

    def _enabled(self, groups: Sequence[Group]) -> Iterator[Tensor]:
        for group in groups:
            if group.get("ema_enabled", True):
                yield from (p for p in group["params"] if self.find(p) or follows(group, p))

    def _lane(self, groups: Sequence[Group]) -> Lane:
        params = groups[0]["params"] if groups else []
        key = (len(groups), id(params[0]) if params else 0)
        lane = self._lanes.get(key)
        if lane is None or not lane.fits(groups):
            lane = self._lanes[key] = self._new_lane(groups)
        self._uses += 1
        lane.used = self._uses
        if len(self._lanes) > 1:
            self._lanes.move_to_end(key)
            self._let_go()
        return lane

    def _new_lane(self, groups: Sequence[Group]) -> Lane:
        for group in groups:
            check_options(group)
        self._shared = None
        refuse_replaced(self._known, params_of(groups))
        ids = {*map(id, params_of(groups)), *map(id, groups)}
        for key, lane in list(self._lanes.items()):
            if not ids.isdisjoint(map(id, [*lane.params, *lane.groups])):
                del self._lanes[key]
        stepping = [lane.params for lane in self._lanes.values()]
        self._known = kinds_of(chain(params_of(groups), *stepping))
        self._look_after_slots(groups)
        self._warn_of_bfloat16()
        with no_autograd():
            buckets = make_buckets(groups, self.slots, self.decay, self.update_every, self.clock_of)
        return Lane.of(groups, buckets, self.slots)

    def _look_after_slots(self, groups: Sequence[Group]) -> None:
        """Make missing slots, mend stale ones, and part with those of parameters that have left."""
        dtypes, here = own_dtypes(groups), {}
        for group in groups:
            clock = self.clock_of(group)
            for param in self._enabled([group]):
                if param not in here:
                    here[param] = self._slot_at(param, dtypes.get(param), clock)
        stepped = set(map(id, params_of(groups)))
        held = {id(p) for lane in self._lanes.values() for p in lane.params}
        gone = {p: s for p, s in self.all_slots().items() if id(p) not in stepped}
        self.slots = {**here, **{p: s for p, s in gone.items() if id(p) in held}}
        # A model has all its parameters at any time: what is not there is gone for good.
        left = {p: s for p, s in gone.items() if self.sees_steps and id(p) not in held}
        self.absent = WeakTensorKeyDictionary(left)

    def _let_go(self) -> None:
        """Forget the lane of parameters that have not stepped for several rounds."""
        oldest = next(iter(self._lanes.values()))
        if self._uses - oldest.used > 4 * len(self._lanes):
            self._lanes.popitem(last=False)
            for param in oldest.params:
                if (slot := self.slots.pop(param, None)) is not None:
                    self.absent[param] = slot

    def _slot_at(self, param: Tensor, dtype: EMADtype, clock: int) -> Slot:
        slot = self.find(param)
        if slot is not None and slot.ema.shape != param.shape:
            self.warn_of_shape(param)
            slot = None
        if slot is None:
            return self.birth(param, dtype, clock)
        wanted = ema_format(param.dtype, self.dtype if dtype is None else dtype)
        moved = slot.ema.device != param.device
        if moved or (slot.format != wanted and param not in self.swapped):
            with no_autograd():
                slot.ema, slot.low = restored(param, (slot.ema, slot.low), wanted)
        return slot

    def warn_of_shape(self, param: Tensor) -> None:
        """Warn once that the EMA of a parameter of another shape than before begins anew."""
        if "shape" not in self.warned:
            self.warned.add("shape")
            warn(
                f"a parameter has got another shape, {tuple(param.shape)}, than its EMA: the EMA "
                "begins anew at the new weights. To keep it, bring state[param]['ema'] to the new "
                "shape together with the weights"
            )

    def _warn_of_nothing(self, groups: Sequence[Group]) -> None:
        wanted = any(group["params"] and group.get("ema_enabled", True) for group in groups)
        if wanted and "nothing" not in self.warned:
            self.warned.add("nothing")
            warn(
                "nothing was averaged at this step: no parameter requires a gradient, has one or "
                "has an EMA already, and the step does not count. Let the parameters require "
                "gradients, or leave the EMA out"
            )

    def _warn_of_bfloat16(self) -> None:
        if "bfloat16" in self.warned:
            return
        if any(slot.format == FORMATS[torch.bfloat16] for slot in self.slots.values()):
            self.warned.add("bfloat16")
            warn(
                "an EMA in bfloat16 is off by about one rounding of the weights, 0.3 %: while the "
                "learning rate is high that is little of what the EMA averages away, and more than "
                "all of it once the learning rate is decayed. There use dtype='float24'"
            )
