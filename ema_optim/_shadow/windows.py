"""Several averages of the same weights, each with a decay of its own: *windows*, known by name.

The first is *the* EMA. Each further one is a shadow set of its own inside the first, with its own
slots, buckets and shares; source, stride, start, format, swap and worker thread are in common.
A step averages one after the other; a compiled step all of them in its one graph.
"""

import json
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

from torch import Tensor

from .._arithmetic.laws import law_of
from .._arithmetic.synthesis import Average
from ..schedules import Decay, as_decay
from .births import Births
from .holdings import no_autograd
from .slots import Group, Slot

FIRST = "ema"  # the name of the one window where none was given

Decays = Decay | Mapping[str, Decay]
Slots = dict[Tensor, Slot]
_NONE: Mapping[str, Any] = MappingProxyType({})


def as_decays(decay: object) -> dict[str, Decay]:
    """Return the windows that a constructor's ``decay`` stands for, by name, the first one first.

    Raises:
        ValueError, TypeError: It is no decay, or no mapping of identifiers to decays.
    """
    if not isinstance(decay, Mapping):
        return {FIRST: as_decay(decay)}  # type: ignore[arg-type]  # it checks what it gets
    if not decay:
        raise ValueError("decay must have at least one window, got {}: pass a float for one")
    for name in decay:
        if not isinstance(name, str) or not name.isidentifier():
            raise ValueError(f"decay must name its windows by identifiers, got {name!r}")
    return {name: _as_window(name, own) for name, own in decay.items()}


def _as_window(name: str, decay: Any) -> Decay:
    try:
        return as_decay(decay)
    except (TypeError, ValueError) as error:
        raise type(error)(f"window {name}: {error}") from None


class Windows(Births):
    """The windows of a shadow set beside its own.

    Attributes:
        name: The name of its own.
        others: The shadow sets of the further ones, by name.
        decays: What was given for all of them.
        law_changed: Whether an average was made by more than its decay: by another one before a
            checkpoint was loaded, or by ``load_ema_state``.
    """

    name = FIRST
    others: Mapping[str, Any] = _NONE  # of the subclass
    law_changed = False

    def __init__(self, source: Any, decay: Decays, *settings: Any, **named: Any) -> None:
        windows = as_decays(decay)
        self.name, *names = windows
        super().__init__(source, windows[self.name], *settings, **named)
        self.decays: Decays = windows if isinstance(decay, Mapping) else self.decay
        if names:
            self.others = {n: type(self)(source, windows[n], *settings, **named) for n in names}
            self.refuse_own_decays(self.groups)
        for other in self.others.values():
            other.swap, other.warned, other.offload = self.swap, self.warned, self.offload

    @property
    def windows(self) -> dict[str, Any]:
        """The shadow sets of all windows by name, the first one first."""
        return {self.name: self, **self.others}

    def refuse_own_decays(self, groups: Iterable[Group]) -> None:
        """Raise ValueError for a param group with a decay of its own beside several windows."""
        if self.others and any(group.get("ema_decay") is not None for group in groups):
            raise ValueError(
                f"a param group must have no ema_decay beside the windows {list(self.windows)}, "
                "which it would make equal: leave it out, or set ema_enabled=False"
            )

    def averages(self, what: str) -> dict[str, Average]:
        """What decides the average of each window, for combinations of them.

        Args:
            what: What wants to know, for the message.

        Raises:
            ValueError: Nobody knows, since a decay was changed.
        """
        if self.law_changed or any(group.get("ema_decay") is not None for group in self.groups):
            raise ValueError(
                f"{what} needs averages that one decay has made, got some whose decay was changed "
                "on a resume, that were loaded by load_ema_state(), or that have an ema_decay of "
                f"their param group: each window alone is read by name, {list(self.windows)}"
            )
        when = self.step, self.update_every, self.update_after_step
        return {name: Average(window.decay, *when) for name, window in self.windows.items()}

    def laws(self) -> dict[str, Any]:
        """What a file says of the windows."""
        found = {name: _law(window.decay) for name, window in self.windows.items()}
        when = {"update_every": self.update_every, "update_after_step": self.update_after_step}
        return {"windows": found, **when, **({"changed": True} if self.law_changed else {})}

    def law_text(self) -> str:
        """``laws`` as a text in which no semicolon is."""
        return json.dumps(self.laws(), allow_nan=False)

    def load_windows(self, slots: Mapping[str, Slots], step: int) -> None:
        """Have the further windows hold these slots alone, by name."""
        for name, other in self.others.items():
            other.load(slots.get(name, {}), step)

    def note_loaded(self, slots: Slots) -> None:
        """Have averages of an unknown law been loaded; windows without one begin at them too."""
        self.law_changed, options = True, self.options_by_param()
        for other in self.others.values():
            other.forget_lanes()
            other.step = self.step
            for param, slot in slots.items():
                kept, wanted = other.find(param), options.get(param, self.options)
                with no_autograd():
                    if kept is None or not kept.age:
                        kept = other.new_slot(param, wanted, (slot.ema, slot.low))
                        kept.set_counts(0, 0, share=0.0)
                kept.set_counts(slot.counter.steps, slot.age, kept.share)
                other.slots[param] = kept

    def renew_placeholders(self) -> None:
        """As ``Births.renew_placeholders``, of every window, which get what they lack before."""
        super().renew_placeholders()
        for other in self.others.values():
            for param, slot in self.slots.items():
                if other.find(param) is None:
                    with no_autograd():
                        other.slot_for(param).convert(param, slot.format)
            other.renew_placeholders()

    def remove(self, param: Tensor) -> None:
        """Forget what is kept for a parameter."""
        super().remove(param)
        for other in self.others.values():
            other.remove(param)

    def hand_over(self, old: Tensor, new: Tensor) -> None:
        """Let what is kept for a tensor that was replaced be its successor's."""
        for other in self.others.values():
            other.hand_over(old, new)
        super().hand_over(old, new)


def _law(decay: Decay) -> Any:
    try:
        return law_of(decay)
    except TypeError:  # a function of the user's
        return None
