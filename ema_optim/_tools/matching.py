"""Names for an EMA that a file holds by position: from a model's weights, or not at all.

An optimizer's state knows the order of each param group, and nothing says that this is the model's
(weight decay has its own groups, sorted as the user liked). So the values decide: the EMA is near
the weights that it averages, and near no others of that shape.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .._checkpoint.parts import Part

# Of each tensor that many values are compared.
_SAMPLE = 1024
# The nearest weights are meant if the next ones are this many times as far away.
_MARGIN = 2.0


class Slot(NamedTuple):
    """One EMA without a name."""

    label: str
    group: str
    main: Part


def match(slots: Sequence[Slot], model: Mapping[str, Part], ordered: bool) -> list[str]:
    """The name of every slot.

    Args:
        slots: In the order of the param groups.
        model: Weights by name, tied ones once.
        ordered: Whether the model's file is in the order in which the model registers them.

    Raises:
        ValueError: Shapes, counts and values leave a doubt.
    """
    shapes = [slot.main.shape for slot in slots]
    found: dict[int, str] = {}
    for shape in dict.fromkeys(shapes):
        indices = [i for i, own in enumerate(shapes) if own == shape]
        names = [name for name, part in model.items() if part.shape == shape]
        own = [slots[i] for i in indices]
        if len(own) > len(names):
            raise ValueError(
                f"the model's file must have {len(own)} weights of shape {tuple(shape)} like the "
                f"optimizer, got {len(names)}: pass the model that was trained"
            )
        chosen = _by_value(own, [model[name] for name in names])
        if None in chosen:
            chosen = _by_order(own, names, ordered, chosen)
        if len(set(chosen)) < len(chosen) or None in chosen:
            raise ValueError(_doubt(own, names, chosen))
        found |= {i: names[j] for i, j in zip(indices, chosen, strict=True) if j is not None}
    return [found[i] for i in range(len(slots))]


def _by_value(slots: Sequence[Slot], parts: Sequence[Part]) -> list[int | None]:
    if len(parts) == 1:
        return [0] * len(slots)
    gaps = torch.cdist(_samples([slot.main for slot in slots]), _samples(parts))
    near, second = gaps.topk(2, largest=False).values.unbind(1)
    clear = near * _MARGIN < second
    best = gaps.argmin(1).tolist()
    return [j if sure else None for j, sure in zip(best, clear.tolist(), strict=True)]


def _by_order(
    slots: Sequence[Slot], names: Sequence[str], ordered: bool, chosen: list[int | None]
) -> list[int | None]:
    """By position: in one group that has as many as the model, unless a value contradicts."""
    one_group = len({slot.group for slot in slots}) == 1
    agrees = all(j in (None, i) for i, j in enumerate(chosen))
    if not (ordered and one_group and agrees and len(slots) == len(names)):
        return chosen
    return list(range(len(names)))


def _samples(parts: Sequence[Part]) -> Tensor:
    return torch.stack([_sample(part.load()) for part in parts])


def _sample(values: Tensor) -> Tensor:
    flat = values.detach().reshape(-1)
    flat = flat[:: max(1, flat.numel() // _SAMPLE)]
    return (torch.view_as_real(flat).reshape(-1) if flat.is_complex() else flat).double()


def _doubt(slots: Sequence[Slot], names: Sequence[str], chosen: Sequence[int | None]) -> str:
    index = next(i for i, j in enumerate(chosen) if j is None or chosen.count(j) > 1)
    return (
        f"the name of {slots[index].label} must be beyond doubt, got {len(names)} weights of shape "
        f"{tuple(slots[index].main.shape)} ({', '.join(names[:3])}, ...) and {len(slots)} EMAs: "
        "pass the weights of the same step, in a file of torch.save(model.state_dict()), which "
        "keeps the order"
    )
