"""What a checkpoint of an ``EMAModel`` must hold: the names of the model, and none but these."""

from collections.abc import Mapping, Sequence
from typing import Any

from .._shadow.slots import Group
from .read import check_form


def check_names(groups: Sequence[Group], state_dict: Mapping[str, Any]) -> None:
    """Raise ValueError for a checkpoint of another model, or one that is damaged."""
    check_form(state_dict)
    if any(group.get("ema_swapped") for group in state_dict["param_groups"]):
        raise ValueError(
            "the checkpoint must not be written while swapped, got ema_swapped=True: load it into "
            "the EMAOptimizer that wrote it, call train() and save again"
        )
    wanted = {name for group in groups for name in group["param_names"]}
    given = {name for group in state_dict["param_groups"] for name in group["params"]}
    if missing := sorted(wanted - given):
        raise ValueError(f"the checkpoint must have every name of the model, it lacks {missing}")
    if unknown := sorted(given - wanted - _buffer_names(state_dict)):
        raise ValueError(
            f"the checkpoint must have the names of the model alone, got {unknown} too: build the "
            "EMAModel of the same model as when it was saved"
        )
    for group in state_dict["param_groups"]:
        for name in group.get("ema_params", ()):
            if name in wanted and "ema" not in state_dict["state"].get(name, ()):
                raise ValueError(
                    f"ema of {name} must be in the checkpoint, got none: the checkpoint is damaged"
                )


def _buffer_names(state_dict: Mapping[str, Any]) -> set[str]:
    # An EMAModel saves its parameters as the first group and its buffers as the second.
    own = [group for group in state_dict["param_groups"][1:] if "ema_params" in group]
    return {name for group in own for name in group["params"]}
