"""Storage formats of the EMA, narrower or more exact than fp32: their arithmetic on lists.

A tensor is kept as one or two plain tensors of its own shape, so that saving and sharding need
nothing special: ``main``, which can be used as it is, and for two formats ``low``, the rest.

    format                  main     low    bytes
    float32_compensated     fp32     bf16   6      Kahan remainder: nothing is lost at any decay
    float24                 bf16     int8   3      fp32 without its last 8 bits
    torch.bfloat16          bf16            2

The last two are rounded stochastically (M. Croci et al., "Stochastic rounding", 2022): up or down
by chance, right on average. Rounded to nearest they would stop moving: a step of the EMA is
``1 - decay`` of its distance to the weights, soon less than half of the last bit.

Every function takes lists of tensors of one device and format, expects to run without autograd and
needs at most 4 MiB of scratch. The dtypes tell the format; where they are those of a plain fp32 or
fp64 EMA, it is updated as one.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .average import copy_, ema_update_
from .noise import Noise
from .scratch import CHUNK, batches_of, columns

EMADtype = torch.dtype | Literal["float32_compensated", "float24"] | None


@dataclass(frozen=True)
class Format:
    """The dtypes of a format's two tensors; ``low`` is None where one tensor is all."""

    main: torch.dtype
    low: torch.dtype | None = None

    @property
    def rounds(self) -> bool:
        """Whether an update is more than the plain one of its main tensor."""
        return self.low is not None or self.main == torch.bfloat16


FORMATS: dict[EMADtype, Format] = {
    "float32_compensated": Format(torch.float32, torch.bfloat16),
    "float24": Format(torch.bfloat16, torch.int8),
    torch.bfloat16: Format(torch.bfloat16),
}


def encode_(mains: list[Tensor], lows: list[Tensor], values: list[Tensor]) -> None:
    """Store values, rounded to nearest: for a birth or a load, never for a step of the EMA.

    Args:
        mains: Main tensors, written in place.
        lows: Low-order tensors, written in place; empty for a format that has none.
        values: Real tensors of the same shapes, of one dtype.
    """
    if not mains:
        return
    if mains[0].dtype == torch.bfloat16 and lows:
        _store_float24_(mains, lows, values)
        return
    copy_(mains, values)
    if lows:
        _store_remainders_(mains, lows, values)


def decode_(targets: list[Tensor], mains: list[Tensor], lows: list[Tensor]) -> None:
    """Write the stored values into targets of any one float dtype, exactly where that is wide.

    Args:
        targets: Tensors of the same shapes, written in place. fp32 holds ``float24`` exactly and
            of ``float32_compensated`` the main tensor; fp64 holds all of both.
        mains: Main tensors.
        lows: Low-order tensors; empty for a format that has none.
    """
    if not mains:
        return
    if mains[0].dtype == torch.bfloat16 and lows:
        values, spare = _scratch(mains, 2)
        for mains_, lows_, targets_ in _batched(mains, lows, targets):
            _scatter_(targets_, _join(values, spare, mains_, lows_))
        return
    copy_(targets, mains)
    if lows and targets[0].dtype == torch.float64:
        _add_remainders_(targets, lows)


def update_(
    mains: list[Tensor],
    lows: list[Tensor],
    params: list[Tensor],
    decay: float,
    stream: int,
    starts: Sequence[int],
) -> None:
    """Move every EMA towards its weights: ``ema <- decay * ema + (1 - decay) * weights``.

    The arithmetic is fp32, ``lerp(ema, weights, 1 - decay)`` with ``1 - decay`` in double
    precision. A decay of 0.0 stores the weights, rounded to nearest; 1.0 leaves all as it is.

    Args:
        mains: Main tensors, changed in place.
        lows: Low-order tensors, changed in place; empty for a format that has none.
        params: Weights, same shapes, of one real dtype.
        decay: The share of the old EMA that is kept, in [0, 1].
        stream: The number of this update. It decides, with ``starts``, every random bit: an update
            repeated with the same number gives the same bits, another number others.
        starts: For each tensor the position of its first element when all elements of the model
            are numbered through; for a shard, that of the shard's first element. Elements are
            counted in the order in which they lie in the memory of ``main``.
    """
    if not mains or decay == 1.0:
        return
    if decay == 0.0:
        encode_(mains, lows, params)
    elif mains[0].dtype != torch.bfloat16 and not lows:
        ema_update_(mains, params, decay)
    elif mains[0].dtype == torch.bfloat16:
        noise = _noise(mains, 8 if lows else 16, stream, starts)
        _update_rounded_([mains, lows] if lows else [mains], params, 1.0 - decay, noise)
    else:
        _update_compensated_(mains, lows, params, 1.0 - decay)


def _update_compensated_(
    mains: list[Tensor], lows: list[Tensor], params: list[Tensor], weight: float
) -> None:
    """W. Kahan 1965: ``y = w (p - e) + c; s = e + y; c = y - (s - e); e = s``."""
    scratch = _scratch(mains, 3)
    for batch in _batched(mains, lows, params):
        ema, rest, step = map(_gather, scratch, batch)
        rest.add_(step.sub_(ema), alpha=weight)
        total = torch.add(ema, rest, out=step)
        rest.add_(ema.sub_(total))
        _scatter_(batch[0], total)
        _scatter_(batch[1], rest)


