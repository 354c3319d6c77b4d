"""The arithmetic of the EMA, on lists of tensors.

    ema <- decay * ema + (1 - decay) * weights

Plain functions: they see tensors and numbers, never a param group or an optimizer. Every function
expects to run without autograd (under ``torch.no_grad()``). Where a scratch buffer is needed it
holds at most ``CHUNK`` elements, whatever the size of the model.
"""

import math
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

# Elements in one scratch buffer: 1 MiB of fp32 stays in a core's L2 cache, and smaller pieces pay
# more in dispatch than they gain in locality.
CHUNK = 256 * 1024

Batch = list[tuple[Tensor, ...]]


def ema_update_(emas: list[Tensor], params: list[Tensor], decay: float) -> None:
    """Move every EMA towards its weights: ``ema <- decay * ema + (1 - decay) * weights``.

    Written as ``lerp(ema, weights, 1 - decay)`` with ``1 - decay`` in double precision. The form
    ``ema * decay + weights * (1 - decay)`` rounds the two factors separately; they then no longer
    sum to one, and in fp32 its fixed point is off by 1.7e-4 at decay 0.9999.

    Args:
        emas: EMA tensors of one device and dtype, changed in place.
        params: Weights, same shapes, of one device and dtype (not necessarily that of ``emas``).
        decay: The share of the old EMA that is kept, in [0, 1]; exact at both ends.
    """
    if not emas or decay == 1.0:
        return
    if decay == 0.0:
        torch._foreach_copy_(emas, params)
    elif emas[0].dtype == params[0].dtype:
        torch._foreach_lerp_(emas, params, 1.0 - decay)
    else:
        _lerp_through_scratch_(emas, params, 1.0 - decay)


def _lerp_through_scratch_(emas: list[Tensor], params: list[Tensor], weight: float) -> None:
    scratch = _scratch_for(emas[0])
    for batch in _batches(zip(emas, params, strict=True)):
        pieces, sources = _columns(batch)
        casts = _carve(scratch, pieces)
        torch._foreach_copy_(casts, sources)
        torch._foreach_lerp_(pieces, casts, weight)


class Exchange:
    """Exchange two lists of tensors in place through a scratch buffer, or take that back.

    ``undo()`` is right after an exception or a signal at any moment of ``run()``: what was done is
    kept as one tuple (batches done, phase of the next), so that no interrupt can fall between the
    two halves of a note.

    Args:
        lefts: Tensors, one side; a pair has one shape, dtype and device.
        rights: Tensors, the other side. No two tensors may overlap in memory.
    """

    def __init__(self, lefts: list[Tensor], rights: list[Tensor]) -> None:
        self._batches = list(_batches(zip(lefts, rights, strict=True)))
        # One buffer for each device, of bytes: a model may mix dtypes.
        widths: dict[torch.device, int] = {}
        for tensor in lefts:
            widths[tensor.device] = max(tensor.element_size(), widths.get(tensor.device, 0))
        self._scratch = {
            device: torch.empty(CHUNK * width, dtype=torch.uint8, device=device)
            for device, width in widths.items()
        }
        self._progress = (0, 0)

    def run(self) -> None:
        """Do the exchange."""
        for done, batch in enumerate(self._batches):
            lefts, rights = _columns(batch)
            held = self._held(lefts)
            torch._foreach_copy_(held, lefts)
            self._progress = (done, 1)
            torch._foreach_copy_(lefts, rights)
            self._progress = (done, 2)
            torch._foreach_copy_(rights, held)
            self._progress = (done + 1, 0)

    def undo(self) -> None:
        """Put back whatever ``run()`` has exchanged so far."""
        done, phase = self._progress
        if phase:
            lefts, rights = _columns(self._batches[done])
            if phase == 2:
                torch._foreach_copy_(rights, lefts)
            held = self._held(lefts)
            torch._foreach_copy_(lefts, held)
        self._batches = self._batches[:done]
        self.run()
        self._batches, self._progress = [], (0, 0)

    def _held(self, lefts: list[Tensor]) -> list[Tensor]:
        return _carve(self._scratch[lefts[0].device].view(lefts[0].dtype), lefts)


