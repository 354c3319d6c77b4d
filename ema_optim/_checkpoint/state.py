"""``EMAOptimizer.state``: the inner optimizer's state and the EMA as one live, writable mapping.

Live, because engines write through it: Lightning moves every tensor by assignment, DeepSpeed puts
empty dicts in. Flattened distributed checkpoints read the keys of a parameter's state from it.
"""

from collections import OrderedDict
from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.optim import Optimizer

from .._shadow.holdings import no_autograd
from .._shadow.options import check_low, check_tensor
from .._shadow.shadow_set import ShadowSet
from .._shadow.slots import Slot
from .layout import ours_of, slot_entries
from .windows import by_window, is_window


class ParamState(MutableMapping[str, Any]):
    """The state of one parameter: the inner optimizer's entries, then the EMA's.

    What was deleted from the optimizer's state keeps what it showed: code that replaces parameters
    takes the old entry, deletes it, and assigns it to the new parameter. Such code resizes every
    entry but "step" (gsplat), so the counter is then shown on request only.
    """

    def __init__(self, inner: MutableMapping[Any, Any], shadow: ShadowSet, param: Tensor) -> None:
        self._inner, self._shadow, self._param = inner, shadow, param
        self._kept: dict[str, Any] | None = None

    def keep(self) -> None:
        """Show from now on what is shown now, whatever happens to the optimizer."""
        self._kept = dict(self)

    def entries(self) -> dict[str, Any]:
        """All entries, as a dict of their own."""
        return dict(self if self._kept is None else self._kept)

    def _ours(self) -> dict[str, Any]:
        return slot_entries(self._shadow, self._param)

    def _rest(self) -> Mapping[str, Any]:
        # Not by index: that would make the inner's defaultdict add an empty entry.
        rest: Mapping[str, Any] = self._inner.get(self._param, {})
        return rest

    def __getitem__(self, key: str) -> Any:
        if self._kept is not None:
            return self._kept[key]
        return (self._ours() if ours_of([key]) else self._rest())[key]

    def __setitem__(self, key: str, value: Any) -> None:
        if self._kept is not None:
            self._kept[key] = value
        elif ours_of([key]):
            _refuse_shape(key, value, self._param)
            _write(self._shadow, self._param, {key: value})
        else:
            self._inner[self._param][key] = value

    def __delitem__(self, key: str) -> None:
        if key not in self:
            raise KeyError(key)
        if self._kept is not None:
            del self._kept[key]
        elif ours_of([key]):
            self._shadow.remove(self._param)
        else:
            del self._inner[self._param][key]

    def __iter__(self) -> Iterator[str]:
        if self._kept is None:
            return iter([*self._rest(), *self._ours()])
        return iter([key for key in self._kept if key != "ema_step"])

    def __len__(self) -> int:
        return len(list(iter(self)))

    def __repr__(self) -> str:
        return repr(dict(self))

    def __reduce__(self) -> tuple[Any, ...]:
        # An optimizer around this one that shares its state writes it into files (SAM does).
        return OrderedDict, (list(self.entries().items()),)


