"""Bounded scratch: tensors cut and grouped so that one small buffer serves a model of any size."""

import random
from collections.abc import Iterable, Iterator
from operator import attrgetter

import torch
from torch import Tensor

# Elements in one scratch buffer: 1 MiB of fp32 stays in a core's L2 cache, and smaller pieces pay
# more in dispatch than they gain in locality.
CHUNK = 256 * 1024

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


def scratch_for(tensor: Tensor) -> Tensor:
    """A buffer of ``CHUNK`` elements like those of ``tensor``."""
    return torch.empty(CHUNK, dtype=tensor.dtype, device=tensor.device)


def buffers(
    tensors: list[Tensor], count: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, ...]:
    """Flat buffers for batches of ``tensors``, which may be all of them if they are few."""
    size = min(CHUNK, sum(map(Tensor.numel, tensors)))
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
    """Group numbered tensors, none larger than a scratch buffer, until they fill one."""
    group: list[tuple[int, Tensor]] = []
    room = CHUNK
    for item in items:
        if item[1].numel() > room:
            yield group
            group, room = [], CHUNK
        group.append(item)
        room -= item[1].numel()
    if group:
        yield group


def batches_of(pairs: Iterable[tuple[Tensor, ...]]) -> Iterator[Batch]:
    """Group pieces until they fill a scratch buffer; a batch has one device and dtype.

    Empty tensors are left out.
    """
    batch: Batch = []
    room, kind = CHUNK, None
    for pair in pairs:
        size = pair[0].numel()
        for piece in [pair] if size <= CHUNK else pieces_of(pair):
            size = piece[0].numel()
            if not size:
                continue
            if batch and (size > room or place(piece[0]) != kind):
                yield batch
                batch, room = [], CHUNK
            if not batch:
                kind = place(piece[0])
            batch.append(piece)
            room -= size
    if batch:
        yield batch


def pieces_of(tensors: tuple[Tensor, ...]) -> Iterator[tuple[Tensor, ...]]:
    """Cut tensors of one shape into aligned views of at most ``CHUNK`` elements."""
    first = tensors[0]
    if first.numel() <= CHUNK:
        yield tensors
        return
    ordered = permuted(tensors)
    if all(tensor.is_contiguous() for tensor in ordered):
        yield from zip(*(torch.split(t.view(-1), CHUNK) for t in ordered), strict=True)
        return
    row = first.numel() // first.shape[0]
    cuts = (torch.split(t, CHUNK // row) if row <= CHUNK else t.unbind() for t in tensors)
    for rows in zip(*cuts, strict=True):
        yield from pieces_of(rows)


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
