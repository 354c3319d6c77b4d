"""``EMAWeights``: the EMA of the weights in a Lightning ``Trainer``."""

from collections.abc import Sequence
from copy import copy
from os import PathLike
from typing import Any, Literal, cast

import torch
from torch import nn
from torch.optim import Optimizer

from .._arithmetic.formats import EMADtype
from .._shadow import names, report
from .._shadow.buffers import Wanted
from .._shadow.windows import Decays
from .._warnings import warn
from ..optimizer import EMAOptimizer

try:
    import lightning.pytorch as pl
except ImportError:
    try:
        import pytorch_lightning as pl
    except ImportError as error:
        message = 'EMAWeights needs Lightning: pip install "ema_optim[lightning]"'
        raise ImportError(message) from error

from . import _buffers
from ._options import EMAOptions, shown_in_logs
from ._snapshots import as_folder, check_snapshots, save_snapshots
from ._verbs import EMAVerbs


class LightningEMAOptimizer(_buffers.BufferedEMAOptimizer):
    """The wrapper that the callback makes."""

    @property
    def optimizer(self) -> Optimizer:
        """The inner optimizer, where ``LearningRateMonitor`` looks for the one to name."""
        return self.inner


class EMAWeights(EMAVerbs, pl.Callback):  # type: ignore[misc]
    """Keep an EMA of the weights that a ``Trainer`` trains: ``callbacks=[EMAWeights(0.999)]``.

    ``ema = decay * ema + (1 - decay) * weights`` after every step of an optimizer, kept inside each
    optimizer. The training is bit-equal to one without the callback. Validation, test and
    prediction, inside ``fit`` and after it, use the EMA weights for every batch; outside of them
    the model holds the training weights, after ``fit`` and after an exception too; then
    ``apply_ema(model)`` puts the EMA weights in. ``ema_decay`` and ``ema_distance`` are logged
    every ``log_every_n_steps``. What ``trainer.test(ckpt_path=...)`` loads is
    evaluated as it is. Every ``fit`` makes new optimizers and so begins a new EMA, unless it
    resumes or is given the same ``EMAOptimizer`` again.

    A checkpoint, whenever it is written, has the layout of Lightning's ``WeightAveraging``: the EMA
    weights in ``state_dict``, for ``load_from_checkpoint`` and ``trainer.test(ckpt_path=...)`` (in
    fp32 for narrower weights), the training weights in ``current_model_state``.
    ``trainer.fit(ckpt_path=...)`` goes on from it bit for bit. A checkpoint written without the
    callback resumes too: the EMA then begins at the loaded weights, with a warning.

    *Resuming without the callback*, Lightning warns that the callback is missing, takes the EMA
    weights for the training weights and loads optimizer states that hold the EMA too. To go on from
    the training weights, change the checkpoint (``torch.load``) so and save it anew::

        checkpoint["state_dict"] = checkpoint.pop("current_model_state")
        states = checkpoint["optimizer_states"]
        checkpoint["optimizer_states"] = [strip_ema_state_dict(state) for state in states]

    Checkpoints of weights alone (``save_weights_only=True``) are written past all callbacks: they
    hold the weights that are in the model, the training weights except during a validation.

    Args:
        decay: The share of the old EMA that is kept per optimizer step, in [0, 1], a schedule
            ``update number (1-based) -> decay``, several by name as for ``EMAOptimizer`` (the
            first is evaluated and saved), or "auto" for one chosen by the length of the run,
            ``warmup_decay(compute_optimal_decay(trainer.estimated_stepping_batches))``. Default
            None: that of the ``EMAOptimizer`` which ``configure_optimizers`` returned, else
            "auto", or ``warmup_decay(0.999)`` in a run without an end.
        update_every: Optimizer steps between two updates. Default 1: the exact EMA.
        update_after_step: Optimizer steps until averaging begins. Default 0.
        dtype: How an EMA tensor is stored, as for ``EMAOptimizer``.
        device: ``"cpu"`` keeps the EMA in pinned host memory, as for ``EMAOptimizer``.
        use_buffers: Which buffers are averaged too and go wherever the EMA weights go, as
            ``EMAModel`` takes it: True for the running statistics of BatchNorm, a list of names, or
            False. Of several optimizers the steps of the first averaged one count. Default None:
            False, with a warning where statistics go with other weights.
        snapshots: A folder into which the EMA weights are written whenever a checkpoint is, for
            ``EMASnapshots``: any window after the training. Of several optimizers each has one in
            it, ``0``, ``1``, and so on.
        optimizers: Which of several optimizers are averaged, by their positions in what
            ``configure_optimizers`` returns: ``[0]`` for the generator of a GAN. Default None:
            those that are an ``EMAOptimizer`` already, else all.

    Raises:
        ValueError, TypeError: An argument is out of its range. At the start of ``fit`` also: two
            callbacks average the weights, an argument is not that of the ``EMAOptimizer`` from
            ``configure_optimizers``, the strategy shards the weights, or ``use_buffers`` goes with
            an ``EMAOptimizer`` from there, or is True where not every optimizer is averaged.
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
        snapshots: str | PathLike[str] | None = None,
        optimizers: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self._options = EMAOptions(decay, update_every, update_after_step, dtype, device)
        self._use_buffers = _buffers.as_choice(use_buffers)
        self._saved_buffers: Any = None  # in the checkpoint that the fit resumes from
        self.snapshots = as_folder(snapshots)
        self._wanted = _check_positions(optimizers)
        self._optimizers: list[EMAOptimizer] = []  # of the last fit
        self._averages: Sequence[int] = ()  # their positions
        self._swapped: list[EMAOptimizer] = []

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Refuse another averaging callback; a fit forgets the one before it."""
        averaging = getattr(pl.callbacks, "WeightAveraging", EMAWeights)
        for callback in trainer.callbacks:
            if callback is not self and isinstance(callback, (EMAWeights, averaging)):
                two = f"EMAWeights and {type(callback).__name__}"
                raise ValueError(f"one callback may average the weights, got {two}: remove one")
        if stage == "fit":
            self._optimizers, self._original, self.model = [], {}, pl_module
            self._saved_buffers = None

    def _averaged(self) -> list[EMAOptimizer]:
        return self._optimizers

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Wrap the optimizers; Lightning restores their states from a checkpoint after this."""
        _check_trainer(trainer)
        # Only where it is needed: Lightning sets the training's loader up to know them.
        steps = trainer.estimated_stepping_batches if self._options.chooses else 0
        self._averages = _positions(trainer.optimizers, self._wanted)
        self._optimizers = []
        optimizers = list(trainer.optimizers)
        for index in self._averages:
            optimizers[index] = _wrap(optimizers[index], self._options, steps)
            self._optimizers.append(optimizers[index])
        self._follow_buffers(trainer, pl_module, self._options.resolved(steps))
        trainer.optimizers = optimizers

    def _follow_buffers(self, trainer: Any, pl_module: Any, options: dict[str, Any]) -> None:
        wanted = self._use_buffers
        self._statistics = _buffers.OwnStatistics(pl_module) if wanted is None else None
        if not wanted:
            return
        first = self._optimizers[0]
        if not isinstance(first, LightningEMAOptimizer):
            _buffers.refuse_own(first, wanted, "from configure_optimizers")
            return
        if wanted is True and len(self._optimizers) < len(trainer.optimizers):
            raise ValueError(
                "use_buffers must list names where not every optimizer is averaged, got True: "
                "name the buffers of the averaged part, as in ['generator.*.running_*']"
            )
        first.buffers = _buffers.BufferEMA(pl_module, wanted, options)
        if trainer.ckpt_path:  # the model's own are loaded already
            _buffers.resume(first, self._saved_buffers, adopted=True)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Take what ``load_ema_state`` was given, unless the fit resumes."""
        if self._loaded is not None and not trainer.ckpt_path:
            self._hand_over(self._loaded)
        self._loaded = None
        check_snapshots(self.snapshots, self._optimizers)
        left = trainer.estimated_stepping_batches - trainer.global_step
        for optimizer in self._optimizers:
            report.warn_of_run(optimizer._ema, left)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        """Log the decay in force and the distance from the weights."""
        if not (trainer.loggers and trainer._logger_connector.should_update_logs):
            return
        for index, optimizer in enumerate(self._optimizers):
            metrics = optimizer.ema_metrics()
            ending = f"_{index}" if len(self._optimizers) > 1 else ""
            for name, value in shown_in_logs(metrics).items() if metrics["ema_updates"] else ():
                pl_module.log(name + ending, value, on_step=True, on_epoch=False)

    def _swap_in(self, trainer: Any, pl_module: Any) -> None:
        """Put the EMA weights in, for all batches."""
        if trainer.state.fn != "fit" and trainer.ckpt_path:
            self._optimizers = []  # the loaded weights are to be evaluated, not an earlier fit's
        # A user's own swap is left for the user to end.
        self._swapped = [optimizer for optimizer in self._optimizers if not optimizer.swapped]
        for optimizer in self._swapped:
            optimizer.eval()
            self._tell_of_statistics(optimizer, pl_module)

    def _swap_out(self, *args: Any) -> None:
        """Put the training weights back."""
        for optimizer in reversed(self._swapped):
            optimizer.train()
        self._swapped = []

    on_validation_start = on_test_start = on_predict_start = _swap_in
    on_validation_end = on_test_end = on_predict_end = on_exception = _swap_out

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Write the EMA weights as ``state_dict``, also in the middle of a validation."""
        if not self._optimizers:
            return
        save_snapshots(self.snapshots, self._optimizers, pl_module)
        steps = max(optimizer._ema.step for optimizer in self._optimizers)
        checkpoint["averaging_state"] = {"n_averaged": torch.tensor(steps, device="cpu")}
        checkpoint["current_model_state"] = checkpoint["state_dict"]
        for optimizer in self._optimizers:
            _part_weights(optimizer, pl_module, checkpoint)
        for index, optimizer in zip(self._averages, self._optimizers, strict=True):
            states = checkpoint["optimizer_states"]
            states[index] = _unswapped(optimizer, states[index])
        # An entry here has Lightning warn of a resume without this callback. (As state_dict() it
        # would have Lightning refuse two of them by a message without a remedy.)
        found = [names.group_names(o.param_groups, pl_module) for o in trainer.optimizers]
        entry = checkpoint["callbacks"][self.state_key] = {"ema_step": steps, "param_names": found}
        if (buffers := _buffers.buffers_of(self._optimizers)) is not None:
            entry["buffers"] = buffers.state_dict()

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Begin a resumed fit at the training weights; ``state_dict`` has just been loaded."""
        entry = checkpoint.get("callbacks", {}).get(self.state_key) or {}
        self._saved_buffers = entry.get("buffers")
        if trainer.state.fn == "fit" and "current_model_state" in checkpoint:
            state = _migrated(pl_module, checkpoint)
            pl_module.load_state_dict(state, strict=pl_module.strict_loading)


