"""The wrapper that ``EMACallback`` puts around the optimizer which the Trainer has made."""

from typing import Any

from .. import _carry, _restore
from .._warnings import warn
from ..optimizer import EMAOptimizer

_STEP = "ema_global_step"


class TrainerEMAOptimizer(EMAOptimizer):
    """The wrapper that the callback makes: its checkpoints load into the bare optimizer as well.

    The Trainer loads ``optimizer.pt`` into the optimizer that it has made, before any callback is
    called; see ``ema_optim._carry`` for what that would do to an EMA in the state.
    """

    owner: Any = None
    trainer_state: Any = None
    loaded_step: int | None = None

    def begin(self, state: Any) -> None:
        """Adopt the EMA that was loaded, here or by the bare optimizer, if it is of this step.

        It is not after a resume without the callback, whose checkpoints carry the old EMA along.
        """
        self.trainer_state = state
        groups = self.param_groups
        self._note_step()
        if self.loaded_step == state.global_step and _carry.is_carrying(groups):
            _carry.adopt(self._ema, groups)
        elif state.global_step and self.loaded_step != state.global_step:
            _restore.Loaded({}).install(self._ema)
            warn(
                f"the checkpoint holds no EMA of step {state.global_step}: it begins at the "
                "weights of the next step"
            )
        _carry.drop(groups)
        self._mark_groups()

    def _note_step(self) -> None:
        steps = [group.pop(_STEP) for group in self.param_groups if _STEP in group]
        self.loaded_step = max(steps, default=self.loaded_step)

    def _state_dict(self) -> dict[str, Any]:
        carried = _carry.carry(super()._state_dict())
        step = 0 if self.trainer_state is None else self.trainer_state.global_step
        groups = [{**group, _STEP: step} for group in carried["param_groups"]]
        return {**carried, "param_groups": groups}

    def _load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super()._load_state_dict(state_dict)
        self.loaded_step = None
        self._note_step()

    def __getstate__(self) -> dict[str, Any]:
        """For pickle and deepcopy."""
        own = {"owner": self.owner, "trainer_state": self.trainer_state}
        return {**super().__getstate__(), **own, "loaded_step": self.loaded_step}
