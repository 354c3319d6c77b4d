"""Further windows in a checkpoint: their keys, and what a file says of the laws of all.

    state[i]   ... for every window but the first, which is "ema": "ema:NAME" [, "ema:NAME:low"]

The law, which the notes of ``ema_format`` hold as JSON, is what tells which windows a file has: a
distributed load brings only the keys that its template asks for.

    {"windows": {"short": 0.99, "long": null}, "update_every": 1, "update_after_step": 0}

with ``"changed": true`` beside them once the averages were made by more than that; null is a
function of the user's.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from .._arithmetic.laws import decay_of
from .._shadow.shadow_set import ShadowSet
from .._shadow.windows import FIRST
from .notes import Notes

PREFIX, _LOW = "ema:", ":low"


class Difference(NamedTuple):
    """How the windows of a checkpoint differ from those of this run.

    Attributes:
        gone: Those of the checkpoint that this run does not have.
        changed: Those of both whose law is another one.
        law_changed: Whether from now on nobody knows the law of what is loaded.
    """

    gone: Sequence[str] = ()
    changed: Sequence[str] = ()
    law_changed: bool = False

    def tell(self, shadow: ShadowSet) -> None:
        """Warn once of what is lost."""
        if self.gone:
            shadow.warned.once(
                "windows",
                f"the checkpoint has the windows {list(self.gone)}, which are not among those of "
                "decay: their averages are dropped",
            )
        if self.changed:
            shadow.warned.once(
                "law",
                f"the windows {list(self.changed)} have another decay than in the checkpoint: they "
                "go on with it, and nothing can be combined from them any more, by decay=a number "
                "or schedule",
            )


AS_EVER = Difference()


def is_window(key: object) -> bool:
    """Whether a key of a parameter's state is a further window's."""
    return isinstance(key, str) and key.startswith(PREFIX)


def entries_of(shadow: ShadowSet, param: Tensor) -> dict[str, Tensor]:
    """The live entries of the further windows of one parameter, by state key."""
    entries = {}
    for name, other in shadow.others.items():
        if (slot := other.find(param)) is not None:
            entries[f"{PREFIX}{name}"] = slot.ema
            if slot.low is not None:
                entries[f"{PREFIX}{name}{_LOW}"] = slot.low
    return entries


def by_window(entries: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The further windows' entries of one parameter by name, each with the keys of a first one."""
    found: dict[str, dict[str, Any]] = {}
    for key in filter(is_window, entries):
        name, low, _ = key.removeprefix(PREFIX).partition(_LOW)
        found.setdefault(name, {})["ema_low" if low else "ema"] = entries[key]
    return found


def part_of(entries: Mapping[str, Any], name: str, label: str) -> dict[str, Any]:
    """What a checkpoint has of a further window, with the keys of a first one."""
    part = by_window(entries).get(name, {})
    if "ema" not in part:
        raise ValueError(
            f"{PREFIX}{name} of {label} must be in the checkpoint, got {sorted(entries)}: to add "
            "a window to a run, load strip_ema_state_dict(checkpoint); all of them then begin anew"
        )
    return {**part, "ema_step": entries["ema_step"]}


def compare(
    shadow: ShadowSet, notes: Iterable[Notes], states: Iterable[Mapping[str, Any]]
) -> Difference:
    """Hold what a checkpoint says of its windows against those of this run.

    Raises:
        ValueError, TypeError: What it says is damaged, or the first window here is a further one
            there: its average would be that of another one.
    """
    mine, law = shadow.laws(), _law(notes)
    theirs = law["windows"]
    first, *further = theirs or {FIRST: None}
    if shadow.name in further:
        raise ValueError(
            f"the first window must be that of the checkpoint, {first}, got {shadow.name}: keep "
            "the order of decay"
        )
    theirs = {shadow.name if name == first else name: own for name, own in theirs.items()}
    found = dict.fromkeys([*theirs, *_names_in(states)])
    gone = [name for name in found if name not in mine["windows"]]
    changed = [name for name, own in mine["windows"].items() if theirs.get(name, own) != own]
    if any(law.get(key, mine[key]) != mine[key] for key in ("update_every", "update_after_step")):
        changed = list(mine["windows"])
    lost = bool(changed or law.get("changed"))
    return Difference(gone, changed if len(mine["windows"]) > 1 else (), lost)


def _names_in(states: Iterable[Mapping[str, Any]]) -> list[str]:
    keys = (key for state in states for key in state if key.startswith(PREFIX))
    return [key.removeprefix(PREFIX).partition(_LOW)[0] for key in keys]


def told(notes: Iterable[Notes]) -> str | None:
    """The decays of a checkpoint for a reader, where it says them."""
    laws = _law(notes)["windows"]
    decays = {name: _shown(law) for name, law in laws.items()}
    if len(decays) > 1:
        return ", ".join(f"{name} {decay}" for name, decay in decays.items())
    return next(iter(decays.values()), None)


def _shown(law: Any) -> str:
    try:
        return "a function" if law is None else str(decay_of(law))
    except ValueError:  # a schedule of a later version
        return str(law)


def _law(notes: Iterable[Notes]) -> dict[str, Any]:
    text = next((note.law for note in notes if note.law), None)
    if text is None:
        return {"windows": {}}
    try:
        law = json.loads(text)
    except ValueError:
        law = None
    if not isinstance(law, dict) or not isinstance(law.get("windows"), dict) or not law["windows"]:
        raise ValueError(
            f"the law in ema_format must be JSON with 'windows', got {text!r:.80}: it is damaged"
        )
    return law
