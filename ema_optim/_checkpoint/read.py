"""Reading the EMA out of a checkpoint: everything is checked before anything changes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .._arithmetic.formats import FORMATS, format_of
from .._engines.quantized import copy_like
from .._shadow.options import check_low, check_options, check_tensor, format_name
from .._shadow.shadow_set import ShadowSet, no_autograd
from .._shadow.slots import Group, Slot
from .layout import GROUP_OPTIONS, StateDict, marks, packed_pairs, split


@dataclass(eq=False)
class Loaded:
    """A checked EMA, ready to be installed in a shadow set.

    Attributes:
        slots: Every slot of the checkpoint.
        step: The optimizer's clock.
        swapped: Whether the checkpoint was written while swapped. Every slot is exchanged back
            then, whatever this run averages: the training weights are nowhere else. Where a
            placeholder was saved it equals the weights, and nothing changes.
        cold: Whether the checkpoint is of a trained optimizer but holds no average.
        trainer_step: The trainer's step at which it was saved, where a trainer has noted it.
    """

    slots: dict[Tensor, Slot]
    step: int = 0
    swapped: bool = False
    cold: bool = False
    trainer_step: int | None = None

    def install(self, shadow: ShadowSet) -> None:
        """Replace the shadow set's EMA; what was swapped in before is forgotten."""
        shadow.clear()
        shadow.slots, shadow.step = self.slots, self.step
        shadow.swapped = dict(self.slots) if self.swapped else {}
        shadow.trainer_step = self.trainer_step
        shadow.mode = "pending" if shadow.swapped else "train"


def read(shadow: ShadowSet, groups: Sequence[Group], state_dict: Mapping[str, Any]) -> Loaded:
    """Check the EMA in a checkpoint and copy it, changing nothing.

    Raises:
        ValueError, TypeError: The checkpoint is damaged or another model's; the message names the
            parameter.
    """
    check_form(state_dict)
    _check_groups(groups, state_dict["param_groups"])
    inner, own = split(state_dict)
    swapped = any(bool(group.get("ema_swapped")) for group in state_dict["param_groups"])
    inner["param_groups"] = state_dict["param_groups"]  # with the marks
    entries, missing = _find_entries(groups, inner, own, swapped)
    if missing and (swapped or entries):
        raise ValueError(
            f"ema of {missing[0]} must be in the checkpoint like that of the other parameters, "
            "got none: the checkpoint is damaged. To go on without, load "
            "strip_ema_state_dict(checkpoint): the EMA then starts anew"
        )
    if not swapped and not any(e.count for e in entries) and any(inner["state"].values()):
        # Nothing was averaged. A clock without averages would only be that of disabled groups.
        cold = bool(missing or entries)
        return Loaded({}, 0 if cold else _clock(state_dict, entries), cold=cold)
    step = _clock(state_dict, entries)
    slots = {
        entry.param: entry.slot(shadow, step if entry.clock is None else entry.clock, swapped)
        for entry in entries
    }
    noted = [g["ema_global_step"] for g in state_dict["param_groups"] if "ema_global_step" in g]
    return Loaded(slots, step, swapped, trainer_step=max(noted, default=None))


def keep_options(groups: Sequence[Group], before: Sequence[Group], shadow: ShadowSet) -> None:
    """Give freshly loaded groups the EMA options that the checkpoint did not know."""
    for group, old in zip(groups, before, strict=True):
        for key in GROUP_OPTIONS:
            if key in old:
                group.setdefault(key, old[key])
        group.update(marks(shadow, group))


def check_form(state_dict: Mapping[str, Any]) -> None:
    """Raise ValueError for what is no optimizer checkpoint at all."""
    parts = state_dict if isinstance(state_dict, Mapping) else {}
    groups = parts.get("param_groups")
    whole = isinstance(parts.get("state"), Mapping) and isinstance(groups, list)
    if not whole or not all(isinstance(g, Mapping) and "params" in g for g in groups or ()):
        raise ValueError(
            "state_dict must have 'state' and 'param_groups' as an optimizer's has, got "
            f"{sorted(map(str, parts))[:5] or type(state_dict)}: it is no optimizer's checkpoint"
        )


