"""EMA weights by parameter name: what ``get_ema_state`` and ``load_ema_state`` exchange."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .._engines.sharding import local, reshard_model
from .holdings import no_autograd
from .mistakes import check_by_name, check_model
from .options import Options, check_tensor, whole_format
from .shadow_set import ShadowSet
from .slots import Group, Slot, stored

# Of data-parallel wrappers, DeepSpeed's engine inside Lightning, and a module's own network.
_PREFIXES = ("module.", "_forward_module.", "model.")


def named_parameters(model: nn.Module) -> dict[str, Tensor]:
    """Parameters under the names of the bare model, every name of a tied one.

    ``torch.compile`` and the data-parallel wrappers prefix every name (``_orig_mod.``,
    ``module.``); a file with such names loads into nothing. FSDP2 shows gathered weights in place
    of parameters until they are given back.
    """
    reshard_model(model)
    named = _unwrap(model).named_parameters(remove_duplicate=False)
    return {_clean(name): param for name, param in named}


def named_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Buffers under the names of the bare model, every name of a shared one."""
    named = _unwrap(model).named_buffers(remove_duplicate=False)
    return {_clean(name): buffer for name, buffer in named}


def unique(named: Mapping[str, Tensor]) -> dict[Tensor, str]:
    """The first name of every tensor."""
    first: dict[Tensor, str] = {}
    for name, tensor in named.items():
        first.setdefault(tensor, name)
    return first


def group_names(groups: Sequence[Group], model: nn.Module) -> list[list[str]]:
    """The names of the parameters of param groups, for files; empty where the model has none."""
    first = unique(named_parameters(model))
    return [[first.get(param, "") for param in group["params"]] for group in groups]


def ema_state(
    shadow: ShadowSet,
    model: nn.Module,
    device: torch.device | str | None = None,
    value_of: Callable[[Tensor], Tensor] | None = None,
) -> dict[str, Tensor]:
    """Fresh copies of the EMA weights, one entry for each unique tensor of the model.

    Args:
        shadow: The shadow set.
        model: Who owns the parameters.
        device: Where the copies are to be.
        value_of: Gives what is wanted of a parameter; None for its EMA.
    """
    shadow.offload.settle()
    with no_autograd():  # one after the other: a device need not hold all of them
        return {
            name: whole(shadow, tensor, value_of).to(device)
            for tensor, name in unique_members(shadow, model).items()
        }


def unique_members(shadow: ShadowSet, model: nn.Module) -> dict[Tensor, str]:
    """The first name in the model of every tensor that has, or will have, an EMA."""
    members = set(shadow.members())
    found = unique({n: t for n, t in _named_tensors(model).items() if t in members})
    if members and not found:
        raise ValueError(
            "the model must own parameters of this optimizer, got a model that has none of its "
            f"{len(members)}: pass the model whose parameters are trained"
        )
    return found


def load_ema_state(
    shadow: ShadowSet,
    model: nn.Module,
    state: Mapping[str, Tensor],
    strict: bool,
) -> None:
    """Make ``state`` the EMA; everything is checked before anything changes."""
    check_by_name(state)  # before the model: the two are mixed up easily
    take_loaded(shadow, matched(_named_tensors(model), set(shadow.members()), state, strict))


def matched(
    named: Mapping[str, Tensor], members: set[Tensor], state: Mapping[str, Tensor], strict: bool
) -> dict[Tensor, Tensor]:
    """The values that ``state`` has for tensors of a model, everything checked.

    Args:
        named: The model's tensors under all their names.
        members: Those that are averaged.
        state: Values by name.
        strict: Whether the names must be exactly those of the members.
    """
    found = _by_known_names(state, named)
    targets = {name: named[name] for name in found if name in named and named[name] in members}
    if strict:
        _check_names(found, targets, {n: t for n, t in named.items() if t in members})
    for name, param in targets.items():
        check_tensor(f"the EMA of {name}", found[name], param)
    _check_tied({name: found[name] for name in targets}, named)
    return {param: found[name] for name, param in targets.items()}