def _check_trainer(trainer: Any) -> None:
    if trainer.strategy.restore_checkpoint_after_setup:
        name = type(trainer.strategy).__name__
        remedy = "use EMAOptimizer alone"
        if "DeepSpeed" in name:
            remedy = (
                "attach ema_optim.integrations.deepspeed.EMAEngine(trainer.strategy.model, decay) "
                "in on_fit_start in its place, and swap around the validation"
            )
        raise ValueError(
            "strategy must keep whole weights on every rank (one device, DDP), got "
            f"{name}: {remedy}"
        )
    if not all(optimizer.state_dict() for optimizer in trainer.optimizers):  # Lightning's stand-in
        raise ValueError("configure_optimizers must return an optimizer, got None: return one")
    if any(getattr(saver, "save_weights_only", False) for saver in trainer.checkpoint_callbacks):
        warn(
            "ModelCheckpoint(save_weights_only=True) writes past EMAWeights: its files hold the "
            "training weights. Leave it False to have the EMA weights in state_dict"
        )


def _check_positions(optimizers: object) -> Sequence[int] | None:
    if optimizers is None:
        return None
    if isinstance(optimizers, str) or not isinstance(optimizers, Sequence):
        raise TypeError(f"optimizers must be a list of positions or None, got {optimizers!r}")
    if not optimizers or not all(type(i) is int and i >= 0 for i in optimizers):
        raise ValueError(
            f"optimizers must list positions from 0 on, got {optimizers!r}: leave it out for all"
        )
    return sorted(set(optimizers))


