"""The exchange of training weights and EMA weights, in both directions.

An EMA of the parameter's own dtype changes places with the weights through a small scratch
buffer. Where that would round (another dtype, quantized weights) or mix values (parameters that
share memory), the training weights are parked in a copy instead and the EMA stays where it is.

Everything is written into the parameters under ``no_grad``: addresses stay, and the version counter
moves, so that a swap between forward and backward raises in backward. Written through ``.data`` it
would give wrong gradients without a word.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .._arithmetic.average import Exchange, copy_, non_finite
from .._engines.quantized import dense, is_quantized, write_
from .._engines.sharding import holds_on_all_ranks, local, locals_of, reshard
from ..schedules import decay_factor
from . import pending
from .shadow_set import ShadowSet, no_autograd
from .slots import Group, Slot
from .store import read_

Slots = dict[Tensor, Slot]


def swap_in(shadow: ShadowSet, groups: Sequence[Group]) -> bool:
    """Put the EMA weights into the parameters. An error on the way changes nothing.

    Returns:
        Whether they may hold a NaN or an infinity (certainly not, if False).
    """
    counted = shadow.counted(groups)
    reshard(counted, shadow.module)
    shadow.look_at_memory()
    parking = {param: slot for param, slot in counted.items() if shadow.parks(param, slot)}
    with no_autograd():
        exchanged = {p: s for p, s in counted.items() if p not in parking}
        exchange = Exchange(_emas(exchanged), _weights(exchanged), watched=True)
        try:
            for param, slot in counted.items():
                # None also where an interrupt has left an old copy: it would be put back.
                slot.parked = param.detach().clone() if param in parking else None
            read_(parking, list(parking.values()))
            exchange.run()
            shadow.swapped = counted
        except BaseException:
            shadow.swapped = {}
            exchange.undo()
            _unpark(parking)
            raise
        return exchange.doubtful() or bool(non_finite(_emas(parking)))


def swap_out(shadow: ShadowSet) -> None:
    """Put the training weights back. An error on the way leaves the EMA weights in."""
    swapped = shadow.swapped
    reshard(swapped, shadow.module)
    parking = {p: s for p, s in swapped.items() if s.parked is not None}
    with no_autograd():
        exchanged = {p: s for p, s in swapped.items() if p not in parking}
        exchange = Exchange(_emas(exchanged), _weights(exchanged))
        try:
            exchange.run()
            _put_back(parking)
            shadow.swapped = {}
        except BaseException:
            shadow.swapped = swapped
            exchange.undo()
            read_(parking, list(parking.values()))
            raise
    for slot in parking.values():
        slot.parked = None


def leave_block(shadow: ShadowSet) -> None:
    """Put the training weights back for good, whatever has interrupted it on the way."""
    try:
        swap_out(shadow)
    except BaseException:
        swap_out(shadow)
        shadow.mode = "train"
        raise
    shadow.mode = "train"


def apply(shadow: ShadowSet, groups: Sequence[Group]) -> None:
    """Make the EMA weights the training weights, one way, inside a swap or outside."""
    shadow.held = None  # what the model holds from here on is meant
    with no_autograd():
        if not shadow.swapped:
            counted = shadow.counted(groups)
            reshard(counted, shadow.module)
            read_(counted, list(counted.values()))
            return
        exchanged = {p: s for p, s in shadow.swapped.items() if s.parked is None}
        copy_(_emas(exchanged), _weights(exchanged))
    forgotten, shadow.swapped = shadow.swapped, {}
    for slot in forgotten.values():
        slot.parked = None


def resolve_pending(shadow: ShadowSet, groups: Sequence[Group]) -> None:
    """Finish the load of a checkpoint that was written while swapped.

    Raises:
        RuntimeError: The model does not hold what it held when the checkpoint was written.
    """
    if shadow.mode != "pending":
        return
    pending.check_model(shadow)
    exchanged = [slot for slot in shadow.swapped.values() if slot.parked is None]
    if (
        shadow.held is None
        and exchanged
        and _all_equal(shadow.swapped)
        and not _forgets_all(shadow, groups)
    ):
        raise RuntimeError(
            "the optimizer's checkpoint was written while the EMA weights were swapped in, the "
            "model's was not: the EMA is in neither. Load the model's state dict of the same "
            "moment; or start a new EMA: remove the 'ema*' entries from the optimizer's checkpoint"
        )
    swap_out(shadow)
    pending.finish_formats(shadow, groups)
    shadow.mode = "train"
    shadow.held = None


def refuse_swapped(shadow: ShadowSet, what: str, also_after_eval: bool = True) -> None:
    """Raise RuntimeError for what must not happen while the EMA weights are in."""
    if shadow.mode == "block":
        raise RuntimeError(f"{what} inside swap_ema_weights(): leave the block first")
    if shadow.mode == "eval" and also_after_eval:
        raise RuntimeError(f"{what} after eval(): call optimizer.train() first")


def check_can_step(shadow: ShadowSet, groups: Sequence[Group], has_closure: bool) -> None:
    """Raise RuntimeError where a step would be made at, or away from, the EMA weights."""
    refuse_swapped(shadow, "step()")
    pending.check_model(shadow)
    pending.check_first_step(shadow)
    if shadow.swapped and shadow.mode == "train":
        raise RuntimeError("step() with the EMA weights still in: call optimizer.train() first")
    if shadow.mode != "pending" or has_closure:
        return
    if any(param.grad is not None for group in groups for param in group["params"]):
        raise RuntimeError(
            "step() after loading a checkpoint written while swapped: the gradients were taken at "
            "the EMA weights. Call optimizer.train() after loading, before the forward"
        )


def _weights(slots: Slots) -> list[Tensor]:
    return locals_of(slots)


def _emas(slots: Slots) -> list[Tensor]:
    return locals_of(slot.ema for slot in slots.values())


def _parked(slots: Slots) -> list[Tensor]:
    return locals_of(slot.parked for slot in slots.values() if slot.parked is not None)


def _put_back(parking: Slots) -> None:
    plain = {param: slot for param, slot in parking.items() if not is_quantized(param)}
    copy_(_weights(plain), _parked(plain))
    for param, slot in parking.items():
        if param not in plain and slot.parked is not None:
            write_(param, slot.parked)


def _unpark(parking: Slots) -> None:
    for param, slot in parking.items():
        if slot.parked is not None:
            param.detach().copy_(slot.parked)
            slot.parked = None


def _all_equal(swapped: Slots) -> bool:
    kept = ((p, s.ema if s.parked is None else s.parked) for p, s in swapped.items())
    equal = all(torch.equal(dense(local(p)), dense(local(weights))) for p, weights in kept)
    return holds_on_all_ranks(swapped, equal)


def _forgets_all(shadow: ShadowSet, groups: Sequence[Group]) -> bool:
    # With a decay of 0 in force (also the first update of a debiased schedule) the EMA equals the
    # weights rightly.
    own = [group.get("ema_decay") for group in groups if group.get("ema_enabled", True)]
    updates = max(slot.updates for slot in shadow.swapped.values())
    decays = (shadow.decay if decay is None else decay for decay in own)
    return all(decay_factor(decay, updates, 1) == 0.0 for decay in decays)
