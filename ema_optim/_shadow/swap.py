"""The exchange of training weights and EMA weights, in both directions.

An EMA of the parameter's own dtype changes places with the weights through a small scratch
buffer. Where that would round (another dtype, quantized weights) or mix values (parameters that
share memory), the training weights are parked in a copy instead and the EMA stays where it is.

Everything is written into the parameters under ``no_grad``: addresses stay, and the version counter
moves, so that a swap between forward and backward raises in backward. Written through ``.data`` it
would give wrong gradients without a word.

A swap may be interrupted at any moment, and what puts it right may be interrupted too. The swap
under way is kept in the state (``SwapState.move``); whoever comes next puts the training weights
back with ``recover``, which every public call begins with.
"""

from collections.abc import Generator, Iterator
from contextlib import AbstractContextManager, _GeneratorContextManager, contextmanager
from typing import Any

import torch
from torch import nn

from .._arithmetic.average import copy_, non_finite
from .._engines.quantized import dense
from .._engines.sharding import holds_on_all_ranks, local, locals_of, reshard
from ..schedules import decay_factor
from . import pending, record, report
from .choice import Shown
from .holdings import no_autograd
from .shadow_set import ShadowSet
from .swap_state import Mode, Move, Slots, write_shown


def block(
    shadow: ShadowSet, what: str, model: nn.Module | None = None, shown: Shown | None = None
) -> AbstractContextManager[None]:
    """Have the EMA weights in the parameters for a block, and the training weights after it.

    Args:
        shadow: The shadow set.
        what: The public call, for an error.
        model: The model that owns the parameters, if known: not to be loaded into meanwhile.
        shown: The average that is put in where it is not the first window.
    """
    return _Block(_block, (shadow, what, model, shown), {})


class _Block(_GeneratorContextManager[None]):
    """Has the state know the generator that is to end the block: an interrupt may have ended it."""

    def __enter__(self) -> None:
        self.args[0].swap.note_block(self.gen)
        super().__enter__()


def _block(
    shadow: ShadowSet, what: str, model: nn.Module | None, shown: Shown | None
) -> Generator[None, None, None]:
    state, entered = shadow.swap, False
    hooks: list[Any] = []
    try:
        with state.alone(what):
            refuse_swapped(shadow, what)
            # The mode first, on both sides: an interrupt may come between any two calls.
            entered, state.mode = True, Mode.BLOCK
            put_in(shadow, shown)
        modules = model.modules() if model is not None and state.swapped else ()
        # A scripted module has no such hooks.
        for module in (m for m in modules if not isinstance(m, torch.jit.ScriptModule)):
            register: Any = module.register_load_state_dict_pre_hook  # torch does not type it
            hooks.append(register(record.refuse_load))
        yield
    finally:
        try:
            for hook in hooks:
                hook.remove()
        finally:
            if entered and state.mode is Mode.BLOCK:  # else a load inside has replaced the EMA
                put_back_for_good(shadow)


def enter_eval(shadow: ShadowSet) -> None:
    """Have the EMA weights in the parameters until ``put_back``, if there are any."""
    state = shadow.swap
    with state.alone("eval()"):
        if state.mode is Mode.TRAIN and state.eval_swaps:
            state.mode = Mode.EVAL
            put_in(shadow)
            if not state.swapped:
                state.mode = Mode.TRAIN


def put_in(shadow: ShadowSet, shown: Shown | None = None) -> None:
    """Put the EMA weights in, with the warnings that they may be worth."""
    counted = shadow.counted()
    windows = [(shadow, counted)] if shown is None else [(w, w.counted()) for w in shown.windows]
    for window, slots in windows:
        report.warn_young(window, "swap", slots)
        if window.skip_non_finite:
            report.warn_skipped(window)
    doubtful = swap_in(shadow, counted, shown)
    shadow.mark_swapped()
    for window, slots in windows if doubtful else ():
        report.warn_non_finite(window, slots)


