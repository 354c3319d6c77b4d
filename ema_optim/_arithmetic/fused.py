"""Whether one kernel makes an update in place of torch's operators, and where its elements lie.

    lists of tensors  ->  Plan: a table on their device  ->  kernel.launch

A plan exists where there is a device that Triton compiles for and the kernel has given there what
the eager form gives: every bit of a narrow format, all but the last of fp32. That is found out
when an EMA is born on the device, so that no later step waits for it. What the kernel does not
know (complex, sparse and oddly strided tensors, float64, a decay of 0) stays eager.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from functools import cache, partial
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from .._warnings import warn
from .formats import Format, Tensors, Update
from .guard import guarded_update_
from .scratch import in_memory_order

_DEVICES = {"cuda"}  # types of device
# How the kernel calls a format and a dtype of weights.
_FORMATS = {
    (torch.float32, None): 0,
    (torch.float32, torch.bfloat16): 1,
    (torch.bfloat16, torch.int8): 2,
    (torch.bfloat16, None): 3,
}
_WEIGHTS = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
_LAST_BIT = 2.0**-23  # of fp32, relative
_PLAIN = frozenset({Tensor, nn.Parameter})
_ALIGNED = 16  # bytes
_layout, _STRIDED = attrgetter("layout"), {torch.strided}


class Plan:
    """Updates a list of EMA tensors of one device and format by one launch.

    Args:
        format: How they are stored.
        mains: Main tensors.
        lows: Low-order tensors; empty for a format that has none.
        starts: For each of them the position of its first element, see ``Update``.
        met: For each of them, bool: set where one of its weights is not finite, and the EMA of that
            element stays as it is, see ``guard``. None: such weights go into the EMA.
    """

    def __init__(
        self,
        format: Format,
        mains: list[Tensor],
        lows: list[Tensor],
        starts: Sequence[int],
        met: Tensor | None = None,
    ) -> None:
        self._device = mains[0].device
        self._form = _FORMATS[format.main, format.low]
        self._mains, self._lows, self._starts, self._met = mains, lows, starts, met
        self._where: object = None
        self._table: Tensor | None = None
        self._kinds: tuple[int | str, ...] = ()
        self._told: tuple[float, int] | None = None
        self._rate, self._stream = self._number(torch.float64), self._number(torch.int64)
        self._free = self._number(torch.float32)

    @property
    def draws(self) -> bool:
        """Whether the number of an update matters: it decides the random bits."""
        return self._form > 1

    def aim(self, weights: list[Tensor], decay: float) -> bool:
        """Find out where the weights are, and whether they can be averaged with this decay."""
        # At its ends the eager form copies, or does nothing. Dynamo knows no addresses.
        if not 0.0 < decay < 1.0 or torch.compiler.is_compiling():
            return False
        if not _PLAIN.issuperset(map(type, weights)) or {*map(_layout, weights)} != _STRIDED:
            return False
        pointers = list(map(Tensor.data_ptr, [*weights, *self._mains, *self._lows]))
        where = pointers, list(map(Tensor.stride, weights))
        if where != self._where:
            self._table = self._table_of(weights)
            self._where = where
        return self._table is not None

    def launch(self, update: Update, held: Tensor | None = None) -> None:
        """Average the weights that were aimed at, unless ``held`` (of one element) is not 0."""
        if self._table is None or not len(self._table):
            return
        self._tell(update)
        held = self._free if held is None else held.to(self._free, non_blocking=True)
        numbers = self._rate, self._stream, held
        with torch.cuda.device(self._device) if self._device.type == "cuda" else nullcontext():
            _kernel().launch(self._table, numbers, self._kinds)
        # Behind autograd's back otherwise: who has saved an EMA tensor for backward is to know.
        torch.autograd.graph.increment_version([*self._mains, *self._lows])

    def _number(self, dtype: torch.dtype) -> Tensor:
        return torch.zeros(1, dtype=dtype, device=self._device)

    def _tell(self, update: Update) -> None:
        told = update.weight, update.stream if self.draws else 0
        if told != self._told:
            self._told = told
            self._rate.fill_(told[0])
            self._stream.fill_(told[1])

    def _table_of(self, weights: list[Tensor]) -> Tensor | None:
        rows = list(zip(self._mains, self._lows or self._mains, weights, strict=True))
        if not all(self._knows(*row) for row in rows):
            return None
        aligned = not any(t.data_ptr() % _ALIGNED for row in rows for t in row)
        self._kinds = self._form, _WEIGHTS[weights[0].dtype], aligned, self._met is not None
        met = 0 if self._met is None else self._met.data_ptr()
        table = _table(rows, met, self._starts, _kernel().ROW)
        if self._device.type == "cpu":
            return table
        # From pageable memory the copy would wait.
        return table.pin_memory().to(self._device, non_blocking=True)

    def _knows(self, main: Tensor, low: Tensor, weights: Tensor) -> bool:
        trio = main, low, weights
        if weights.dtype not in _WEIGHTS or weights.is_neg():
            return False
        if any(t.device != self._device or t.shape != weights.shape for t in trio):
            return False
        return all(map(Tensor.is_contiguous, in_memory_order(trio)))


def _table(
    trios: Sequence[tuple[Tensor, ...]], met: int, starts: Sequence[int], row: int
) -> Tensor:
    """The rows of the kernel's table, on the CPU; ``met`` is an address."""
    integers = partial(torch.tensor, dtype=torch.int64, device="cpu")
    sizes = integers([trio[0].numel() for trio in trios])
    pieces = (sizes + row - 1) // row
    count = torch.arange(int(pieces.sum()), device="cpu")
    begun = count - (pieces.cumsum(0) - pieces).repeat_interleave(pieces)
    lines = [
        (*map(Tensor.data_ptr, trio), met + i, starts[i])  # a byte for each tensor
        for i, trio in enumerate(trios)
    ]
    widths = integers([*map(Tensor.element_size, trios[0]), 0, 1])
    begun = begun[:, None] * row
    where = integers(lines).repeat_interleave(pieces, 0) + begun * widths
    left = sizes.repeat_interleave(pieces)[:, None] - begun
    return torch.cat([where, left.clamp(max=row)], 1)


