"""What a checkpoint holds: the inner optimizer's dict with the EMA merged into it.

    state[i]        ... the inner's entries, "ema", "ema_step" [, "ema_weights"]
    param_groups[g] ... the inner's options, "ema_step", "ema_swapped" [, "ema_decay", ...]

The keys are the same at any moment: distributed checkpoints load only what a template of the same
keys asks for, and a key that came and went would be dropped without a word. While the EMA weights
are swapped in (``ema_swapped``), "ema" is what the slot holds. For an exchanged tensor that is the
training weights; where the training weights are parked, "ema" stays the EMA, and "ema_weights"
(ignored unless ``ema_swapped``) holds the training weights in their own dtype.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ._config import check_group_decay, check_tensor
from ._shadow import ShadowSet, no_autograd
from ._slots import Group, Slot

StateDict = dict[str, Any]

STATE_KEYS = ("ema", "ema_step", "ema_weights")
GROUP_OPTIONS = ("ema_decay", "ema_enabled")
GROUP_MARKS = ("ema_step", "ema_swapped")

_GROUP = "a param group"


@dataclass(eq=False)
class Loaded:
    """A checked EMA, ready to be installed in a shadow set."""

    slots: dict[Tensor, Slot]
    step: int
    swapped: bool

    def install(self, shadow: ShadowSet) -> None:
        """Replace the shadow set's EMA; what was swapped in before is forgotten."""
        shadow.forget_cache()
        shadow.slots, shadow.step = self.slots, self.step
        shadow.swapped = shadow.counted() if self.swapped else {}
        shadow.mode = "pending" if shadow.swapped else "train"


def marks(shadow: ShadowSet) -> dict[str, Any]:
    """The entries that every param group carries."""
    return {"ema_step": shadow.step, "ema_swapped": bool(shadow.swapped)}


def slot_entries(shadow: ShadowSet, param: Tensor) -> dict[str, Tensor]:
    """The live entries of one parameter, by state key."""
    slot = shadow.slots[param]
    step = torch.tensor(shadow.ema_step(slot), dtype=torch.int64, device="cpu")
    if not slot.updates:
        # A placeholder is the weights, whenever it is looked at. In a new tensor: the old one may
        # be the template that a distributed load has just written into.
        shadow.renew(param)
    entries = {"ema": slot.ema, "ema_step": step}
    if shadow.parks(param, slot):
        entries["ema_weights"] = shadow.weights_of(param)
    return entries


def merge(
    packed: StateDict, groups: Sequence[Group], shadow: ShadowSet, may_be_swapped: bool = True
) -> StateDict:
    """The inner optimizer's state dict with the EMA in it.

    Without ``may_be_swapped`` no checkpoint is ever written while swapped, so that none needs room
    for the training weights.
    """
    shadow.look_at_memory()
    state = dict(packed["state"])
    for _, param, key in _pairs(groups, packed["param_groups"]):
        if param in shadow.slots:
            entries = slot_entries(shadow, param)
            if not may_be_swapped:
                entries.pop("ema_weights", None)
            elif "ema_weights" in entries and param not in shadow.swapped:
                # A copy: a distributed load writes into the tensors of a state dict, and these
                # must not be the model's own.
                entries["ema_weights"] = entries["ema_weights"].clone()
            state[key] = {**state.get(key, {}), **entries}
    marked = [{**group, **marks(shadow)} for group in packed["param_groups"]]
    return {**packed, "state": state, "param_groups": marked}


def split(state_dict: Mapping[str, Any]) -> tuple[StateDict, dict[Any, StateDict]]:
    """Part a checkpoint into the inner optimizer's dict and the EMA's entries by packed key."""
    rest: dict[Any, Any] = {}
    own: dict[Any, StateDict] = {}
    for key, values in state_dict["state"].items():
        if not isinstance(values, dict) or not any(k in STATE_KEYS for k in values):
            rest[key] = values
            continue
        # A partial distributed load fills entries that the checkpoint lacks with an empty dict.
        own[key] = {k: v for k, v in values.items() if k in STATE_KEYS and not _is_empty(v)}
        # An entry of the EMA alone would look initialised to the inner optimizer, and is not.
        if inner := {k: v for k, v in values.items() if k not in STATE_KEYS}:
            rest[key] = inner
    groups = [
        {k: v for k, v in group.items() if k not in GROUP_MARKS}
        for group in state_dict["param_groups"]
    ]
    own = {key: values for key, values in own.items() if values}
    return {**state_dict, "state": rest, "param_groups": groups}, own


