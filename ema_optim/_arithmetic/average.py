"""The arithmetic of the EMA, on lists of tensors.

    ema <- decay * ema + (1 - decay) * weights

Plain functions: they see tensors and numbers, never a param group or an optimizer. Every function
expects to run without autograd (under ``torch.no_grad()``). Where a scratch buffer is needed it
holds at most ``scratch_size(device)`` elements, whatever the size of the model.
"""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from .scratch import (
    CHUNK,
    batches_of,
    by_place,
    carve,
    columns,
    fill,
    is_kept,
    needed_size,
    pieces_of,
    place,
    scratch_for,
)

Items = dict[int, Tensor]


class Casts:
    """Room for the weights in the EMA's dtype where it is another one.

    The views of small tensors into the scratch buffer are made once: for many they cost more than
    the update. Large tensors are cut anew at every use, since views of them would not follow
    ``param.data = ...``. For these an accelerator has a buffer only while they are averaged: an
    optimizer for each parameter would keep a second model otherwise.

    Args:
        emas: EMA tensors of one device and dtype.
        scratch: A buffer of ``kept_size(emas)`` elements or more, to be shared with others.
    """

    def __init__(self, emas: list[Tensor], scratch: Tensor | None = None) -> None:
        self.scratch = scratch_for(emas[0], kept_size(emas)) if scratch is None else scratch
        self._large = [i for i, ema in enumerate(emas) if ema.numel() > CHUNK]
        small = [(i, ema) for i, ema in enumerate(emas) if 0 < ema.numel() <= CHUNK]
        self._small: list[tuple[list[int], list[Tensor]]] = []
        for group in fill(small):
            self._small.append(([i for i, _ in group], carve(self.scratch, [e for _, e in group])))

    def lerp_(self, emas: list[Tensor], params: list[Tensor], weight: float) -> None:
        """``ema <- lerp(ema, weights, weight)``, a buffer at a time."""
        for indices, casts in self._small:
            torch._foreach_copy_(casts, [params[i] for i in indices])
            torch._foreach_lerp_([emas[i] for i in indices], casts, weight)
        if self._large:
            large = [emas[i] for i in self._large]
            self._lerp_large_(large, [params[i] for i in self._large], weight)

    def _lerp_large_(self, emas: list[Tensor], params: list[Tensor], weight: float) -> None:
        scratch = self.scratch
        if not is_kept(emas[0].device):
            scratch = scratch_for(emas[0], needed_size(emas))
        for batch in batches_of(zip(emas, params, strict=True)):
            pieces, sources = columns(batch)
            casts = carve(scratch, pieces)
            torch._foreach_copy_(casts, sources)
            torch._foreach_lerp_(pieces, casts, weight)


def kept_size(emas: list[Tensor]) -> int:
    """The elements of the buffer that ``Casts`` of these EMA tensors keeps."""
    kept = is_kept(emas[0].device)
    return needed_size(ema for ema in emas if kept or ema.numel() <= CHUNK)


def casts_of(lists: list[list[Tensor]]) -> list[Casts]:
    """``Casts`` of several lists, with one buffer between those of one device and dtype."""
    buffers: dict[object, Tensor] = {}
    for emas in sorted(lists, key=kept_size, reverse=True):
        if place(emas[0]) not in buffers:
            buffers[place(emas[0])] = scratch_for(emas[0], kept_size(emas))
    return [Casts(emas, buffers[place(emas[0])]) for emas in lists]


def ema_update_(
    emas: list[Tensor], params: list[Tensor], decay: float, casts: Casts | None = None
) -> None:
    """Move every EMA towards its weights: ``ema <- decay * ema + (1 - decay) * weights``.

    Written as ``lerp(ema, weights, 1 - decay)`` with ``1 - decay`` in double precision. The form
    ``ema * decay + weights * (1 - decay)`` rounds the two factors separately; they then no longer
    sum to one, and in fp32 its fixed point is off by 1.7e-4 at decay 0.9999.

    Args:
        emas: EMA tensors of one device and dtype, changed in place.
        params: Weights, same shapes, of one device and dtype (not necessarily that of ``emas``).
        decay: The share of the old EMA that is kept, in [0, 1]; exact at both ends.
        casts: Made of ``emas``, to be used again; only where the dtypes differ.
    """
    if not emas or decay == 1.0:
        return
    if decay == 0.0:
        torch._foreach_copy_(emas, params)
    elif emas[0].dtype == params[0].dtype:
        torch._foreach_lerp_(emas, params, 1.0 - decay)
    else:
        (casts or Casts(emas)).lerp_(emas, params, 1.0 - decay)


def copy_(targets: list[Tensor], sources: list[Tensor]) -> None:
    """Copy ``sources`` into ``targets`` in place, rounding where the target is narrower."""
    if targets:
        torch._foreach_copy_(targets, sources)


def squared_norms(parts: Iterable[tuple[Tensor, Tensor, float]]) -> list[Tensor]:
    """``[||ema - weights||**2, ||weights||**2]`` over all tensors together, in double precision.

    Args:
        parts: An EMA tensor, weights of its shape, and what one element of these stands for.

    Returns:
        One tensor of the two numbers for each device.
    """
    sums: dict[torch.device, Tensor] = {}
    for *pair, scale in parts:
        for ema, weight in pieces_of((pair[0], pair[1])):
            norms = torch.stack([_square_of_norm(ema - weight), _square_of_norm(weight)])
            sums[ema.device] = sums.get(ema.device, 0.0) + norms * scale
    return list(sums.values())


def relative_distance(squares: Sequence[Sequence[float]]) -> float:
    """``||ema - weights|| / ||weights||`` from pairs of squared norms that are to be added up."""
    gap, size = (math.fsum(column) for column in zip((0.0, 0.0), *squares, strict=True))
    if size == 0.0:
        return 0.0 if gap == 0.0 else math.inf
    return math.sqrt(gap / size)


def non_finite(tensors: list[Tensor]) -> list[int]:
    """Positions of the tensors that hold a NaN or an infinity."""
    # As real numbers: the modulus of a finite complex number may overflow.
    reals = [torch.view_as_real(t) if t.is_complex() else t for t in tensors]
    filled = {i: real for i, real in enumerate(reals) if real.numel()}
    # The 2-norm is many times faster than the largest modulus, and overflows for large numbers.
    return sorted(_without_norm(_without_norm(filled, 2.0), math.inf))


def flagged(flags: list[Tensor]) -> list[int]:
    """Positions of the 0-dim tensors that are True, read with one wait for each device."""
    groups = by_place(dict(enumerate(flags)))
    read = [zip(g, torch.stack(list(g.values())).tolist(), strict=True) for g in groups]
    return sorted(position for pairs in read for position, flag in pairs if flag)


def _square_of_norm(piece: Tensor) -> Tensor:
    double = torch.complex128 if piece.is_complex() else torch.float64
    square: Tensor = torch.linalg.vector_norm(piece, dtype=double).square().real
    return square


def _without_norm(items: Items, order: float) -> Items:
    """The items whose norm is not finite."""
    found: Items = {}
    for group in by_place(items):
        norms = torch._foreach_norm(list(group.values()), order)
        bad = ~torch.isfinite(torch.stack(list(norms)))
        if bad.any():
            keys = list(group)
            found |= {keys[j]: group[keys[j]] for j in bad.nonzero().flatten().tolist()}
    return found
