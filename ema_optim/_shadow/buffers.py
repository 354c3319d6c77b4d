"""A model's buffers, which are known by name: ``Module.to()`` and some forwards replace them."""

from torch import Tensor, nn

from .names import named_buffers
from .shadow_set import ShadowSet, no_autograd


class HeldBuffers:
    """The buffers of a model as they are now, tensors and values, to be put back later."""

    def __init__(self, model: nn.Module) -> None:
        with no_autograd():
            self._held = [
                (module, name, buffer, buffer.clone())
                for module in model.modules()
                for name, buffer in module._buffers.items()
                if buffer is not None
            ]

    def put_back(self) -> None:
        """Undo what was written to the buffers, and what was put in their place."""
        with no_autograd():
            for module, name, buffer, value in self._held:
                module._buffers[name] = buffer
                buffer.copy_(value)


class AveragedBuffers:
    """The floating-point buffers of a model, whose averages follow them when they are replaced."""

    def __init__(self) -> None:
        self._seen: dict[str, Tensor] = {}

    def find(self, model: nn.Module, shadow: ShadowSet) -> dict[str, Tensor]:
        """The buffers by name; a replaced one hands its average over to its successor."""
        named = named_buffers(model)
        floats = {n: b for n, b in named.items() if b.is_floating_point() or b.is_complex()}
        if shadow.mode != "block":
            for name, buffer in floats.items():
                old = self._seen.get(name, buffer)
                if old is not buffer and shadow.find(old) is not None and old.shape == buffer.shape:
                    shadow.hand_over(old, buffer)
            self._seen = floats
        return floats