def copy_(targets: list[Tensor], sources: list[Tensor]) -> None:
    """Copy ``sources`` into ``targets`` in place, rounding where the target is narrower."""
    if targets:
        torch._foreach_copy_(targets, sources)


def squared_norms(emas: list[Tensor], weights: list[Tensor]) -> list[Tensor]:
    """``[||ema - weights||**2, ||weights||**2]`` over all tensors together, in double precision.

    Returns:
        One tensor of the two numbers for each device.
    """
    gaps, sizes = _sums_of_squares(_differences(emas, weights)), _sums_of_squares(weights)
    return [torch.stack([gap, sizes[device]]) for device, gap in gaps.items()]


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
    found = []
    for group in _by_place([(i, real) for i, real in enumerate(reals) if real.numel()]):
        norms = torch._foreach_norm([tensor for _, tensor in group], math.inf)
        bad = ~torch.isfinite(torch.stack(list(norms)))
        if bad.any():
            found += [group[j][0] for j in bad.nonzero().flatten().tolist()]
    return sorted(found)


def _differences(emas: list[Tensor], weights: list[Tensor]) -> Iterator[Tensor]:
    for pair in zip(emas, weights, strict=True):
        for ema, weight in _pieces(pair):
            yield ema - weight


def _sums_of_squares(tensors: Iterable[Tensor]) -> dict[torch.device, Tensor]:
    sums: dict[torch.device, Tensor] = {}
    for tensor in tensors:
        for (piece,) in _pieces((tensor,)):
            square = torch.linalg.vector_norm(piece, dtype=_double(piece)).square().real
            sums[piece.device] = sums.get(piece.device, 0.0) + square
    return sums


def _double(tensor: Tensor) -> torch.dtype:
    return torch.complex128 if tensor.is_complex() else torch.float64


def _place(tensor: Tensor) -> tuple[torch.device, torch.dtype]:
    return tensor.device, tensor.dtype


def _by_place(items: Sequence[tuple[int, Tensor]]) -> list[list[tuple[int, Tensor]]]:
    groups: dict[tuple[torch.device, torch.dtype], list[tuple[int, Tensor]]] = {}
    for item in items:
        groups.setdefault(_place(item[1]), []).append(item)
    return list(groups.values())


def _scratch_for(tensor: Tensor) -> Tensor:
    return torch.empty(CHUNK, dtype=tensor.dtype, device=tensor.device)


def _carve(scratch: Tensor, tensors: list[Tensor]) -> list[Tensor]:
    """Views into the scratch buffer, one for each tensor and of its shape."""
    sizes = [tensor.numel() for tensor in tensors]
    views = torch.split(scratch[: sum(sizes)], sizes)
    return [view.view(tensor.shape) for view, tensor in zip(views, tensors, strict=True)]


def _columns(batch: Batch) -> list[list[Tensor]]:
    return [list(column) for column in zip(*batch, strict=True)]


def _batches(pairs: Iterable[tuple[Tensor, ...]]) -> Iterator[Batch]:
    """Group pieces until they fill a scratch buffer; a batch has one device and dtype."""
    batch: Batch = []
    room = CHUNK
    for pair in pairs:
        for piece in _pieces(pair):
            size = piece[0].numel()
            if batch and (size > room or _place(piece[0]) != _place(batch[0][0])):
                yield batch
                batch, room = [], CHUNK
            batch.append(piece)
            room -= size
    if batch:
        yield batch


def _pieces(tensors: tuple[Tensor, ...]) -> Iterator[tuple[Tensor, ...]]:
    """Cut tensors of one shape into aligned views of at most ``CHUNK`` elements."""
    first = tensors[0]
    if first.numel() <= CHUNK:
        yield tensors
        return
    order = sorted(range(first.dim()), key=first.stride, reverse=True)
    ordered = [tensor.permute(order) for tensor in tensors]
    if all(tensor.is_contiguous() for tensor in ordered):
        yield from zip(*(torch.split(t.view(-1), CHUNK) for t in ordered), strict=True)
        return
    row = first.numel() // first.shape[0]
    cuts = (torch.split(t, CHUNK // row) if row <= CHUNK else t.unbind() for t in tensors)
    for rows in zip(*cuts, strict=True):
        yield from _pieces(rows)
