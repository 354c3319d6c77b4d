"""The wrapper that ``EMACallback`` puts around the optimizer which the Trainer has made."""

import sys
import weakref
from collections.abc import Callable, Mapping
from typing import Any

from accelerate.optimizer import AcceleratedOptimizer, patch_optimizer_step
from accelerate.utils.deepspeed import DeepSpeedOptimizerWrapper
from torch import nn
from transformers import Trainer, TrainerCallback

from .._checkpoint import carry, read
from .._checkpoint.strip import strip_ema_state_dict
from .._engines.sharding import is_sharded
from .._forwarding import call_if_there, inner_step
from .._shadow import names
from ..optimizer import EMAOptimizer
from . import _buffers

_STEP = "ema_global_step"  # the note of the Trainer's step at which an EMA was saved


class TrainerEMAOptimizer(_buffers.BufferedEMAOptimizer):
    """The wrapper that the callback makes: its checkpoints load into the bare optimizer as well.

    The Trainer loads ``optimizer.pt`` into the optimizer that it has made, before any callback is
    called; see ``ema_optim._checkpoint.carry`` for what that would do to an EMA in the state.

    Once its callback is taken out of the Trainer it does what the inner optimizer does, and no
    more: nobody would put the training weights back after an evaluation.
    """

    trainer_state: Any = None
    attended: Callable[[], bool] | None = None  # whether the callback is still in the Trainer
    missed = False  # whether a step was made without the callback

    def _is_alone(self) -> bool:
        if self.attended is None or self.attended():
            return False
        if self.swapped:
            self.train()
        return True

    def _step(self, closure: Callable[[], Any] | None = None, *args: Any, **kwargs: Any) -> Any:
        if not self._is_alone():
            return super()._step(closure, *args, **kwargs)
        self.missed = True
        return inner_step(self.inner, closure, args, kwargs)

    def eval(self) -> None:
        """Put the EMA weights in until ``train()``, as long as the callback is in the Trainer."""
        if not self._is_alone():
            return super().eval()
        call_if_there(self.inner, "eval")

    trainer_model: Any = None  # for the names in its files
    loaded_buffers: Mapping[str, Any] | None = None  # of the checkpoint that was loaded last

    def _state_dict(self) -> dict[str, Any]:
        if self._is_alone():
            return strip_ema_state_dict(super()._state_dict())
        step = 0 if self.trainer_state is None else self.trainer_state.global_step
        carried = carry.carry(super()._state_dict(), {_STEP: step})
        if self.trainer_model is not None:
            found = names.group_names(self.param_groups, self.trainer_model)
            for group, own in zip(carried["param_groups"], found, strict=True):
                group["ema_entries"]["param_names"] = own
        if self.buffers is not None:
            carry.carry_buffers(carried, self.buffers.state_dict())
        return carried

    def _load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super()._load_state_dict(state_dict)
        self.loaded_buffers = carry.carried_buffers(state_dict.get("param_groups", ()))

    def __getstate__(self) -> dict[str, Any]:
        """For pickle and deepcopy."""
        return {**super().__getstate__(), "trainer_state": self.trainer_state}


def running_trainer() -> "weakref.ref[Trainer] | None":
    """The Trainer that is calling a callback now.

    A callback is told neither who calls it, nor that it is taken out, nor into which folder a trial
    of a hyperparameter search writes.
    """
    frame = sys._getframe(1)
    while frame is not None:
        # In locals, not by the code's name: subclasses override what they like.
        owner = frame.f_locals.get("self")
        if isinstance(owner, Trainer):
            return weakref.ref(owner)
        frame = frame.f_back  # type: ignore[assignment]
    return None


def renewed(old: TrainerEMAOptimizer, options: dict[str, Any]) -> TrainerEMAOptimizer:
    """Another wrapper of the same optimizer, with other options; the EMA goes on in it."""
    old.train()
    saved = None if old.missed else carry.uncarry(EMAOptimizer._state_dict(old))
    made = TrainerEMAOptimizer(old.inner, **options)
    if saved is not None:
        read.read(made._ema, saved).install(made._ema)
        made._ema.mark()
    made.loaded_buffers = old.loaded_buffers
    return made


def step_of(groups: Any) -> int | None:
    """The Trainer's step at which the EMA that param groups carry was saved."""
    return carry.notes_of(groups).get(_STEP)


