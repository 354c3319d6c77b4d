"""``strip_ema_state_dict``: a checkpoint as the inner optimizer alone would have written it."""

from collections.abc import Mapping
from typing import Any

from .carry import uncarry
from .layout import GROUP_MARKS, GROUP_OPTIONS, ours_of, split
from .nested import is_nested

_FLAT = ("state.", "param_groups.")


def strip_ema_state_dict(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """The same checkpoint without the EMA, for the inner optimizer alone.

    Takes torch's form (state by index), the form keyed by parameter names, the flattened form of
    distributed checkpoints, and the nested one of inner optimizers whose own dict has another form.
    The argument is not changed; tensors are shared, not copied.

    Args:
        state_dict: What ``EMAOptimizer.state_dict()`` or ``get_optimizer_state_dict`` returned.

    Returns:
        The checkpoint as the inner optimizer alone would have written it.

    Raises:
        ValueError: The checkpoint was written while the EMA weights were swapped in: the model
            saved with it holds the EMA weights, and what is stripped here would be the training
            weights.
        TypeError: It is in none of these forms.
    """
    if is_nested(state_dict):
        strip_ema_state_dict(state_dict["ema"])  # raises
        return state_dict["inner"]  # type: ignore[no-any-return]
    if "state" in state_dict and "param_groups" in state_dict:
        _refuse_swapped(any(group.get("ema_swapped") for group in state_dict["param_groups"]))
        inner, _ = split(uncarry(state_dict))
        groups = [
            {k: v for k, v in group.items() if k not in GROUP_OPTIONS}
            for group in inner["param_groups"]
        ]
        return {**inner, "param_groups": groups}
    if state_dict and all(isinstance(key, str) and key.startswith(_FLAT) for key in state_dict):
        _refuse_swapped(any(v for k, v in state_dict.items() if k.endswith(".ema_swapped")))
        return {key: value for key, value in state_dict.items() if not _ours_of(key)}
    raise TypeError(
        "state_dict must be an optimizer's state dict (state and param_groups, or flattened), got "
        f"the keys {sorted(map(str, state_dict))[:3]}: pass the optimizer's part of the checkpoint"
    )


def _ours_of(key: str) -> bool:
    kind, _, rest = key.partition(".")
    name = rest.rpartition(".")[2]
    return bool(ours_of([name])) if kind == "state" else name in GROUP_OPTIONS + GROUP_MARKS


def _refuse_swapped(swapped: bool) -> None:
    if swapped:
        raise ValueError(
            "the checkpoint must not be written while swapped, got ema_swapped=True: load it (with "
            "its model) into an EMAOptimizer, call train() and save again"
        )
