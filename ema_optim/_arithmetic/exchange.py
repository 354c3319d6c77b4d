"""The exchange of two lists of tensors in place, which may be interrupted anywhere and turned."""

import torch
from torch import Tensor

from .scratch import batches_of, by_place, carve, columns, needed_size


class Exchange:
    """Exchange two lists of tensors in place through a scratch buffer, or take that back.

    The way there and the way back are one row of copies. Each may be made twice, and is noted only
    once it has been made: after an exception or a signal at any moment (of ``undo()`` too) either
    way goes on from the note. Of one batch:

        0: nothing is held    1: lefts are held    2: lefts are rights    (next, 0): exchanged

    The note is one tuple, so that no interrupt can fall between its halves.

    Args:
        lefts: Tensors, one side; a pair has one shape, dtype and device.
        rights: Tensors, the other side. No two tensors may overlap in memory.
        watched: Whether ``doubtful()`` is to know of the lefts.
        done: Whether they have changed places already, so that ``undo()`` has all to do.
    """

    def __init__(
        self,
        lefts: list[Tensor],
        rights: list[Tensor],
        watched: bool = False,
        done: bool = False,
    ) -> None:
        self._batches = list(batches_of(zip(lefts, rights, strict=True)))
        by_device: dict[torch.device, list[Tensor]] = {}
        for tensor in lefts:
            by_device.setdefault(tensor.device, []).append(tensor)
        self._scratch = {device: _bytes_for(own) for device, own in by_device.items()}
        self._progress = (len(self._batches) if done else 0, 0)
        self._watched, self._sums = watched, list[Tensor]()

    def run(self) -> None:
        """Do what is left of the exchange."""
        (first, phase), end = self._progress, len(self._batches)
        for now in range(first, end):
            lefts, rights = columns(self._batches[now])
            held = self._held(lefts)
            if phase < 1:
                torch._foreach_copy_(held, lefts)
                self._progress = (now, 1)
            if phase < 2:
                if self._watched:
                    self._sums.append(self._flat(lefts).sum())  # it is in the cache now
                torch._foreach_copy_(lefts, rights)
                self._progress = (now, 2)
            torch._foreach_copy_(rights, held)
            self._progress = (now + 1, phase := 0)

    def undo(self) -> None:
        """Take back what has been exchanged so far."""
        first, phase = self._progress
        for now in range(first if phase else first - 1, -1, -1):
            lefts, rights = columns(self._batches[now])
            held = self._held(lefts)
            if not phase:
                torch._foreach_copy_(held, rights)
                self._progress = (now, 2)
            if phase != 1:
                torch._foreach_copy_(rights, lefts)
                self._progress = (now, 1)
            torch._foreach_copy_(lefts, held)
            self._progress = (now, phase := 0)

    def doubtful(self) -> bool:
        """Whether the lefts may have held a NaN or an infinity (certainly not, if False)."""
        groups = by_place(dict(enumerate(self._sums)))
        return not all(torch.isfinite(torch.stack(list(g.values()))).all() for g in groups)

    def _flat(self, lefts: list[Tensor]) -> Tensor:
        scratch = self._scratch[lefts[0].device].view(lefts[0].dtype)
        return scratch[: sum(left.numel() for left in lefts)]

    def _held(self, lefts: list[Tensor]) -> list[Tensor]:
        return carve(self._scratch[lefts[0].device].view(lefts[0].dtype), lefts)


def _bytes_for(tensors: list[Tensor]) -> Tensor:
    """One buffer for a device, of bytes: a model may mix dtypes."""
    size = needed_size(tensors) * max(map(Tensor.element_size, tensors))
    return torch.empty(size, dtype=torch.uint8, device=tensors[0].device)
