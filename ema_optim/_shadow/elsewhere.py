"""Steps that Python does not make: in a replayed CUDA graph, in an engine, on purpose.

A captured step would be wrong in silence: a graph replays the decay, the random numbers and the
stride of one step, and no counter. So it is refused, and a step that was made elsewhere is counted
and averaged by itself, outside the graph.
"""

from typing import Any

import torch

from . import pending, swap
from .shadow_set import ShadowSet
from .swap_state import Mode


def refuse_captured(shadow: ShadowSet, what: str) -> None:
    """Raise RuntimeError where what is done now goes into a graph that is replayed later."""
    params = (param for group in shadow.source.param_groups for param in group["params"])
    if torch.compiler.is_compiling() or (param := next(params, None)) is None:
        return
    # A CPU knows of no capture, and torch's builds without CUDA refuse to be asked.
    device: Any = getattr(torch, param.device.type, None)
    asked = getattr(device, "is_current_stream_capturing", None)
    if asked is not None and asked():
        remedy = "capture optimizer.inner.step(), " if shadow.sees_steps else ""
        raise RuntimeError(
            f"{what} must not be captured in a CUDA graph: its replays would repeat one decay and "
            f"one set of random numbers, and count nothing: {remedy}call update() after each replay"
        )


def count_step(shadow: ShadowSet) -> None:
    """Count a step that has moved the weights already, and average."""
    swap.recover(shadow)
    with shadow.swap.alone("update()"):
        _check(shadow)
        shadow.finish_step(shadow.begin_step(moved=True))


def _check(shadow: ShadowSet) -> None:
    refuse_captured(shadow, "update()")
    swap.refuse_swapped(shadow, "update()")
    swap.refuse_others(shadow, "update()")
    if shadow.mode is Mode.PENDING:
        raise RuntimeError(
            "update() after loading a checkpoint written while swapped: the step was made from the "
            "EMA weights. Call optimizer.train() after loading, before the forward"
        )
    if not shadow.step:
        raise RuntimeError(
            "update() must follow a step of the EMAOptimizer, got none yet: the EMA begins at the "
            "weights before the first one. Make that one eager, optimizer.step() (the warm-up of "
            "a CUDA graph has several)"
        )
    pending.check_first_step(shadow)