def _positions(there: Sequence[Optimizer], wanted: Sequence[int] | None) -> Sequence[int]:
    """Which of the optimizers are averaged."""
    if wanted is not None:
        if wanted[-1] >= len(there):
            raise ValueError(
                f"optimizers must be positions among the {len(there)} that configure_optimizers "
                f"has returned, got {wanted[-1]}"
            )
        return wanted
    wrapped = [i for i, optimizer in enumerate(there) if isinstance(optimizer, EMAOptimizer)]
    return wrapped or range(len(there))


def _wrap(optimizer: Optimizer, options: EMAOptions, steps: float) -> EMAOptimizer:
    if not isinstance(optimizer, EMAOptimizer):
        options.log_choice(steps)
        return LightningEMAOptimizer(optimizer, **options.resolved(steps))
    options.check_same(optimizer, steps, "from configure_optimizers")
    return optimizer


def _migrated(model: Any, checkpoint: dict[str, Any]) -> dict[str, Any]:
    """The training weights of a checkpoint as the module's ``on_load_checkpoint`` changes them.

    Lightning has called it once, on the EMA weights.
    """
    training = {**checkpoint, "state_dict": copy(checkpoint["current_model_state"])}
    try:
        model.on_load_checkpoint(training)
    except Exception as error:
        raise RuntimeError(
            "on_load_checkpoint of the LightningModule must change the training weights as it has "
            f"changed the EMA weights, the second call failed ({error!r}): have it take a "
            "checkpoint again, with other weights under 'state_dict'"
        ) from error
    return cast(dict[str, Any], training["state_dict"])


