"""What doors offer alike: to read the average, make it the weights, begin anew, compile."""

from collections.abc import Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from ._forwarding import ForwardingOptimizer
from ._shadow import mistakes, names, pending, report, swap, teacher
from ._shadow.choice import Choice, choose, in_place, read_from
from ._shadow.compiled import CompiledStep
from ._shadow.shadow_set import ShadowSet
from ._shadow.windows import Decays


class Door:
    """A front door over a shadow set."""

    _ema: ShadowSet

    def _shadows(self) -> list[ShadowSet]:
        """All that is averaged on one clock by one decay."""
        return [self._ema]

    @property
    def decay(self) -> Decays:
        """The decay, as given at construction: a float, a schedule, or several by name."""
        return self._ema.decays

    @property
    def swapped(self) -> bool:
        """Whether the EMA weights are in the parameters now."""
        return bool(self._ema.swapped)

    def apply_ema(self, *model: NoReturn, decay: Choice = None, max_error: float = 0.05) -> None:
        """Make the EMA weights the training weights, one way (the EMA stays as it is).

        Inside a swap nothing is swapped back then.

        Args:
            model: Not to be given: the weights of the model that is trained are written to.
            decay: Which average, as for ``swap_ema_weights``.
            max_error: The limit of its told error.

        Raises:
            TypeError: Something was given without a name.
            RuntimeError: Another object has its EMA weights in the parameters.
            ValueError: There is no such average.
        """
        if model:
            mistakes.refuse_model(model[0])
        swap.get_ready(self._ema)
        self._look()
        swap.refuse_others(self._ema, "apply_ema()")
        shown = choose(self._ema, decay, max_error)
        report.warn_export(*read_from(self._ema, shown))
        swap.apply(self._ema, shown)

    def ema_metrics(self) -> dict[str, float]:
        """The health of the EMA, for a logger.

        Returns:
            ``ema_decay`` (in force now), ``ema_updates``, ``ema_window`` (``1 / (1 - decay)``, in
            optimizer steps), ``ema_initial_share`` (the largest share of initial weights still
            inside the EMA of a parameter) and ``ema_distance``
            (``||ema - weights|| / ||weights||`` with the training weights; NaN or infinite when
            what is read of either is). Of a tensor of more than 65,536 elements a 16th is read,
            another one after every step: a fraction of a step's time. Where the weights are spread
            over ranks every rank calls it: two numbers are summed up. Of further windows the same,
            ``ema_decay/NAME`` and so on; they have the updates in common.
        """
        swap.recover(self._ema)
        self._look()
        return report.metrics(self._ema)

    def _look(self) -> None:
        """Look at what is followed, where that may have changed since the last call."""


class NamedDoor(Door):
    """A door that is handed the model for the names of its parameters."""

    def get_ema_state(
        self,
        model: nn.Module,
        *,
        decay: Choice = None,
        max_error: float = 0.05,
        device: torch.device | str | None = None,
        copy: bool = True,
    ) -> dict[str, Tensor]:
        """The EMA weights by parameter name, without touching the live weights.

        Right at any time, also inside a swap. Ready for ``model.load_state_dict(strict=False)``
        and for safetensors.

        Args:
            model: The model that owns the parameters. Wrapped by ``torch.compile`` or a
                data-parallel class, in whole or in parts, the names are still the bare model's.
            decay: Which average, as for ``swap_ema_weights``.
            max_error: The limit of its told error.
            device: Where the copies are to be, moved one by one (default: where the EMA is).
            copy: False hands out the EMA tensors themselves, to be read until the next swap or
                load: a live teacher, ``torch.func.functional_call(model, state, (x,))`` (which in
                train mode moves the model's running statistics; an ``EMAModel`` does not).

        Returns:
            Fresh copies in the EMA's dtype (of a storage format in fp32), one for each unique
            parameter of this optimizer; of a DTensor a DTensor, without communication.

        Raises:
            ValueError: The model has no parameter of this optimizer, or there is no such average.
            RuntimeError: ``copy=False`` while the EMA weights are swapped in, or of an EMA in a
                narrow storage format, of sharded or quantized weights, or on another device.
        """
        shown = choose(self._ema, decay, max_error)
        if not copy:
            swap.get_ready(self._ema)
            swap.refuse_swapped(self._ema, "get_ema_state(copy=False)")
            return teacher.live_state(in_place(self._ema, shown), model, device)
        swap.recover(self._ema)
        pending.check_model(self._ema)  # what the EMA is of may be in the model's file
        report.warn_export(*read_from(self._ema, shown))
        return names.ema_state(self._ema, model, device, None if shown is None else shown.value)

    def load_ema_state(
        self, model: nn.Module, state: Mapping[str, Tensor], strict: bool = True
    ) -> None:
        """Make ``state`` the EMA, without touching the weights; the next step averages into it.

        Args:
            model: The model that owns the parameters.
            state: As ``get_ema_state`` returns it; one prefix of all names (``module.``,
                ``model.``, ``_forward_module.``), there or in the model, is no difference. For
                DTensors also whole tensors, on every rank.
            strict: Whether the names must be exactly those of the parameters.

        Raises:
            KeyError: Names are missing or unknown.
            ValueError: A tensor has another shape than its parameter, or lies on another mesh.
            RuntimeError: The EMA weights are swapped in.
        """
        swap.get_ready(self._ema)
        swap.refuse_swapped(self._ema, "load_ema_state()")
        names.load_ema_state(self._ema, model, state, strict)
        self._ema.mark()


