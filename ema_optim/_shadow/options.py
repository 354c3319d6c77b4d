"""What a user may set, and what is said of a value that is out of its range."""

from collections.abc import Mapping, Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .._arithmetic.formats import FORMATS, EMADtype, Format, format_of
from .._engines.sharding import check_layout, refuse_flat
from .._warnings import warn
from ..schedules import Decay, as_decay
from .mistakes import for_optimizer
from .slots import Group

_COMPLEX = {torch.float32: torch.complex64, torch.float64: torch.complex128}


class Options(NamedTuple):
    """What a param group wants of its EMA, its own options resolved against the others'."""

    decay: Decay
    dtype: EMADtype
    enabled: bool = True

    def of(self, group: Group) -> "Options":
        """The options of a group, these being those of a group without any of its own."""
        decay, dtype = group.get("ema_decay"), group.get("ema_dtype")
        return Options(
            self.decay if decay is None else decay,
            self.dtype if dtype is None else dtype,
            group.get("ema_enabled", True),
        )


@cache
def ema_format(dtype: torch.dtype, wanted: EMADtype) -> Format:
    """How the EMA of a parameter is stored; that of a complex one always as it is by default."""
    if isinstance(wanted, torch.dtype) and wanted not in FORMATS:
        return format_of(ema_dtype(dtype, wanted))
    if wanted is None or dtype.is_complex:
        return format_of(ema_dtype(dtype, None))
    return FORMATS[wanted]


def whole_format(dtype: torch.dtype, wanted: EMADtype) -> Format:
    """How the EMA of a parameter is handed out: in one tensor that holds all of it."""
    return ema_format(dtype, None if wanted in FORMATS else wanted)


def format_name(wanted: EMADtype) -> str:
    """What a checkpoint calls a format."""
    return "default" if wanted is None else str(wanted).removeprefix("torch.")


def ema_dtype(dtype: torch.dtype, wanted: torch.dtype | None) -> torch.dtype:
    """The dtype of the EMA of a parameter: fp32 for every narrower float, complex stays complex."""
    if dtype.is_complex:
        if wanted is not None:
            return _COMPLEX[wanted]
        return torch.complex64 if dtype.itemsize < 8 else dtype
    if wanted is not None:
        return wanted
    return torch.float32 if dtype.itemsize < 4 else dtype


def as_group_decay(decay: object) -> float:
    """A group's own ``ema_decay`` is a float: schedules belong to the whole optimizer."""
    if callable(decay):
        raise TypeError(
            "ema_decay of a param group must be a float, got a callable: pass a schedule as decay="
        )
    try:
        return float(as_decay(decay))  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:
        raise type(error)(f"ema_decay of a param group: {error}") from None


def warn_of_tau(decay: object) -> None:
    """Warn of a number that is more often the share of the new weights, or a typing error."""
    if isinstance(decay, Mapping):
        for window in decay.values():
            warn_of_tau(window)
    if isinstance(decay, (int, float)) and 0 < decay < 0.5:
        warn(
            f"decay={decay:g} looks like tau, the share of new weights, or like a typing error: "
            f"decay = 1 - tau, here {1 - decay:g}. As it is, the EMA is hardly more than the last "
            "weights",
            once="tau",
        )


def as_count(name: str, value: int, least: int) -> int:
    """Return ``value`` if it is an int of at least ``least``; raise TypeError or ValueError."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int (optimizer steps), got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least} (optimizer steps), got {value}")
    return value


def as_flag(name: str, value: bool) -> bool:
    """Return ``value`` if it is True or False; raise TypeError."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return value


def as_dtype(dtype: object, what: str = "dtype") -> EMADtype:
    """Return ``dtype`` if an EMA can be stored so; raise TypeError or ValueError."""
    if dtype is not None and not isinstance(dtype, (torch.dtype, str)):
        raise TypeError(f"{what} must be a torch.dtype, a format's name or None, got {dtype!r}")
    allowed = (None, torch.float32, torch.float64, *FORMATS)
    if dtype not in allowed:
        shown = ", ".join(repr(name) for name in allowed)
        raise ValueError(
            f"{what} must be one of {shown}, got {dtype!r}: rounded to nearest into a narrower "
            "dtype, an EMA stops moving; the narrow ones of these are rounded stochastically"
        )
    return dtype


