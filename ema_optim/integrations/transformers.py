"""``EMACallback``: the EMA of the weights in the Hugging Face ``Trainer``."""

import os
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .._arithmetic.formats import EMADtype
from .._engines import adapters
from .._engines.sharding import whole_on_first_rank
from .._shadow import names
from .._shadow.options import check_tensor, same_option
from .._shadow.shadow_set import ShadowSet
from .._warnings import warn
from ..optimizer import EMAOptimizer
from ..schedules import Decay, check_decay, compute_optimal_decay

try:
    from accelerate.optimizer import patch_optimizer_step
    from transformers import TrainerCallback
except ImportError as error:
    raise ImportError(
        'EMACallback needs transformers and accelerate: pip install "ema_optim[transformers]"'
    ) from error

from . import _pretrained
from ._trainer_optimizer import TrainerEMAOptimizer, refuse_engines, take_over

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
        self.decay = decay if decay is None or decay == "auto" else check_decay(decay)
        self.options: dict[str, Any] = {
            "update_every": update_every,
            "update_after_step": update_after_step,
            "dtype": dtype,
        }
        ShadowSet(0.0, update_every, update_after_step, dtype)  # checks them
        self.evaluate_with, self.save_ema = evaluate_with, save_ema
        self.optimizer: EMAOptimizer | None = None
        self.model: nn.Module | None = None
        self._loaded: dict[str, Tensor] | None = None
        self._original: dict[nn.Module, dict[str, Tensor]] = {}
        self._holds_best = False

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
        self.model = kwargs["model"]
        self.optimizer = self._find_or_wrap(kwargs["optimizer"], args, state)
        self.optimizer.train()  # an earlier evaluation may have failed half-way
        self._original, self._holds_best = {}, False
        self._set_eval_swaps()
        if self._loaded is not None and not state.global_step:
            self.optimizer.load_ema_state(self.model, self._loaded)
        self._loaded = None

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Put the training weights back.

        Raises:
            RuntimeError: The evaluation has left LoRA adapters merged (they are unmerged then).
        """
        if self.optimizer is None:
            return
        undone = self.optimizer.swapped and self.model is not None and adapters.unmerge(self.model)
        self._put_back()
        if undone:
            adapters.raise_unmerged()

    on_predict = on_evaluate

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Add the EMA's decay and its distance from the weights."""
        if self.optimizer is None or logs is None:
            return
        metrics = self.optimizer.ema_metrics()
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
        checkpoint = os.path.join(args.output_dir, checkpoint)
        writes = args.should_save and _pretrained.is_there(checkpoint)
        if not writes and not _pretrained.sharded(model):
            return
        self._put_back()  # an evaluation may have failed half-way
        folder = _pretrained.ema_folder(model, checkpoint)
        with self.optimizer.swap_ema_weights():
            _pretrained.save_model(model, folder, writes)
        if writes and kwargs.get("processing_class") is not None:
            kwargs["processing_class"].save_pretrained(folder)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave the training weights in, or the EMA weights of the best checkpoint."""
        if self.optimizer is None:
            return
        self._put_back()
        best = state.best_model_checkpoint
        if args.load_best_model_at_end and best and self.evaluate_with == "ema":
            _pretrained.load_best(self.optimizer, kwargs["model"], best)
            self._holds_best = True
            self._set_eval_swaps()

    def _put_back(self) -> None:
        # Not train(): that would also put a schedule-free optimizer's training weights into the
        # model, where a run without the callback still has those of its eval().
        if self.optimizer is not None:
            self.optimizer.put_back()

    def _find_or_wrap(self, accelerated: Any, args: Any, state: Any) -> EMAOptimizer:
        refuse_engines(accelerated, args)
        found = accelerated.optimizer
        if not isinstance(found, EMAOptimizer):
            found = self._wrap(accelerated, state)
        elif getattr(found, _BEGUN, None) is state:
            raise ValueError("the Trainer must have one EMACallback, got two: remove one of them")
        if isinstance(found, TrainerEMAOptimizer):
            found.trainer_state = state
        else:
            self._check_same(found, state)
        setattr(found, _BEGUN, state)
        take_over(found, state.global_step)
        return found

    def _check_same(self, found: EMAOptimizer, state: Any) -> None:
        given = {"decay": None if self.decay is None else self._decay(state), **self.options}
        defaults = {"decay": None, "update_every": 1, "update_after_step": 0, "dtype": None}
        for name, value in given.items():
            own = getattr(found._ema, name)
            if value != defaults[name] and not same_option(value, own):
                raise ValueError(
                    f"{name} must be that of the EMAOptimizer which the Trainer was given ({own}), "
                    f"got {value}: leave it out here, or set it there"
                )

    def _decay(self, state: Any) -> Decay:
        if self.decay == "auto":
            return compute_optimal_decay(state.max_steps)
        return 0.999 if self.decay is None else self.decay

    def _wrap(self, accelerated: Any, state: Any) -> EMAOptimizer:
        inner = accelerated.optimizer
        made = TrainerEMAOptimizer(inner, self._decay(state), **self.options)
        accelerated.optimizer = made
        if accelerated.scaler is not None:
            # Accelerate has kept the inner optimizer's step to call it through the scaler.
            accelerated._optimizer_original_step_method = made.step
            accelerated._optimizer_patched_step_method = patch_optimizer_step(
                accelerated, made.step
            )
        return made

    def _set_eval_swaps(self) -> None:
        if self.optimizer is None:
            return
        trained = self.optimizer._ema.slots.keys()
        applied = any(
            not trained.isdisjoint(_pretrained.members(model)) for model in self._original
        )
        in_model = applied or self._holds_best  # what is to be evaluated is in the model already
        self.optimizer.evaluate_with_ema(self.evaluate_with == "ema" and not in_model)
