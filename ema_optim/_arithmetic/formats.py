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

A format carries its own arithmetic: how values get in, how they get out, and an update. All of it
takes lists of tensors of one device and format, expects to run without autograd and needs at most
4 MiB of scratch on a CPU (64 MiB elsewhere). A new format is a subclass and a row of ``FORMATS``.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from .average import Casts, copy_, ema_update_
from .noise import Noise, Words
from .scratch import batches_of, buffers, carve, columns, in_memory_order, needed_size

EMADtype = torch.dtype | Literal["float32_compensated", "float24"] | None
Tensors = list[Tensor]


class Update(NamedTuple):
    """Which update of the EMA it is.

    Attributes:
        decay: The share of the old EMA that is kept, in [0, 1].
        stream: The number of this update. It decides, with ``starts``, every random bit: an update
            repeated with the same number gives the same bits, another number others.
        starts: For each tensor the position of its first element when all elements of the model are
            numbered through; for a shard, that of the shard's first element. Elements are counted
            in the order in which they lie in the memory of the main one.
        casts: Room for weights of another dtype, as ``ema_update_`` takes it.
        words: Room for the random bits, to be used again.
    """

    decay: float
    stream: int
    starts: Sequence[int]
    casts: Casts | None = None
    words: Words | None = None

    @property
    def weight(self) -> float:
        """The share of the weights."""
        return 1.0 - self.decay

    def noise(self, mains: Tensors, bits: int) -> Noise:
        """The random bits of this update."""
        sizes = [main.numel() for main in mains]
        room, words = needed_size(mains, narrow=True), self.words or Words()
        return Noise(bits, self.stream, self.starts, sizes, room, mains[0].device, words)


@dataclass(frozen=True)
class Format:
    """A plain EMA tensor of one dtype, and what the others are derived from.

    Attributes:
        main: The dtype of the main tensor.
        low: The dtype of the low-order tensor; None where one tensor is all.
    """

    main: torch.dtype
    low: torch.dtype | None = None
    # Whether an update is more than the plain one of the main tensor.
    rounds: ClassVar[bool] = False

    def encode_(self, mains: Tensors, lows: Tensors, values: Tensors) -> None:
        """Store values, rounded to nearest: for a birth or a load, never for a step of the EMA.

        Args:
            mains: Main tensors, written in place.
            lows: Low-order tensors, written in place; empty for a format that has none.
            values: Real tensors of the same shapes, of one dtype.
        """
        copy_(mains, values)

    def decode_(self, targets: Tensors, mains: Tensors, lows: Tensors) -> None:
        """Write the stored values into targets of any one float dtype, exactly where it is wide.

        Args:
            targets: Tensors of the same shapes, written in place. fp32 holds ``float24`` exactly
                and of ``float32_compensated`` the main tensor; fp64 holds all of both.
            mains: Main tensors.
            lows: Low-order tensors; empty for a format that has none.
        """
        copy_(targets, mains)

    def update_(self, mains: Tensors, lows: Tensors, params: Tensors, update: Update) -> None:
        """Move every EMA towards its weights: ``ema <- decay * ema + (1 - decay) * weights``.

        The arithmetic of the formats that round is fp32, ``lerp(ema, weights, 1 - decay)`` with
        ``1 - decay`` in double precision. A decay of 0.0 stores the weights, rounded to nearest;
        1.0 leaves all as it is.

        Args:
            mains: Main tensors, changed in place.
            lows: Low-order tensors, changed in place; empty for a format that has none.
            params: Weights, same shapes, of one dtype.
            update: Which update it is.
        """
        ema_update_(mains, params, update.decay, update.casts)


class _Rounding(Format):
    """A format whose update is its own."""

    rounds = True

    def update_(self, mains: Tensors, lows: Tensors, params: Tensors, update: Update) -> None:
        """As ``Format.update_``."""
        if not params or update.decay == 1.0:
            return
        if update.decay == 0.0:
            self.encode_(mains, lows, params)
        else:
            self._average_(mains, lows, params, update)

    def _average_(self, mains: Tensors, lows: Tensors, params: Tensors, update: Update) -> None:
        raise NotImplementedError


class Compensated(_Rounding):
    """``float32_compensated``: the low tensor is what rounding has left out of the main one."""

    def encode_(self, mains: Tensors, lows: Tensors, values: Tensors) -> None:
        """As ``Format.encode_``."""
        if not mains:
            return
        copy_(mains, values)
        exact, wide = buffers(mains, 2, torch.float64)
        for mains_, lows_, values_ in _batched(mains, lows, values):
            rests = _gather(exact, values_).sub_(_gather(wide, mains_))
            # An infinite EMA has no remainder, and inf - inf would make it a NaN.
            _scatter_(lows_, rests.nan_to_num_(0.0, 0.0, 0.0))

    def decode_(self, targets: Tensors, mains: Tensors, lows: Tensors) -> None:
        """As ``Format.decode_``."""
        copy_(targets, mains)
        if not targets or targets[0].dtype != torch.float64:
            return
        (wide,) = buffers(targets, 1, torch.float64)
        for targets_, lows_ in _batched(targets, lows):
            rests = _gather(wide, lows_).nan_to_num_(0.0, 0.0, 0.0)
            torch._foreach_add_(targets_, carve(rests, targets_))

    def _average_(self, mains: Tensors, lows: Tensors, params: Tensors, update: Update) -> None:
        # W. Kahan 1965: y = w (p - e) + c; s = e + y; c = y - (s - e); e = s
        scratch = buffers(mains, 3)
        for batch in _batched(mains, lows, params):
            ema, rest, step = map(_gather, scratch, batch)
            rest.add_(step.sub_(ema), alpha=update.weight)
            total = torch.add(ema, rest, out=step)
            rest.add_(ema.sub_(total))
            _scatter_(batch[0], total)
            _scatter_(batch[1], rest)


