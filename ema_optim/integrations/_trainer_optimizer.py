"""The wrapper that ``EMACallback`` puts around the optimizer which the Trainer has made."""

from typing import Any

from .. import _carry, _restore
from .._warnings import warn
from ..optimizer import EMAOptimizer


class TrainerEMAOptimizer(EMAOptimizer):
    """The wrapper that the callback makes: its checkpoints load into the bare optimizer as well.

    The Trainer loads ``optimizer.pt`` into the optimizer that it has made, before any callback is
    called; see ``ema_optim._carry`` for what that would do to an EMA in the state.
    """

    trainer_state: Any = None

    def _state_dict(self) -> dict[str, Any]:
        state_dict = super()._state_dict()
        step = 0 if self.trainer_state is None else self.trainer_state.global_step
        groups = [{**group, "ema_global_step": step} for group in state_dict["param_groups"]]
        return _carry.carry({**state_dict, "param_groups": groups})

    def __getstate__(self) -> dict[str, Any]:
        """For pickle and deepcopy."""
        return {**super().__getstate__(), "trainer_state": self.trainer_state}


def take_over(optimizer: EMAOptimizer, global_step: int) -> None:
    """Adopt the EMA that was loaded, here or by the bare optimizer, if it is of this very step.

    It is not after a run without the callback, whose checkpoints carry an old EMA along.
    """
    shadow, groups = optimizer._ema, optimizer.param_groups
    if _carry.is_carrying(groups) and _carry.carried_step(groups) == global_step:
        _carry.adopt(shadow, groups)
    elif shadow.trainer_step not in (None, global_step):
        _restore.Loaded({}).install(shadow)
    _carry.drop(groups)
    shadow.trainer_step = None  # seen to; a later training begins at another step
    if global_step and not shadow.slots and "cold" not in shadow.warned:
        shadow.warned.add("cold")
        warn(
            f"the checkpoint holds no EMA of step {global_step}: it begins at the weights of the "
            "next step"
        )
    optimizer._mark_groups()
