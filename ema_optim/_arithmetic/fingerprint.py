"""One text for the bits of many tensors, whatever their order, strides and device."""

import functools
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_MASK = 2**64 - 1


def fingerprint(tensors: Sequence[Tensor]) -> str:
    """The sum of the bits by dtype, as ``float32*4:0123456789abcdef``.

    Before the colon the dtype and the number of tensors. Every tensor is summed up as integers of
    its own width, which costs no memory, with one read of the host for each device and width.
    """
    sums: dict[object, list[tuple[Tensor, Tensor]]] = {}
    for tensor in tensors:
        bits = _bits(tensor.detach())
        total = bits.sum(dtype=bits.dtype)  # not int64: the CPU would cast a copy first
        sums.setdefault((total.device, total.dtype), []).append((tensor, total))
    mixed: Counter[str] = Counter()
    for pairs in sums.values():
        totals = torch.stack([total for _, total in pairs]).tolist()
        for (tensor, _), total in zip(pairs, totals, strict=True):
            mixed[_name(tensor)] += _mix(total * 0x9E3779B97F4A7C15 + tensor.numel())
    counts = Counter(map(_name, tensors))
    return "+".join(f"{name}*{counts[name]}:{mixed[name] & _MASK:016x}" for name in sorted(counts))


def kinds(text: str) -> set[str]:
    """The dtypes and numbers of tensors that a fingerprint is of."""
    return {part.partition(":")[0] for part in text.split("+") if part}


def kinds_of(tensors: Sequence[Tensor]) -> set[str]:
    """The same of tensors whose fingerprint is not known."""
    return {f"{name}*{count}" for name, count in Counter(map(_name, tensors)).items()}


def _name(tensor: Tensor) -> str:
    return _names(tensor.dtype)


@functools.cache
def _names(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _bits(tensor: Tensor) -> Tensor:
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    return tensor.view(_INTEGERS[tensor.itemsize])


def _mix(number: int) -> int:
    # The finaliser of splitmix64: two tensors that have changed places give another sum.
    number &= _MASK
    number = (number ^ number >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    number = (number ^ number >> 27) * 0x94D049BB133111EB & _MASK
    return number ^ number >> 31
