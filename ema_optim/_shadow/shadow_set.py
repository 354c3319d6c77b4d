"""The shadow set: the one owner of every EMA tensor, the counters and the cached lists.

``EMAOptimizer`` and ``EMAModel`` are two front doors over it. A tensor meets five steps here:

    param --birth--> slot.ema --update--> slot.ema --swap--> param --swap--> slot.ema

Everything mutable sits in this object, so that a proxy of the optimizer (Lightning re-classes it
to one with a ``__dict__`` of its own) and the optimizer itself can never disagree.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .._arithmetic.formats import FORMATS, EMADtype
from .._engines.quantized import dense, is_quantized
from .._engines.sharding import refuse_flat
from .._warnings import warn
from ..schedules import Decay, check_decay, decay_factor, initial_share
from .buckets import Bucket, Cache, follows, group_options, is_dry, make_buckets, own_dtypes
from .memory import shared_memory
from .options import check_count, check_dtype, check_module, check_options, ema_format
from .slots import Group, Slot, place_of
from .store import Parts, restored, stored, value_of


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
    """The EMA of the parameters in a list of param groups.

    Args:
        decay: Float or schedule.
        update_every: Optimizer steps between two updates.
        update_after_step: Optimizer steps until averaging begins.
        dtype: How an EMA tensor is stored, see ``_formats``; None is fp32 for every narrower float,
            else the parameter's own dtype. A group's own ``ema_dtype`` goes before.
        module: The module that holds the FSDP2 modules, where they are not found by themselves.
        reseeds: Whether the first average begins at the weights of the moment before it, or (where
            the steps are not seen) at those of the birth.
    """

    def __init__(
        self,
        decay: Decay,
        update_every: int,
        update_after_step: int,
        dtype: EMADtype,
        module: nn.Module | None = None,
        reseeds: bool = True,
    ) -> None:
        self.decay = check_decay(decay)
        self.update_every = check_count("update_every", update_every, least=1)
        self.update_after_step = check_count("update_after_step", update_after_step, least=0)
        self.dtype = check_dtype(dtype)
        self.module = check_module(module)
        self.reseeds = reseeds
        self.step = 0  # counted optimizer steps
        self.slots: dict[Tensor, Slot] = {}
        self.swapped: dict[Tensor, Slot] = {}  # whose EMA weights are in the parameter now
        self.mode = "train"  # "train", "block", "eval" or "pending"
        self.eval_swaps = True  # whether eval() swaps; a trainer may have put the EMA in already
        self.trainer_step: int | None = None  # at which a trainer has saved what was loaded
        self.warned: set[str] = set()
        self.compiled: Any = None  # what stands in for the inner step after compile()
        self._cache: Cache | None = None
        self._shared: set[Tensor] | None = None  # parameters that share memory
        self._share: tuple[Any, float] | None = None
        self._settled_at = 0

    def __getstate__(self) -> dict[str, Any]:
        self.settle()
        # A copy made inside a swap block has no block to leave; train() puts its weights back.
        mode = "eval" if self.mode == "block" else self.mode
        fresh = dict.fromkeys(("compiled", "_cache", "_shared", "_share"))
        return {**self.__dict__, **fresh, "mode": mode}

    def begin_step(self, groups: Sequence[Group]) -> list[tuple[Bucket, float]] | None:
        """Prepare one step, before the weights move.

        Gives birth to missing slots, seeds placeholders from the weights and settles the factors,
        so that a bad decay raises before anything has moved.

        Returns:
            The updates that ``finish_step`` is to make, or None for a step that does not count: a
            first step with every learning rate exactly 0 is the dry initialisation of distributed
            checkpoints, made before the weights are loaded.
        """
        buckets = self._fresh_buckets(groups)
        if self.reseeds and self.step >= self.update_after_step:
            for bucket in buckets:
                if bucket.updates(self.step) == 0:
                    with no_autograd():
                        bucket.seed()
        if self.step == 0 and is_dry(groups):
            return None
        tick = self.step + 1 - self.update_after_step
        if tick <= 0 or tick % self.update_every:
            return []
        return [(bucket, self._factor(bucket)) for bucket in buckets]

    def finish_step(self, plan: list[tuple[Bucket, float]] | None) -> None:
        """Count the step and average, after the weights have moved."""
        if plan is None:
            return
        with no_autograd():
            for bucket, factor in plan:
                bucket.average(factor, self.step)
        self.step += 1

    def seed(self, groups: Sequence[Group]) -> None:
        """Have every EMA begin at the weights of now."""
        with no_autograd():
            for bucket in self._fresh_buckets(groups):
                bucket.seed()

    def settle(self) -> None:
        """Write the buckets' counters back to the slots; they cost nothing per step this way."""
        if self._cache is None or self._settled_at == self.step:
            return
        for bucket in self._cache.buckets:
            for slot in bucket.slots:
                slot.updates, slot.share = bucket.updates(self.step), bucket.share
        self._settled_at = self.step

    def forget_cache(self) -> None:
        """Have the buckets made anew at the next step (a slot was changed from outside)."""
        self.settle()
        self._cache = self._shared = None

    def counted(self, groups: Sequence[Group]) -> dict[Tensor, Slot]:
        """The slots that hold an average, by parameter; placeholders are left out."""
        self.settle()
        # By id: a tensor's own hash is a call into Python.
        own = {id(p) for g in groups if g.get("ema_enabled", True) for p in g["params"]}
        return {p: slot for p, slot in self.slots.items() if slot.updates and id(p) in own}

    def ema_step(self, slot: Slot) -> int:
        """The counter of one slot in optimizer steps, as checkpoints hold it."""
        self.settle()
        return min(self.step, self.update_after_step) + slot.updates

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
        self._shared = shared_memory(self.slots)

    def ema_of(self, param: Tensor) -> Tensor:
        """The EMA weights of a parameter, wherever they are now; the weights before averaging."""
        self.settle()
        slot = self.slots.get(param)
        if slot is None or not slot.updates:
            return dense(param.detach())
        return value_of(self.main_of(param), slot.low)

    def main_of(self, param: Tensor) -> Tensor:
        """The main tensor of the EMA of a parameter that has one, wherever it is now."""
        slot = self.slots[param]
        exchanged = param in self.swapped and slot.parked is None
        return param.detach() if exchanged else slot.ema

    def weights_of(self, param: Tensor) -> Tensor:
        """The training weights of a parameter, wherever they are now."""
        slot = self.swapped.get(param)
        if slot is None:
            return param.detach()
        return slot.ema if slot.parked is None else slot.parked

    def members(self, groups: Sequence[Group]) -> list[Tensor]:
        """Unique parameters of the groups that have, or at the next step will have, an EMA."""
        members = {
            param: None
            for group in groups
            if group.get("ema_enabled", True)
            for param in group["params"]
            if param in self.slots or follows(group, param)
        }
        return list(members)

    def birth(self, param: Tensor, dtype: EMADtype = None) -> Slot:
        """A new slot that holds the parameter's weights; ``dtype`` is its group's own, if any."""
        refuse_flat([param])
        return self.slot_of(param, (param, None), dtype)

    def slot_of(self, param: Tensor, parts: Parts, dtype: EMADtype = None, **counts: Any) -> Slot:
        """A slot of what ``parts`` hold, in the format that is wanted for the parameter."""
        format = ema_format(param.dtype, self.dtype if dtype is None else dtype)
        with no_autograd():
            main, low = restored(param, parts, format)
        return Slot(main, low=low, **counts)

    def hand_over(self, old: Tensor, new: Tensor) -> None:
        """Let the slot of a tensor that was replaced be its successor's."""
        self.forget_cache()
        self.slots[new] = self.slots.pop(old)

    def renew_placeholder(self, param: Tensor) -> None:
        """Have a placeholder hold the weights of now, as it does whenever it is looked at.

        In a new tensor: the old one may be the template that a distributed load has written into.
        """
        waits = self.reseeds or self.step < self.update_after_step
        if waits and not self.slots[param].updates:
            slot = self.slots[param]
            with no_autograd():
                slot.ema, slot.low = stored(param, param, slot.format)
            self._cache = None  # a placeholder has no counters to settle

    def decay_in_force(self, groups: Sequence[Group]) -> float:
        """The decay of one step now: that of the first group with an EMA."""
        own = next((g.get("ema_decay") for g in groups if g.get("ema_enabled", True)), None)
        decay = self.decay if own is None else own
        return decay_factor(decay, max(1, self.step - self.update_after_step), 1)

    def _factor(self, bucket: Bucket) -> float:
        updates = bucket.updates(self.step + 1)
        return decay_factor(bucket.decay, updates, min(self.update_every, updates))

    def _fresh_buckets(self, groups: Sequence[Group]) -> list[Bucket]:
        if self._cache is not None and self._cache.fits(groups):
            return self._cache.buckets
        for group in groups:
            check_options(group)
        self.forget_cache()
        dtypes = own_dtypes(groups)
        members = self.members(groups)
        self.slots = {param: self._slot_at(param, dtypes.get(param)) for param in members}
        self._warn_of_bfloat16()
        with no_autograd():
            clock = max(self.step, self.update_after_step)
            buckets = make_buckets(groups, self.slots, self.decay, clock)
        params = [param for group in groups for param in group["params"]]
        self._cache = Cache(
            params,
            [param.requires_grad for param in params],
            [param.dtype for param in params],
            params[0].device if params else None,
            group_options(groups),
            buckets,
        )
        self._settled_at = self.step
        return self._cache.buckets

    def _slot_at(self, param: Tensor, dtype: EMADtype) -> Slot:
        slot = self.slots.get(param)
        if slot is None:
            return self.birth(param, dtype)
        wanted = ema_format(param.dtype, self.dtype if dtype is None else dtype)
        moved = slot.ema.device != param.device
        if moved or (slot.format != wanted and param not in self.swapped):
            with no_autograd():
                slot.ema, slot.low = restored(param, (slot.ema, slot.low), wanted)
        return slot

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
