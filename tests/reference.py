"""Independent oracles: the EMA in float64, one tensor at a time, without any of the tricks.

The EMA starts from the weights before the first step; the first update averages the weights after
that step into it.
"""

import io

import torch


class Reference:
    """A float64 EMA of tensors, told of every optimizer step."""

    def __init__(self, params, decay, update_every=1, update_after_step=0):
        self.decay = decay if callable(decay) else lambda u: decay
        self.every, self.after, self.step = update_every, update_after_step, 0
        self.params = list(params)
        self.emas = [wide(p) for p in self.params]

    def update(self):
        self.step += 1
        u = self.step - self.after
        if u <= 0:
            self.emas = [wide(p) for p in self.params]
        elif u % self.every == 0:
            factor = 1.0
            for v in range(u - self.every + 1, u + 1):
                factor *= self.decay(v)
            pairs = zip(self.emas, self.params, strict=True)
            self.emas = [factor * e + (1 - factor) * wide(p) for e, p in pairs]


def wide(tensor):
    return tensor.detach().to(torch.complex128 if tensor.is_complex() else torch.float64, copy=True)


def same(left, right):
    """Bit equality of nested containers of tensors and numbers."""
    if isinstance(left, torch.Tensor):
        return left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[k], right[k]) for k in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(same, left, right))
    return left == right


def through_file(state, *classes):
    """What a checkpoint is after ``torch.save`` and ``torch.load(weights_only=True)``."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    with torch.serialization.safe_globals(list(classes)):
        return torch.load(buffer, weights_only=True)
