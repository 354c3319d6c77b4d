"""Where tensors lie in memory, as far as a swap has to know."""

from collections.abc import Iterable

from torch import Tensor


def shared_memory(tensors: Iterable[Tensor]) -> set[Tensor]:
    """The tensors whose memory ranges overlap with another's."""
    by_storage: dict[int, list[Tensor]] = {}
    for tensor in tensors:
        if tensor.numel():
            by_storage.setdefault(tensor.untyped_storage().data_ptr(), []).append(tensor)
    shared: set[Tensor] = set()
    for neighbours in by_storage.values():
        neighbours.sort(key=lambda tensor: tensor.storage_offset())
        reach, holder = -1, neighbours[0]
        for tensor in neighbours:
            if tensor.storage_offset() <= reach:
                shared |= {tensor, holder}
            if _last(tensor) > reach:
                reach, holder = _last(tensor), tensor
    return shared


def _last(tensor: Tensor) -> int:
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    return int(tensor.storage_offset()) + sum((size - 1) * stride for size, stride in steps)
