"""The EMA in DeepSpeed's checkpoints: in the state dict of the torch optimizer inside.

As ``_checkpoint.layout`` has it, but for ``ema_step``, which is a Python int here: DeepSpeed's
``ds_to_universal`` takes the padding off every tensor that is not called "step", and fails on one
without dimensions.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .._arithmetic.formats import FORMATS
from .._checkpoint import layout, read
from .._checkpoint.notes import parse
from .._shadow.options import format_name
from .._shadow.shadow_set import ShadowSet
from .._shadow.slots import Group

STEP = "ema_global_step"  # the engine's step at which an EMA was saved, in every param group
COLD = "the checkpoint holds no EMA: it begins at the weights of the next step"
STALE = (
    "the EMA in the checkpoint is of step {}, and the checkpoint of step {}, since an engine "
    "without EMAEngine has written it: the EMA begins at the weights of the next step"
)

_NAMED = {format_name(dtype): format for dtype, format in FORMATS.items()}


def merged(state_dict: dict[str, Any], shadow: ShadowSet, step: int) -> dict[str, Any]:
    """The torch optimizer's state dict with the EMA in it, and the engine's step."""
    made = layout.merge(state_dict, shadow)
    for entry in made["state"].values():
        if isinstance(entry, dict) and torch.is_tensor(entry.get("ema_step")):
            entry["ema_step"] = int(entry["ema_step"])
    groups = [{**group, STEP: step} for group in made["param_groups"]]
    return {**made, "param_groups": groups}


def stripped(state_dict: dict[str, Any]) -> dict[str, Any]:
    """The inverse of ``merged``: what the torch optimizer alone would have written."""
    inner = layout.split(state_dict)[0]
    groups = [{k: v for k, v in group.items() if k != STEP} for group in inner["param_groups"]]
    return {**inner, "param_groups": groups}


def notes_of(groups: Sequence[Group]) -> dict[str, Any]:
    """The engine's step in the param groups of a checkpoint."""
    steps = [group[STEP] for group in groups if STEP in group]
    return {STEP: steps[0]} if steps else {}


def keep_options(
    groups: Sequence[Group],
    before: Sequence[Group],
    saved: Sequence[Group],
    given: Sequence[Group],
) -> None:
    """Give freshly loaded groups the EMA options that go before the checkpoint's."""
    options = layout.options_of
    for group, old, new, own in zip(groups, before, saved, given, strict=True):
        group.update({**options(old), **options(new), **own})


def adopt(shadow: ShadowSet, base: Any) -> None:
    """Take over the EMA that a bare optimizer has loaded, out of its state and its groups."""
    notes = notes_of(base.param_groups)
    groups, numbers = [], dict[Tensor, int]()
    for live, ours in zip(base.param_groups, shadow.groups, strict=True):
        keys = [numbers.setdefault(param, len(numbers)) for param in ours["params"]]
        live.pop(STEP, None)
        marks = {key: live.pop(key) for key in layout.GROUP_MARKS if key in live}
        groups.append({**layout.options_of(live), **marks, "params": keys})
    formats = {
        key: parse(group.get("ema_format"), "the checkpoint").format
        for group in groups
        for key in group["params"]
    }
    state = {
        number: {**base.state.get(param, {}), **_taken(base.state.get(param, {}), formats[number])}
        for param, number in numbers.items()
    }
    if any("ema" in entry for entry in state.values()):
        read.read(shadow, {"state": state, "param_groups": groups}).install(shadow, notes)


def _taken(entry: dict[str, Any], name: str | None) -> Mapping[str, Any]:
    """The EMA's entries in the dtypes in which they were saved; torch has cast them to fp32."""
    ours = {key: entry.pop(key) for key in layout.STATE_KEYS if key in entry}
    format = _NAMED.get(name or "default")
    if format is not None and "ema" in ours:
        ours["ema"] = ours["ema"].to(format.main)
        if format.low is not None:
            ours["ema_low"] = ours["ema_low"].to(format.low)
    return ours