def read(shadow: ShadowSet, groups: Sequence[Group], state_dict: Mapping[str, Any]) -> Loaded:
    """Check the EMA in a checkpoint and copy it, changing nothing.

    Raises:
        ValueError: The checkpoint is damaged or another model's; the message names the parameter.
    """
    check_form(state_dict)
    saved = state_dict["param_groups"]
    _check_sizes(groups, saved)
    for packed in saved:
        if packed.get("ema_decay") is not None:
            check_group_decay(packed["ema_decay"])
    inner, own = split(state_dict)
    entries: dict[Tensor, _Entry] = {}
    for options, param, key in _pairs(groups, saved):
        label = _label(groups, param)
        if not options.get("ema_enabled", True):
            continue
        if key in own:
            entries[param] = _Entry(param, own[key], options.get("ema_decay"), label)
        elif own and inner["state"].get(key) and param.requires_grad:
            raise ValueError(
                f"ema of {label} must be in the checkpoint like that of the other parameters, got "
                "none: the checkpoint is damaged. To go on without, load "
                "strip_ema_state_dict(checkpoint): the EMA then starts anew"
            )
    counts = [_count(g["ema_step"], _GROUP) for g in saved if "ema_step" in g]
    step = max(counts or [entry.count for entry in entries.values()], default=0)
    swapped = any(bool(group.get("ema_swapped")) for group in saved)
    slots = {param: entry.slot(shadow, step, swapped) for param, entry in entries.items()}
    return Loaded(slots, step, swapped)


def is_without_ema(state_dict: Mapping[str, Any]) -> bool:
    """Whether a checkpoint was written by a trained optimizer that had no EMA."""
    inner, own = split(state_dict)
    counted = any(group.get("ema_step", 0) for group in state_dict["param_groups"])
    return bool(inner["state"]) and not own and not counted


def keep_options(groups: Sequence[Group], before: Sequence[Group], shadow: ShadowSet) -> None:
    """Give freshly loaded groups the EMA options that the checkpoint did not know."""
    for group, old in zip(groups, before, strict=True):
        for key in GROUP_OPTIONS:
            if key in old:
                group.setdefault(key, old[key])
        group.update(marks(shadow))


class _Entry:
    """The EMA of one parameter as a checkpoint has it, checked."""

    def __init__(self, param: Tensor, saved: StateDict, decay: float | None, label: str) -> None:
        for key in ("ema", "ema_step"):
            if key not in saved:
                raise ValueError(f"{key} of {label} must be in the checkpoint, got {sorted(saved)}")
        for key in ("ema", "ema_weights"):
            if key in saved:
                check_tensor(f"{key} of {label}", saved[key], param)
        self.count = _count(saved["ema_step"], label)
        self.param, self.saved, self.decay, self.label = param, saved, decay, label

    def slot(self, shadow: ShadowSet, step: int, swapped: bool) -> Slot:
        updates, share = shadow.counter_at(self.count, step, self.decay)
        with no_autograd():
            slot = Slot(shadow.place(self.param, self.saved["ema"]), updates, share)
            if swapped and updates:
                slot.parked = self._parked(shadow, slot)
        return slot

    def _parked(self, shadow: ShadowSet, slot: Slot) -> Tensor | None:
        if "ema_weights" in self.saved:
            parked = torch.empty_like(self.param, requires_grad=False)
            return parked.copy_(self.saved["ema_weights"])
        if shadow.parks(self.param, slot):
            raise ValueError(
                f"ema_weights of {self.label} must be in a checkpoint written while swapped, got "
                "none: load it into parameters of the dtype it was saved with, call train() and "
                "save again"
            )
        return None


def _pairs(groups: Sequence[Group], saved: Sequence[Group]) -> Iterator[tuple[Group, Tensor, Any]]:
    """Unique parameters with their saved group and packed key."""
    seen: set[Tensor] = set()
    for group, packed in zip(groups, saved, strict=True):
        options = {key: group[key] for key in GROUP_OPTIONS if key in group}
        for param, key in zip(group["params"], packed["params"], strict=True):
            if param not in seen:
                seen.add(param)
                yield {**options, **packed}, param, key


def _label(groups: Sequence[Group], param: Tensor) -> str:
    for index, group in enumerate(groups):
        for position, other in enumerate(group["params"]):
            if other is param:
                names = group.get("param_names")
                return names[position] if names else f"param_groups[{index}]['params'][{position}]"
    raise KeyError("the parameter is in no param group")


def check_form(state_dict: Mapping[str, Any]) -> None:
    """Raise ValueError for what is no optimizer checkpoint at all."""
    if not {"state", "param_groups"} <= state_dict.keys():
        raise ValueError(
            "state_dict must have 'state' and 'param_groups', got the keys "
            f"{sorted(map(str, state_dict))[:5]}: it is another part of the checkpoint"
        )


def _check_sizes(groups: Sequence[Group], saved: Sequence[Group]) -> None:
    if len(saved) != len(groups):
        raise ValueError(
            f"the checkpoint must have {len(groups)} param groups like the optimizer, got "
            f"{len(saved)}: build the optimizer as it was when it was saved"
        )
    for index, (group, packed) in enumerate(zip(groups, saved, strict=True)):
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


def _is_empty(value: object) -> bool:
    return isinstance(value, dict) and not value
