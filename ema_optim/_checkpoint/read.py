"""Reading the EMA out of a checkpoint: everything is checked before anything changes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._arithmetic.formats import FORMATS, format_of
from .._shadow.holdings import no_autograd
from .._shadow.mistakes import for_checkpoint
from .._shadow.options import Options, check_low, check_options, check_tensor, format_name
from .._shadow.pending import Held, held
from .._shadow.shadow_set import ShadowSet
from .._shadow.slots import Group, Parts, Slot
from .layout import Pair, StateDict, options_of, packed_pairs, split
from .notes import Notes, parse
from .windows import AS_EVER, Difference, compare, part_of


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
        held: What the model held then, as far as the checkpoint tells.
        further: The slots of the further windows, by name.
        difference: What the checkpoint says of its windows otherwise than this run.
        inner: What is the inner optimizer's.
    """

    slots: dict[Tensor, Slot]
    step: int = 0
    swapped: bool = False
    cold: bool = False
    held: Held | None = None
    further: Mapping[str, dict[Tensor, Slot]] = field(default_factory=dict)
    difference: Difference = AS_EVER
    inner: StateDict = field(default_factory=dict)

    def install(self, shadow: ShadowSet, notes: Mapping[str, Any] | None = None) -> None:
        """Replace the shadow set's EMA; what was swapped in before is forgotten."""
        law_changed = self.difference.law_changed
        shadow.load(
            self.slots, self.step, self.swapped, self.held, notes, self.further, law_changed
        )
        if self.difference != AS_EVER:
            self.difference.tell(shadow)


def read(shadow: ShadowSet, state_dict: Mapping[str, Any]) -> Loaded:
    """Check the EMA in a checkpoint and copy it, changing nothing.

    Raises:
        ValueError, TypeError: The checkpoint is damaged or another model's; the message names the
            parameter.
    """
    check_form(state_dict)
    groups, saved = shadow.groups, state_dict["param_groups"]
    if shadow.others:
        shadow.refuse_own_decays(saved)
    notes = _check_groups(groups, saved)
    pairs = packed_pairs(groups, saved)
    _check_states(groups, pairs, state_dict["state"])
    inner, ours = split(state_dict)
    swapped = any(bool(group.get("ema_swapped")) for group in saved)
    given = [_given(shadow, index) for index in range(len(groups))]
    options = [
        _Saved.of({**options_of(group), **packed, **mine}, note, shadow.options, index)
        for index, (group, packed, mine, note) in enumerate(
            zip(groups, saved, given, notes, strict=True)
        )
    ]
    entries, missing = _find_entries(groups, pairs, options, inner, ours, swapped)
    if swapped or entries:
        _check_missing(groups, pairs, missing, ours, notes)
    if not swapped and not any(e.count for e in entries) and any(inner["state"].values()):
        # Nothing was averaged. A clock without averages would only be that of disabled groups.
        cold = bool(missing or entries)
        return Loaded({}, 0 if cold else _clock(state_dict, entries), cold=cold, inner=inner)
    difference = compare(shadow, notes, ours.values())
    step = _clock(state_dict, entries)
    with no_autograd():
        slots = {entry.param: entry.slot(shadow, step, swapped) for entry in entries}
        further = {
            name: {entry.param: entry.of(name).slot(other, step, swapped) for entry in entries}
            for name, other in shadow.others.items()
        }
    texts = _texts(pairs, slots, notes)
    return Loaded(slots, step, swapped, False, held(texts), further, difference, inner)


def keep_options(shadow: ShadowSet, before: Sequence[Group], saved: Sequence[Group]) -> None:
    """Give freshly loaded groups the EMA options that go before the checkpoint's.

    What a group was given when it was wrapped or added wins; what was set on it later is kept where
    the checkpoint does not know it.
    """
    live = shadow.source.param_groups
    for index, (group, old, new) in enumerate(zip(live, before, saved, strict=True)):
        group.update({**options_of(old), **options_of(new), **_given(shadow, index)})


def _given(shadow: ShadowSet, index: int) -> Group:
    return shadow.given[index] if index < len(shadow.given) else {}


