"""Where the weights are: the state of the swap, one for each shadow set."""

import threading
import weakref
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from .._arithmetic.average import copy_
from .._arithmetic.exchange import Exchange
from .._engines.quantized import is_quantized, write_
from .._engines.sharding import locals_of
from . import record
from .slots import Group, Slot, read_

Slots = dict[Tensor, Slot]


class Mode(str, Enum):
    """What the parameters are used for at the moment.

    TRAIN: They hold the training weights.
    BLOCK: They hold the EMA weights until a ``with`` block ends.
    EVAL: They hold the EMA weights until ``train()``.
    PENDING: A checkpoint written while swapped was loaded; its exchange comes with the next use.
    """

    TRAIN = "train"
    BLOCK = "block"
    EVAL = "eval"
    PENDING = "pending"


class Move:
    """EMA weights on their way into the parameters, or training weights on their way back.

    Both ways may be interrupted at any moment, and either goes on from there.

    Args:
        slots: By parameter.
        parking: Those of them whose training weights are kept in a copy.
        arrived: Whether the EMA weights are in.
        shown: What is put in in place of the EMA, see ``choice.Shown``; ``parking`` is all then.
    """

    def __init__(self, slots: Slots, parking: Slots, arrived: bool, shown: Any = None) -> None:
        self.slots, self._parking, self._shown = slots, parking, shown
        exchanged = {p: s for p, s in slots.items() if p not in parking}
        emas = locals_of(slot.ema for slot in exchanged.values())
        self.exchange = Exchange(emas, locals_of(exchanged), not arrived, done=arrived)
        kept = {p: s.parked for p, s in parking.items() if arrived and s.parked is not None}
        kept |= {p: s.aside(p, p) for p, s in parking.items() if s.host and p not in kept}
        if copied := [param for param in parking if param not in kept]:
            kept |= _copies(copied)
        self._parked = kept

    def put_in(self) -> None:
        """Put the EMA weights in."""
        try:
            self.exchange.run()
            if self._parking:
                write_shown(self._parking, self._shown)
        finally:
            torch.clear_autocast_cache()
        for param, slot in self.slots.items():
            slot.parked = self._parked.get(param)

    def put_back(self) -> None:
        """Put the training weights back."""
        try:
            self.exchange.undo()
            plain = {p: kept for p, kept in self._parked.items() if not is_quantized(p)}
            if plain:
                copy_(locals_of(plain), locals_of(plain.values()))
            for param, kept in self._parked.items():
                if param not in plain:
                    write_(param, kept)
        finally:
            torch.clear_autocast_cache()


def _copies(params: list[Tensor]) -> dict[Tensor, Tensor]:
    """A copy of each, with one multi-tensor call where that can be."""
    alone = {param: param.detach().clone() for param in params if is_quantized(param)}
    plain = [param.detach() for param in params if param not in alone]
    copies = list(map(torch.empty_like, plain))
    copy_(locals_of(copies), locals_of(plain))
    return alone | dict(zip((p for p in params if p not in alone), copies, strict=True))


def write_shown(slots: Slots, shown: Any) -> None:
    """Write the EMA of each slot into its parameter, or what is shown in place of it."""
    if shown is None:
        read_(slots, list(slots.values()))
    else:
        shown.write_(slots)


class SwapState:
    """The one owner of what is to be known of a swap.

    Attributes:
        mode: See ``Mode``.
        swapped: The slots whose EMA weights are in the parameters.
        move: A swap that has begun and not ended. Whoever comes next ends it.
        shows_other: Whether another average than the EMA is in, or on its way.
        eval_swaps: Whether ``eval()`` swaps; a trainer may have put the EMA in already.
        groups: The param groups at the swap, for the names in a warning.
        versions: What torch had counted of writes into each parameter when the swap was made.
    """

    def __init__(self) -> None:
        self.eval_swaps = True
        self._lock = threading.RLock()
        self.load({})

    def load(self, swapped: Slots) -> None:
        """Begin anew; ``swapped`` are the slots of a checkpoint that was written while swapped."""
        self.mode = Mode.PENDING if swapped else Mode.TRAIN
        self.swapped = swapped
        self.move: Move | None = None
        self.shows_other = False
        self.groups: Sequence[Group] = ()
        self.versions: dict[int, int] = {}
        self._block: weakref.ref[Any] | None = None
        record.leave(self)

    def __getstate__(self) -> dict[str, Any]:
        # A copy made inside a swap block has no block to leave; train() puts its weights back.
        mode = Mode.EVAL if self.mode is Mode.BLOCK else self.mode
        kept = ("swapped", "eval_swaps", "shows_other")
        return {"mode": mode, **{name: getattr(self, name) for name in kept}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        SwapState.__init__(self)
        self.__dict__.update(state)

    @property
    def held(self) -> Slots:
        """The slots whose parameters may hold something else than the training weights."""
        return self.swapped if self.move is None else self.move.slots

    def show_in_eval(self, ema: bool) -> None:
        """Have ``eval()`` show the EMA weights, or what the parameters hold already."""
        self.eval_swaps = ema

    def note_block(self, generator: Generator[None, None, None]) -> None:
        """Know the generator that ends the block."""
        if not self.in_block:
            self._block = weakref.ref(generator)

    @property
    def in_block(self) -> bool:
        """Whether there is a block that can still be left."""
        generator = None if self._block is None else self._block()
        return self.mode is Mode.BLOCK and generator is not None and generator.gi_frame is not None

    @property
    def is_interrupted(self) -> bool:
        """Whether an interrupt has left a swap behind that nobody else will end."""
        if self.mode is Mode.BLOCK and not self.in_block:
            return True
        return self.move is not None or (self.mode is Mode.TRAIN and bool(self.swapped))

    @contextmanager
    def alone(self, what: str) -> Iterator[None]:
        """Let no other thread step or swap meanwhile.

        Raises:
            RuntimeError: Another thread does.
        """
        # Never waited for: a thread that waits inside a backward could not be woken.
        if not self._lock.acquire(blocking=False):
            raise RuntimeError(
                f"{what} while another thread steps or swaps: have one thread wait for the other"
            )
        try:
            yield
        finally:
            self._lock.release()
