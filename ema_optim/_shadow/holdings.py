"""Who holds what: the slots by parameter, and where EMA weights and training weights are now."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .._engines.quantized import dense, is_quantized
from .._engines.sharding import PLAIN
from .deferred import Deferred
from .memory import shared_memory
from .settings import Settings
from .slots import Slot, place_of, value_of
from .swap_state import Mode, SwapState


@contextmanager
def no_autograd() -> Iterator[None]:
    """Plain tensors inside: no graph, no inference tensors, which would refuse later writes."""
    if not torch.is_inference_mode_enabled():
        with torch.no_grad():
            yield
        return
    # In this order: inference_mode(False) turns grad mode on.
    with torch.inference_mode(False), torch.no_grad():
        yield


class Holdings(Settings):
    """The slots of a shadow set, and the state of its swap.

    Attributes:
        slots: By parameter. Whoever looks at them waits for the updates in host memory.
        absent: The slots of parameters that have left the groups, for as long as somebody else has
            them. Weak only then: ``torch.utils.swap_tensors`` refuses a tensor that is referred to
            weakly.
        swap: The state of the swap.
        deferred: Steps that are still to be counted; ``settle`` comes before every look at a slot
            or at ``step``.
    """

    def __init__(self, *settings: Any, **named: Any) -> None:
        super().__init__(*settings, **named)
        self._slots: dict[Tensor, Slot] = {}
        self.absent: Any = WeakTensorKeyDictionary()  # Any: torch does not type it
        self.swap = SwapState()
        self._shared: set[Tensor] | None = None  # parameters that share memory
        self.deferred = Deferred()
        self._step = 0

    def __getstate__(self) -> dict[str, Any]:
        self.settle()
        return {**super().__getstate__(), "absent": list(self.absent.items()), "_shared": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.set_absent(dict(state["absent"]))

    @property
    def slots(self) -> dict[Tensor, Slot]:
        """The slots by parameter, every update of them made."""
        if self.offload.jobs:
            self.offload.join()
        return self._slots

    @slots.setter
    def slots(self, slots: dict[Tensor, Slot]) -> None:
        if self.offload.jobs:
            self.offload.join()
        self._slots = slots

    @property
    def step(self) -> int:
        """The largest clock: counted optimizer steps."""
        if self.deferred.waiting:
            self.settle()
        return self._step

    @step.setter
    def step(self, step: int) -> None:
        self._step = step

    def settle(self) -> None:
        """Count the steps that were left to the device; waits for it where there are any."""
        for lane in self.deferred.settle():
            self._step = max(self._step, *(bucket.counter.steps for bucket in lane.buckets))
            lane.mark(self._step)

    @property
    def mode(self) -> Mode:
        """What the parameters are used for now."""
        return self.swap.mode

    @property
    def swapped(self) -> dict[Tensor, Slot]:
        """The slots whose EMA weights are in the parameters now."""
        return self.swap.swapped

    def all_slots(self) -> dict[Tensor, Slot]:
        """Every slot by parameter, those of absent parameters too."""
        if self.deferred.waiting:
            self.settle()
        if self.offload.jobs:
            self.offload.join()
        return {**dict(self.absent.items()), **self._slots} if self.absent else self._slots

    def find(self, param: Tensor) -> Slot | None:
        """The slot of a parameter, if it has one."""
        if self.deferred.waiting:
            self.settle()
        if self.offload.jobs:
            self.offload.join()
        slot = self._slots.get(param)
        return self.absent.get(param) if slot is None and self.absent else slot

    def drop(self, param: Tensor) -> None:
        """Forget the slot of a parameter."""
        self.slots.pop(param, None)
        self.absent.pop(param, None)

    def set_absent(self, slots: dict[Tensor, Slot]) -> None:
        """Hold the slots of parameters that have left, in place of those of before."""
        self.absent = WeakTensorKeyDictionary(slots)

    def take(self, slots: dict[Tensor, Slot], swapped: bool) -> None:
        """Hold these slots alone; what was swapped in before is forgotten."""
        self.slots = slots
        self.swap.load(dict(slots) if swapped else {})
        self.absent.clear()

    def forget_memory(self) -> None:
        """Look anew at which parameters share memory, at the next swap."""
        self._shared = None

    def parks(self, param: Tensor, slot: Slot) -> bool:
        """Whether a swap parks the weights, because an exchange would round or mix values."""
        if self._shared is None:
            self.look_at_memory()
        if slot.staging is not None:
            return True
        if place_of(param) != place_of(slot.ema) or param in (self._shared or ()):
            return True
        return type(param) not in PLAIN and is_quantized(param)

    def look_at_memory(self) -> None:
        """Find out anew which parameters share memory: ``param.data = ...`` may have changed it."""
        self._shared = shared_memory(self.all_slots())

    def ema_of(self, param: Tensor) -> Tensor:
        """The EMA weights of a parameter, wherever they are now; the weights before averaging."""
        slot = self.find(param)
        if slot is None or not slot.age:
            return dense(self.weights_of(param))
        return value_of(self._main_of(param, slot), slot.low)

    def main_of(self, param: Tensor) -> Tensor:
        """The main tensor of the EMA of a parameter that has one, wherever it is now."""
        slot = self.find(param)
        if slot is None:
            raise KeyError("the parameter has no EMA")
        return self._main_of(param, slot)

    def _main_of(self, param: Tensor, slot: Slot) -> Tensor:
        # The state of the swap is in common with further windows, whose slots stay as they are.
        exchanged = self.swapped.get(param) is slot and slot.parked is None
        return param.detach() if exchanged else slot.ema

    def weights_of(self, param: Tensor) -> Tensor:
        """The training weights of a parameter, wherever they are now."""
        slot = self.swapped.get(param)
        if slot is None:
            return param.detach()
        return slot.ema if slot.parked is None else slot.parked
