"""Slots in their storage formats: how values get in and out."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from .._arithmetic.formats import Format, format_of
from .._engines.quantized import check_quantized, dense, dense_like, is_quantized, write_
from .._engines.sharding import local, locals_of, part_for
from .slots import Slot, place_of

Parts = tuple[Tensor, Tensor | None]


def stored(param: Tensor, value: Tensor, format: Format) -> Parts:
    """``value`` as the EMA of ``param`` is kept: its format, device, strides, part of this rank."""
    main, low = _empty(param, format)
    lows = [] if low is None else [local(low)]
    format.encode_([local(main)], lows, [part_for(param, dense(value.detach()))])
    return main, low


def restored(param: Tensor, parts: Parts, format: Format) -> Parts:
    """What a checkpoint holds, as the EMA of ``param`` is kept: bit for bit in the same format."""
    check_quantized(param, local(param))
    parts = main, low = dense(parts[0]), parts[1]
    if format_of(main.dtype, None if low is None else low.dtype) != format:
        # The remainder of an fp32 tensor needs more digits than fp32 has.
        exact = main if low is None else _decoded(main, low, torch.float64)
        return stored(param, exact, format)
    kept = _empty(param, format)
    for target, source in zip(kept, parts, strict=True):
        if target is not None and source is not None:
            local(target).copy_(part_for(param, source.detach()))
    return kept


def value_of(main: Tensor, low: Tensor | None) -> Tensor:
    """The EMA weights in one tensor, as a swap shows them; the main tensor where that is all."""
    return main if low is None else _decoded(main, low, torch.float32)


def _decoded(main: Tensor, low: Tensor, dtype: torch.dtype) -> Tensor:
    value = torch.empty_like(main, dtype=dtype)
    format_of(main.dtype, low.dtype).decode_([local(value)], [local(main)], [local(low)])
    return value


def read_(targets: Iterable[Tensor], slots: Sequence[Slot]) -> None:
    """Copy the EMA of each slot into a tensor of any float dtype, to nearest or as ``write_``."""
    groups: dict[object, tuple[list[Tensor], list[Slot]]] = {}
    for target, slot in zip(targets, slots, strict=True):
        if is_quantized(target):
            write_(target, value_of(slot.ema, slot.low))
            continue
        key = (place_of(target), place_of(slot.ema), slot.format)
        kept = groups.setdefault(key, ([], []))
        kept[0].append(local(target))
        kept[1].append(slot)
    for whole, members in groups.values():
        lows = [local(slot.low) for slot in members if slot.low is not None]
        members[0].format.decode_(whole, locals_of(slot.ema for slot in members), lows)


def _empty(param: Tensor, format: Format) -> Parts:
    main = dense_like(param, format.main)
    return main, None if format.low is None else dense_like(param, format.low)
