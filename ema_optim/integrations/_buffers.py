"""Buffers under a trainer's callback: averaged beside the EMA weights, or told of where not.

    statistics --update--> average --eval--> statistics --train--> average

An optimizer does not see buffers, so that a second shadow set follows them, with the options of the
optimizer's own and on its clock. The optimizer owns it: whoever swaps, reads or loads swaps, reads
and loads both.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from .._engines.sharding import is_sharded
from .._shadow import names, swap
from .._shadow.blocks import as_block
from .._shadow.buffers import HeldBuffers, Wanted, as_use_buffers, statistics
from .._shadow.choice import Choice
from .._shadow.holdings import no_autograd
from .._shadow.model_groups import BufferGroups
from .._shadow.shadow_set import ShadowSet
from .._shadow.slots import read_
from .._shadow.swap_state import Mode
from .._warnings import warn
from ..model import EMAModel
from ..optimizer import EMAOptimizer

_TOLD_OF_WEIGHTS = {
    "swap",
    "export",
    "run",
    "unaveraged",
    "windows",
    "law",
}  # the buffers are as old as these


class BufferEMA(EMAModel):
    """The EMA of a model's buffers, for an ``EMAOptimizer`` that averages its parameters.

    Args:
        model: The model.
        wanted: As ``EMAModel`` takes ``use_buffers``.
        options: What else ``EMAModel`` takes.
    """

    _groups_of = BufferGroups

    def __init__(self, model: nn.Module, wanted: Wanted, options: Mapping[str, Any]) -> None:
        refuse_sharded(model, wanted)
        super().__init__(model, use_buffers=wanted, **options)
        self._ema.warned.update(_TOLD_OF_WEIGHTS)
        self._held: HeldBuffers | None = None

    def eval(self) -> None:
        """Put the averages in until ``put_back()``."""
        swap.recover(self._ema)
        if self._ema.mode is Mode.TRAIN:
            self._look()
            swap.enter_eval(self._ema)
            self._held = HeldBuffers(self.model, self._ema.swapped)

    def put_back(self) -> None:
        """Put the model's own back after ``eval()``; what the evaluation did to them is undone."""
        held, self._held = self._held, None
        if held is not None and self._ema.mode is Mode.EVAL:
            held.put_back()
        swap.put_back_after_eval(self._ema)

    def both_by_name(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Averages and the model's own values, wherever they are now, under every name."""
        self._look()
        shadow, members = self._ema, set(self._ema.members())
        named = {n: b for n, b in names.named_buffers(self.model).items() if b in members}
        return {n: (shadow.ema_of(b), shadow.weights_of(b)) for n, b in named.items()}

    def state_dict(self) -> dict[str, Any]:
        """All that a resume needs beside the model's own state dict; right at any time."""
        swap.recover(self._ema)
        shadow, packed = self._ema, self._packed()
        named = {n: b for n, b in names.named_buffers(self.model).items() if b in shadow.swapped}
        if not named:
            return packed
        state = dict(packed["state"])
        for name in named.keys() & state.keys():
            state[name] = {**state[name], "ema": shadow.main_of(named[name])}
        groups = [{**group, "ema_swapped": False} for group in packed["param_groups"]]
        # The model's own state dict of this moment holds the averages.
        own = {name: shadow.weights_of(buffer).clone() for name, buffer in named.items()}
        return {**packed, "state": state, "param_groups": groups, "own": own}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load what ``state_dict()`` returned, after the model's own."""
        super().load_state_dict(state_dict)
        named = names.named_buffers(self.model)
        with no_autograd():
            for name, value in state_dict.get("own", {}).items():
                named[name].copy_(value)

    def show(self, state_dict: Mapping[str, Any]) -> None:
        """Copy the averages of a checkpoint into the model, and go on with those that are here."""
        slots = self._read(state_dict).slots
        with no_autograd():
            read_(slots, list(slots.values()))

    def _saved_groups(self) -> list[dict[str, Any]]:
        self._look()  # temporary ones too: this entry is beside the model's state dict, not in it
        return self._ema.groups


class BufferedEMAOptimizer(EMAOptimizer):
    """The wrapper that a callback makes: with the buffers of the model, where these are wanted."""

    buffers: BufferEMA | None = None

    def _shadows(self) -> list[ShadowSet]:
        return super()._shadows() + ([] if self.buffers is None else self.buffers._shadows())

    @property
    def swapped(self) -> bool:
        """Whether EMA weights, or averaged buffers, are in the model now."""
        return super().swapped or (self.buffers is not None and self.buffers.swapped)

    def _step(self, closure: Callable[[], Any] | None = None, *args: Any, **kwargs: Any) -> Any:
        before = self._ema.step
        result = super()._step(closure, *args, **kwargs)
        if self.buffers is not None and self._ema.step > before:  # else it was skipped
            self.buffers.update()
        return result

    def eval(self) -> None:
        """Put the EMA weights and the averaged buffers in until ``train()``."""
        super().eval()
        if self.buffers is None or self._ema.mode is not Mode.EVAL:
            return
        try:
            self.buffers.eval()
        except BaseException:
            self.train()
            raise

    def put_back(self) -> None:
        """Put the training weights and the model's own buffers back, after ``eval()`` alone."""
        # The buffers first: they are in only as long as the EMA weights are.
        if self.buffers is not None:
            self.buffers.put_back()
        swap.put_back_after_eval(self._ema)

    def train(self) -> None:
        """Put the training weights and the model's own buffers back."""
        if self.buffers is not None:
            self.buffers.put_back()
        super().train()

    @as_block
    def swap_ema_weights(
        self, enabled: bool = True, *, decay: Choice = None, max_error: float = 0.05
    ) -> Iterator[None]:
        """As ``EMAOptimizer`` has it, with the averaged buffers."""
        with super().swap_ema_weights(enabled, decay=decay, max_error=max_error):
            if self.buffers is None:
                yield
                return
            with self.buffers.swap_ema_weights(enabled, decay=decay, max_error=max_error):
                yield

    use_ema = swap_ema_weights

    def apply_ema(self, *model: NoReturn, decay: Choice = None, max_error: float = 0.05) -> None:
        """As ``EMAOptimizer`` has it, with the averaged buffers."""
        super().apply_ema(*model, decay=decay, max_error=max_error)
        if self.buffers is not None:
            self.buffers.apply_ema(decay=decay, max_error=max_error)

    def reset(self) -> None:
        """As ``EMAOptimizer`` has it, with the averaged buffers."""
        super().reset()
        if self.buffers is not None:
            self.buffers.reset()

    def get_ema_state(
        self,
        model: nn.Module,
        *,
        decay: Choice = None,
        max_error: float = 0.05,
        device: torch.device | str | None = None,
        copy: bool = True,
    ) -> dict[str, Tensor]:
        """As ``EMAOptimizer`` has it, with the averaged buffers."""
        which: Any = {"decay": decay, "max_error": max_error, "device": device, "copy": copy}
        state = super().get_ema_state(model, **which)
        return state if self.buffers is None else {**state, **self.buffers.get_ema_state(**which)}

    def load_ema_state(
        self, model: nn.Module, state: Mapping[str, Tensor], strict: bool = True
    ) -> None:
        """As ``EMAOptimizer`` has it, with the averaged buffers: both are loaded, or none."""
        if self.buffers is None:
            return super().load_ema_state(model, state, strict)
        found, own = names.by_model_names(state, model), self.buffers.both_by_name().keys()
        before = self.buffers.state_dict()
        self.buffers.load_ema_state({n: v for n, v in found.items() if n in own}, strict)
        try:
            super().load_ema_state(model, {n: v for n, v in found.items() if n not in own}, strict)
        except BaseException:
            self.buffers.load_state_dict(before)
            raise

    def __getstate__(self) -> dict[str, Any]:
        """For pickle and deepcopy."""
        return {**super().__getstate__(), "buffers": self.buffers}


class OwnStatistics:
    """Running statistics that stay those of the training weights while EMA weights are evaluated.

    Args:
        model: The model at the start of a training.
    """

    def __init__(self, model: nn.Module) -> None:
        with no_autograd():
            self._begun = {n: b.to("cpu", copy=True) for n, b in statistics(model).items()}

    def warn(self, model: nn.Module) -> None:
        """Warn once that they go with other weights; frozen ones, which never move, do not."""
        found = ((b, self._begun.get(n)) for n, b in statistics(model).items())
        if any(old is not None and not torch.equal(b.cpu(), old) for b, old in found):
            warn(
                "the model has running statistics (BatchNorm), which stay those of the training "
                "weights while the EMA weights are evaluated or saved: pass use_buffers=True to "
                "the callback to average them as well, or use_buffers=False to leave them so",
                once="statistics",
            )


def as_choice(wanted: object) -> Wanted | None:
    """Return ``use_buffers`` of a callback if it is one; raise TypeError."""
    return None if wanted is None else as_use_buffers(wanted)


def refuse_sharded(model: nn.Module, wanted: Wanted | None) -> None:
    """Raise ValueError for buffers of a model whose weights are spread over ranks."""
    if wanted and any(map(is_sharded, names.named_parameters(model).values())):
        raise ValueError(
            "use_buffers must go with whole weights on every rank (one device, DDP), got "
            f"use_buffers={wanted!r} and sharded weights (FSDP2): leave it out, and take the "
            "statistics anew for the EMA weights (torch.optim.swa_utils.update_bn)"
        )


def buffers_of(optimizers: Iterable[EMAOptimizer]) -> BufferEMA | None:
    """The averaged buffers that one of these optimizers owns, if any."""
    owners = (o for o in optimizers if isinstance(o, BufferedEMAOptimizer))
    return next((owner.buffers for owner in owners if owner.buffers is not None), None)


def refuse_own(optimizer: EMAOptimizer, wanted: Wanted | None, whose: str) -> None:
    """Raise ValueError for buffers beside an optimizer that the callback has not made."""
    if wanted:
        raise ValueError(
            "use_buffers must go with an optimizer that the callback wraps, got "
            f"use_buffers={wanted!r} and the {type(optimizer).__name__} {whose}, which would swap "
            "without the buffers: pass its inner optimizer, and its options to the callback"
        )


def continued(
    old: BufferEMA | None, model: Any, wanted: Wanted | None, options: Mapping[str, Any]
) -> BufferEMA | None:
    """The averages of one more training: those of the last one go on, others begin at the model."""
    if old is not None:
        old.put_back()
    if not wanted:
        return None
    made = BufferEMA(model, wanted, options)
    if old is not None and old.model is model and old.use_buffers == made.use_buffers:
        made.load_state_dict(old.state_dict())
    return made


def resume(optimizer: BufferedEMAOptimizer, saved: Mapping[str, Any] | None, adopted: bool) -> None:
    """Take the averaged buffers of a checkpoint, or begin anew at those of the model.

    Args:
        optimizer: Whose EMA was just loaded.
        saved: What the checkpoint holds of buffers.
        adopted: Whether it holds the EMA of this step.
    """
    if optimizer.buffers is None:
        return
    if adopted and saved is not None:
        optimizer.buffers.load_state_dict(saved)
        return
    optimizer.buffers.reset()
    if adopted:
        warn(
            "the checkpoint holds no averaged buffers, since it was written without use_buffers: "
            "they begin at those of the model"
        )