def swap_in(shadow: ShadowSet, counted: Slots, shown: Shown | None = None) -> bool:
    """Put the EMA weights of these slots into the parameters. An error on the way changes nothing.

    Returns:
        Whether they may hold a NaN or an infinity (certainly not, if False).
    """
    state = shadow.swap
    with state.alone("a swap"):
        if not counted:
            return False
        if shadow.device is not None:
            shadow.offload.settle()
        record.refuse_interrupted(state, counted)
        reshard(counted, shadow.module)
        shadow.look_at_memory()
        parking = counted
        if shown is None:
            parking = {param: slot for param, slot in counted.items() if shadow.parks(param, slot)}
        before = record.before_ours(state, counted)
        with no_autograd():
            move = Move(counted, parking, arrived=False, shown=shown)
            record.enter(state)
            try:
                state.move, state.shows_other = move, shown is not None
                move.put_in()
                if shadow.has_copies:
                    shadow.publish()
                record.take_for_ours(state, counted, before)
                state.groups, state.versions = shadow.groups, record.versions_of(counted)
                state.swapped = counted
                state.move = None
            except BaseException:
                state.move = move
                put_back(shadow)
                raise
            if shown is not None:
                return True
            emas = locals_of(slot.ema for slot in parking.values()) if parking else []
            return move.exchange.doubtful() or bool(parking and non_finite(emas))


@contextmanager
def lent(shadow: ShadowSet) -> Iterator[None]:
    """Have the EMA weights in all parameters, to be written to by name; the rest stays what it is.

    The training weights are kept in a copy, for as long as it takes.
    """
    state = shadow.swap
    with state.alone("load_ema_state()"), no_autograd():
        slots = {param: shadow.slot_for(param) for param in shadow.members()}
        state.move = Move(slots, slots, arrived=False)
        try:
            state.move.put_in()
            yield
        finally:
            put_back_for_good(shadow)


def put_back(shadow: ShadowSet) -> None:
    """Put the training weights back. Interrupted, it is to be called again.

    Raises:
        RuntimeError: Another object, or another thread, has the parameters swapped by now.
    """
    state = shadow.swap
    written: list[str] = []
    with state.alone("train(), or the end of a swap,"):
        if state.move is None and state.swapped:
            record.refuse_crossed(state)
            written = _written(shadow)
            parking = {p: s for p, s in state.swapped.items() if s.parked is not None}
            with no_autograd():
                state.move = Move(state.swapped, parking, arrived=True)
        if state.move is not None:
            _finish(shadow, state.move)
        record.leave(state)
        state.mode = Mode.TRAIN
    shadow.mark_swapped()
    if written:
        shadow.warned.once(
            "written",
            f"{', '.join(written)}: written to while the EMA weights were in. What was written is "
            "now the EMA where that has the dtype of the parameters, else it is dropped. Write "
            "to the training weights, after the swap; for a forward that writes, swap a copy of "
            "the model",
        )


def _finish(shadow: ShadowSet, move: Move) -> None:
    state = shadow.swap
    before = record.before_ours(state, move.slots)
    reshard(move.slots, shadow.module)
    with no_autograd():
        move.put_back()
    if shadow.has_copies:
        shadow.publish()
    record.take_for_ours(state, move.slots, before)
    state.swapped, state.shows_other = {}, False
    for slot in move.slots.values():
        slot.parked = None
    state.move = None


def put_back_for_good(shadow: ShadowSet) -> None:
    """Put the training weights back, whatever interrupts it on the way."""
    try:
        put_back(shadow)
    except BaseException:
        put_back(shadow)
        raise


def put_back_after_eval(shadow: ShadowSet) -> None:
    """Put the training weights back, unless that is for the end of a block.

    By itself for a trainer whose inner optimizer has to stay in its own ``eval()``.
    """
    if shadow.mode is Mode.EVAL or shadow.swap.is_interrupted:
        put_back_for_good(shadow)


def recover(shadow: ShadowSet) -> None:
    """Put the training weights back where an interrupt has kept a swap from ending."""
    if shadow.swap.is_interrupted:
        put_back(shadow)


def get_ready(shadow: ShadowSet) -> None:
    """Finish what an interrupt or a load has left to be done."""
    recover(shadow)
    resolve_pending(shadow)


