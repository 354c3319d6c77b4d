"""The wrapper that ``EMACallback`` puts around the optimizer which the Trainer has made."""

from typing import Any

from accelerate.optimizer import AcceleratedOptimizer

from .._checkpoint import carry, read
from .._engines.sharding import is_sharded
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
        return carry.carry({**state_dict, "param_groups": groups})

    def __getstate__(self) -> dict[str, Any]:
        """For pickle and deepcopy."""
        return {**super().__getstate__(), "trainer_state": self.trainer_state}


def take_over(optimizer: EMAOptimizer, global_step: int) -> None:
    """Adopt the EMA that was loaded, here or by the bare optimizer, if it is of this very step.

    It is not after a run without the callback, whose checkpoints carry an old EMA along.
    """
    shadow, groups = optimizer._ema, optimizer.param_groups
    if carry.is_carrying(groups) and carry.carried_step(groups) == global_step:
        carry.adopt(shadow, groups)
    elif shadow.trainer_step not in (None, global_step):
        read.Loaded({}).install(shadow)
    carry.drop(groups)
    shadow.trainer_step = None  # seen to; a later training begins at another step
    if global_step and not shadow.slots and "cold" not in shadow.warned:
        shadow.warned.add("cold")
        warn(
            f"the checkpoint holds no EMA of step {global_step}: it begins at the weights of the "
            "next step"
        )
    optimizer._mark_groups()


def refuse_engines(accelerated: Any, args: Any) -> None:
    """Raise TypeError or RuntimeError where the callback would lose weights."""
    if not isinstance(accelerated, AcceleratedOptimizer):
        raise TypeError(f"the Trainer's optimizer must be Accelerate's, got {type(accelerated)}")
    if getattr(args, "deepspeed", None):
        raise RuntimeError(
            "EMACallback under DeepSpeed: a swap would not reach the weights of the forward. Use "
            "DDP, or EMAOptimizer without a swap"
        )
    params = [p for group in accelerated.param_groups for p in group["params"]]
    if any(getattr(param, "_fsdp_flattened", False) for param in params):
        raise RuntimeError(
            "EMACallback under FSDP1: a swap would not reach the forward. Use FSDP2, "
            "TrainingArguments(fsdp_config={'version': 2})"
        )
    if any(map(is_sharded, params)) and not isinstance(accelerated.optimizer, EMAOptimizer):
        raise RuntimeError(
            "EMACallback under FSDP2 must find an EMAOptimizer, since the Trainer loads a sharded "
            "checkpoint before any callback is called: pass Trainer(optimizer_cls_and_kwargs="
            "(EMAOptimizer.for_class(AdamW, decay=0.999), {'lr': 1e-4}))"
        )