class StateView(MutableMapping[Any, Any]):
    """All parameters' states."""

    def __init__(self, inner: Optimizer, shadow: ShadowSet) -> None:
        self._optimizer, self._shadow = inner, shadow
        self._shown: WeakValueDictionary[int, ParamState] = WeakValueDictionary()

    def __getitem__(self, key: Any) -> Any:
        if not isinstance(key, torch.Tensor):
            return self._optimizer.state[key]
        shown = self._shown.get(id(key))
        if shown is None or shown._param is not key:
            shown = ParamState(self._optimizer.state, self._shadow, key)
            self._shown[id(key)] = shown
        # Torch replaces the inner's state on load.
        shown._inner = self._optimizer.state
        return shown

    def __setitem__(self, key: Any, value: Any) -> None:
        if not isinstance(key, torch.Tensor):
            self._optimizer.state[key] = value
            return
        entries = value.entries() if isinstance(value, ParamState) else dict(value)
        ours = {k: entries.pop(k) for k in ours_of(entries)}
        if "ema" in ours and getattr(ours["ema"], "shape", None) != key.shape:
            self._shadow.warn_of_shape(key)
            ours = {}
        if entries or not ours or key in self._optimizer.state:
            self._optimizer.state[key] = entries
        if not ours:
            self._shadow.remove(key)
        else:
            _write(self._shadow, key, ours)

    def __delitem__(self, key: Any) -> None:
        if key not in self:
            raise KeyError(key)
        if isinstance(key, torch.Tensor) and (shown := self._shown.pop(id(key), None)) is not None:
            shown.keep()
        self._optimizer.state.pop(key, None)
        if isinstance(key, torch.Tensor):
            self._shadow.remove(key)

    def __contains__(self, key: object) -> bool:
        return key in self._optimizer.state or key in self._shadow.slots

    def get(self, key: Any, default: Any = None) -> Any:
        if key not in self:
            return default
        return self[key]

    def __iter__(self) -> Iterator[Any]:
        inner = self._optimizer.state
        return iter([*inner, *(param for param in self._shadow.slots if param not in inner)])

    def __len__(self) -> int:
        return len(list(iter(self)))

    def __repr__(self) -> str:
        return repr(dict(self))


def replace_state(view: StateView, value: Mapping[Any, Any]) -> None:
    """Make ``value`` the whole state, as an assignment to ``optimizer.state`` does."""
    entries = {key: _snapshot(value[key]) for key in value}  # value may be this view itself
    for key in view:
        if key not in entries:
            del view[key]
    for key, entry in entries.items():
        view[key] = entry


def _snapshot(entry: Any) -> Any:
    return dict(entry) if isinstance(entry, Mapping) else entry


def _refuse_shape(key: str, value: Any, param: Tensor) -> None:
    if key == "ema" and isinstance(value, torch.Tensor) and value.shape != param.shape:
        raise ValueError(
            f"ema must have the shape of its parameter, {tuple(param.shape)}, got "
            f"{tuple(value.shape)}: for another parameter take the entry out first, entry = "
            "optimizer.state.pop(param)"
        )


def _write(shadow: ShadowSet, param: Tensor, entries: Mapping[str, Any]) -> None:
    """Take what an engine assigns, under our own policy of dtype and device."""
    for name, theirs in by_window(entries).items():
        if name in shadow.others:  # else of a run with more windows
            _write(shadow.others[name], param, theirs)
    entries = {key: value for key, value in entries.items() if not is_window(key)}
    if "ema" in entries:
        check_tensor("ema", entries["ema"], param)
    if "ema_low" in entries:
        check_low("ema_low", entries["ema_low"], param)
    slot = shadow.slot_for(param)
    with no_autograd():
        if "ema" in entries and "ema_low" in entries:
            slot.hold(param, (entries["ema"], entries["ema_low"]))
            entries = {k: v for k, v in entries.items() if k not in ("ema", "ema_low")}
        for key, value in entries.items():
            _SETTERS[key](shadow, param, slot, value)


def _set_ema(shadow: ShadowSet, param: Tensor, slot: Slot, value: Tensor) -> None:
    if value.dtype == slot.ema.dtype:
        slot.hold(param, (value, slot.low))  # of two tensors the other one may follow
    else:
        slot.hold(param, (value, None))


def _set_low(shadow: ShadowSet, param: Tensor, slot: Slot, value: Tensor) -> None:
    if slot.low is not None:
        slot.hold(param, (slot.ema, value))


def _set_step(shadow: ShadowSet, param: Tensor, slot: Slot, value: Any) -> None:
    for window in shadow.windows.values():
        if (kept := window.find(param)) is not None:
            window.set_ema_step(kept, int(value))


def _set_parked(shadow: ShadowSet, param: Tensor, slot: Slot, value: Tensor) -> None:
    slot.park(param, value)


_SETTERS = {"ema": _set_ema, "ema_step": _set_step, "ema_weights": _set_parked, "ema_low": _set_low}
