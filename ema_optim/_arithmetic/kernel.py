"""The update of every storage format in one kernel, for accelerators that Triton compiles for.

    ema <- lerp(ema, weights, 1 - decay), stored as the format stores it

One launch serves tensors of any number and size: a table in device memory says where each row of
elements lies. What changes from step to step (the rate, the number of the update, whether it is
held) is read from memory, so that no value of the device is waited for. The arithmetic and the
random bits are those of ``formats`` and ``noise``, element for element.

Imported by ``fused`` alone, where there is such a device: ``import triton`` takes a second.
"""

import triton
import triton.language as tl
from torch import Tensor

ROW = 16384  # elements of one program; the table takes 48 bytes for each
_STEP = 2048  # elements at a time: two 16-byte accesses of fp32 for each thread
_WARPS = 8


def launch(table: Tensor, numbers: tuple[Tensor, ...], kinds: tuple[int | str, ...]) -> None:
    """Update every element of a table.

    Args:
        table: int64, for each program the addresses of main, low, weights and "met", the position
            of the first element, and the number of elements, at most ``ROW``.
        numbers: ``1 - decay`` (float64), the number of the update (int64), what is not 0 where the
            update is to be held back (float32); each of one element.
        kinds: The format, the weights' dtype, whether all addresses are divisible by 16, and
            whether elements whose weight is not finite keep their EMA; "met", of one byte, is set
            to 1 then.
    """
    form, weights, aligned, skip = kinds
    update[(len(table),)](
        table,
        *numbers,
        FORMAT=form,
        WEIGHTS=getattr(tl, str(weights)),
        ALIGNED=bool(aligned),
        SKIP=bool(skip),
        SIZE=ROW,
        STEP=_STEP,
        num_warps=_WARPS,
        enable_fp_fusion=False,  # where one rounding is meant, fma says so
    )


@triton.jit
def update(
    table,
    rate_at,
    stream_at,
    held_at,
    FORMAT: tl.constexpr,
    WEIGHTS: tl.constexpr,
    ALIGNED: tl.constexpr,
    SKIP: tl.constexpr,
    SIZE: tl.constexpr,
    STEP: tl.constexpr,
):
    if tl.load(held_at) == 0.0:  # a NaN holds too
        row = table + tl.program_id(0).to(tl.int64) * 6
        first, size = tl.load(row + 4), tl.load(row + 5).to(tl.int32)
        rate = tl.load(rate_at).to(tl.float32)
        key = _mix64(tl.load(stream_at).to(tl.uint64))
        weights = _pointer(tl.load(row + 2), WEIGHTS, ALIGNED)
        # Rows that are full, nearly all, are read and written in wide accesses: no mask.
        if size == SIZE:
            for begin in range(0, SIZE, STEP):
                at = begin + tl.arange(0, STEP)
                _elements(row, at, None, weights, first, rate, key, FORMAT, ALIGNED, SKIP)
        else:
            for begin in range(0, size, STEP):
                at = begin + tl.arange(0, STEP)
                mask = at < size
                _elements(row, at, mask, weights, first, rate, key, FORMAT, ALIGNED, SKIP)


@triton.jit
def _elements(
    row,
    at,
    mask,
    weights,
    first,
    rate,
    key,
    FORMAT: tl.constexpr,
    ALIGNED: tl.constexpr,
    SKIP: tl.constexpr,
):
    new = tl.load(weights + at, mask).to(tl.float32)
    keep = (tl.abs(new) < float("inf")) == 0  # a NaN too
    if SKIP:
        if mask is not None:
            keep = keep & mask
        met = _pointer(tl.load(row + 3), tl.int8, False)
        tl.store(met + at * 0, 1, keep)
    if FORMAT == 0:
        _plain(row, at, mask, new, rate, keep, ALIGNED, SKIP)
    elif FORMAT == 1:
        _compensated(row, at, mask, new, rate, keep, ALIGNED, SKIP)
    else:
        _narrow(row, at, mask, new, first, rate, key, keep, FORMAT == 2, ALIGNED, SKIP)


