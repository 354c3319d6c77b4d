"""What the callbacks of all trainers have in common for their users: the EMA after a training."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .._engines.quantized import write_
from .._engines.sharding import local, part_for, whole_on_first_rank
from .._shadow import names
from .._shadow.choice import Choice
from .._shadow.holdings import no_autograd
from .._shadow.options import check_tensor
from .._warnings import warn
from ..optimizer import EMAOptimizer
from ._buffers import OwnStatistics


class EMAVerbs:
    """``apply_ema``, ``restore_original``, ``get_ema_state`` and ``load_ema_state``."""

    def __init__(self) -> None:
        self.model: nn.Module | None = None  # of the last training
        self._loaded: dict[str, Tensor] | None = None
        self._original: dict[nn.Module, dict[str, Tensor]] = {}
        self._holds_best = False  # whether the trainer has loaded the EMA of its best checkpoint
        self._statistics: OwnStatistics | None = None  # of the last training, unless averaged

    def _averaged(self) -> Sequence[Any]:
        """The optimizers of the last training that have an EMA; under DeepSpeed its engine."""
        raise NotImplementedError

    def _engine_of(self, model: nn.Module) -> Any:
        """The engine that trains a model, if one does."""
        engines = (each for each in self._averaged() if not isinstance(each, EMAOptimizer))
        return next((engine for engine in engines if engine.trains(model)), None)

    def _written(self) -> None:
        """Called after weights were put into a model or taken out of it."""

    def _tell_of_statistics(self, optimizer: EMAOptimizer, model: nn.Module | None) -> None:
        """Called while the EMA weights may be in the model."""
        if self._statistics is not None and model is not None and optimizer.swapped:
            self._statistics.warn(model)

    def apply_ema(self, model: nn.Module, *, decay: Choice = None, max_error: float = 0.05) -> None:
        """Copy the EMA weights into ``model``, one way, until ``restore_original(model)``.

        Args:
            model: The trained model, or another with parameters of the same names.
            decay: Which average, as for ``EMAOptimizer.swap_ema_weights``.
            max_error: The limit of its told error.

        Raises:
            RuntimeError: Nothing was trained or loaded yet.
            KeyError: The model lacks parameters of the EMA.
            ValueError: A parameter has another shape, or there is no such average.
        """
        for optimizer in self._averaged():
            optimizer.train()  # an evaluation may have failed half-way
        if self._holds_best and model not in self._original:
            warn(
                "apply_ema() replaces the EMA weights of the best checkpoint, which the Trainer "
                "has loaded, by the last ones; restore_original(model) takes them out again"
            )
        if (engine := self._engine_of(model)) is not None:
            kept = engine.keep()
            engine.apply_ema(decay=decay, max_error=max_error)
            self._original.setdefault(model, kept)
            self._written()
            return
        state = self._ema_by_name(decay, max_error)
        named = _named(model)
        if missing := sorted(set(state) - set(named)):
            raise KeyError(
                f"the model must have every parameter of the EMA, it lacks {missing}: pass the "
                "model that was trained, or one built alike"
            )
        for name, value in state.items():
            check_tensor(f"the EMA of {name}", value, named[name])
        held = {name: named[name].detach().clone() for name in state}
        self._original.setdefault(model, held)
        _copy(state, named)
        self._written()

    def restore_original(self, model: nn.Module) -> None:
        """Undo ``apply_ema``, and put the training weights back after a failed evaluation.

        Args:
            model: The model that ``apply_ema`` was given.
        """
        for optimizer in self._averaged():
            if optimizer.swapped:
                optimizer.train()
        kept = self._original.pop(model, {})
        if (engine := self._engine_of(model)) is not None:
            engine.put(kept)
        else:
            _copy(kept, _named(model))
        self._written()

    def get_ema_state(self, *, decay: Choice = None, max_error: float = 0.05) -> dict[str, Tensor]:
        """The EMA weights (and averaged buffers) by name, as CPU tensors in the EMA's dtype.

        Under FSDP and DeepSpeed every rank calls it; the whole tensors are gathered one at a time
        for the first rank, and the dict of the others is empty.

        Args:
            decay: Which average, as for ``EMAOptimizer.swap_ema_weights``.
            max_error: The limit of its told error.

        Raises:
            RuntimeError: Nothing was trained or loaded yet.
            ValueError: There is no such average.
        """
        if self.model is not None and (engine := self._engine_of(self.model)) is not None:
            refuse_choice(decay, "under DeepSpeed, which has one window")
            return engine.get_ema_state()  # type: ignore[no-any-return]
        return whole_on_first_rank(self._ema_by_name(decay, max_error))

    def _ema_by_name(self, decay: Choice, max_error: float) -> dict[str, Tensor]:
        if self.model is not None and (engine := self._engine_of(self.model)) is not None:
            refuse_choice(decay, "under DeepSpeed, which has one window")
            return engine.ema_state(everywhere=True)  # type: ignore[no-any-return]
        if self.model is not None and self._averaged():
            which: Any = {"decay": decay, "max_error": max_error}
            parts = [o.get_ema_state(self.model, **which) for o in self._averaged()]
            return {name: value for part in parts for name, value in part.items()}
        if self._loaded is not None:
            refuse_choice(decay, "of what load_ema_state() took")
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
        if self.model is not None and self._averaged():
            self._hand_over(state)
        else:
            self._loaded = {name: value.detach().cpu().clone() for name, value in state.items()}

    def _hand_over(self, state: Mapping[str, Tensor]) -> None:
        """Make ``state`` the EMA of the optimizers, each its own part."""
        optimizers, model = self._averaged(), self.model
        assert model is not None
        for optimizer in optimizers:
            optimizer.train()
        if (engine := self._engine_of(model)) is not None:
            engine.load_ema_state(state)
            return
        if len(optimizers) == 1:
            optimizers[0].load_ema_state(model, state)
            return
        own = [optimizer.get_ema_state(model).keys() for optimizer in optimizers]
        if wrong := set(state) ^ set().union(*own):
            raise KeyError(
                f"state must have exactly the names that are averaged, got {sorted(wrong)} in one "
                "of the two alone: take it from get_ema_state() of a model built alike"
            )
        for optimizer, keys in zip(optimizers, own, strict=True):
            optimizer.load_ema_state(model, {name: state[name] for name in keys})

    def __getstate__(self) -> dict[str, Any]:
        """For pickle and deepcopy."""
        return dict(self.__dict__)


def refuse_choice(decay: Choice, where: str) -> None:
    """Raise ValueError for a choice among averages where there is one."""
    if decay is not None:
        raise ValueError(f"decay must be None {where}, got {decay}: leave it out")


def _named(model: nn.Module) -> dict[str, Tensor]:
    return {**names.named_buffers(model), **names.named_parameters(model)}


def _copy(state: Mapping[str, Tensor], named: Mapping[str, Tensor]) -> None:
    """Copy values by name into parameters and buffers, each rank its own part."""
    with no_autograd():
        for name, value in state.items():
            write_(local(named[name]), part_for(named[name], value))
