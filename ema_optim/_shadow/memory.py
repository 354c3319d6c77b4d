"""Where tensors lie in memory, as far as a swap has to know."""

from collections.abc import Iterable

import torch
from torch import Tensor

from .._engines.quantized import is_quantized
from .._engines.sharding import PLAIN, locals_of


def shared_memory(tensors: Iterable[Tensor]) -> set[Tensor]:
    """The tensors whose memory ranges overlap with another's."""
    # Quantized weights have no address, and are never exchanged.
    dense = [t for t in tensors if type(t) in PLAIN or not is_quantized(t)]
    by_device: dict[torch.device, list[tuple[int, int, Tensor]]] = {}
    for tensor, part in zip(dense, locals_of(dense), strict=True):
        if part.numel():
            by_device.setdefault(tensor.device, []).append((*_bytes(part), tensor))
    shared: set[Tensor] = set()
    for spans in by_device.values():
        spans.sort(key=lambda span: span[0])
        reach, holder = -1, spans[0][2]
        for first, last, tensor in spans:
            if first <= reach:
                shared |= {tensor, holder}
            if last > reach:
                reach, holder = last, tensor
    return shared


def _bytes(tensor: Tensor) -> tuple[int, int]:
    """Addresses of a tensor's first and last byte."""
    if tensor.is_contiguous():
        extent = tensor.numel()
    else:
        steps = zip(tensor.shape, tensor.stride(), strict=True)
        extent = 1 + sum((size - 1) * stride for size, stride in steps)
    first = tensor.data_ptr()
    return first, first + int(extent) * tensor.element_size() - 1
