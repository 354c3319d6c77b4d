"""How slots come and go: born with a parameter, mended, handed over, forgotten."""

from collections.abc import Sequence
from itertools import chain
from typing import Any

from torch import Tensor

from .._engines.sharding import refuse_flat
from .._warnings import Warned
from .buckets import follows, params_of
from .holdings import Holdings, no_autograd
from .lanes import Lanes
from .options import Options, ema_format
from .slots import Group, Parts, Slot, stored


class Births(Holdings):
    """The slots of a shadow set over time.

    Attributes:
        warned: What the user was told once.
    """

    def __init__(self, *settings: Any, **named: Any) -> None:
        super().__init__(*settings, **named)
        self.warned = Warned()
        self._lanes = Lanes()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_lanes": Lanes()}

    def check_offload(self) -> None:
        """Raise TypeError for what is to have an EMA in host memory and cannot."""
        groups = (group for group in self.groups if self.options.of(group).enabled)
        self.offload.check(param for group in groups for param in group["params"])

    def members(self) -> list[Tensor]:
        """Unique parameters that have, or at the next step will have, an EMA."""
        followed = (self._followed(group, self.options.of(group)) for group in self.groups)
        return list(dict.fromkeys([*chain(*followed), *self.absent.keys()]))

    def new_slot(
        self, param: Tensor, options: Options, parts: Parts | None = None, steps: int | None = None
    ) -> Slot:
        """A slot in the format that is wanted for the parameter; called under ``no_autograd()``.

        Args:
            param: The parameter.
            options: Those of its group.
            parts: What it is to hold; None for the parameter's weights.
            steps: The clock of its group; None for the largest.
        """
        kept = (param, None) if parts is None else parts
        host = self.device is not None and self._goes_to_host(param)
        slot = Slot.of(param, kept, ema_format(param.dtype, options.dtype), host=host)
        slot.counter.steps = self.step if steps is None else steps
        return slot

    def _goes_to_host(self, param: Tensor) -> bool:
        self.offload.check([param])
        return self.offload.serves(param)

    def slot_for(self, param: Tensor) -> Slot:
        """The slot of a parameter, made if it has none, to be written to."""
        self.forget_lanes()
        slot = self.find(param)
        if slot is None:
            with no_autograd():
                slot = self.slots[param] = self.new_slot(param, self.options)
        return slot

    def clock_of(self, group: Group) -> int:
        """The clock of a param group: how many of its steps were counted."""
        slots = filter(None, map(self.all_slots().get, group["params"]))
        if steps := [slot.counter.steps for slot in slots]:
            return max(steps)
        marked: int = group.get("ema_step", self.step)
        return min(self.step, marked)  # an old mark after a new start

    def set_ema_step(self, slot: Slot, ema_step: int) -> None:
        """Have a slot show a counter that an engine assigns."""
        if ema_step != self.ema_step(slot):
            self.step = max(self.step, ema_step)  # no parameter is ahead of the clock
            steps = max(slot.counter.steps, ema_step)
            slot.set_counts(steps, *self.counter_at(ema_step, steps, None))

    def remove(self, param: Tensor) -> None:
        """Forget the slot of a parameter."""
        self.forget_lanes()
        self.drop(param)

    def hand_over(self, old: Tensor, new: Tensor) -> None:
        """Let the slot of a tensor that was replaced be its successor's."""
        slot = self.find(old)
        self.remove(old)
        if slot is not None:
            self.slots[new] = slot

    def forget_lanes(self) -> None:
        """Have the buckets made anew at the next step (a slot was changed from outside)."""
        if self.deferred.waiting:
            self.settle()
        self._lanes.clear()
        self.forget_memory()

    def waits(self, slot: Slot) -> bool:
        """Whether a slot holds no average yet, and will be seeded from the weights once more."""
        waits = self.sees_steps or slot.counter.steps < self.update_after_step
        return waits and not slot.age

    def renew_placeholders(self) -> None:
        """Have placeholders hold the weights of this moment, as a checkpoint is to show them.

        In new tensors: the old one may be the template that a distributed load has written into.
        """
        for param, slot in self.slots.items():
            if self.waits(slot):
                with no_autograd():
                    slot.ema, slot.low = stored(param, param, slot.format, slot.host)
                self._lanes.clear()

    def look_after_slots(self, groups: Sequence[Group]) -> None:
        """Make missing slots, mend stale ones, and part with those of parameters that have left."""
        params = params_of(groups)
        refuse_flat(params)
        here, known = dict[Tensor, Slot](), self.all_slots()
        for group in groups:
            options, clock = self.options.of(group), self.clock_of(group)
            for param in self._followed(group, options):
                if param not in here:
                    slot = self._mended(param, known.get(param), options)
                    here[param] = slot or self.new_slot(param, options, steps=clock)
        stepped, held = (set(map(id, ps)) for ps in (params, self._lanes.params()))
        gone = {p: s for p, s in known.items() if id(p) not in stepped}
        self._slots = {**here, **{p: s for p, s in gone.items() if id(p) in held}}
        # A model has all its parameters at any time: what is not there is gone for good.
        left = {p: s for p, s in gone.items() if self.sees_steps and id(p) not in held}
        self.set_absent(left)

    def _followed(self, group: Group, options: Options) -> list[Tensor]:
        if not options.enabled:
            return []
        slots = self.all_slots()
        return [p for p in group["params"] if p in slots or follows(group, p)]

    def _mended(self, param: Tensor, slot: Slot | None, options: Options) -> Slot | None:
        if slot is None:
            return None
        if slot.ema.shape != param.shape:
            self.warn_of_shape(param)
            return None
        wanted = ema_format(param.dtype, options.dtype)
        host = self.device is not None and self.offload.serves(param)
        moved = not slot.lies(param, host)
        if moved or (slot.format != wanted and param not in self.swapped):
            slot.convert(param, wanted, host)
        return slot

    def warn_of_shape(self, param: Tensor) -> None:
        """Warn once that the EMA of a parameter of another shape than before begins anew."""
        self.warned.once(
            "shape",
            f"a parameter has got another shape, {tuple(param.shape)}, than its EMA: the EMA "
            "begins anew at the new weights. To keep it, bring state[param]['ema'] to the new "
            "shape together with the weights",
        )
