"""Whether the model holds what it held when the checkpoint that was loaded was written.

The model's file is loaded before or after the optimizer's, or never. A fingerprint in the
checkpoint tells, so that an exchange never rests on a guess:

    written while swapped      the exchange waits until the model holds what it held then
    written in training        the first step is refused if the model holds the EMA instead
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from .._arithmetic.fingerprint import fingerprint, kinds, kinds_of
from .holdings import no_autograd
from .options import ema_format
from .shadow_set import ShadowSet
from .slots import read_


@dataclass(eq=False)
class Held:
    """Parameters and the fingerprint of what they held, by the number of their param group."""

    groups: dict[int, tuple[list[Tensor], str]]

    def fits(self, shadow: ShadowSet) -> bool:
        """Whether the model holds that now, as far as its parameters are still the same."""
        kept = [
            (params, text)
            for params, text in self.groups.values()
            if all(shadow.find(param) is not None for param in params)
        ]
        return all(fingerprint(params) == text for params, text in kept)


def model_fingerprint(shadow: ShadowSet, index: int, params: Iterable[Tensor]) -> str:
    """What a checkpoint written now says of the model; empty where nothing can be told.

    Of a pending exchange what was loaded: the model's file may still be to come.
    """
    if shadow.mode != "pending":
        return fingerprint(_plain(params))
    known = shadow.held.groups if shadow.held is not None else {}
    return known[index][1] if index in known else ""


def held(groups: Iterable[tuple[list[Tensor], str | None]]) -> Held | None:
    """What can be told of these parameters by the fingerprints of a checkpoint; None for nothing.

    Nothing can of parameters that were sharded, or of another dtype, or in other groups.
    """
    told = [(_plain(params), text or "") for params, text in groups]
    known = {i: own for i, own in enumerate(told) if own[1] and kinds(own[1]) == kinds_of(own[0])}
    return Held(known) if known else None


def check_model(shadow: ShadowSet) -> None:
    """Raise RuntimeError while a pending exchange would be made with the wrong weights."""
    if shadow.mode == "pending" and shadow.swapped and shadow.held and not shadow.held.fits(shadow):
        raise RuntimeError(
            "the optimizer's checkpoint was written while the EMA weights were swapped in, and the "
            "model must hold what it held then, which it does not: load the model's state dict of "
            "the same moment first. If that is in no file, start a new EMA: remove the 'ema*' "
            "entries from the optimizer's checkpoint"
        )


def check_first_step(shadow: ShadowSet) -> None:
    """Raise RuntimeError where a run would go on from the EMA weights; asked once after a load."""
    if shadow.mode != "train" or shadow.held is None:
        return
    if _holds_ema(shadow, shadow.held) and not shadow.held.fits(shadow):
        raise RuntimeError(
            "the model must hold the training weights of the checkpoint, got its EMA weights: the "
            "model's file was written while the EMA was swapped in, the optimizer's was not. Load "
            "the model's state dict of the same moment; or, to go on from the EMA weights, call "
            "optimizer.apply_ema()"
        )
    shadow.held = None


def finish_formats(shadow: ShadowSet) -> None:
    """Bring an EMA that was exchanged in another format than this run's into that."""
    options = shadow.options_by_param()
    for window in shadow.windows.values():
        for param, slot in window.all_slots().items():
            wanted = ema_format(param.dtype, options.get(param, shadow.options).dtype)
            if slot.format != wanted:
                window.forget_lanes()
                with no_autograd():
                    slot.convert(param, wanted)


def _plain(params: Iterable[Tensor]) -> list[Tensor]:
    # Sharded ones are left out: state_dict() communicates nothing. Quantized ones are of a class
    # of their own as well.
    return [p for p in params if type(p.detach()) is Tensor and p.layout == torch.strided]


def _holds_ema(shadow: ShadowSet, held: Held) -> bool:
    params = [param for params, _ in held.groups.values() for param in params]
    found = ((param, shadow.find(param)) for param in params)
    averaged = [(param, slot) for param, slot in found if slot is not None and slot.age]
    for param, slot in averaged:
        shown = torch.empty_like(param, requires_grad=False)
        with no_autograd():
            read_([shown], [slot])
        if not torch.equal(shown, param.detach()):
            return False
    return bool(averaged)
