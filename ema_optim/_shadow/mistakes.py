"""What is said of a value that was handed over in place of another: the way to the right one."""

import os
from collections.abc import Mapping
from typing import Any, NoReturn

from torch import Tensor, nn
from torch.optim import Optimizer

NOTHING = (
    "nothing was averaged at this step: no parameter requires a gradient, has one or has an EMA "
    "already, and the step does not count. Let the parameters require gradients, or leave the EMA "
    "out"
)
BFLOAT16 = (
    "an EMA in bfloat16 is off by about one rounding of the weights, 0.3 %: while the learning "
    "rate is high that is little of what the EMA averages away, and more than all of it once the "
    "learning rate is decayed. There use dtype='float24'"
)


def for_optimizer(given: object) -> str:
    """The remedy for what is no optimizer."""
    if isinstance(given, nn.Module):
        return ": pass torch.optim.AdamW(model.parameters(), ...), or use EMAModel(model)"
    if hasattr(given, "get_ema_state"):
        return ": an EMAModel stands beside an optimizer, use one of the two"
    return ": pass a built optimizer, EMAOptimizer(torch.optim.AdamW(model.parameters(), ...))"


def check_model(model: object) -> None:
    """Raise TypeError for what is no model."""
    if isinstance(model, nn.Module):
        return
    remedy = "pass the model itself"
    if isinstance(model, Optimizer):
        remedy += "; for an optimizer there is EMAOptimizer(optimizer)"
    raise TypeError(f"model must be a torch.nn.Module, got {type(model)}: {remedy}")


def refuse_model(given: object) -> NoReturn:
    """Raise TypeError for what was handed to ``apply_ema()`` without a name."""
    got = type(given) if isinstance(given, (nn.Module, Optimizer)) else repr(given)
    raise TypeError(
        f"apply_ema() takes no model, got {got}: it writes to the weights that are trained. An "
        "average is named by decay=, as in apply_ema(decay='long'); another model loads what "
        "get_ema_state() returns"
    )


def check_by_name(state: object) -> None:
    """Raise TypeError for what holds no tensors by name."""
    if not isinstance(state, Mapping):
        raise TypeError(f"state must hold tensors by parameter name, got {_shown(state)}")
    if state and not any(isinstance(value, Tensor) for value in state.values()):
        raise TypeError(
            f"state must hold tensors by parameter name, got {_keys(state)}: pass what "
            "get_ema_state() returned; a whole checkpoint goes to load_state_dict(), part by part"
        )


def for_checkpoint(given: object) -> str:
    """What was given for an optimizer's checkpoint, and the remedy."""
    if not isinstance(given, Mapping):
        return _shown(given)
    parts = [key for key, value in given.items() if _is_checkpoint(value)]
    if parts:
        return f"{_keys(given)}: pass a part of it, checkpoint[{parts[0]!r}]"
    if given and all(isinstance(value, Tensor) for value in given.values()):
        return f"{_keys(given)}: it is a model's, pass it to model.load_state_dict()"
    return f"{_keys(given) if given else type(given)}: it is no optimizer's checkpoint"


def _is_checkpoint(value: Any) -> bool:
    known = isinstance(value, Mapping)
    return known and (value.keys() >= {"state", "param_groups"} or value.keys() == {"inner", "ema"})


def _shown(given: object) -> str:
    if isinstance(given, (str, os.PathLike)):
        return f"the path {os.fspath(given)!r}: pass what torch.load() returns for it"
    return f"{type(given)}: it is no checkpoint"


def _keys(state: Mapping[Any, Any]) -> list[str]:
    return sorted(map(str, state))[:5]
