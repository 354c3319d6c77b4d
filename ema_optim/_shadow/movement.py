"""Whether the weights move between two updates: an ``update()`` per micro-batch shows here."""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from .._engines.quantized import is_quantized
from .._engines.sharding import local
from .holdings import no_autograd

_WATCHED = 4  # one alone may rest for reasons of its own: unused, clamped, frozen
_UPDATES = 100  # until then a loop has shown what it does


class Movement:
    """Compares a few of the smallest tensors with what they were at the update before."""

    def __init__(self) -> None:
        self._seen: list[tuple[Tensor, int, Tensor]] = []  # with version and value
        self._rests: list[bool] = []

    def rests(self, params: Iterable[Tensor]) -> bool:
        """Whether the weights were unmoved at 3 of the last 4 updates, this one included."""
        if torch.compiler.is_compiling() or len(self._rests) == _UPDATES:
            return False
        with no_autograd():
            moved = not self._seen or any(_has_moved(*seen) for seen in self._seen)
            self._rests.append(not moved)
            if moved:
                self._look_at([tensor for tensor, *_ in self._seen] or _smallest(params))
        if sum(self._rests[-4:]) < 3:
            return False
        trained = {param for param in params if param.requires_grad}
        if all(tensor in trained for tensor, *_ in self._seen):
            return True
        self._seen, self._rests = [], []  # others are trained now
        return False

    def _look_at(self, tensors: Iterable[Tensor]) -> None:
        self._seen = [(t, local(t)._version, local(t).detach().clone()) for t in tensors]


def _has_moved(tensor: Tensor, version: int, value: Tensor) -> bool:
    # The version first: comparing values waits for an accelerator. It alone would not do, since a
    # replayed graph, or what writes through .data, does not count.
    if local(tensor)._version != version or local(tensor).shape != value.shape:
        return True
    captured = value.is_cuda and torch.cuda.is_current_stream_capturing()
    return captured or not torch.equal(local(tensor), value.to(local(tensor)))


def _smallest(params: Iterable[Tensor]) -> list[Tensor]:
    fit = [param for param in params if param.requires_grad and _is_plain(param)]
    used = [param for param in fit if param.grad is not None]
    return sorted(used or fit, key=lambda param: local(param).numel())[:_WATCHED]


def _is_plain(param: Tensor) -> bool:
    if is_lazy(param) or is_quantized(param) or param.is_meta or param.is_inference():
        return False
    return local(param).numel() > 0