def take_over(optimizer: EMAOptimizer, global_step: int) -> None:
    """Adopt the EMA that was loaded, here or by the bare optimizer, if it is of this very step.

    It is not after a run without the callback, whose checkpoints carry an old EMA along.
    """
    shadow, groups = optimizer._ema, optimizer.param_groups
    saved_at = shadow.take_notes().get(_STEP)
    if carry.is_carrying(groups) and step_of(groups) == global_step:
        saved_at = global_step
        if isinstance(optimizer, TrainerEMAOptimizer):
            optimizer.loaded_buffers = carry.carried_buffers(groups)
        carry.adopt(shadow)
    elif saved_at not in (None, global_step):
        read.Loaded({}).install(shadow)
    carry.drop(groups)
    if isinstance(optimizer, TrainerEMAOptimizer):
        if global_step or saved_at is not None:
            _buffers.resume(optimizer, optimizer.loaded_buffers, saved_at == global_step)
        optimizer.loaded_buffers = None
    if global_step and not shadow.slots:
        shadow.warned.once(
            "cold",
            f"the checkpoint holds no EMA of step {global_step}: it begins at the weights of the "
            "next step",
        )
    optimizer._ema.mark()


def run_folder(trainer: Any, args: Any) -> str:
    """Where the checkpoints of a run are: a trial of a search has its own folder.

    Args:
        trainer: A weak reference to the Trainer, if it is known.
        args: Its arguments.
    """
    there = None if trainer is None else trainer()
    if there is None or getattr(there, "_trial", None) is None:
        return str(args.output_dir)
    return str(there._get_output_dir(there._trial))


def put_into(accelerated: Any, made: EMAOptimizer) -> None:
    """Have Accelerate's wrapper use an optimizer in place of its own."""
    accelerated.optimizer = made
    if accelerated.scaler is not None:
        # Accelerate has kept the inner optimizer's step to call it through the scaler.
        accelerated._optimizer_original_step_method = made.step
        accelerated._optimizer_patched_step_method = patch_optimizer_step(accelerated, made.step)


def ema_optimizer(kwargs: Mapping[str, Any]) -> Any:
    """That of the Trainer which calls a callback now: it may serve several."""
    found = getattr(kwargs.get("optimizer"), "optimizer", None)
    if isinstance(found, EMAOptimizer):
        return found
    return getattr(getattr(found, "step", None), "ema_engine", None)  # DeepSpeed's


def is_in(trainer: Any, callback: TrainerCallback) -> bool:
    """Whether a callback is in the Trainer of a weak reference, as far as one can know."""
    there = None if trainer is None else trainer()
    return there is None or callback in there.callback_handler.callbacks


def is_deepspeed(accelerated: Any) -> bool:
    """Whether Accelerate's wrapper is that of a DeepSpeed engine's optimizer."""
    return isinstance(accelerated, DeepSpeedOptimizerWrapper)


def refuse_engines(accelerated: Any) -> None:
    """Raise TypeError or RuntimeError where the callback would lose weights."""
    if not isinstance(accelerated, AcceleratedOptimizer):
        raise TypeError(
            f"the Trainer's optimizer must be Accelerate's, got {type(accelerated)}: for a second "
            "training under DeepSpeed, whose engine knows nothing of it, build another Trainer"
        )
    if is_deepspeed(accelerated):
        return  # EMAEngine looks at what it is to serve
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


def check_optimizer(optimizer: Any, model: nn.Module) -> None:
    """Raise RuntimeError or ValueError where weights are trained past the optimizer's ``step()``.

    Args:
        optimizer: The Trainer's, without Accelerate's wrapper.
        model: The model that is trained.
    """
    inner = optimizer.inner if isinstance(optimizer, EMAOptimizer) else optimizer
    if (kind := type(inner).__name__) in ("Lomo", "AdaLomo"):
        raise RuntimeError(
            f"EMACallback with {kind}: it moves the weights inside the backward pass, where no "
            "step is seen. Use another optim, or EMAModel and call update() after each step"
        )
    held = {id(param) for group in optimizer.param_groups for param in group["params"]}
    trained = names.named_parameters(model).items()
    missing = [name for name, p in trained if p.requires_grad and id(p) not in held]
    if missing:
        raise ValueError(
            "the optimizer must hold every trainable weight of the model, it lacks "
            f"{', '.join(missing)}: freeze them by requires_grad_(False), or give them to the "
            "optimizer. A layer-wise optimizer steps inside the backward pass, past the "
            "optimizer that the Trainer sees: leave 'layerwise' out of optim"
        )
