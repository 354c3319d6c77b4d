"""``EMACallback``: the EMA of the weights in the Hugging Face ``Trainer``."""

import os
from collections.abc import Mapping
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from .._arithmetic.formats import EMADtype
from .._engines import adapters
from .._engines.sharding import whole_on_first_rank
from .._shadow import names
from .._shadow.options import check_tensor, same_option
from .._warnings import warn
from ..optimizer import EMAOptimizer
from ..schedules import Decay

try:
    from accelerate.optimizer import patch_optimizer_step
    from transformers import TrainerCallback
except ImportError as error:
    raise ImportError(
        'EMACallback needs transformers and accelerate: pip install "ema_optim[transformers]"'
    ) from error

from . import _pretrained
from ._options import EMAOptions
from ._trainer_optimizer import (
    TrainerEMAOptimizer,
    check_optimizer,
    refuse_engines,
    renewed,
    running_trainer,
    take_over,
)

# The attribute of an optimizer that tells whether another callback has begun the same training.
_BEGUN = "ema_trainer_state"


class EMACallback(TrainerCallback):  # type: ignore[misc]
    """Keep an EMA of the weights that a ``Trainer`` trains: ``callbacks=[EMACallback(0.999)]``.

    ``ema = decay * ema + (1 - decay) * weights`` after every optimizer step, kept inside the
    optimizer, whichever it is. The training is bit-equal to one without the callback. Evaluation
    and prediction use the EMA weights for every batch; outside of them the model holds the
    training weights. ``checkpoint-N/`` is what it would be without the callback, with the EMA in
    ``optimizer.pt``: it resumes with the callback (bit for bit) and without it. With
    ``load_best_model_at_end`` the model ends with the EMA weights of the best checkpoint.

    If the learning rate is decayed to zero, as the Trainer does by default, an EMA gains nothing.
    Set ``lr_scheduler_type="constant_with_warmup"``, or ``"warmup_stable_decay"``, under which it
    helps until the decay at the end. Evaluation loss after 800 steps of ``examples/hf_trainer.py``,
    3 seeds, training weights and EMA weights: constant 1.8067 and 1.7499, linear (the default)
    1.7820 and 1.7955, warmup_stable_decay 1.7398 and 1.7562.

    Args:
        decay: The share of the old EMA that is kept per optimizer step, in [0, 1], a schedule
            ``update number (1-based) -> decay``, or "auto" for
            ``compute_optimal_decay(max_steps)``. Default None: that of the ``EMAOptimizer`` which
            the Trainer was given, else 0.999.
        update_every: Optimizer steps between two updates. Default 1.
        update_after_step: Optimizer steps until averaging begins. Default 0.
        evaluate_with: "ema" or "training", the weights that evaluation and prediction use.
        save_ema: Whether every checkpoint gets a folder ``checkpoint-N/ema`` that
            ``from_pretrained`` deploys (with PEFT ``checkpoint-N/ema/adapter``). Default True.
        dtype: How an EMA tensor is stored, as for ``EMAOptimizer``.

    Raises:
        RuntimeError: At the start of a training under FSDP2 whose optimizer is no EMAOptimizer: the
            Trainer loads a sharded checkpoint before any callback is called, and wants
            ``optimizer_cls_and_kwargs=(EMAOptimizer.for_class(AdamW, decay=...), {...})``.
        ValueError, TypeError: An argument is out of its range. At the start of the training also:
            it is not that of the Trainer's own ``EMAOptimizer``, there are two callbacks, or the
            best checkpoint would hold no EMA weights to load.
    """

    def __init__(
        self,
        decay: Decay | Literal["auto"] | None = None,
        *,
        update_every: int = 1,
        update_after_step: int = 0,
        evaluate_with: Literal["ema", "training"] = "ema",
        save_ema: bool = True,
        dtype: EMADtype = None,
    ) -> None:
        if evaluate_with not in ("ema", "training"):
            raise ValueError(f"evaluate_with must be 'ema' or 'training', got {evaluate_with!r}")
        self.options = EMAOptions(decay, update_every, update_after_step, dtype)
        self.evaluate_with, self.save_ema = evaluate_with, save_ema
        self.optimizer: EMAOptimizer | None = None
        self.model: nn.Module | None = None
        self._loaded: dict[str, Tensor] | None = None
        self._original: dict[nn.Module, dict[str, Tensor]] = {}
        self._holds_best = False
        self._trainer: Any = None  # a weak reference to the Trainer of the last training

    def __getstate__(self) -> dict[str, Any]:
        """For pickle and deepcopy, which take no weak reference."""
        return {**self.__dict__, "_trainer": None}

    def apply_ema(self, model: nn.Module) -> None:
        """Copy the EMA weights into ``model``, one way, until ``restore_original(model)``.

        Args:
            model: The trained model, or another with parameters of the same names.

        Raises:
            RuntimeError: Nothing was trained or loaded yet.
            KeyError: The model lacks parameters of the EMA.
            ValueError: A parameter has another shape.
        """
        if self.optimizer is not None:
            self.optimizer.train()  # an evaluation may have failed half-way
        state = self._ema_by_name()
        named = names.named_parameters(model)
        if missing := sorted(set(state) - set(named)):
            raise KeyError(
                f"the model must have every parameter of the EMA, it lacks {missing}: pass the "
                "model that was trained, or one built alike"
            )
        for name, value in state.items():
            check_tensor(f"the EMA of {name}", value, named[name])
        if self._holds_best and model not in self._original:
            warn(
                "apply_ema() replaces the EMA weights of the best checkpoint, which the Trainer "
                "has loaded, by the last ones; restore_original(model) takes them out again"
            )
        held = {name: named[name].detach().clone() for name in state}
        self._original.setdefault(model, held)
        _pretrained.copy_state(state, named)
        self._set_eval_swaps()

    def restore_original(self, model: nn.Module) -> None:
        """Undo ``apply_ema``, and put the training weights back after a failed evaluation.

        Args:
            model: The model that ``apply_ema`` was given.
        """
        if self.optimizer is not None and self.optimizer.swapped:
            self.optimizer.train()
        _pretrained.copy_state(self._original.pop(model, {}), names.named_parameters(model))
        self._set_eval_swaps()

    def get_ema_state(self) -> dict[str, Tensor]:
        """The EMA weights by parameter name, as CPU tensors in the EMA's dtype.

        Under FSDP every rank calls it; the whole tensors are gathered one at a time for the first
        rank, and the dict of the others is empty.

        Raises:
            RuntimeError: Nothing was trained or loaded yet.
        """
        return whole_on_first_rank(self._ema_by_name())

    def _ema_by_name(self) -> dict[str, Tensor]:
        if self.optimizer is not None and self.model is not None:
            return self.optimizer.get_ema_state(self.model)
        if self._loaded is not None:
            return dict(self._loaded)
        raise RuntimeError("there is no EMA yet: call trainer.train() or load_ema_state() first")

    def load_ema_state(self, state: Mapping[str, Tensor]) -> None:
        """Take the EMA weights that ``get_ema_state`` returned.

        ``apply_ema(model)`` then works without any training, and a training that starts goes on
        averaging into them (one that resumes takes its checkpoint's instead). The names are
        checked against the model there.

        Args:
            state: Tensors by parameter name.

        Raises:
            TypeError: ``state`` is no dict of tensors.
        """
        if not isinstance(state, Mapping) or not all(map(torch.is_tensor, state.values())):
            raise TypeError(f"state must be a dict of tensors by parameter name, got {type(state)}")
        if self.optimizer is not None and self.model is not None:
            self.optimizer.train()
            self.optimizer.load_ema_state(self.model, state)
        else:
            self._loaded = {name: value.detach().cpu().clone() for name, value in state.items()}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Wrap the optimizer that the Trainer has made, or find its EMAOptimizer."""
        if args.load_best_model_at_end and args.save_only_model and not self.save_ema:
            raise ValueError(
                "load_best_model_at_end must find the EMA weights in the checkpoint, got "
                "save_only_model=True and save_ema=False: set one of them back"
            )
        refuse_engines(kwargs["optimizer"], args)
        check_optimizer(kwargs["optimizer"].optimizer, kwargs["model"])
        self.model, self._trainer = kwargs["model"], running_trainer()
        self.optimizer = self._find_or_wrap(kwargs["optimizer"], state)
        self.optimizer.train()  # an earlier evaluation may have failed half-way
        self._original, self._holds_best = {}, False
        self._set_eval_swaps()
        if self._loaded is not None and not state.global_step:
            self.optimizer.load_ema_state(self.model, self._loaded)
        self._loaded = None

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Put the training weights back after the last batch: not every loop ends in an event."""
        if getattr(kwargs.get("eval_dataloader"), "end_of_dataloader", False):  # Accelerate's
            self.on_evaluate(args, state, control, **kwargs)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Put the training weights back.

        Raises:
            RuntimeError: The evaluation has left LoRA adapters merged (they are unmerged then).
        """
        optimizer, model = _ema_optimizer(kwargs), kwargs.get("model")
        if optimizer is None:
            return
        undone = optimizer.swapped and model is not None and adapters.unmerge(model)
        _put_back(optimizer)
        if undone:
            adapters.raise_unmerged()

    on_predict = on_evaluate

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Add the EMA's decay and its distance from the weights."""
        optimizer = _ema_optimizer(kwargs)
        if optimizer is None or logs is None:
            return
        metrics = optimizer.ema_metrics()
        if not metrics["ema_updates"]:
            return
        shown = {key: metrics[key] for key in ("ema_decay", "ema_distance")}
        logs.update(shown)
        if state.log_history:  # the entry that the Trainer has just made of the same logs
            state.log_history[-1].update(shown)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the EMA weights beside the checkpoint that was just written."""
        if self.optimizer is None or not self.save_ema:
            return
        model, checkpoint = kwargs["model"], f"checkpoint-{state.global_step}"
        checkpoint = os.path.join(self._run_folder(args), checkpoint)
        writes = args.should_save and _pretrained.is_there(checkpoint)
        if not writes and not _pretrained.sharded(model):
            return
        _put_back(self.optimizer)  # an evaluation may have failed half-way
        aside_of = _pretrained.written_aside(checkpoint, writes)
        with self.optimizer.swap_ema_weights(), aside_of as aside:
            folder = _pretrained.ema_folder(model, aside)
            _pretrained.save_model(model, folder, writes)
            if writes and kwargs.get("processing_class") is not None:
                kwargs["processing_class"].save_pretrained(folder)

    def _run_folder(self, args: Any) -> str:
        """Where the checkpoints of this run are: a trial of a search has its own folder."""
        trainer = None if self._trainer is None else self._trainer()
        if trainer is None or getattr(trainer, "_trial", None) is None:
            return str(args.output_dir)
        return str(trainer._get_output_dir(trainer._trial))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave the training weights in, or the EMA weights of the best checkpoint."""
        if self.optimizer is None:
            return
        _put_back(self.optimizer)
        best = state.best_model_checkpoint
        if args.load_best_model_at_end and best and self.evaluate_with == "ema":
            _pretrained.load_best(self.optimizer, kwargs["model"], best)
            self._holds_best = True
            self._set_eval_swaps()

    def _find_or_wrap(self, accelerated: Any, state: Any) -> EMAOptimizer:
        found: Any = accelerated.optimizer
        if getattr(found, _BEGUN, None) is state:
            raise ValueError("the Trainer must have one EMACallback, got two: remove one of them")
        if isinstance(found, EMAOptimizer) and not isinstance(found, TrainerEMAOptimizer):
            self.options.check_same(found, state.max_steps, "which the Trainer was given")
        else:
            found = self._wrapper(accelerated, state)
        setattr(found, _BEGUN, state)
        take_over(found, state.global_step)
        return cast(EMAOptimizer, found)

    def _wrapper(self, accelerated: Any, state: Any) -> TrainerEMAOptimizer:
        """A wrapper with the options of this training, the one that is there if it has them."""
        found, options = accelerated.optimizer, self.options.resolved(state.max_steps)
        if not isinstance(found, TrainerEMAOptimizer):
            found = TrainerEMAOptimizer(found, **options)
        elif found.missed or any(
            not same_option(value, getattr(found._ema, name)) for name, value in options.items()
        ):
            found = renewed(found, options)
        if found is not accelerated.optimizer:
            _put_into(accelerated, found)
        found.trainer_state, found.trainer_model = state, self.model
        found.attended = partial(_is_in, self._trainer, self)
        return cast(TrainerEMAOptimizer, found)

    def _set_eval_swaps(self) -> None:
        if self.optimizer is None:
            return
        trained = self.optimizer._ema.slots.keys()
        applied = any(
            not trained.isdisjoint(_pretrained.members(model)) for model in self._original
        )
        in_model = applied or self._holds_best  # what is to be evaluated is in the model already
        self.optimizer.evaluate_with_ema(self.evaluate_with == "ema" and not in_model)


def _put_into(accelerated: Any, made: EMAOptimizer) -> None:
    accelerated.optimizer = made
    if accelerated.scaler is not None:
        # Accelerate has kept the inner optimizer's step to call it through the scaler.
        accelerated._optimizer_original_step_method = made.step
        accelerated._optimizer_patched_step_method = patch_optimizer_step(accelerated, made.step)


def _ema_optimizer(kwargs: Mapping[str, Any]) -> EMAOptimizer | None:
    """That of the Trainer which calls now: a callback may serve several."""
    found = getattr(kwargs.get("optimizer"), "optimizer", None)
    return found if isinstance(found, EMAOptimizer) else None


def _put_back(optimizer: EMAOptimizer) -> None:
    # Not train(): that would also put a schedule-free optimizer's training weights into the
    # model, where a run without the callback still has those of its eval().
    optimizer.put_back()


def _is_in(trainer: Any, callback: TrainerCallback) -> bool:
    """Whether a callback is in the Trainer of a weak reference, as far as one can know."""
    there = None if trainer is None else trainer()
    return there is None or callback in there.callback_handler.callbacks
