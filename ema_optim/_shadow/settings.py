"""What a shadow set was told: where its param groups are, how they are averaged and kept."""

from typing import Any

from torch import Tensor, nn

from .._arithmetic.formats import EMADtype
from .._engines.offload import Offload
from ..schedules import Decay, as_decay, initial_share
from .options import Options, as_count, as_device, as_dtype, as_flag, as_module
from .slots import Group, Slot


class Settings:
    """The settings of a shadow set, and what follows from them alone.

    Args:
        source: What has the ``param_groups``: the inner optimizer, which replaces them on load, or
            a ``ModelGroups``. Asked whenever they are needed.
        decay: Float or schedule.
        update_every: Optimizer steps between two updates.
        update_after_step: Optimizer steps until averaging begins.
        dtype: How an EMA tensor is stored, see ``formats``; None is fp32 for every narrower float,
            else the parameter's own dtype. A group's own ``ema_dtype`` goes before.
        module: The module that holds the FSDP2 modules, where they are not found by themselves.
        skip_non_finite: Whether an element whose weight is NaN or infinite keeps its EMA.
        device: "cpu" to have the EMA in host memory, None beside its weights.
        sees_steps: Whether the source is an optimizer, so that an average can begin at the weights
            before a step. The average of a model begins at the weights of its birth.
    """

    def __init__(
        self,
        source: Any,
        decay: Decay,
        update_every: int,
        update_after_step: int,
        dtype: EMADtype,
        module: nn.Module | None = None,
        skip_non_finite: bool = False,
        sees_steps: bool = True,
        device: object = None,
    ) -> None:
        self.source = source
        self.decay = as_decay(decay)
        self.update_every = as_count("update_every", update_every, least=1)
        self.update_after_step = as_count("update_after_step", update_after_step, least=0)
        self.dtype = as_dtype(dtype)
        self.module = as_module(module)
        self.skip_non_finite = as_flag("skip_non_finite", skip_non_finite)
        self.sees_steps = sees_steps
        self.has_copies = getattr(source, "has_ema_copies", False)
        self.device = as_device(device)
        self.offload = Offload.to(self.device)
        self.checkpoint_device: str | None = None  # of the weights that a state dict copies
        self._share: tuple[Any, float] | None = None

    def set_checkpoint_device(self, device: object) -> None:
        """Have a state dict copy weights to "cpu", or with None stay on their own device."""
        self.checkpoint_device = as_device(device, "checkpoint_device")

    def __getstate__(self) -> dict[str, Any]:
        self.offload.settle()
        return {**self.__dict__, "_share": None}

    @property
    def options(self) -> Options:
        """What param groups want that have no options of their own."""
        return Options(self.decay, self.dtype)

    def publish(self) -> None:
        """Have the forward use what was written into the parameters, of which it uses copies."""
        self.source.publish()

    @property
    def groups(self) -> list[Group]:
        """The param groups of the moment."""
        groups: list[Group] = self.source.param_groups
        return groups

    def ema_step(self, slot: Slot) -> int:
        """The counter of one slot in optimizer steps, as checkpoints hold it."""
        return min(slot.counter.steps, self.update_after_step) + slot.age

    def counter_at(self, ema_step: int, step: int, decay: float | None) -> tuple[int, float]:
        """Updates and share that a checkpoint's counter stands for when the clock shows ``step``.

        ``decay`` is the group's own, if it has one.
        """
        age = max(0, ema_step - min(step, self.update_after_step))
        made = age // self.update_every * self.update_every
        source = self.decay if decay is None else decay
        key = (id(source) if callable(source) else source, made)
        # Remembered: a slowly forgetting schedule is multiplied out, once and not per parameter.
        if self._share is None or self._share[0] != key:
            self._share = key, initial_share(source, made)
        return age, self._share[1]

    def options_by_param(self) -> dict[Tensor, Options]:
        """The options of every parameter in the param groups."""
        pairs = ((self.options.of(group), group) for group in self.groups)
        return {param: options for options, group in pairs for param in group["params"]}