def take_loaded(shadow: ShadowSet, values: Mapping[Tensor, Tensor]) -> None:
    """Make the values of parameters their EMA, which counts as one from then on."""
    slots, options = {}, shadow.options_by_param()
    for param, value in values.items():
        wanted = options.get(param, shadow.options)
        with no_autograd():
            slots[param] = _loaded_slot(shadow, param, value, wanted)
    shadow.forget_lanes()
    shadow.held = None  # an EMA of another source says nothing of the model's file
    shadow.slots.update(slots)
    shadow.step = max(shadow.step, shadow.update_after_step + 1)
    shadow.note_loaded(slots)


def by_model_names(state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Values under the names that the model has for them, where a prefix alone parts the two."""
    return _by_known_names(state, _named_tensors(model))


def _named_tensors(model: nn.Module) -> dict[str, Tensor]:
    check_model(model)
    return {**named_buffers(model), **named_parameters(model)}


def whole(
    shadow: ShadowSet, param: Tensor, value_of: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """A fresh copy of the EMA weights of one parameter, in one tensor; ``value_of`` as above."""
    shadow.offload.settle()
    ema = shadow.ema_of(param) if value_of is None else value_of(param)
    format = whole_format(param.dtype, shadow.dtype)
    if shadow.offload.serves(param):
        return ema.to("cpu", format.main, copy=True)
    return stored(param, ema, format)[0]


def _loaded_slot(shadow: ShadowSet, param: Tensor, value: Tensor, options: Options) -> Slot:
    old = shadow.find(param)
    steps, age = (shadow.step, 0) if old is None else (old.counter.steps, old.age)
    slot = shadow.new_slot(param, options, (value, None))
    # No share: none of what was loaded is this run's initial weights.
    slot.set_counts(max(steps, shadow.update_after_step + 1), max(1, age), share=0.0)
    return slot


def _check_names(
    found: Mapping[str, Tensor], targets: Mapping[str, Tensor], wanted: Mapping[str, Tensor]
) -> None:
    given = set(targets.values())
    missing = sorted({name for name, param in wanted.items() if param not in given})
    unknown = sorted(set(found) - set(targets))
    if missing or unknown:
        raise KeyError(
            f"the names must be those of the optimizer's parameters in the model; missing: "
            f"{missing}, unknown: {unknown}. Pass strict=False to load the others"
        )


def _check_tied(found: Mapping[str, Tensor], named: Mapping[str, Tensor]) -> None:
    first: dict[Tensor, str] = {}
    for name in found:
        other = first.setdefault(named[name], name)
        if other != name and not torch.equal(local(found[name]), local(found[other])):
            raise ValueError(
                f"{name} and {other} are tied and must have one EMA, got two different ones"
            )


def _by_known_names(state: Mapping[str, Tensor], named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``state`` by the model's names, where one prefix for all is all that parts the two."""
    names = {name: _clean(name) for name in state}
    prefixes = [prefix for prefix in ("", *_PREFIXES) if _all_start_with(prefix, names.values())]
    ways = [{name: own[len(prefix) :] for name, own in names.items()} for prefix in prefixes]
    ways += [{name: prefix + own for name, own in names.items()} for prefix in _PREFIXES]
    fallback = {name: _known(own, named) for name, own in names.items()}
    way = next((way for way in ways if named.keys() >= set(way.values())), fallback)
    return {way[name]: value for name, value in state.items()}


def _all_start_with(prefix: str, names: Iterable[str]) -> bool:
    return all(name.startswith(prefix) for name in names)


def _known(name: str, named: Mapping[str, Tensor]) -> str:
    if name not in named and name.startswith("module."):
        return name.removeprefix("module.")
    return name


def _clean(name: str) -> str:
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def callee(model: nn.Module) -> nn.Module:
    """What runs the bare forward: below any data-parallel wrapper, compiled as it is there."""
    inner, called = model, model
    while (within := _within(inner)) is not None:
        if not _is_compiled(inner):
            called = within
        inner = within
    return called


def _unwrap(model: nn.Module) -> nn.Module:
    while (within := _within(model)) is not None:
        model = within
    return model


def _within(model: nn.Module) -> nn.Module | None:
    within: Any = getattr(model, "_orig_mod", None) if _is_compiled(model) else None
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        within = model.module
    return within  # type: ignore[no-any-return]


def _is_compiled(model: nn.Module) -> bool:
    return isinstance(getattr(model, "_orig_mod", None), nn.Module)
