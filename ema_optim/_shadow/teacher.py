"""A live teacher: one forward of the model with the EMA weights, which stay where they are.

    module._parameters[name]    the parameter -> its EMA tensor -> (forward) -> the parameter
    module._buffers[name]       the buffer    -> a copy         -> (forward) -> the buffer

Nothing is written to a parameter or a buffer: graphs of the student, autocast's cache of cast
weights (EMA tensors require no gradient, so they never enter it) and CUDA addresses know nothing
of the forward.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .._engines.quantized import is_quantized
from .._engines.sharding import fsdp_modules, is_sharded
from . import names
from .holdings import no_autograd
from .shadow_set import ShadowSet
from .slots import Slot

# Where something is kept, under which key, and what is to be there during the forward.
Place = tuple[dict[str, Any], str, Any]


def forward(shadow: ShadowSet, model: nn.Module, args: Any, kwargs: Any) -> Any:
    """The forward of ``model`` with the EMA weights, and with copies of its buffers.

    Raises:
        RuntimeError: The EMA cannot stand in for the weights as it is; the message names the way.
    """
    called = names.callee(model)
    places = list(_places(shadow, called))
    with shadow.swap.alone("a forward with the EMA weights"), _in_place(places):
        return called(*args, **kwargs)


def live_state(shadow: ShadowSet, model: nn.Module, device: object) -> dict[str, Tensor]:
    """The EMA tensors themselves by name, one for each unique tensor of the model.

    Raises:
        RuntimeError: As ``forward``.
        ValueError: A device is wanted.
    """
    if device is not None:
        raise ValueError(f"device must be None with copy=False, got {device!r}: a move is a copy")
    state, options = {}, shadow.options_by_param()
    for param, name in names.unique_members(shadow, model).items():
        _check_plain(param)
        slot = shadow.find(param)
        if slot is None:  # what is handed out must still be the EMA after the first step
            shadow.forget_lanes()
            slot = shadow.slots[param] = shadow.new_slot(param, options[param])
        _check_slot(param, slot)
        if shadow.waits(slot):
            with no_autograd():
                slot.ema.copy_(param)
        state[name] = slot.ema
    return state


def _places(shadow: ShadowSet, called: nn.Module) -> Iterator[Place]:
    tensors: dict[int, Any] = {}  # what is tied stays tied

    def stand_in(tensor: Any, make: Any) -> Any:
        if id(tensor) not in tensors:
            tensors[id(tensor)] = make(shadow, tensor)
        return tensors[id(tensor)]

    if fsdp_modules(called):
        raise RuntimeError(_REFUSED["sharded"])
    for module in called.modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise RuntimeError(_REFUSED["scripted"])
        for name, param in module._parameters.items():
            if param is not None:
                yield module._parameters, name, stand_in(param, _weights)
        for name, buffer in module._buffers.items():
            if buffer is not None and not is_lazy(buffer):
                yield module._buffers, name, stand_in(buffer, _copy)
        if isinstance(module, nn.RNNBase):
            # Seeing other weights than in its own list, it would lay them out anew in memory.
            flat = [None if w is None else stand_in(w, _weights) for w in module._flat_weights]
            refs = [None if w is None else weakref.ref(w) for w in flat]
            yield module.__dict__, "_flat_weights", flat
            yield module.__dict__, "_flat_weight_refs", refs


@contextmanager
def _in_place(places: list[Place]) -> Iterator[None]:
    held = [(where, key, where[key]) for where, key, _ in places]
    try:
        _put(places)
        yield
    finally:
        try:
            _put(held)
        except BaseException:  # an interrupt
            _put(held)
            raise


def _put(places: list[Place]) -> None:
    for where, key, value in places:
        where[key] = value


def _weights(shadow: ShadowSet, param: Tensor) -> Tensor:
    _check_plain(param)
    slot = shadow.find(param)
    if slot is not None:
        _check_slot(param, slot)
    if slot is None or not slot.age:
        return param.detach() if param.requires_grad else param
    return slot.ema if slot.ema.dtype == param.dtype else slot.ema.to(param.dtype)


def _copy(shadow: ShadowSet, buffer: Tensor) -> Tensor:
    value = shadow.ema_of(buffer)
    return value.to(device=buffer.device, dtype=buffer.dtype, copy=True)


def _check_plain(param: Tensor) -> None:
    if is_sharded(param):
        raise RuntimeError(_REFUSED["sharded"])


def _check_slot(param: Tensor, slot: Slot) -> None:
    narrower = slot.ema.dtype != param.dtype and slot.ema.itemsize <= param.itemsize
    if slot.low is not None or narrower:
        raise RuntimeError(_REFUSED["format"])
    if is_quantized(param):
        raise RuntimeError(_REFUSED["quantized"])
    if slot.host or slot.ema.device != param.device:
        raise RuntimeError(_REFUSED["device"])


_SWAP = "take the forward inside swap_ema_weights(), under torch.no_grad()"
_REFUSED = {
    "sharded": "a live teacher needs whole weights, got weights that are sharded (FSDP2), which "
    f"gather their own at every forward: {_SWAP} and before the student's forward",
    "scripted": "a live teacher needs a module of Python, got a torch.jit.ScriptModule, whose "
    "weights cannot be stood in for: load get_ema_state() into a second one",
    "format": "a live teacher needs EMA tensors that are weights as they are, got a narrow storage "
    f"format: leave dtype out (or torch.float32), or {_SWAP}",
    "quantized": "a live teacher needs weights of floats, got quantized ones, into which an EMA is "
    f"rounded by a swap alone: {_SWAP}",
    "device": "a live teacher needs the EMA on the device of the weights, got it elsewhere: leave "
    f"device out; after model.to(...) the EMA follows at the next update; or {_SWAP}",
}
