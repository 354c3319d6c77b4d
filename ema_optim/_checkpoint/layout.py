"""What a checkpoint holds: the inner optimizer's dict with the EMA merged into it.

    state[i]        ... the inner's entries, "ema", "ema_step" [, "ema_low"] [, "ema_weights"]
                    [, "ema:NAME" [, "ema:NAME:low"] of further windows, see ``windows``]
    param_groups[g] ... the inner's options, "ema_step", "ema_swapped", "ema_format" [, "ema_decay"]

The keys are the same at any moment: distributed checkpoints load only what a template of the same
keys asks for, and a key that came and went would be dropped without a word. While the EMA weights
are swapped in (``ema_swapped``), "ema" is what the slot holds. For an exchanged tensor that is the
training weights; where the training weights are parked, "ema" stays the EMA, and "ema_weights"
(ignored unless ``ema_swapped``) holds the training weights in their own dtype; quantized ones in
their own class, which ``torch.load(weights_only=True)`` must be allowed as for the model's file.

``ema_swapped`` is False, or a text that is not empty; the text of ``ema_format`` says which
parameters have no EMA, what the model held, and by which decay (see ``notes``). Of older files
these are not known.

The dicts of inner optimizers that have another form are nested, see ``nested``.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from .._arithmetic.formats import FORMATS
from .._engines.quantized import is_quantized
from .._engines.sharding import local, with_part
from .._shadow.options import format_name
from .._shadow.pending import model_fingerprint
from .._shadow.report import warn_skipped
from .._shadow.shadow_set import ShadowSet
from .._shadow.slots import Group
from .._warnings import warn
from . import windows
from .notes import Notes

StateDict = dict[str, Any]

STATE_KEYS = ("ema", "ema_step", "ema_weights", "ema_low")
GROUP_OPTIONS = ("ema_decay", "ema_enabled", "ema_dtype")
GROUP_MARKS = ("ema_step", "ema_swapped", "ema_format")


def saved_marks(
    shadow: ShadowSet, index: int, group: Group, params: Sequence[Tensor]
) -> dict[str, Any]:
    """The entries of a param group in a checkpoint; ``params`` are those no earlier group has."""
    live = shadow.marks(group)
    followed = {param: slot for param in params if (slot := shadow.find(param)) is not None}
    without = frozenset(i for i, p in enumerate(group["params"]) if shadow.find(p) is None)
    name = live["ema_format"]
    if shadow.mode == "pending":  # in the format of the checkpoint that was loaded
        found = {format: format_name(dtype) for dtype, format in FORMATS.items()}
        formats = [found[s.format] for s in followed.values() if s.format in found]
        name = formats[0] if formats else "default"
    model = model_fingerprint(shadow, index, followed)
    notes = Notes(name, without, model, shadow.law_text())
    return {**live, "ema_format": notes.text()}


def slot_entries(shadow: ShadowSet, param: Tensor) -> dict[str, Tensor]:
    """The live entries of one parameter, by state key."""
    slot = shadow.find(param)
    if slot is None:
        return {}
    step = torch.tensor(shadow.ema_step(slot), dtype=torch.int64, device="cpu")
    entries = {"ema": slot.ema, "ema_step": step}
    if slot.low is not None:
        entries["ema_low"] = slot.low
    if slot.parked is not None or shadow.parks(param, slot):
        entries["ema_weights"] = shadow.weights_of(param)
    return {**entries, **windows.entries_of(shadow, param)} if shadow.others else entries


def merge(packed: StateDict, shadow: ShadowSet) -> StateDict:
    """The inner optimizer's state dict with the EMA in it.

    That of a model is never written while swapped, and needs no room for the training weights.
    """
    if shadow.swap.shows_other:
        raise RuntimeError(
            "state_dict() while another average than the first window is in the parameters: leave "
            "the block of swap_ema_weights(decay=...) first"
        )
    groups = shadow.groups
    shadow.offload.settle()
    warn_skipped(shadow)
    shadow.look_at_memory()
    shadow.renew_placeholders()
    found = packed_pairs(groups, packed["param_groups"])
    keys = {pair.param: pair.key for pair in found}
    if not shadow.swapped.keys() <= keys.keys():
        raise RuntimeError(
            "state_dict() after parameters have left the param groups while swapped: their "
            "training weights would be in no file. Call optimizer.train() first"
        )
    state = dict(packed["state"])
    for param, key in keys.items():
        if entries := slot_entries(shadow, param):
            if not shadow.sees_steps:
                entries.pop("ema_weights", None)
            elif "ema_weights" in entries and param not in shadow.swapped:
                # A copy: a distributed load writes into the tensors of a state dict, and these
                # must not be the model's own.
                entries["ema_weights"] = _writable(shadow, param, entries["ema_weights"])
            _refuse_taken(state.get(key, {}), "the inner optimizer")
            state[key] = {**state.get(key, {}), **entries}
    pairs = list(zip(groups, packed["param_groups"], strict=True))
    if not shadow.sees_steps:
        marked = [{**saved, **_model_marks(shadow, group)} for group, saved in pairs]
        return {**packed, "state": state, "param_groups": marked}
    unique: list[list[Tensor]] = [[] for _ in groups]
    for pair in found:
        unique[pair.group].append(pair.param)
    marked = [
        {**saved, **saved_marks(shadow, index, group, ours)}
        for index, ((group, saved), ours) in enumerate(zip(pairs, unique, strict=True))
    ]
    return {**packed, "state": state, "param_groups": marked}


def _model_marks(shadow: ShadowSet, group: Group) -> dict[str, Any]:
    marks = shadow.marks(group)
    return {**marks, "ema_format": Notes(marks["ema_format"], law=shadow.law_text()).text()}


def ours_of(entries: Iterable[Any]) -> list[Any]:
    """The keys of a parameter's state that are the EMA's."""
    start = windows.PREFIX
    return [k for k in entries if k in STATE_KEYS or (isinstance(k, str) and k.startswith(start))]


def _writable(shadow: ShadowSet, param: Tensor, weights: Tensor) -> Tensor:
    # What it holds is of no use while nothing is swapped: beside an EMA in host memory that is
    # some memory of its form.
    slot, device = shadow.find(param), shadow.checkpoint_device
    if slot is not None and slot.staging is not None:
        return slot.staging
    if device is None or is_quantized(param):
        return weights.clone()
    return with_part(param, local(weights).to(device, copy=True))


def split(state_dict: Mapping[str, Any]) -> tuple[StateDict, dict[Any, StateDict]]:
    """Part a checkpoint into the inner optimizer's dict and the EMA's entries by packed key."""
    rest: dict[Any, Any] = {}
    ours: dict[Any, StateDict] = {}
    for key, values in state_dict["state"].items():
        taken = ours_of(values) if isinstance(values, dict) else ()
        if not taken:
            rest[key] = values
            continue
        # A partial distributed load fills entries that the checkpoint lacks with an empty dict.
        ours[key] = {
            k: v for k, v in values.items() if k in taken and (not isinstance(v, dict) or v)
        }
        # An entry of the EMA alone would look initialised to the inner optimizer, and is not.
        if inner := {k: v for k, v in values.items() if k not in taken}:
            rest[key] = inner
    groups = [
        {k: v for k, v in group.items() if k not in GROUP_MARKS}
        for group in state_dict["param_groups"]
    ]
    ours = {key: values for key, values in ours.items() if values}
    return {**state_dict, "state": rest, "param_groups": groups}, ours


def clear_reserved(inner: Optimizer) -> bool:
    """See to it that the inner optimizer's state has none of the EMA's keys.

    Returns:
        Whether there were any: an EMA that was loaded before the optimizer was wrapped.

    Raises:
        TypeError: It keeps something of its own under such a key.
    """
    stale = 0
    for entry in inner.state.values():
        taken = _taken(entry)
        if not {"ema", "ema_step"} <= set(taken):
            _refuse_taken(entry, type(inner).__name__)
        stale += len([entry.pop(key) for key in taken])
    if stale:
        warn(
            "the optimizer has loaded an EMA before it was wrapped, and torch has cast it to the "
            "weights' dtype: the EMA begins anew. Wrap first, then load the checkpoint"
        )
    return bool(stale)


def refuse_reserved(inner: Optimizer) -> None:
    """Raise TypeError for an inner optimizer that keeps something of its own under our keys."""
    for entry in inner.state.values():
        _refuse_taken(entry, type(inner).__name__)


def _refuse_taken(entry: object, name: str) -> None:
    if taken := _taken(entry):
        raise TypeError(
            f"optimizer must not use the state keys {STATE_KEYS}, got {taken} in the state of "
            f"{name}: use EMAModel beside it"
        )


def _taken(entry: object) -> list[str]:
    return ours_of(entry) if isinstance(entry, dict) else []


class Pair(NamedTuple):
    """A parameter, its key in a checkpoint, and where it is in the param groups."""

    param: Tensor
    key: Any
    group: int
    position: int


def packed_pairs(groups: Sequence[Group], saved: Sequence[Group]) -> list[Pair]:
    """Unique parameters with their packed keys."""
    pairs: dict[Tensor, Pair] = {}
    for index, (group, packed) in enumerate(zip(groups, saved, strict=True)):
        for position, param in enumerate(group["params"]):
            if param not in pairs:
                pairs[param] = Pair(param, packed["params"][position], index, position)
    return list(pairs.values())


def options_of(group: Group) -> Group:
    """A group's own EMA options."""
    return {key: group[key] for key in GROUP_OPTIONS if key in group}
