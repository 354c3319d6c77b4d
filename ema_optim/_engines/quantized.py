"""Weights that are kept as codes and scales, and trained in that form (torchao's int8 training).

Such a parameter is of a tensor subclass that knows its values by a ``dequantize()`` of its own.
The EMA of one is a plain dense tensor:

    weights   dequantize() -> the average, one parameter at a time
    swap in   copy_(EMA): the subclass rounds, stochastically, what it is given
    parked    a clone of the subclass: codes and scales come back bit for bit

All that the package knows of them is here, and none of the classes is imported.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from .sharding import PLAIN


def is_quantized(tensor: object) -> bool:
    """Whether the values of a tensor are known through a ``dequantize()`` of its class alone."""
    kind = type(tensor)
    if kind in PLAIN:
        return False
    # Every tensor inherits one, for torch's own quantized dtypes; a DTensor too.
    return isinstance(tensor, Tensor) and kind.dequantize is not Tensor.dequantize  # type: ignore[attr-defined]


def dense(tensor: Tensor) -> Tensor:
    """The values as a plain tensor; the tensor itself where it is one."""
    if type(tensor) in PLAIN or not is_quantized(tensor):
        return tensor
    return tensor.detach().dequantize()


def dense_like(param: Tensor, dtype: torch.dtype) -> Tensor:
    """An empty tensor to keep the values of ``param`` in."""
    if is_quantized(param):
        return torch.empty(param.shape, dtype=dtype, device=param.device)
    return torch.empty_like(param, dtype=dtype, requires_grad=False)


def copy_like(param: Tensor, value: Tensor) -> Tensor:
    """A copy of ``value`` in the form of ``param``: exact where it has that form."""
    if is_quantized(param):
        copy = param.detach().clone()
        write_(copy, value)
        return copy
    return torch.empty_like(param, requires_grad=False).copy_(value)


def write_(param: Tensor, value: Tensor) -> None:
    """Copy ``value`` into a parameter in place, rounded as it rounds; exactly in its own form."""
    if not is_quantized(param):
        param.detach().copy_(value)
        return
    with _own_randomness(param.device):
        param.detach().copy_(value)


def apart(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """The plain tensors together, each quantized one alone: dense, they need memory in turn."""
    plain = [tensor for tensor in tensors if not is_quantized(tensor)]
    return [*([plain] if plain else []), *([t] for t in tensors if is_quantized(t))]


def check_quantized(param: Tensor, part: Tensor) -> None:
    """Raise TypeError for quantized weights that could not be averaged, or not put back exactly.

    Args:
        param: A parameter.
        part: What this rank holds of it.
    """
    if type(param) in PLAIN:
        return
    if part is not param and is_quantized(part):
        raise TypeError(
            f"quantized weights must not be spread over ranks, got a DTensor of "
            f"{type(part).__name__}: keep them whole (DDP), or have this group 'ema_enabled': False"
        )
    if is_quantized(param) and (lack := _lack(param)):
        raise TypeError(
            f"quantized weights must be floats by dequantize(), and take by copy_() these as well "
            f"as a clone of theirs exactly, got {type(param).__name__}: {lack}. Have its group "
            "'ema_enabled': False, or freeze it"
        )


def _lack(param: Tensor) -> str | None:
    """What a quantized weight is tried for on a copy, and cannot do."""
    try:
        values, copy = dense(param), param.detach().clone()
        if values.shape != param.shape or not values.is_floating_point():
            return f"dequantize() gives {values.dtype} of shape {tuple(values.shape)}"
        write_(copy, values.float())
        write_(copy, param.detach())
    except Exception as error:  # whatever a class may raise of an operation that it lacks
        return f"{type(error).__name__}: {error}".splitlines()[0]
    # A NaN is no other number than a NaN here.
    exact = torch.equal(dense(copy).nan_to_num(), values.nan_to_num())
    return None if exact and type(copy) is type(param) else "copy_() of a clone changes it"


@contextmanager
def _own_randomness(device: torch.device) -> Iterator[None]:
    """Leave the global generator, that the training draws from too, as it is.

    The bits are always the same inside: a swap repeats itself, on every rank too.
    """
    if device.type == "cpu":
        generator = torch.default_generator
    else:
        generator = torch.get_device_module(device).default_generators[device.index]
    state = generator.get_state()
    try:
        generator.manual_seed(0)
        yield
    finally:
        generator.set_state(state)
