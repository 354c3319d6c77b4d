"""Checkpoints of inner optimizers whose own state dict has another form than torch's.

    {"inner": its own dict, as it alone would write it,
     "ema":   the EMA's entries and marks, in the form of ``layout``, with nothing of the inner's}

Such are wrappers (Lookahead), chains of several optimizers, and those that keep state elsewhere.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from .._shadow.shadow_set import ShadowSet
from .._shadow.slots import Group
from .layout import GROUP_MARKS, GROUP_OPTIONS, StateDict, merge, options_of
from .read import check_form


def check_served(inner: Optimizer) -> None:
    """Raise TypeError for an inner optimizer that keeps its param groups from being marked.

    One that keeps no state of its own is given an empty one, as torch's have.
    """
    groups, name = getattr(inner, "param_groups", None), type(inner).__name__
    if not isinstance(groups, list) or not all(
        isinstance(g, dict) and "params" in g for g in groups
    ):
        raise TypeError(
            f"optimizer must have param_groups, a list of dicts with 'params', got {groups!r:.80} "
            f"of {name}: use EMAModel beside it, or wrap the optimizers in it one by one"
        )
    if any(a is not b for a, b in zip(groups, inner.param_groups, strict=True)):
        raise TypeError(
            f"optimizer must give its own param_groups, got copies made at every look by {name}: "
            "return the groups of the optimizers in it, or wrap those one by one"
        )
    if not hasattr(inner, "state"):
        inner.state = defaultdict(dict)


def is_torch_form(state_dict: object, groups: Sequence[Group]) -> bool:
    """Whether an optimizer's own dict has torch's form, so that the EMA can be merged into it."""
    if not isinstance(state_dict, Mapping) or not isinstance(state_dict.get("state"), Mapping):
        return False
    saved = state_dict.get("param_groups")
    if not isinstance(saved, list) or len(saved) != len(groups):
        return False
    pairs = zip(saved, groups, strict=True)
    return all(len(group.get("params", ())) == len(live["params"]) for group, live in pairs)


def nest(inner: Any, shadow: ShadowSet) -> StateDict:
    """A checkpoint of an inner optimizer whose own dict has another form."""
    return {"inner": _unmarked(inner), "ema": merge(bare(shadow.groups), shadow)}


def bare(groups: Sequence[Group]) -> StateDict:
    """The dict of an optimizer of these groups that keeps nothing."""
    numbers: dict[Tensor, int] = {}
    packed = [
        {
            **options_of(group),
            "params": [numbers.setdefault(param, len(numbers)) for param in group["params"]],
        }
        for group in groups
    ]
    return {"state": {}, "param_groups": packed}


def parts(state_dict: Any, inner: Optimizer, groups: Sequence[Group]) -> tuple[Any, Any]:
    """What the inner optimizer is to load, where it has a form of its own, and the EMA's dict."""
    known = isinstance(state_dict, Mapping)
    if known and is_nested(state_dict):
        check_form(state_dict["ema"])
        return state_dict["inner"], state_dict["ema"]
    if (known and "state" in state_dict) or is_torch_form(inner.state_dict(), groups):
        if not known:
            check_form(state_dict)
        return None, state_dict
    return state_dict, bare(groups)


def is_nested(state_dict: Mapping[str, Any]) -> bool:
    """Whether a checkpoint is one of ``nest``."""
    return set(state_dict) == {"inner", "ema"}


def _unmarked(value: Any) -> Any:
    """A state dict without what we have written into the live param groups."""
    if isinstance(value, dict):
        ours = GROUP_MARKS + GROUP_OPTIONS if "params" in value else ()
        return {k: _unmarked(v) for k, v in value.items() if k not in ours}
    return type(value)(map(_unmarked, value)) if type(value) in (list, tuple) else value