def plan_for(
    format: Format,
    mains: list[Tensor],
    lows: list[Tensor],
    starts: Sequence[int],
    dtype: torch.dtype,
    met: Tensor | None = None,
) -> Plan | None:
    """The plan of EMA tensors of one device whose weights are of one dtype, if there can be one.

    The first time for a device, a format and a dtype the kernel is compiled and tried, which waits
    for the device.
    """
    device = mains[0].device
    known = (format.main, format.low) in _FORMATS and dtype in _WEIGHTS
    if device.type not in _DEVICES or not known or _kernel() is None:
        return None
    if not _is_right(device, format, dtype, met is not None):
        return None
    return Plan(format, mains, lows, starts, met)


@cache
def _kernel() -> Any:
    """The module of the kernel; None without Triton."""
    try:
        from . import kernel
    except ImportError:
        return None
    return kernel


@cache
def _is_right(device: torch.device, format: Format, dtype: torch.dtype, skips: bool) -> bool:
    """Whether the kernel gives on a device what the eager form gives; told once if not."""
    try:
        found = "" if _agrees(device, format, dtype, skips) else "gave other numbers"
    except Exception as error:  # of Triton, its compiler, the driver
        found = f"failed ({type(error).__name__}: {str(error).strip().partition(chr(10))[0]})"
    if found:
        warn(
            f"the EMA on {device} is averaged by torch's own operators, several times slower: "
            f"Triton's kernel for {format} of {dtype} {found}. Install the triton that this "
            "torch was built with",
            once="kernel",
        )
    return not found


def _agrees(device: torch.device, format: Format, dtype: torch.dtype, skips: bool) -> bool:
    sizes, starts = [5, _kernel().ROW + 99], [3, 2**32 - 70]
    values = [torch.linspace(-3, 3, n, dtype=torch.float32, device=device).sin_() for n in sizes]
    # In proportion, so that nothing cancels: another rounding shows in the last bit alone.
    weights = [(value * 1.01).to(dtype) for value in values]
    weights[0][:3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    eager, fused = _stored(format, values), _stored(format, values)
    met = torch.zeros(2, dtype=torch.bool, device=device)
    plan = Plan(format, *fused, starts, met if skips else None)
    for number, decay in enumerate((0.99, 0.3), 70):
        update = Update(decay, number, starts)
        if skips:
            guarded_update_(format, eager, weights, update, torch.zeros_like(met))
        else:
            format.update_(*eager, weights, update)
        if not plan.aim(weights, decay):
            return False
        plan.launch(update)
        plan.launch(update, torch.ones(1, device=device))  # is held back
    return met.tolist() == [skips, False] and _are_alike(format, eager, fused)


def _stored(format: Format, values: Tensors) -> tuple[Tensors, Tensors]:
    mains = [torch.empty_like(value, dtype=format.main) for value in values]
    lows = [torch.empty_like(value, dtype=format.low) for value in values] if format.low else []
    format.encode_(mains, lows, values)
    return mains, lows


def _are_alike(format: Format, *stored: tuple[Tensors, Tensors]) -> bool:
    decoded = []
    for mains, lows in stored:
        decoded.append([torch.empty_like(main, dtype=torch.float64) for main in mains])
        format.decode_(decoded[-1], mains, lows)
    # As numbers: a NaN has a pattern of its own on each device.
    rtol = _LAST_BIT if format.main == torch.float32 else 0.0
    pairs = zip(*decoded, strict=True)
    return all(torch.allclose(x, y, rtol=rtol, atol=0.0, equal_nan=True) for x, y in pairs)