class _Entry:
    """The EMA of one parameter as a checkpoint has it, checked."""

    def __init__(self, param: Tensor, saved: StateDict, options: Group, label: str) -> None:
        for key in ("ema", "ema_step"):
            if key not in saved:
                raise ValueError(f"{key} of {label} must be in the checkpoint, got {sorted(saved)}")
        for key in ("ema", "ema_weights"):
            if key in saved:
                check_tensor(f"{key} of {label}", saved[key], param)
        if "ema_low" in saved:
            check_low(f"ema_low of {label}", saved["ema_low"], param)
        _check_format(saved, options.get("ema_format"), label)
        self.count = _count(saved["ema_step"], label)
        clock = options.get("ema_step")  # of its group; old checkpoints of EMAModel have none
        self.clock = None if clock is None else _count(clock, "a param group")
        self.param, self.saved, self.label = param, saved, label
        self.decay, self.dtype = options.get("ema_decay"), options.get("ema_dtype")

    def slot(self, shadow: ShadowSet, step: int, swapped: bool) -> Slot:
        if self.count > step:
            raise ValueError(
                f"ema_step of {self.label} must be at most its param group's {step}, got "
                f"{self.count}: the checkpoint is damaged"
            )
        updates, share = shadow.counter_at(self.count, step, self.decay)
        parts = self.saved["ema"], self.saved.get("ema_low")
        slot = shadow.slot_of(self.param, parts, self.dtype)
        slot.set_counts(step, updates, share)
        if swapped:
            with no_autograd():
                slot.parked = self._parked(shadow, slot)
        return slot

    def _parked(self, shadow: ShadowSet, slot: Slot) -> Tensor | None:
        if "ema_weights" in self.saved:
            return copy_like(self.param, self.saved["ema_weights"])
        if shadow.parks(self.param, slot):
            raise ValueError(
                f"ema_weights of {self.label} must be in a checkpoint written while swapped, got "
                "none: load it into a model like the one it was saved from, call train() and save "
                "again"
            )
        return None


def _find_entries(
    groups: Sequence[Group], inner: StateDict, own: dict[Any, StateDict], swapped: bool
) -> tuple[list[_Entry], list[str]]:
    """The EMA's entries, and the labels of parameters that lack theirs."""
    if own and all(_is_cast(entry.get("ema_step")) for entry in own.values()):
        own = {}
    entries, missing = [], []
    for options, param, key in packed_pairs(groups, inner["param_groups"]):
        enabled = options.get("ema_enabled", True)
        if key in own and (enabled or swapped):
            label = _label(groups, param)
            entries.append(_Entry(param, own[key], options, label))
        elif enabled and param.requires_grad and inner["state"].get(key):
            missing.append(_label(groups, param))
    return entries, missing


def _clock(state_dict: Mapping[str, Any], entries: Sequence[_Entry]) -> int:
    marked = [g["ema_step"] for g in state_dict["param_groups"] if "ema_step" in g]
    counts = [_count(mark, "a param group") for mark in marked]
    return max(counts or [entry.count for entry in entries], default=0)


def _label(groups: Sequence[Group], param: Tensor) -> str:
    for index, group in enumerate(groups):
        for position, other in enumerate(group["params"]):
            if other is param:
                names = group.get("param_names")
                return names[position] if names else f"param_groups[{index}]['params'][{position}]"
    raise KeyError("the parameter is in no param group")


def _check_groups(groups: Sequence[Group], saved: Sequence[Group]) -> None:
    if len(saved) != len(groups):
        raise ValueError(
            f"the checkpoint must have {len(groups)} param groups like the optimizer, got "
            f"{len(saved)}: build the optimizer as it was when it was saved"
        )
    for index, (group, packed) in enumerate(zip(groups, saved, strict=True)):
        check_options(packed)
        if len(packed["params"]) != len(group["params"]):
            raise ValueError(
                f"param_groups[{index}] of the checkpoint must have {len(group['params'])} "
                f"parameters like the optimizer's, got {len(packed['params'])}"
            )


def _count(value: object, label: str) -> int:
    if isinstance(value, torch.Tensor) and value.numel() == 1 and not value.is_floating_point():
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(
            f"ema_step of {label} must be a count (an integer, 0 or more), got {value!r}: the "
            "checkpoint is damaged"
        )
    return value


def _check_format(saved: StateDict, name: str | None, label: str) -> None:
    """Raise ValueError for an EMA that is not in the format it was saved in."""
    low = saved.get("ema_low")
    found = format_of(saved["ema"].dtype, None if low is None else low.dtype)
    named = {format_name(dtype): format for dtype, format in FORMATS.items()}
    whole = found.low is None and found.main.itemsize >= 4
    if name is None or (found == named[name] if name in named else whole):
        return
    raise ValueError(
        f"ema of {label} must be as it was saved ({name}), got {found.main} and {found.low}: a "
        "distributed load casts to its template. Load it into an optimizer built with the dtype it "
        "was saved with"
    )


def _is_cast(count: object) -> bool:
    # Torch casts what it does not know to the parameter's dtype: the checkpoint has passed through
    # an optimizer without an EMA, which carried the entries along and did not average.
    return isinstance(count, torch.Tensor) and count.is_floating_point()
