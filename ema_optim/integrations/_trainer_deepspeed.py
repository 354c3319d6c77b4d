"""``EMACallback`` under DeepSpeed: an ``EMAEngine`` where an optimizer would be wrapped.

This module is imported where a ``Trainer`` runs under DeepSpeed, and nowhere else.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn

from .._shadow.holdings import no_autograd
from .._warnings import warn
from ._deepspeed_checks import attached
from .deepspeed import EMAEngine


class TrainerEMAEngine(EMAEngine):
    """The engine of a ``Trainer``; after a training its masters may show something else."""

    def trains(self, model: object) -> bool:
        """Whether a model is the one that the engine trains."""
        return model is self.engine.module or model is self.engine

    def keep(self) -> dict[str, Tensor]:
        """Copies of the masters of this rank."""
        return {name: master.detach().clone() for name, master in self._numbered().items()}

    def put(self, kept: dict[str, Tensor]) -> None:
        """Put into the masters and the forward what ``keep`` returned; every rank calls it."""
        with no_autograd():
            for name, master in self._numbered().items():
                if name in kept:
                    master.copy_(kept[name])
        if kept:
            self._ema.publish()

    def load_best(self) -> None:
        """Have the EMA weights of the best checkpoint trained on; the Trainer has loaded it."""
        if self._ema.counted():
            self.apply_ema()
        else:
            warn("the best checkpoint holds no EMA: the model keeps its training weights")

    def _numbered(self) -> dict[str, Tensor]:
        masters = (master for group in self._ema.groups for master in group["params"])
        return {str(number): master for number, master in enumerate(masters)}


def engine_for(
    accelerated: Any, callback: Any, steps: float, trainer: Any, attended: Callable[[], bool]
) -> TrainerEMAEngine:
    """The ``EMAEngine`` of a training, made unless it is there.

    Args:
        accelerated: Accelerate's wrapper of the engine's optimizer; nothing in it steps.
        callback: The ``EMACallback``.
        steps: The optimizer steps of the run.
        trainer: A weak reference to the Trainer.
        attended: Whether the callback is still in the Trainer; an evaluation swaps only then.
    """
    if callback.use_buffers:
        raise ValueError(
            "use_buffers must go with an optimizer that the callback wraps, got "
            f"use_buffers={callback.use_buffers!r} and DeepSpeed's engine: leave it out"
        )
    found, options = attached(accelerated.optimizer), callback.options
    if options.device is not None:
        raise ValueError(
            f"device must be left out under DeepSpeed, got {options.device!r}: the EMA lies where "
            "the fp32 masters do, with offload_optimizer in host memory"
        )
    if found is None:
        options.log_choice(steps)
        given = {k: v for k, v in options.resolved(steps).items() if k != "device"}
        found = TrainerEMAEngine(trainer().model_wrapped, **given)
    else:
        options.check_same(found, steps, "of the engine")
    # What the Trainer calls before and after an evaluation.
    accelerated.eval = partial(_eval, found, attended)
    accelerated.train = found.train
    return found  # type: ignore[no-any-return]


def whole_state(model: nn.Module) -> dict[str, Any]:
    """The whole weights of the forward on the first rank, under ZeRO 3 gathered one at a time."""
    import deepspeed
    import torch

    first, whole = torch.distributed.get_rank() == 0, {}
    for name, value in model.state_dict(keep_vars=True).items():
        with deepspeed.zero.GatheredParameters([value] if hasattr(value, "ds_id") else []):
            if first:
                whole[name] = value.detach().cpu().clone()
    return whole


def _eval(engine: TrainerEMAEngine, attended: Callable[[], bool]) -> None:
    if attended():
        engine.eval()