class Float24(_Rounding):
    """``float24``: the upper 24 bits of fp32, as the nearest bfloat16 and an int8."""

    def encode_(self, mains: Tensors, lows: Tensors, values: Tensors) -> None:
        """As ``Format.encode_``."""
        if not mains:
            return
        scratch, spare = buffers(mains, 2)
        for mains_, lows_, values_ in _batched(mains, lows, values):
            bits = _patterns(_gather(scratch, values_))
            odd = torch.bitwise_right_shift(bits, 8, out=spare.view(torch.int32)[: len(bits)])
            # Half of the last bit that is kept: a tie goes to the even pattern.
            bits.add_(odd.bitwise_and_(1)).add_(0x7F)
            _split24_(bits, odd, mains_, lows_)

    def decode_(self, targets: Tensors, mains: Tensors, lows: Tensors) -> None:
        """As ``Format.decode_``."""
        if not mains:
            return
        if targets[0].dtype == self.main:
            copy_(targets, mains)  # what an exchange shows: rounded once, ties too
            return
        values, spare = buffers(mains, 2)
        for mains_, lows_, targets_ in _batched(mains, lows, targets):
            _scatter_(targets_, _join24(values, spare, mains_, lows_))

    def _average_(self, mains: Tensors, lows: Tensors, params: Tensors, update: Update) -> None:
        noise, (values, spare) = update.noise(mains, 8), buffers(params, 2)
        for mains_, lows_, params_ in _batched(mains, lows, params):
            ema = _join24(values, spare, mains_, lows_)
            bits, rest = _rounded(ema, _gather(spare, params_), update.weight, noise)
            _split24_(bits, rest, mains_, lows_)


class BFloat16(_Rounding):
    """bfloat16: the upper 16 bits of fp32."""

    def _average_(self, mains: Tensors, lows: Tensors, params: Tensors, update: Update) -> None:
        noise, (values, spare) = update.noise(mains, 16), buffers(params, 2)
        for mains_, params_ in _batched(mains, params):
            ema = _gather(values, mains_)
            bits, _ = _rounded(ema, _gather(spare, params_), update.weight, noise)
            _scatter_(mains_, _upper_half(bits))


FORMATS: dict[EMADtype, Format] = {
    "float32_compensated": Compensated(torch.float32, torch.bfloat16),
    "float24": Float24(torch.bfloat16, torch.int8),
    torch.bfloat16: BFloat16(torch.bfloat16),
}


@cache
def format_of(main: torch.dtype, low: torch.dtype | None = None) -> Format:
    """The format of tensors of these dtypes."""
    known = (f for f in FORMATS.values() if (f.main, f.low) == (main, low))
    return next(known, Format(main, low))


def _rounded(ema: Tensor, weights: Tensor, weight: float, noise: Noise) -> tuple[Tensor, Tensor]:
    """The patterns of the new EMA with noise in the bits to be cut off, and the spare buffer."""
    integers = weights.view(torch.int32)
    bits = _patterns(ema.lerp_(weights, weight))
    noise.fill_(integers)
    return bits.add_(integers), integers


def _join24(values: Tensor, spare: Tensor, mains: Tensors, lows: Tensors) -> Tensor:
    """The fp32 values of a batch, in scratch."""
    ema = _gather(values, mains)
    ema.view(torch.int32).add_(_gather(spare.view(torch.int32), lows), alpha=1 << 8)
    return ema


def _split24_(bits: Tensor, spare: Tensor, mains: Tensors, lows: Tensors) -> None:
    """Store fp32 patterns without their last 8 bits."""
    _scatter_(lows, torch.bitwise_right_shift(bits, 8, out=spare))
    # To the nearest bf16, not truncated: main has no bias, and the rest fits in an int8.
    _scatter_(mains, _upper_half(bits.add_(1 << 15)))


def _upper_half(bits: Tensor) -> Tensor:
    return bits.bitwise_and_(-1 << 16).view(torch.float32)


def _patterns(values: Tensor) -> Tensor:
    """The bits of fp32 values, such that an integer may be added to those that are cut off."""
    # Some NaNs would become an infinity or, past the highest pattern, -0.0; the plain one does not.
    return values.nan_to_num_(math.nan, math.inf, -math.inf).view(torch.int32)


def _gather(scratch: Tensor, tensors: Tensors) -> Tensor:
    """A batch, flat and in the dtype of the scratch buffer."""
    flat = scratch[: sum(map(Tensor.numel, tensors))]
    torch._foreach_copy_(carve(flat, tensors), tensors)
    return flat


def _scatter_(tensors: Tensors, flat: Tensor) -> None:
    torch._foreach_copy_(tensors, carve(flat, tensors))


def _batched(mains: Tensors, *others: Tensors) -> Iterator[list[Tensors]]:
    rows = zip(mains, *others, strict=True)
    return map(columns, batches_of(map(in_memory_order, rows), narrow=True))
