"""A model's buffers, which are known by name: ``Module.to()`` and some forwards replace them."""

from collections.abc import Container, Sequence
from fnmatch import fnmatchcase

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import is_lazy

from .holdings import no_autograd
from .names import named_buffers
from .shadow_set import ShadowSet
from .swap_state import Mode

Wanted = bool | Sequence[str]


class HeldBuffers:
    """The buffers of a model as they are now, tensors and values, to be put back later.

    Args:
        model: The model.
        only: These buffers alone; None for all.
    """

    def __init__(self, model: nn.Module, only: Container[Tensor] | None = None) -> None:
        with no_autograd():
            self._held = [
                (module, name, buffer, buffer.clone())
                for module in model.modules()
                for name, buffer in module._buffers.items()
                if buffer is not None and not is_lazy(buffer) and (only is None or buffer in only)
            ]

    def put_back(self) -> None:
        """Undo what was written to the buffers, and what was put in their place."""
        with no_autograd():
            for module, name, buffer, value in self._held:
                module._buffers[name] = buffer
                if buffer.shape == value.shape:
                    buffer.copy_(value)
                else:  # resized in place, as observers are
                    buffer.set_(value)  # type: ignore[call-overload]


class AveragedBuffers:
    """The buffers of a model that are averaged; the averages follow buffers that are replaced.

    Args:
        wanted: True for the running statistics of torch's norm classes: other buffers (masks,
            observers, unit vectors of spectral norm, caches) lose their meaning in an average.
            Shell patterns for the buffers of these names. False for none.
    """

    def __init__(self, wanted: Wanted) -> None:
        self.wanted = as_use_buffers(wanted)
        self._seen: dict[str, Tensor] = {}

    def find(self, model: nn.Module, shadow: ShadowSet, anew: bool = False) -> dict[str, Tensor]:
        """The buffers by name; a replaced one hands its average over to its successor.

        Args:
            model: The owner of the buffers.
            shadow: The owner of the averages.
            anew: Whether a buffer that is named may have another shape than its average.

        Raises:
            ValueError: A pattern matches nothing, or what it matches cannot be averaged; the
                message names it. Nothing has changed then.
        """
        if self.wanted is False:
            return {}
        patterns = None if self.wanted is True else self.wanted
        found = statistics(model) if patterns is None else _matching(model, patterns)
        if shadow.mode is not Mode.BLOCK:
            if patterns is not None and not anew:
                self._check_shapes(found, shadow)
            self._follow(found, shadow)
        return found

    def _check_shapes(self, found: dict[str, Tensor], shadow: ShadowSet) -> None:
        for name, buffer in found.items():
            slot = shadow.find(self._seen.get(name, buffer))
            if slot is not None and slot.ema.shape != buffer.shape:
                raise ValueError(
                    f"buffer {name} must keep its shape to be averaged, got {tuple(buffer.shape)} "
                    f"after {tuple(slot.ema.shape)}: call reset() to begin anew, or leave it out "
                    "of use_buffers"
                )

    def _follow(self, found: dict[str, Tensor], shadow: ShadowSet) -> None:
        for name, buffer in found.items():
            old = self._seen.get(name, buffer)
            slot = shadow.find(old)
            if slot is None:
                continue
            if slot.ema.shape != buffer.shape:  # it begins anew
                shadow.remove(old)
            elif old is not buffer:
                shadow.hand_over(old, buffer)
        self._seen = found


def as_use_buffers(wanted: object) -> Wanted:
    """Return ``wanted`` if it says which buffers are averaged; raise TypeError."""
    if isinstance(wanted, bool):
        return wanted
    if isinstance(wanted, str) or not isinstance(wanted, Sequence):
        raise TypeError(f"use_buffers must be True, False or a list of names, got {wanted!r}")
    if wrong := [name for name in wanted if not isinstance(name, str)]:
        raise TypeError(f"use_buffers must list names (shell patterns), got {wrong[0]!r}")
    return list(wanted)


def temporary_buffers(model: nn.Module) -> set[Tensor]:
    """The buffers that no state dict of the model holds."""
    return {
        buffer
        for module in model.modules()
        for name in getattr(module, "_non_persistent_buffers_set", ())
        if (buffer := module._buffers.get(name)) is not None
    }


def statistics(model: nn.Module) -> dict[str, Tensor]:
    """The running statistics of torch's norm classes and their subclasses, by name."""
    running = {
        module._buffers.get(name)
        for module in model.modules()
        if isinstance(module, _NormBase)
        for name in ("running_mean", "running_var")
    }
    named = named_buffers(model).items()
    return {n: b for n, b in named if b in running and b.is_floating_point() and not is_lazy(b)}


def _matching(model: nn.Module, patterns: Sequence[str]) -> dict[str, Tensor]:
    named, found = named_buffers(model), {}
    for pattern in patterns:
        names = [name for name in named if fnmatchcase(name, pattern)]
        if not names:
            raise ValueError(
                f"use_buffers must name buffers of the model, got {pattern!r}, which matches none "
                f"of {sorted(named)}"
            )
        found.update({name: named[name] for name in names})
    for name, buffer in found.items():
        if is_lazy(buffer) or not (buffer.is_floating_point() or buffer.is_complex()):
            raise ValueError(
                f"buffer {name} must hold real or complex numbers to be averaged, got "
                f"{buffer.dtype}: leave it out of use_buffers"
            )
    return found