def as_device(device: object, what: str = "device") -> str | None:
    """Return "cpu" or None if an EMA can be there; raise TypeError or ValueError."""
    if device is None:
        return None
    if not isinstance(device, (str, torch.device)):
        raise TypeError(f"{what} must be None or 'cpu', got {device!r}")
    if str(device) != "cpu":
        raise ValueError(
            f"{what} must be None (what is kept of a parameter lies on its device and follows it) "
            f"or 'cpu' (in pinned host memory), got {str(device)!r}: leave it out"
        )
    return "cpu"


def as_module(module: nn.Module | None) -> nn.Module | None:
    """Return ``module`` if it is one or None; raise TypeError."""
    if module is not None and not isinstance(module, nn.Module):
        raise TypeError(f"module must be a torch.nn.Module or None, got {type(module)}")
    return module


def check_options(group: Group) -> None:
    """Raise TypeError or ValueError for a param group's own EMA options."""
    if group.get("ema_decay") is not None:
        as_group_decay(group["ema_decay"])
    as_dtype(group.get("ema_dtype"), "ema_dtype of a param group")
    if not isinstance(group.get("ema_enabled", True), bool):
        raise TypeError(f"ema_enabled must be True or False, got {group['ema_enabled']!r}")


def check_tensor(what: str, value: object, param: Tensor) -> None:
    """Raise TypeError or ValueError for a value that cannot be the EMA of ``param``."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{what} must be a tensor, got {value!r}")
    if value.is_meta or value.layout != torch.strided:
        _raise_not_dense(what, value)
    floats = value.is_floating_point() or value.is_complex()
    if not floats or value.shape != param.shape or value.is_complex() != param.is_complex():
        raise ValueError(
            f"{what} must have shape {tuple(param.shape)} and fit {param.dtype}, got "
            f"{tuple(value.shape)} and {value.dtype}: it is damaged or another model's"
        )
    check_layout(what, value, param)


def _raise_not_dense(what: str, value: Tensor) -> None:
    where = "one on meta" if value.is_meta else f"{value.layout}"
    raise ValueError(f"{what} must be a dense tensor with values, got {where}: it is damaged")


def check_low(what: str, low: object, param: Tensor) -> None:
    """Raise ValueError for a value that cannot be the low-order part of the EMA of ``param``."""
    kinds = [format.low for format in FORMATS.values() if format.low]
    if not isinstance(low, torch.Tensor):
        raise TypeError(f"{what} must be a tensor, got {low!r}")
    if low.is_meta or low.layout != torch.strided:
        _raise_not_dense(what, low)
    if low.dtype not in kinds or low.shape != param.shape:
        got = tuple(low.shape), low.dtype
        raise ValueError(
            f"{what} must have shape {tuple(param.shape)} and a dtype of {kinds}, got {got}: it is "
            "damaged or another model's"
        )
    check_layout(what, low, param)


def same_option(one: object, other: object) -> bool:
    """Whether two values of a constructor argument are equal."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return list(one.items()) == list(other.items())  # the first window is the EMA
    return bool(one == other)


def check_wrappable(optimizer: Optimizer, wrapper: type[Optimizer]) -> None:
    """Raise TypeError for what cannot be wrapped, or is a wrapper already."""
    if isinstance(optimizer, type):
        raise TypeError(
            f"optimizer must be an optimizer, got the class {optimizer.__name__}: build it first, "
            "or use EMAOptimizer.for_class"
        )
    if not isinstance(optimizer, Optimizer):
        remedy = for_optimizer(optimizer)
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer)}{remedy}")
    if isinstance(optimizer, wrapper):
        raise TypeError("optimizer must not be an EMAOptimizer already, got one: use that one")


def check_groups(groups: Sequence[Group]) -> None:
    """Raise TypeError or ValueError for param groups that cannot be averaged."""
    for group in groups:
        check_options(group)
        refuse_flat(group["params"])


def check_new_group(group: Group) -> None:
    """Raise TypeError or ValueError for a param group that cannot be added."""
    if not isinstance(group, dict) or "params" not in group:
        raise TypeError(f"param_group must be a dict with 'params', got {group!r}")
    if not isinstance(group["params"], (torch.Tensor, set)):
        group["params"] = list(group["params"])  # a generator would be empty for the inner
    check_options(group)