@triton.jit
def _plain(row, at, mask, new, rate, keep, ALIGNED: tl.constexpr, SKIP: tl.constexpr):
    main = _pointer(tl.load(row), tl.float32, ALIGNED)
    old = tl.load(main + at, mask)
    ema = _lerp(old, new, rate)
    if SKIP:
        ema = tl.where(keep, old, ema)
    tl.store(main + at, ema, mask)


@triton.jit
def _compensated(row, at, mask, new, rate, keep, ALIGNED: tl.constexpr, SKIP: tl.constexpr):
    main = _pointer(tl.load(row), tl.float32, ALIGNED)
    low = _pointer(tl.load(row + 1), tl.bfloat16, ALIGNED)
    old, kept = tl.load(main + at, mask), tl.load(low + at, mask)
    step = tl.fma(new - old, rate, kept.to(tl.float32))
    ema = old + step
    rest = (step + (old - ema)).to(tl.bfloat16)
    if SKIP:
        ema, rest = tl.where(keep, old, ema), tl.where(keep, kept, rest)
    tl.store(main + at, ema, mask)
    tl.store(low + at, rest, mask)


@triton.jit
def _narrow(
    row,
    at,
    mask,
    new,
    first,
    rate,
    key,
    keep,
    LOW: tl.constexpr,
    ALIGNED: tl.constexpr,
    SKIP: tl.constexpr,
):
    main = _pointer(tl.load(row), tl.int16, ALIGNED)
    upper = tl.load(main + at, mask)
    bits = upper.to(tl.int32) << 16
    if LOW:
        low = _pointer(tl.load(row + 1), tl.int8, ALIGNED)
        lower = tl.load(low + at, mask)
        bits = bits + lower.to(tl.int32) * 256
    ema = _lerp(bits.to(tl.float32, bitcast=True), new, rate)
    # One NaN for all: noise would turn some of them into an infinity or a zero.
    bits = tl.where(ema != ema, 0x7FC00000, ema.to(tl.int32, bitcast=True))
    if LOW:
        bits = bits + _noise(first, at, key, 8)
        rest = (bits >> 8).to(tl.int8)
        bits = bits + 0x8000
        if SKIP:
            rest = tl.where(keep, lower, rest)
        tl.store(low + at, rest, mask)
    else:
        bits = bits + _noise(first, at, key, 16)
    ema16 = (bits >> 16).to(tl.int16)
    if SKIP:
        ema16 = tl.where(keep, upper, ema16)
    tl.store(main + at, ema16, mask)


@triton.jit
def _lerp(old, new, rate):
    # As torch's own, with its two sides: exact at both ends, and one rounding.
    step = new - old
    return tl.where(rate < 0.5, tl.fma(step, rate, old), tl.fma(step, rate - 1.0, new))


@triton.jit
def _pointer(address, KIND: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = address.to(tl.pointer_type(KIND))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _noise(first, at, key, BITS: tl.constexpr):
    per: tl.constexpr = 32 // BITS
    position = first + at
    # A row lies in two blocks at most: their keys are made once.
    block = first >> 32
    here, after = _block_key(key, block), _block_key(key, block + 1)
    word = (position // per).to(tl.uint32) * 0x9E3779B9
    word = word + tl.where((position >> 32) == block, here, after)
    word = word ^ (word >> 16)
    word = word * 0x7FEB352D + (key >> 32).to(tl.uint32)
    word = word ^ (word >> 15)
    word = word * 0x846CA68B
    word = word ^ (word >> 16)
    shift = ((position % per) * BITS).to(tl.uint32)
    return ((word >> shift) & ((1 << BITS) - 1)).to(tl.int32)


@triton.jit
def _block_key(key, block):
    return _mix64(key + block.to(tl.uint64)).to(tl.uint32)


@triton.jit
def _mix64(number):
    number = number + 0x9E3779B97F4A7C15
    number = (number ^ (number >> 30)) * 0xBF58476D1CE4E5B9
    number = (number ^ (number >> 27)) * 0x94D049BB133111EB
    return number ^ (number >> 31)