def apply(shadow: ShadowSet, shown: Shown | None = None) -> None:
    """Make the EMA weights the training weights, one way, inside a swap or outside."""
    shadow.held = None  # what the model holds from here on is meant
    state = shadow.swap
    with state.alone("apply_ema()"), no_autograd():
        shadow.offload.settle()
        counted = state.swapped or shadow.counted()
        reshard(counted, shadow.module)
        if not state.swapped:
            _write(shadow, counted, shown)
            return
        is_in = shown is None and not state.shows_other
        exchanged = {p: s for p, s in counted.items() if s.parked is None}
        copy_(locals_of(slot.ema for slot in exchanged.values()), locals_of(exchanged))
        state.swapped, state.shows_other = {}, False
        for slot in counted.values():
            slot.parked = None
        if not is_in:
            _write(shadow, counted, shown)
        record.leave(state)
        if state.mode is Mode.EVAL:
            state.mode = Mode.TRAIN
    shadow.mark_swapped()


def _write(shadow: ShadowSet, slots: Slots, shown: Shown | None) -> None:
    try:
        write_shown(slots, shown)
    finally:
        torch.clear_autocast_cache()
    if shadow.has_copies:
        shadow.publish()


def resolve_pending(shadow: ShadowSet) -> None:
    """Finish the load of a checkpoint that was written while swapped.

    Raises:
        RuntimeError: The model does not hold what it held when the checkpoint was written.
    """
    if shadow.mode is not Mode.PENDING:
        return
    pending.check_model(shadow)
    exchanged = [slot for slot in shadow.swapped.values() if slot.parked is None]
    if (
        shadow.held is None
        and exchanged
        and _all_equal(shadow.swapped)
        and not _forgets_all(shadow)
    ):
        raise RuntimeError(
            "the optimizer's checkpoint was written while the EMA weights were swapped in, the "
            "model's was not: the EMA is in neither. Load the model's state dict of the same "
            "moment; or start a new EMA: remove the 'ema*' entries from the optimizer's checkpoint"
        )
    put_back(shadow)
    pending.finish_formats(shadow)
    shadow.held = None


def refuse_swapped(shadow: ShadowSet, what: str, also_after_eval: bool = True) -> None:
    """Raise RuntimeError for what must not happen while the EMA weights are in."""
    mode = shadow.mode
    if mode is Mode.BLOCK:
        raise RuntimeError(f"{what} inside swap_ema_weights(): leave the block first")
    if mode is Mode.EVAL and shadow.swapped and also_after_eval:
        raise RuntimeError(f"{what} after eval(): call optimizer.train() first")


def check_can_step(shadow: ShadowSet, has_closure: bool) -> None:
    """Raise RuntimeError where a step would be made at, or away from, the EMA weights."""
    refuse_swapped(shadow, "step()")
    refuse_others(shadow, "step()")
    pending.check_model(shadow)
    pending.check_first_step(shadow)
    if shadow.mode is not Mode.PENDING or has_closure:
        return
    if any(param.grad is not None for group in shadow.groups for param in group["params"]):
        raise RuntimeError(
            "step() after loading a checkpoint written while swapped: the gradients were taken at "
            "the EMA weights. Call optimizer.train() after loading, before the forward"
        )


def refuse_others(shadow: ShadowSet, what: str) -> None:
    """Raise RuntimeError where another object has its EMA weights in the parameters."""
    params = (param for group in shadow.source.param_groups for param in group["params"])
    record.refuse_others(shadow.swap, params, what)


def _written(shadow: ShadowSet) -> list[str]:
    """Names of the parameters that others have written to while the EMA weights were in."""
    state = shadow.swap
    now = record.versions_of(state.swapped)
    params = [p for p in state.swapped if now[id(p)] != state.versions.get(id(p), now[id(p)])]
    return record.names_of(state.groups, params) if params else []


def _all_equal(swapped: Slots) -> bool:
    kept = ((p, s.ema if s.parked is None else s.parked) for p, s in swapped.items())
    equal = all(torch.equal(dense(local(p)), dense(local(weights))) for p, weights in kept)
    return holds_on_all_ranks(swapped, equal)


def _forgets_all(shadow: ShadowSet) -> bool:
    # With a decay of 0 in force (also the first update of a debiased schedule) the EMA equals the
    # weights rightly.
    updates = max(slot.age for slot in shadow.swapped.values())
    enabled = (o for o in map(shadow.options.of, shadow.groups) if o.enabled)
    return all(decay_factor(options.decay, updates, 1) == 0.0 for options in enabled)
