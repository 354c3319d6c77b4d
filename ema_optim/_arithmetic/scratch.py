"""Bounded scratch: tensors cut and grouped so that one small buffer serves a model of any size."""

import random
from collections.abc import Iterable, Iterator, Sequence
from operator import attrgetter

import torch
from torch import Tensor

# Elements in one scratch buffer. On a CPU 1 MiB of fp32 stays in a core's L2 cache, and smaller
# pieces pay more in dispatch than they gain in locality.
CHUNK = 256 * 1024
# Elsewhere every piece is a launch. 64 MiB of fp32; the narrow formats need several buffers.
WIDE, NARROW = 16 * 2**20, 4 * 2**20

# A sample of a tensor: one in so many blocks of so many elements, a memory page of fp32.
_EVERY, _BLOCK, _SAMPLED_FROM = 16, 1024, 64 * 1024

Batch = list[tuple[Tensor, ...]]


# What tensors of one multi-tensor call have in common.
place = attrgetter("device", "dtype")


def by_place(items: dict[int, Tensor]) -> list[dict[int, Tensor]]:
    """Part numbered tensors by device and dtype."""
    groups: dict[tuple[torch.device, torch.dtype], dict[int, Tensor]] = {}
    for key, tensor in items.items():
        groups.setdefault(place(tensor), {})[key] = tensor
    return list(groups.values())


def scratch_size(device: torch.device, narrow: bool = False) -> int:
    """The most elements that a scratch buffer on a device holds.

    Args:
        device: The device.
        narrow: Whether it is for a narrow format.
    """
    if device.type == "cpu":
        return CHUNK
    return NARROW if narrow else WIDE


def is_kept(device: torch.device) -> bool:
    """Whether a scratch buffer on a device is small enough to be kept between updates."""
    return scratch_size(device) == CHUNK


def needed_size(tensors: Iterable[Tensor], narrow: bool = False) -> int:
    """The elements of a buffer for batches of tensors of one device, which may be few."""
    tensors = list(tensors)
    total = sum(map(Tensor.numel, tensors))
    return min(scratch_size(tensors[0].device, narrow), total) if tensors else 0


def scratch_for(tensor: Tensor, size: int) -> Tensor:
    """A buffer of elements like those of ``tensor``."""
    return torch.empty(size, dtype=tensor.dtype, device=tensor.device)


def buffers(
    tensors: list[Tensor], count: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, ...]:
    """Flat buffers for batches of the tensors of a narrow format."""
    size = needed_size(tensors, narrow=True)
    return torch.empty(count, size, dtype=dtype, device=tensors[0].device).unbind()


def carve(scratch: Tensor, tensors: list[Tensor]) -> list[Tensor]:
    """Views into the scratch buffer, one for each tensor and of its shape."""
    size = sum(tensor.numel() for tensor in tensors)
    # One call into C++ for all; none of the tensors may be empty.
    views = torch._utils._unflatten_dense_tensors(scratch[:size], tensors)  # type: ignore[no-untyped-call]
    return list(views)


def columns(batch: Batch) -> list[list[Tensor]]:
    """The tensors of a batch by their place in its tuples."""
    return [list(column) for column in zip(*batch, strict=True)]


def fill(items: Iterable[tuple[int, Tensor]]) -> Iterator[list[tuple[int, Tensor]]]:
    """Group numbered tensors of one device, none of more than ``CHUNK``, until they fill one."""
    group: list[tuple[int, Tensor]] = []
    room = 0
    for item in items:
        if item[1].numel() > room:
            if group:
                yield group
            group, room = [], scratch_size(item[1].device)
        group.append(item)
        room -= item[1].numel()
    if group:
        yield group


def batches_of(pairs: Iterable[tuple[Tensor, ...]], narrow: bool = False) -> Iterator[Batch]:
    """Group pieces until they fill a scratch buffer; a batch has one device and dtype.

    Empty tensors are left out.
    """
    batch: Batch = []
    room, kind = 0, None
    for pair in pairs:
        for piece in [pair] if pair[0].numel() <= CHUNK else pieces_of(pair, narrow):
            size = piece[0].numel()
            if not size:
                continue
            if batch and (size > room or place(piece[0]) != kind):
                yield batch
                batch = []
            if not batch:
                kind, room = place(piece[0]), scratch_size(piece[0].device, narrow)
            batch.append(piece)
            room -= size
    if batch:
        yield batch


def pieces_of(tensors: tuple[Tensor, ...], narrow: bool = False) -> Sequence[tuple[Tensor, ...]]:
    """Cut tensors of one shape into aligned views that fit in a scratch buffer."""
    size = tensors[0].numel()
    if size <= CHUNK or size <= (limit := scratch_size(tensors[0].device, narrow)):
        return [tensors]
    return list(_cut(tensors, limit))


def _cut(tensors: tuple[Tensor, ...], limit: int) -> Iterator[tuple[Tensor, ...]]:
    first = tensors[0]
    if first.numel() <= limit:
        yield tensors
        return
    ordered = permuted(tensors)
    if all(tensor.is_contiguous() for tensor in ordered):
        yield from zip(*(torch.split(t.view(-1), limit) for t in ordered), strict=True)
        return
    row = first.numel() // first.shape[0]
    cuts = (torch.split(t, limit // row) if row <= limit else t.unbind() for t in tensors)
    for rows in zip(*cuts, strict=True):
        yield from _cut(rows, limit)


def permuted(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Views whose logical order is the order of the first one in memory."""
    first = tensors[0]
    order = sorted(range(first.dim()), key=first.stride, reverse=True)
    return tuple(tensor.permute(order) for tensor in tensors)


def in_memory_order(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """``permuted``, and flat where the views can be."""
    first = tensors[0]
    if not first.is_contiguous():
        tensors = permuted(tensors)
    if first.dim() != 1 and all(map(Tensor.is_contiguous, tensors)):
        tensors = tuple(tensor.view(-1) for tensor in tensors)
    return tensors


def sample_of(tensors: tuple[Tensor, ...], seed: int) -> tuple[tuple[Tensor, ...], float]:
    """Aligned copies of every 16th block of tensors of one shape, and what one element stands for.

    Which of them is drawn by ``seed``. Tensors of up to 65,536 elements are returned whole.
    """
    count, whole = tensors[0].numel(), in_memory_order(tensors)
    if count <= _SAMPLED_FROM or whole[0].dim() != 1:
        return tensors, 1.0
    first = random.Random(seed).randrange(_EVERY)
    end = count - count % _BLOCK
    views = tuple(t[:end].view(-1, _BLOCK)[first::_EVERY].contiguous() for t in whole)
    return views, count / views[0].numel()
