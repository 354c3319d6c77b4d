"""Who has swapped what, over the whole process: two averages may follow the same parameters.

Nothing here refers to a parameter (``torch.utils.swap_tensors`` refuses one that is referred to
weakly), and torch's hooks are there only while something is swapped.
"""

import weakref
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from .slots import Group

if TYPE_CHECKING:
    from .swap_state import SwapState

_holders: list["weakref.ref[SwapState]"] = []  # in the order of their swaps
_hooks: list[Any] = []


def enter(state: "SwapState") -> None:
    """Note a swap that is about to be made."""
    if not any(ref() is state for ref in _holders):
        _holders.append(weakref.ref(state, _forget))
    if not _hooks:
        _hooks.append(register_optimizer_step_pre_hook(refuse_step))


def leave(state: "SwapState") -> None:
    """Forget a swap that is over."""
    for ref in [ref for ref in _holders if ref() is state]:
        _forget(ref)


def refuse_others(state: "SwapState", params: Iterable[Tensor], what: str) -> None:
    """Raise RuntimeError where another object has its EMA weights in the parameters."""
    if _holders and (other := _holding(params, _others(state))) is not None:
        raise RuntimeError(
            f"{what} while another object has its EMA weights in these parameters{_way_out(other)}"
        )


def refuse_crossed(state: "SwapState") -> None:
    """Raise RuntimeError where another object has swapped after this one and not yet back."""
    order = [ref() for ref in _holders]
    later = order[order.index(state) + 1 :] if state in order else []
    if (other := _holding(state.held, [s for s in later if s is not None])) is not None:
        raise RuntimeError(
            "the training weights cannot come back while another object, which has swapped later, "
            f"has its EMA weights in these parameters{_way_out(other)}"
        )


def refuse_interrupted(state: "SwapState", params: Iterable[Tensor]) -> None:
    """Raise RuntimeError for a swap over one of another object that was interrupted."""
    halves = [other for other in _others(state) if other.move is not None] if _holders else ()
    if halves and (other := _holding(params, halves)) is not None:
        raise RuntimeError(f"a swap while that of another object was interrupted{_way_out(other)}")


def refuse_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    """Torch's hook before any optimizer's step."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    if (other := _holding(params, _all())) is not None:
        raise RuntimeError(
            f"step() of {type(optimizer).__name__} over parameters that hold EMA weights"
            f"{_way_out(other)}"
        )


def refuse_load(module: nn.Module, *args: Any) -> None:
    """Torch's hook before the ``load_state_dict`` of a module, for the time of a block."""
    blocks = [state for state in _all() if state.in_block]
    if _holding(module.parameters(), blocks) is not None:
        raise RuntimeError(
            "load_state_dict() of a model whose parameters hold EMA weights: leave "
            "swap_ema_weights() or use_ema() first"
        )


def versions_of(params: Iterable[Tensor]) -> dict[int, int]:
    """What torch has counted of writes into each parameter (of inference tensors, nothing)."""
    return {id(p): 0 if p.is_inference() else p._version for p in params}


def before_ours(state: "SwapState", params: Iterable[Tensor]) -> dict[int, int]:
    """What was counted before we write, where another object is to be told."""
    return versions_of(params) if _holders and _others(state) else {}


def take_for_ours(state: "SwapState", params: Iterable[Tensor], before: dict[int, int]) -> None:
    """Have other objects take what was written since ``before`` for no write of a user."""
    if not before:
        return
    now = versions_of(params)
    for other in _others(state):
        for key in other.versions.keys() & before.keys():
            other.versions[key] += now[key] - before[key]


def _all() -> Iterator["SwapState"]:
    return (state for ref in _holders if (state := ref()) is not None)


def _others(state: "SwapState") -> list["SwapState"]:
    return [other for other in _all() if other is not state]


def _holding(params: Iterable[Tensor], states: Iterable["SwapState"]) -> "SwapState | None":
    ids = set(map(id, params))
    return next((s for s in states if not ids.isdisjoint(map(id, s.held))), None)


def _way_out(other: "SwapState") -> str:
    if other.in_block:
        return ": leave its block first"
    return ": put its training weights back first (train(), or the next use of an EMAModel)"


def _forget(ref: "weakref.ref[SwapState]") -> None:
    if ref in _holders:
        _holders.remove(ref)
    if not _holders and _hooks:
        _hooks.pop().remove()


def names_of(groups: Sequence[Group], params: Iterable[Tensor]) -> list[str]:
    """How a warning names parameters: by name where the groups know it, else by position."""
    wanted, found, position = set(map(id, params)), [], 0
    for group in groups:
        if group.get("ema_buffers"):  # what a block does to buffers is undone
            continue
        given = group.get("param_names", ())
        for i, param in enumerate(group["params"]):
            if id(param) in wanted:
                found.append(given[i] if i < len(given) else f"parameter {position}")
            position += 1
    return found