def check_form(state_dict: Mapping[str, Any]) -> None:
    """Raise ValueError for what is no optimizer checkpoint at all."""
    parts = state_dict if isinstance(state_dict, Mapping) else {}
    groups = parts.get("param_groups")
    whole = isinstance(parts.get("state"), Mapping) and isinstance(groups, list)
    if not whole or not all(isinstance(g, Mapping) and "params" in g for g in groups or ()):
        raise ValueError(
            "state_dict must have 'state' and 'param_groups' as an optimizer's has, got "
            f"{for_checkpoint(state_dict)}"
        )


_NAMED = {format_name(dtype): format for dtype, format in FORMATS.items()}


class _Saved(NamedTuple):
    """What a checkpoint says of a param group, this run's own options before it."""

    options: Options
    decay: float | None  # its own
    clock: int | None  # old checkpoints of EMAModel have none
    format: str | None

    @classmethod
    def of(cls, group: Group, note: Notes, options: Options, index: int) -> "_Saved":
        clock = group.get("ema_step")
        known = None if clock is None else _count(clock, f"param_groups[{index}]")
        return cls(options.of(group), group.get("ema_decay"), known, note.format)


class _Entry:
    """The EMA of one parameter as a checkpoint has it, checked."""

    is_first = True  # of the windows

    def __init__(self, param: Tensor, saved: StateDict, group: _Saved, label: str) -> None:
        for key in ("ema", "ema_step"):
            if key not in saved:
                raise ValueError(f"{key} of {label} must be in the checkpoint, got {sorted(saved)}")
        for key in ("ema", "ema_weights"):
            if key in saved:
                check_tensor(f"{key} of {label}", saved[key], param)
        if "ema_low" in saved:
            check_low(f"ema_low of {label}", saved["ema_low"], param)
        _check_format(saved, group.format, label)
        self.count = _count(saved["ema_step"], label)
        self.param, self.saved, self.group, self.label = param, saved, group, label

    def of(self, window: str) -> "_Entry":
        """That of a further window."""
        saved = part_of(self.saved, window, self.label)
        entry = _Entry(self.param, saved, self.group, f"{self.label} ({window})")
        entry.is_first = False
        return entry

    def slot(self, shadow: ShadowSet, step: int, swapped: bool) -> Slot:
        step = step if self.group.clock is None else self.group.clock
        if self.count > step:
            raise ValueError(
                f"ema_step of {self.label} must be at most its param group's {step}, got "
                f"{self.count}: the checkpoint is damaged"
            )
        updates, share = shadow.counter_at(self.count, step, self.group.decay)
        parts = self.saved["ema"], self.saved.get("ema_low")
        if swapped:
            slot = self._exchanged(shadow, parts)
        else:
            slot = shadow.new_slot(self.param, self.group.options, parts, step)
        slot.set_counts(step, updates, share)
        return slot

    def _exchanged(self, shadow: ShadowSet, parts: Parts) -> Slot:
        """What is exchanged back in the format in which it was saved, and converted only then.

        An EMA that is in the model cannot be converted before: the model's file may come later.
        """
        param, (main, low) = self.param, parts
        format = format_of(main.dtype, None if low is None else low.dtype)
        host = shadow.offload.serves(param)
        slot = Slot.of(param, parts, format, self.saved.get("ema_weights"), host)
        if self.is_first and slot.parked is None and shadow.parks(param, slot):
            raise ValueError(
                f"ema_weights of {self.label} must be in a checkpoint written while swapped, got "
                "none: load it into a model like the one it was saved from, call train() and save "
                "again"
            )
        return slot


def _find_entries(
    groups: Sequence[Group],
    pairs: Sequence[Pair],
    options: Sequence[_Saved],
    inner: StateDict,
    ours: dict[Any, StateDict],
    swapped: bool,
) -> tuple[list[_Entry], list[Pair]]:
    """The EMA's entries, and the parameters that lack theirs."""
    if ours and all(_is_cast(entry.get("ema_step")) for entry in ours.values()):
        ours = {}
    entries, missing = [], []
    for pair in pairs:
        mine = options[pair.group]
        enabled = mine.options.enabled
        if pair.key in ours and (enabled or swapped):
            entries.append(_Entry(pair.param, ours[pair.key], mine, _label(groups, pair)))
        elif enabled and pair.param.requires_grad and inner["state"].get(pair.key):
            missing.append(pair)
    return entries, missing


