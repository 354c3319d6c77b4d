"""The EMA carried inside the param groups of a checkpoint, for optimizers that do not know it.

A trainer that resumes may load a checkpoint into the bare inner optimizer before the wrapper
exists. That would cast the EMA to the parameters' dtype, and fail on a state that holds nothing
but an EMA. Tensors inside ``param_groups`` are spared both:

    state[i]        ... the inner's entries alone
    param_groups[g] ... "ema_entries": the group's marks, and one dict for each of its parameters;
                        in the first group also averaged buffers, as an EMAModel saves them

Beside the marks stand the notes of who has carried it, which nobody else needs to know.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from .._shadow.shadow_set import ShadowSet
from .._shadow.slots import Group
from . import layout, read

_ENTRIES = "ema_entries"
_BUFFERS = "buffers"


def carry(
    state_dict: layout.StateDict, notes: Mapping[str, Any] = MappingProxyType({})
) -> layout.StateDict:
    """A checkpoint with the EMA's entries moved from the state into the param groups.

    Args:
        state_dict: The checkpoint.
        notes: What the carrier wants to be told after a load, see ``notes_of``.
    """
    inner, ours = layout.split(state_dict)
    groups = [
        {
            **group,
            _ENTRIES: {
                "marks": {**{k: group[k] for k in layout.GROUP_MARKS if k in group}, **notes},
                "params": [ours.get(key, {}) for key in group["params"]],
            },
        }
        for group in state_dict["param_groups"]
    ]
    return {**state_dict, "state": inner["state"], "param_groups": groups}


def uncarry(state_dict: Mapping[str, Any]) -> layout.StateDict:
    """The inverse of ``carry``; any other checkpoint stays as it is."""
    if not isinstance(state_dict.get("param_groups"), list):
        return dict(state_dict)
    if not is_carrying(state_dict["param_groups"]):
        return dict(state_dict)
    read.check_form(state_dict)
    state, groups = dict(state_dict["state"]), []
    for index, group in enumerate(map(dict, state_dict["param_groups"])):
        carried = group.pop(_ENTRIES, None)
        if carried is not None:
            _check(carried, group["params"], f"param_groups[{index}]")
            for key, entry in zip(group["params"], carried["params"], strict=True):
                if entry:
                    state[key] = {**_entries_of(state, key), **entry}
            marks = carried["marks"].items()
            group.update({name: mark for name, mark in marks if name in layout.GROUP_MARKS})
        groups.append(group)
    return {**state_dict, "state": state, "param_groups": groups}


def unpacked(state_dict: Mapping[str, Any]) -> tuple[layout.StateDict, dict[str, Any]]:
    """The inverse of ``carry``: a checkpoint, and the notes of who has carried it."""
    return uncarry(state_dict), notes_of(state_dict.get("param_groups"))


def is_carrying(groups: Sequence[Group]) -> bool:
    """Whether live param groups hold the EMA of a checkpoint."""
    return any(isinstance(group, Mapping) and _ENTRIES in group for group in groups)


def notes_of(groups: object) -> dict[str, Any]:
    """The notes in the param groups of a checkpoint that ``uncarry`` takes, or in live ones."""
    if not isinstance(groups, list) or not is_carrying(groups):
        return {}
    marks = [group[_ENTRIES]["marks"] for group in groups if group.get(_ENTRIES) is not None]
    return {k: v for mark in marks for k, v in mark.items() if k not in layout.GROUP_MARKS}


def carried_buffers(groups: Sequence[Group]) -> Mapping[str, Any] | None:
    """The averaged buffers that param groups carry beside the EMA; None if there are none."""
    entries = (group.get(_ENTRIES) for group in groups)
    return next((e[_BUFFERS] for e in entries if isinstance(e, Mapping) and _BUFFERS in e), None)


def carry_buffers(carried: layout.StateDict, buffers: Mapping[str, Any]) -> None:
    """Have a checkpoint that ``carry`` has returned hold averaged buffers too."""
    carried["param_groups"][0][_ENTRIES][_BUFFERS] = buffers


def adopt(shadow: ShadowSet) -> None:
    """Take over the EMA that the bare inner optimizer has loaded in its param groups."""
    groups = shadow.groups
    numbers = iter(range(sum(len(group["params"]) for group in groups)))
    packed = [{**group, "params": [next(numbers) for _ in group["params"]]} for group in groups]
    state_dict = uncarry({"state": {}, "param_groups": packed})
    read.read(shadow, state_dict).install(shadow)
    drop(groups)


def drop(groups: Sequence[Group]) -> None:
    """Forget what live param groups carry."""
    for group in groups:
        group.pop(_ENTRIES, None)


def _check(carried: object, params: object, label: str) -> None:
    parts = carried if isinstance(carried, Mapping) else {}
    marks, entries = parts.get("marks"), parts.get("params")
    whole = isinstance(marks, Mapping) and isinstance(entries, list) and isinstance(params, list)
    if not whole or not all(isinstance(entry, Mapping) for entry in entries or ()):
        raise TypeError(
            f"{_ENTRIES} of {label} must hold 'marks' and a dict for each parameter in 'params', "
            f"got {sorted(map(str, parts)) or type(carried)}: the checkpoint is damaged"
        )
    if len(entries or ()) != len(params):  # type: ignore[arg-type]
        raise ValueError(
            f"{_ENTRIES} of {label} must have an entry for each of its parameters, got "
            f"{len(entries or ())}: the checkpoint is damaged"
        )
    if not all(isinstance(key, (int, str)) for key in params):  # type: ignore[attr-defined]
        raise TypeError(f"params of {label} must be a list of keys, got {params!r}: it is damaged")


def _entries_of(state: Mapping[Any, Any], key: object) -> Mapping[str, Any]:
    found = state.get(key, {})
    if not isinstance(found, Mapping):
        raise TypeError(
            f"state of parameter {key} must be a dict, got {type(found)}: it is damaged"
        )
    return found