class InnerDoor(NamedDoor, ForwardingOptimizer):
    """A door in front of an inner optimizer."""

    @property
    def checkpoint_device(self) -> str | None:
        """Where ``state_dict()`` copies the weights whose EMA is of another dtype.

        Such weights (bf16, fp16 with an EMA in fp32) are in every checkpoint, so that one written
        while swapped loses nothing: 2 bytes for each, copied beside them at every ``state_dict()``.
        ``optimizer.checkpoint_device = "cpu"`` copies them into host memory instead, one by one.
        Torch refuses to load a full state dict whose tensors lie on two devices; sharded
        checkpoints and ``torch.save`` files load. Default None: beside the weights.
        """
        return self._ema.checkpoint_device

    @checkpoint_device.setter
    def checkpoint_device(self, device: torch.device | str | None) -> None:
        self._ema.set_checkpoint_device(device)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients, as the inner optimizer does."""
        if self._ema.held is None:  # else the model's file may still be to come
            swap.resolve_pending(self._ema)
        self.inner.zero_grad(set_to_none=set_to_none)

    def compile(self, **torch_compile_kwargs: Any) -> None:
        """Make the inner step and the EMA one compiled graph, which reads each weight once.

        ``weights, state, ema = f(weights, state, gradients, ema)``.

        The numbers are those of the eager step up to rounding, checkpoints and swaps are the same.
        Tracing begins with the second step and takes a second and more for every ten tensors. A
        step that the graph cannot stand in for (hooks or a patched ``step`` on the inner optimizer,
        arguments beside a closure, ``fused``, ``differentiable``, sparse gradients, complex or
        sharded parameters, no trace) is eager, with a warning. Copies are not compiled.

        Args:
            torch_compile_kwargs: What ``torch.compile`` takes, ``fullgraph`` apart (it is True).

        Raises:
            TypeError: ``torch.compile`` does not know an option.
        """
        self._ema.compile(CompiledStep(torch_compile_kwargs), self.inner)

    def reset(self) -> None:
        """Have the average and its warm-up begin anew, as newly built.

        ``update_after_step`` counts again, and the EMA begins at the weights of the next step. The
        inner optimizer keeps its state; to have it alone forget, clear ``optimizer.inner.state``.

        Raises:
            RuntimeError: The EMA weights are swapped in.
        """
        swap.get_ready(self._ema)
        swap.refuse_swapped(self._ema, "reset()")
        self._ema.clear()
        self._ema.mark()

    def __repr__(self) -> str:
        """Settings, whether swapped, and the inner optimizer."""
        ema = self._ema
        return (
            f"{type(self).__name__} (decay={ema.decays}, update_every={ema.update_every}, "
            f"update_after_step={ema.update_after_step}, swapped={self.swapped})\n{self.inner!r}"
        )