def _check_missing(
    groups: Sequence[Group],
    pairs: Sequence[Pair],
    missing: Sequence[Pair],
    ours: dict[Any, StateDict],
    notes: Sequence[Notes],
) -> None:
    """Raise ValueError for an EMA that is lost, not for one that never was."""
    listed = {(i, position) for i, note in enumerate(notes) for position in note.without or ()}
    lost = [pair for pair in missing if (pair.group, pair.position) not in listed]
    # Names in another order (a distributed load goes by name): then only their number is known.
    moved = any((p.group, p.position) in listed and p.key in ours for p in pairs)
    if lost and not (moved and len(missing) <= len(listed)):
        raise ValueError(
            f"ema of {_label(groups, lost[0])} must be in the checkpoint like that of the other "
            "parameters, got none: the checkpoint is damaged. To go on without, load "
            "strip_ema_state_dict(checkpoint): the EMA then starts anew"
        )


def _texts(
    pairs: Sequence[Pair], slots: Mapping[Tensor, Slot], notes: Sequence[Notes]
) -> list[tuple[list[Tensor], str | None]]:
    """By group the parameters that have an EMA, and the fingerprint of what they held."""
    params: list[list[Tensor]] = [[] for _ in notes]
    for pair in pairs:
        if pair.param in slots:
            params[pair.group].append(pair.param)
    return [(ours, note.model) for ours, note in zip(params, notes, strict=True)]


def _clock(state_dict: Mapping[str, Any], entries: Sequence[_Entry]) -> int:
    groups = enumerate(state_dict["param_groups"])
    counts = [_count(g["ema_step"], f"param_groups[{i}]") for i, g in groups if "ema_step" in g]
    return max(counts or [entry.count for entry in entries], default=0)


def _label(groups: Sequence[Group], pair: Pair) -> str:
    names = groups[pair.group].get("param_names")
    if names:
        return str(names[pair.position])
    return f"param_groups[{pair.group}]['params'][{pair.position}]"


def _check_groups(groups: Sequence[Group], saved: Sequence[Group]) -> list[Notes]:
    if len(saved) != len(groups):
        raise ValueError(
            f"the checkpoint must have {len(groups)} param groups like the optimizer, got "
            f"{len(saved)}: build the optimizer as it was when it was saved"
        )
    pairs = enumerate(zip(groups, saved, strict=True))
    return [_check_group(f"param_groups[{i}]", group, packed) for i, (group, packed) in pairs]


def _check_group(label: str, group: Group, packed: Group) -> Notes:
    params, swapped = packed["params"], packed.get("ema_swapped", False)
    if not isinstance(params, (list, tuple)) or not all(isinstance(k, (int, str)) for k in params):
        raise TypeError(f"params of {label} must be a list of keys, got {params!r}: it is damaged")
    if len(params) != len(group["params"]):
        raise ValueError(
            f"{label} of the checkpoint must have {len(group['params'])} parameters like the "
            f"optimizer's, got {len(params)}"
        )
    if not isinstance(swapped, (bool, str)):
        raise TypeError(f"ema_swapped of {label} must be False or a text, got {swapped!r}")
    try:
        check_options(packed)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{label} of the checkpoint: {error}") from None
    return parse(packed.get("ema_format"), label)


def _check_states(groups: Sequence[Group], pairs: Sequence[Pair], state: Mapping[Any, Any]) -> None:
    for pair in pairs:
        if not isinstance(found := state.get(pair.key, {}), Mapping):
            raise TypeError(
                f"state of {_label(groups, pair)} must be a dict, got {type(found)}: it is damaged"
            )


def _count(value: object, label: str) -> int:
    if isinstance(value, torch.Tensor) and not value.is_meta and value.numel() == 1:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= 2**62:
        raise ValueError(
            f"ema_step of {label} must be a count (an integer from 0 to 2**62), got {value!r}: the "
            "checkpoint is damaged"
        )
    return value


def _check_format(saved: StateDict, name: str | None, label: str) -> None:
    """Raise ValueError for an EMA that is not in the format it was saved in."""
    low = saved.get("ema_low")
    found = format_of(saved["ema"].dtype, None if low is None else low.dtype)
    whole = found.low is None and found.main.itemsize >= 4
    if name is None or (found == _NAMED[name] if name in _NAMED else whole):
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
