"""``EMACallback``: the EMA of the weights in the Hugging Face ``Trainer``."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, cast

import torch

from .._arithmetic.formats import EMADtype
from .._engines import adapters
from .._shadow import report, swap
from .._shadow.buffers import Wanted
from .._shadow.options import same_option
from .._shadow.windows import Decays
from ..optimizer import EMAOptimizer

try:
    from transformers import TrainerCallback
except ImportError as error:
    raise ImportError(
        'EMACallback needs transformers and accelerate: pip install "ema_optim[transformers]"'
    ) from error

from . import _buffers, _pretrained
from . import _trainer_logs as _logs
from ._options import EMAOptions, option_of, shown_in_logs
from ._snapshots import as_folder, check_snapshots, folder_of, save_snapshots
from ._trainer_hub import check_strategy, push_ema, warn_of_folders
from ._trainer_optimizer import (
    TrainerEMAOptimizer,
    check_optimizer,
    ema_optimizer,
    is_deepspeed,
    is_in,
    put_into,
    refuse_engines,
    renewed,
    run_folder,
    running_trainer,
    take_over,
)
from ._verbs import EMAVerbs

# The attribute of an optimizer that tells whether another callback has begun the same training.
_BEGUN = "ema_trainer_state"


class EMACallback(EMAVerbs, TrainerCallback):  # type: ignore[misc]
    """Keep an EMA of the weights that a ``Trainer`` trains: ``callbacks=[EMACallback(0.999)]``.

    ``ema = decay * ema + (1 - decay) * weights`` after every optimizer step, kept inside the
    optimizer, whichever it is. The training is bit-equal to one without the callback. Evaluation
    and prediction use the EMA weights for every batch; outside of them the model holds the
    training weights. ``checkpoint-N/`` is what it would be without the callback, with the EMA in
    ``optimizer.pt``: it resumes with the callback (bit for bit) and without it. With
    ``load_best_model_at_end`` the model ends with the EMA weights of the best checkpoint. Every
    reporter gets ``ema_decay`` and ``ema_distance`` with the logs of the training.

    If the learning rate is decayed to zero, as the Trainer does by default, an EMA gains nothing.
    Set ``lr_scheduler_type="constant_with_warmup"``, or ``"warmup_stable_decay"``, under which it
    helps until the decay at the end. Evaluation loss after 800 steps of ``examples/hf_trainer.py``,
    3 seeds, training weights and EMA weights: constant 1.8067 and 1.7499, linear (the default)
    1.7820 and 1.7955, warmup_stable_decay 1.7398 and 1.7562.

    Args:
        decay: The share of the old EMA that is kept per optimizer step, in [0, 1], a schedule
            ``update number (1-based) -> decay``, several by name as for ``EMAOptimizer`` (the
            first is evaluated and saved), or "auto" for one chosen by the length of the run,
            ``warmup_decay(compute_optimal_decay(max_steps))``, anew by each ``train()``. Default
            None: that of the ``EMAOptimizer`` which the Trainer was given, else "auto".
        update_every: Optimizer steps between two updates. Default 1.
        update_after_step: Optimizer steps until averaging begins. Default 0.
        dtype: How an EMA tensor is stored, as for ``EMAOptimizer``.
        device: ``"cpu"`` keeps the EMA in pinned host memory, as for ``EMAOptimizer``.
        use_buffers: Which buffers are averaged too and go wherever the EMA weights go, as
            ``EMAModel`` takes it: True for the running statistics of BatchNorm, a list of names, or
            False. Default None: False, with a warning where statistics go with other weights.
        evaluate_with: "ema" or "training", the weights that evaluation and prediction use, or
            "both": every evaluation on the EMA weights (``eval_loss``, ...) is followed by one on
            the training weights (``eval_training_loss``, ...), for two curves of one run. May be
            set later.
        save_ema: Whether every checkpoint gets a folder ``checkpoint-N/ema`` that
            ``from_pretrained`` deploys (with PEFT ``checkpoint-N/ema/adapter``). Default True.
        snapshots: A folder into which the EMA weights are written whenever a checkpoint is, for
            ``EMASnapshots``: any window after the training. A trial of a search has one in it.
        hub_weights: "training" or "ema", the weights that ``push_to_hub`` pushes, by itself
            (``hub_strategy="every_save"``) and as ``trainer.push_to_hub()``.

    Raises:
        RuntimeError: At the start of a training under FSDP2 whose optimizer is no EMAOptimizer: the
            Trainer loads a sharded checkpoint before any callback is called, and wants
            ``optimizer_cls_and_kwargs=(EMAOptimizer.for_class(AdamW, decay=...), {...})``.
        ValueError, TypeError: An argument is out of its range. At the start of the training also:
            it is not that of the Trainer's own ``EMAOptimizer``, there are two callbacks, or the
            best checkpoint would hold no EMA weights to load; or ``use_buffers`` goes with the
            Trainer's own ``EMAOptimizer`` or with sharded weights.
    """

    def __init__(
        self,
        decay: Decays | Literal["auto"] | None = None,
        *,
        update_every: int = 1,
        update_after_step: int = 0,
        dtype: EMADtype = None,
        device: torch.device | str | None = None,
        use_buffers: Wanted | None = None,
        evaluate_with: Literal["ema", "training", "both"] = "ema",
        save_ema: bool = True,
        snapshots: str | os.PathLike[str] | None = None,
        hub_weights: Literal["training", "ema"] = "training",
    ) -> None:
        super().__init__()
        if hub_weights not in ("training", "ema"):
            raise ValueError(f"hub_weights must be 'training' or 'ema', got {hub_weights!r}")
        if hub_weights == "ema" and not save_ema:
            raise ValueError(
                "hub_weights='ema' must find the EMA weights in the checkpoint, got "
                "save_ema=False: leave it out"
            )
        self.options = EMAOptions(decay, update_every, update_after_step, dtype, device)
        self.use_buffers = _buffers.as_choice(use_buffers)
        self.optimizer: Any = None  # an EMAOptimizer, or under DeepSpeed an EMAEngine
        self.evaluate_with, self.save_ema = evaluate_with, save_ema
        self.hub_weights, self.snapshots = hub_weights, as_folder(snapshots)
        self._saved = ""  # the checkpoint beside which the EMA weights were written last
        self._trainer: Any = None  # a weak reference to the Trainer of the last training

    def __getstate__(self) -> dict[str, Any]:
        """For pickle and deepcopy, which take no weak reference."""
        return {**super().__getstate__(), "_trainer": None}

    @property
    def evaluate_with(self) -> str:
        """The weights that evaluation and prediction use: "ema", "training" or "both"."""
        return self._evaluate_with

    @evaluate_with.setter
    def evaluate_with(self, value: str) -> None:
        if value not in ("ema", "training", "both"):
            raise ValueError(f"evaluate_with must be 'ema', 'training' or 'both', got {value!r}")
        self._evaluate_with = value
        self._written()

    def _averaged(self) -> list[Any]:
        return [] if self.optimizer is None else [self.optimizer]

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Wrap the optimizer that the Trainer has made, or find its EMAOptimizer."""
        if args.load_best_model_at_end and args.save_only_model and not self.save_ema:
            raise ValueError(
                "load_best_model_at_end must find the EMA weights in the checkpoint, got "
                "save_only_model=True and save_ema=False: set one of them back"
            )
        if self.hub_weights == "ema":
            check_strategy(args)
        _buffers.refuse_sharded(kwargs["model"], self.use_buffers)
        refuse_engines(kwargs["optimizer"])
        if not is_deepspeed(kwargs["optimizer"]):
            check_optimizer(kwargs["optimizer"].optimizer, kwargs["model"])
        self.model, self._trainer = kwargs["model"], running_trainer()
        self.optimizer = self._find_or_wrap(kwargs["optimizer"], state)
        self.optimizer.train()  # an earlier evaluation may have failed half-way
        self._original, self._holds_best, self._saved = {}, False, ""
        own = self.use_buffers is None
        self._statistics = _buffers.OwnStatistics(kwargs["model"]) if own else None
        self._written()
        _logs.put_first(self._trainer, self)
        if self._loaded is not None and not state.global_step:
            self._hand_over(self._loaded)
        self._loaded = None
        check_snapshots(
            folder_of(self.snapshots, args, run_folder(self._trainer, args)), [self.optimizer]
        )
        self._begin_pushing(args, state, control, kwargs)
        report.warn_of_run(self.optimizer._ema, state.max_steps - state.global_step)

    def _begin_pushing(self, args: Any, state: Any, control: Any, kwargs: dict[str, Any]) -> None:
        if self.evaluate_with != "training":
            warn_of_folders(args, self.hub_weights, self.save_ema)
        trainer = None if self._trainer is None else self._trainer()
        if self.hub_weights == "ema" and args.push_to_hub and trainer is not None:
            save = partial(self.on_save, args, state, control, **kwargs)
            push_ema(trainer, partial(self._in_model, state), save)

    @contextmanager
    def _in_model(self, state: Any) -> Iterator[None]:
        """The EMA weights in the model, and told of in the files that are written."""
        assert self.optimizer is not None
        header = _pretrained.metadata(self.optimizer, state.global_step)
        swaps = not self._holds_ema(self.optimizer)
        with self.optimizer.swap_ema_weights(swaps), _pretrained.marked(header):
            yield

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Put the training weights back after the last batch: not every loop ends in an event."""
        if getattr(kwargs.get("eval_dataloader"), "end_of_dataloader", False):  # Accelerate's
            self.on_predict(args, state, control, **kwargs)

    def on_predict(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Put the training weights back.

        Raises:
            RuntimeError: The evaluation has left LoRA adapters merged (they are unmerged then).
        """
        optimizer, model = ema_optimizer(kwargs), kwargs.get("model")
        if optimizer is None:
            return
        self._tell_of_statistics(optimizer, model)
        undone = optimizer.swapped and model is not None and adapters.unmerge(model)
        _put_back(optimizer)
        if undone:
            adapters.raise_unmerged()

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Put the training weights back, and evaluate them too where "both" is wanted.

        Raises:
            RuntimeError: The evaluation has left LoRA adapters merged (they are unmerged then).
        """
        self.on_predict(args, state, control, **kwargs)
        optimizer = ema_optimizer(kwargs)
        if optimizer is None or self.evaluate_with != "both" or self._holds_ema(optimizer):
            return
        optimizer._ema.swap.show_in_eval(False)
        try:
            _logs.evaluate_again(running_trainer(), kwargs["eval_dataloader"])
        finally:
            _put_back(optimizer)
            self._written()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Add the EMA's metrics to the entries of the training, for every reporter."""
        optimizer = ema_optimizer(kwargs)
        if optimizer is None or "loss" not in (logs or {}):  # an evaluation's, or the summary
            return
        metrics = optimizer.ema_metrics()
        if not metrics["ema_updates"]:
            return
        shown = shown_in_logs(metrics)
        logs.update(shown)
        if state.log_history:  # the entry that the Trainer has just made of the same logs
            state.log_history[-1].update(shown)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the EMA weights beside the checkpoint that was just written."""
        if self.optimizer is None:
            return
        model, checkpoint = kwargs["model"], f"checkpoint-{state.global_step}"
        checkpoint = os.path.join(run_folder(self._trainer, args), checkpoint)
        if checkpoint == self._saved:
            return  # before it was pushed
        self._saved = checkpoint
        own = folder_of(self.snapshots, args, run_folder(self._trainer, args))
        save_snapshots(own, [self.optimizer], model)
        if not self.save_ema:
            return
        writes = args.should_save and _pretrained.is_there(checkpoint)
        alone = isinstance(self.optimizer, EMAOptimizer) and not _pretrained.sharded(model)
        if not writes and alone:
            return
        _put_back(self.optimizer)  # an evaluation may have failed half-way
        aside_of = _pretrained.written_aside(checkpoint, writes)
        with self.optimizer.swap_ema_weights(), aside_of as aside:
            folder = _pretrained.ema_folder(model, aside)
            header = _pretrained.metadata(self.optimizer, state.global_step)
            self._tell_of_statistics(self.optimizer, model)
            _pretrained.save_model(model, folder, header, writes)
            if writes and kwargs.get("processing_class") is not None:
                kwargs["processing_class"].save_pretrained(folder)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave the training weights in, or the EMA weights of the best checkpoint."""
        if self.optimizer is None:
            return
        _put_back(self.optimizer)
        best = state.best_model_checkpoint
        if args.load_best_model_at_end and best and self.evaluate_with != "training":
            if isinstance(self.optimizer, EMAOptimizer):
                _pretrained.load_best(self.optimizer, kwargs["model"], best)
            else:
                self.optimizer.load_best()
            self._holds_best = True
            self._written()

    def _find_or_wrap(self, accelerated: Any, state: Any) -> Any:
        found: Any = accelerated.optimizer
        if engine := is_deepspeed(accelerated):
            from ._trainer_deepspeed import engine_for

            trains = partial(is_in, self._trainer, self)
            found = engine_for(accelerated, self, state.max_steps, self._trainer, trains)
        if getattr(found, _BEGUN, None) is state:
            raise ValueError("the Trainer must have one EMACallback, got two: remove one of them")
        if engine:
            return _begun(found, state)
        if isinstance(found, EMAOptimizer) and not isinstance(found, TrainerEMAOptimizer):
            _buffers.refuse_own(found, self.use_buffers, "which the Trainer was given")
            self.options.check_same(found, state.max_steps, "which the Trainer was given")
        else:
            found = self._wrapper(accelerated, state)
        take_over(_begun(found, state), state.global_step)
        return found

    def _wrapper(self, accelerated: Any, state: Any) -> TrainerEMAOptimizer:
        """A wrapper with the options of this training, the one that is there if it has them."""
        found, options = accelerated.optimizer, self.options.resolved(state.max_steps)
        self.options.log_choice(state.max_steps)
        old = None if getattr(found, "missed", False) else getattr(found, "buffers", None)
        if not isinstance(found, TrainerEMAOptimizer):
            found = TrainerEMAOptimizer(found, **options)
        elif found.missed or any(
            not same_option(value, option_of(found, name)) for name, value in options.items()
        ):
            found = renewed(found, options)
        if found is not accelerated.optimizer:
            put_into(accelerated, found)
        found.buffers = _buffers.continued(old, self.model, self.use_buffers, options)
        found.trainer_state, found.trainer_model = state, self.model
        found.attended = partial(is_in, self._trainer, self)
        return cast(TrainerEMAOptimizer, found)

    def _written(self) -> None:
        """Have evaluations swap, unless what is to be evaluated is in the model already."""
        if self.optimizer is not None:
            wanted = self.evaluate_with != "training" and not self._holds_ema(self.optimizer)
            self.optimizer._ema.swap.show_in_eval(wanted)

    def _holds_ema(self, optimizer: Any) -> bool:
        if not isinstance(optimizer, EMAOptimizer):
            return self._holds_best or any(map(optimizer.trains, self._original))
        trained = optimizer._ema.slots.keys()
        applied = (_pretrained.members(model) for model in self._original)
        return self._holds_best or not all(map(trained.isdisjoint, applied))


def _begun(found: Any, state: Any) -> Any:
    setattr(found, _BEGUN, state)
    return found


def _put_back(optimizer: Any) -> None:
    # Not train(): that would also put a schedule-free optimizer's training weights into the
    # model, where a run without the callback still has those of its eval().
    if isinstance(optimizer, _buffers.BufferedEMAOptimizer):
        optimizer.put_back()
    else:
        swap.put_back_after_eval(optimizer._ema)
