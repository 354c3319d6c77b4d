"""The guard against non-finite weights: what an update would spoil keeps its EMA."""

from collections.abc import Iterator

import torch
from torch import Tensor

from .average import non_finite
from .formats import Format, Update
from .scratch import scratch_size

Tensors = list[Tensor]


def guarded_update_(
    format: Format, parts: tuple[Tensors, Tensors], params: Tensors, update: Update, met: Tensor
) -> None:
    """``format.update_``, but an element whose weight is NaN or infinite keeps its EMA.

    On a CPU the weights are looked at first, and where all are finite this is the plain update. An
    accelerator is not waited for: there every element is chosen anew, a few tensors at a time.

    Args:
        format: The format of the EMA.
        parts: Main and low-order tensors, as ``Format.update_`` takes them.
        params: Weights, of the same shapes.
        update: Which update it is.
        met: For each tensor, bool: whether one of its weights was not finite; set in place.
    """
    if not params or update.decay == 1.0:
        return
    if is_read_at_once(met.device):
        bad = non_finite(params)
        met[bad] = True
        _keep_(format, parts, params, update, bad)
        return
    for run in _runs(params):
        mains, lows, weights = parts[0][run], parts[1][run], params[run]
        own = update._replace(starts=update.starts[run], casts=None)
        if format.rounds:
            finite = _keep_(format, (mains, lows), weights, own, range(len(mains)))
        else:
            fine = list(map(torch.isfinite, weights))
            # lerp(ema, ema, rate) is the EMA, bit for bit.
            safe = list(map(torch.where, fine, weights, mains))
            format.update_(mains, lows, safe, own)
            finite = list(map(torch.all, fine))
        met[run].logical_or_(~torch.stack(finite))


def is_read_at_once(device: torch.device) -> bool:
    """Whether a value can be looked at without a wait."""
    return device.type == "cpu"


def _keep_(
    format: Format,
    parts: tuple[Tensors, Tensors],
    params: Tensors,
    update: Update,
    watched: range | list[int],
) -> Tensors:
    """Update all; whether the weights of those that are watched were finite, one by one."""
    kept = [[(part[i], part[i].clone()) for part in parts if part] for i in watched]
    format.update_(*parts, params, update)
    finite = []
    for i, pairs in zip(watched, kept, strict=True):
        fine = torch.isfinite(params[i])
        for new, old in pairs:
            new.copy_(torch.where(fine, new, old))
        finite.append(fine.all())
    return finite


def _runs(tensors: Tensors) -> Iterator[slice]:
    """Slices of a list that fill a scratch buffer each; a larger tensor is alone."""
    first = room = 0
    for i, tensor in enumerate(tensors):
        room -= tensor.numel()
        if room < 0 and i > first:
            yield slice(first, i)
        if room < 0:
            size = scratch_size(tensor.device, narrow=True)
            first, room = i, size - tensor.numel()
    yield slice(first, len(tensors))