def _part_weights(optimizer: EMAOptimizer, model: nn.Module, checkpoint: dict[str, Any]) -> None:
    ema, training = map(copy, (checkpoint["state_dict"], checkpoint["current_model_state"]))
    shadow, members = optimizer._ema, set(optimizer._ema.members())
    for name, param in model.named_parameters(remove_duplicate=False):
        if name in ema and param in members:
            # The tensors of the optimizer's state, not copies of them: the file holds them once.
            ema[name], training[name] = shadow.ema_of(param), shadow.weights_of(param)
    buffers = _buffers.buffers_of([optimizer])
    for name, (ema_of, own) in ({} if buffers is None else buffers.both_by_name()).items():
        if name in ema:
            ema[name], training[name] = ema_of, own
    checkpoint["state_dict"], checkpoint["current_model_state"] = ema, training


def _unswapped(optimizer: EMAOptimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """The optimizer's state dict as if the training weights were in, without moving any."""
    state = dict(state_dict["state"])
    groups = [{**group, "ema_swapped": False} for group in state_dict["param_groups"]]
    for group, packed in zip(optimizer.param_groups, groups, strict=True):
        for param, key in zip(group["params"], packed["params"], strict=True):
            if "ema" in state.get(key, ()):
                state[key] = {**state[key], "ema": optimizer._ema.main_of(param)}
    return {**state_dict, "state": state, "param_groups": groups}
