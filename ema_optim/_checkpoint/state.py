"""``EMAOptimizer.state``: the inner optimizer's state and the EMA as one live, writable mapping.

Live, because engines write through it: Lightning moves every tensor by assignment, DeepSpeed puts
empty dicts in. Flattened distributed checkpoints read the keys of a parameter's state from it.
"""

from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .._engines.quantized import copy_like, dense_like
from .._engines.sharding import local, part_for
from .._shadow.options import check_low, check_tensor
from .._shadow.shadow_set import ShadowSet, no_autograd
from .._shadow.store import restored
from .layout import STATE_KEYS, slot_entries


class ParamState(MutableMapping[str, Any]):
    """The state of one parameter: the inner optimizer's entries, then the EMA's."""

    def __init__(self, inner: MutableMapping[Any, Any], shadow: ShadowSet, param: Tensor) -> None:
        self._inner, self._shadow, self._param = inner, shadow, param

    def _own(self) -> dict[str, Tensor]:
        if self._param not in self._shadow.slots:
            return {}
        return slot_entries(self._shadow, self._param)

    def _rest(self) -> Mapping[str, Any]:
        # Not by index: that would make the inner's defaultdict add an empty entry.
        rest: Mapping[str, Any] = self._inner.get(self._param, {})
        return rest

    def __getitem__(self, key: str) -> Any:
        return (self._own() if key in STATE_KEYS else self._rest())[key]

    def __setitem__(self, key: str, value: Any) -> None:
        if key in STATE_KEYS:
            _write(self._shadow, self._param, key, value)
        else:
            self._inner[self._param][key] = value

    def __delitem__(self, key: str) -> None:
        if key not in self:
            raise KeyError(key)
        if key in STATE_KEYS:
            _drop(self._shadow, self._param)
        else:
            del self._inner[self._param][key]

    def __iter__(self) -> Iterator[str]:
        return iter([*self._rest(), *self._own()])

    def __len__(self) -> int:
        return len(self._rest()) + len(self._own())

    def __repr__(self) -> str:
        return repr(dict(self))


class StateView(MutableMapping[Any, Any]):
    """All parameters' states."""

    def __init__(self, inner: Optimizer, shadow: ShadowSet) -> None:
        self._optimizer, self._shadow = inner, shadow

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, torch.Tensor):
            return ParamState(self._optimizer.state, self._shadow, key)
        return self._optimizer.state[key]

    def __setitem__(self, key: Any, value: Any) -> None:
        if not isinstance(key, torch.Tensor):
            self._optimizer.state[key] = value
            return
        entries = dict(value)
        own = {k: entries.pop(k) for k in STATE_KEYS if k in entries}
        if "ema" in own and "ema_low" in own:
            own["ema"] = own["ema"], own.pop("ema_low")
        if entries or not own or key in self._optimizer.state:
            self._optimizer.state[key] = entries
        if not own:
            _drop(self._shadow, key)
        for name, entry in own.items():
            _write(self._shadow, key, name, entry)

    def __delitem__(self, key: Any) -> None:
        if key not in self:
            raise KeyError(key)
        self._optimizer.state.pop(key, None)
        _drop(self._shadow, key)

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


def _drop(shadow: ShadowSet, param: Any) -> None:
    if param in shadow.slots:
        shadow.forget_cache()
        del shadow.slots[param]


def _write(shadow: ShadowSet, param: Tensor, key: str, value: Any) -> None:
    """Take what an engine assigns, under our own policy of dtype and device."""
    main, low = value if isinstance(value, tuple) else (value, None)
    if key == "ema":
        check_tensor("ema", main, param)
    if key == "ema_low" or low is not None:
        check_low("ema_low", low if key == "ema" else main, param)
    slot = shadow.slots.get(param) or shadow.slots.setdefault(param, shadow.birth(param))
    shadow.forget_cache()
    with no_autograd():
        if key == "ema_low":
            if slot.low is not None:
                slot.low = _copy(param, slot.low, main)
        elif key == "ema" and low is None and main.dtype == slot.ema.dtype:
            slot.ema = _copy(param, slot.ema, main)
        elif key == "ema":
            slot.ema, slot.low = restored(param, (main, low), slot.format)
        elif key == "ema_step":
            if int(value) != shadow.ema_step(slot):
                shadow.step = max(shadow.step, int(value))  # no parameter is ahead of the clock
                slot.updates, slot.share = shadow.counter_at(int(value), shadow.step, None)
        elif slot.parked is not None:
            slot.parked = copy_like(param, value)


def _copy(param: Tensor, old: Tensor, value: Tensor) -> Tensor:
    new = dense_like(param, old.dtype)
    local(new).copy_(part_for(param, value.detach()))
    return new