def _update_rounded_(
    parts: list[list[Tensor]], params: list[Tensor], weight: float, noise: Noise
) -> None:
    values, spare = _scratch(params, 2)
    for *stored, params_ in _batched(*parts, params):
        ema = _join(values, spare, *stored)
        weights = _gather(spare, params_)
        integers = weights.view(torch.int32)
        bits = _patterns(ema.lerp_(weights, weight))
        noise.fill_(integers)
        _split_(bits.add_(integers), integers, *stored)


def _join(
    values: Tensor, spare: Tensor, mains: list[Tensor], lows: list[Tensor] | None = None
) -> Tensor:
    """The fp32 values of a batch, in scratch."""
    ema = _gather(values, mains)
    if lows:
        ema.view(torch.int32).add_(_gather(spare.view(torch.int32), lows), alpha=1 << 8)
    return ema


def _split_(
    bits: Tensor, spare: Tensor, mains: list[Tensor], lows: list[Tensor] | None = None
) -> None:
    """Store fp32 patterns without their last 8 bits, or without their last 16."""
    if lows:
        _scatter_(lows, torch.bitwise_right_shift(bits, 8, out=spare))
        # To the nearest bf16, not truncated: main has no bias, and the rest fits in an int8.
        bits.add_(1 << 15)
    _scatter_(mains, bits.bitwise_and_(-1 << 16).view(torch.float32))


def _patterns(values: Tensor) -> Tensor:
    """The bits of fp32 values, such that an integer may be added to those that are cut off."""
    # Some NaNs would become an infinity or, past the highest pattern, -0.0; the plain one does not.
    return values.nan_to_num_(math.nan, math.inf, -math.inf).view(torch.int32)


def _store_float24_(mains: list[Tensor], lows: list[Tensor], values: list[Tensor]) -> None:
    scratch, spare = _scratch(mains, 2)
    for mains_, lows_, values_ in _batched(mains, lows, values):
        bits = _patterns(_gather(scratch, values_))
        odd = torch.bitwise_right_shift(bits, 8, out=spare.view(torch.int32)[: len(bits)])
        # Half of the last bit that is kept: a tie goes to the even pattern.
        bits.add_(odd.bitwise_and_(1)).add_(0x7F)
        _split_(bits, odd, mains_, lows_)


def _store_remainders_(mains: list[Tensor], lows: list[Tensor], values: list[Tensor]) -> None:
    exact, wide = _scratch(mains, 2, torch.float64)
    for mains_, lows_, values_ in _batched(mains, lows, values):
        rests = _gather(exact, values_).sub_(_gather(wide, mains_))
        # An infinite EMA has no remainder, and inf - inf would make it a NaN.
        _scatter_(lows_, rests.nan_to_num_(0.0, 0.0, 0.0))


def _add_remainders_(targets: list[Tensor], lows: list[Tensor]) -> None:
    (wide,) = _scratch(targets, 1, torch.float64)
    for targets_, lows_ in _batched(targets, lows):
        rests = _gather(wide, lows_).nan_to_num_(0.0, 0.0, 0.0)
        torch._foreach_add_(targets_, _cut(rests, targets_))


def _noise(mains: list[Tensor], bits: int, stream: int, starts: Sequence[int]) -> Noise:
    sizes = [main.numel() for main in mains]
    return Noise(bits, stream, starts, sizes, min(CHUNK, sum(sizes)), mains[0].device)


def _scratch(
    tensors: list[Tensor], count: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, ...]:
    size = min(CHUNK, sum(tensor.numel() for tensor in tensors))
    return torch.empty(count, size, dtype=dtype, device=tensors[0].device).unbind()


def _gather(scratch: Tensor, tensors: list[Tensor]) -> Tensor:
    """A batch, flat and in the dtype of the scratch buffer."""
    flat = scratch[: sum(map(Tensor.numel, tensors))]
    torch._foreach_copy_(_cut(flat, tensors), tensors)
    return flat


def _scatter_(tensors: list[Tensor], flat: Tensor) -> None:
    torch._foreach_copy_(tensors, _cut(flat, tensors))


def _cut(flat: Tensor, tensors: list[Tensor]) -> list[Tensor]:
    pieces = torch.split(flat, list(map(Tensor.numel, tensors)))
    return [p if t.dim() == 1 else p.view(t.shape) for p, t in zip(pieces, tensors, strict=True)]


def _batched(mains: list[Tensor], *others: list[Tensor]) -> Iterator[list[list[Tensor]]]:
    rows = zip(mains, *others, strict=True)
    return map(columns, batches_of(map(_in_memory_order, rows)))


def _in_memory_order(row: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Views whose logical order is the order of the first one in memory, flat where they can be."""
    first = row[0]
    if not first.is_contiguous():
        order = sorted(range(first.dim()), key=first.stride, reverse=True)
        row = tuple(tensor.permute(order) for tensor in row)
    if first.dim() != 1 and all(map(Tensor.is_contiguous, row)):
        row = tuple(tensor.view(-1) for tensor in row)
    return row
