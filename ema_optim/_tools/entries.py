"""The EMA in a source, one entry for each parameter: where its values are and what it is called."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from .._arithmetic.formats import FORMATS, Format, format_of
from .._checkpoint.carry import uncarry
from .matching import Slot, match
from .parts import Part, plain, unique
from .sources import Model, Source, Tree, open_models


@dataclass(frozen=True, eq=False)
class Entry:
    """The EMA of one parameter.

    Attributes:
        label: Where it is in the file, for messages.
        group: The param group that it is in, and its number: names are given in a group's order.
        main: The main tensor; the training weights if ``exchanged``.
        low: The low-order tensor of a format that has one.
        exchanged: Whether the EMA weights (their main tensor) are in the model instead.
        step: The counter of optimizer steps of this parameter.
        name: Its name, where the file has it.
    """

    label: str
    group: str
    main: Part
    low: Part | None
    exchanged: bool
    step: Any
    name: str | None


def entries_of(source: Source, key: str | None = None) -> list[Entry]:
    """Every EMA of the optimizers of a source, checked as far as one file can be.

    Args:
        source: What was opened.
        key: Where the one optimizer is that is meant; None for all.

    Raises:
        ValueError: There is no such optimizer, two have a name in common, or an EMA is damaged.
    """
    if key is not None and key not in source.optimizers:
        raise ValueError(f"key must be one of {sorted(source.optimizers)}, got {key!r}")
    wanted = source.optimizers if key is None else {key: source.optimizers[key]}
    found = [e for where, tree in wanted.items() for e in _read(source, where, tree)]
    if not found:
        raise ValueError(f"the file must have an EMA that is enabled, got none in {list(wanted)}")
    names = [entry.name for entry in found if entry.name is not None]
    if twice := {name for name in names if names.count(name) > 1} if _collide(names) else ():
        raise ValueError(
            f"every EMA must have a name of its own, got {sorted(twice)[0]} twice, in "
            f"{sorted(wanted)}: pass key= (--key) to take one of them"
        )
    return found


def named(entries: list[Entry], source: Source, model: Path | None) -> dict[str, Entry]:
    """The entries by name, every ``main`` being that of the EMA.

    Raises:
        ValueError: A name or an EMA is not in the files, or not beyond doubt.
    """
    given = None if model is None else open_models(model)
    if any(entry.name is None for entry in entries):
        if given is None:
            raise ValueError(
                "the file holds the EMA by position, without names (the optimizer was not built "
                "from named_parameters()): pass model= (--model) a file or folder with the model's "
                "weights of about the same step"
            )
        entries = _matched(entries, _one_model(given, {}), given.ordered)
    by_name = {str(entry.name): entry for entry in entries}
    if not any(entry.exchanged for entry in entries):
        return by_name
    return _from_model(by_name, source if given is None else given)


def _matched(entries: list[Entry], model: Model, ordered: bool) -> list[Entry]:
    known = {entry.name for entry in entries}
    free = {name: part for name, part in unique(model).items() if name not in known}
    slots = [Slot(e.label, e.group, e.main) for e in entries if e.name is None]
    names = iter(match(slots, free, ordered))
    return [replace(e, name=next(names)) if e.name is None else e for e in entries]


def options_of(group: Mapping[str, Any]) -> tuple[str | None, dict[str, str]]:
    """The format that a group names, and what is written behind it (``;key=value``)."""
    name, *rest = str(group.get("ema_format", "")).split(";")
    return name or None, {
        k.strip(): v for k, found, v in (part.partition("=") for part in rest) if found
    }


def _read(source: Source, where: str, tree: Tree) -> Iterator[Entry]:
    names = [_names(group) for group in tree["param_groups"]]
    if not any(names):
        names = list(source.names.get(where, names))
    tree = uncarry(tree)
    _check_step(source, tree)
    state, seen = tree["state"], set()
    for index, group in enumerate(tree["param_groups"]):
        if not plain(group.get("ema_enabled", True)):
            continue
        own = names[index] if index < len(names) else None
        for position, key in enumerate(group["params"]):
            saved = state.get(key, state.get(str(key), {}))
            if key in seen or not isinstance(saved, Mapping) or "ema" not in saved:
                continue
            seen.add(key)
            name = own[position] if own else (key if isinstance(key, str) else None)
            place = f"{where or 'state'}[{key!r}]" if name is None else name
            yield _entry(saved, group, place, f"{where} {index}", _clean(name))


def _entry(
    saved: Mapping[str, Any], group: Tree, label: str, place: str, name: str | None
) -> Entry:
    for part in (saved["ema"], saved.get("ema_low"), saved.get("ema_weights")):
        if part is not None and not isinstance(part, (Part, Mapping)):
            raise ValueError(
                f"the EMA of {label} must be a whole, plain tensor, got {type(part).__name__}: a "
                "sharded one is saved with torch.distributed.checkpoint"
            )
    main, low, step = saved["ema"], saved.get("ema_low") or None, saved.get("ema_step")
    _check_format(format_of(main.dtype, low.dtype if low else None), group, label)
    if isinstance(step, Part) and step.is_weight:
        raise ValueError(
            f"the EMA of {label} must be as it was saved, got one that was cast: an optimizer "
            "without an EMA has carried it along and saved it. Take an earlier checkpoint"
        )
    exchanged = bool(plain(group.get("ema_swapped"))) and not saved.get("ema_weights")
    return Entry(label, place, main, low, exchanged, step, name)


def _check_format(found: Format, group: Tree, label: str) -> None:
    name = options_of(group)[0]
    known = {str(dtype).removeprefix("torch."): format for dtype, format in FORMATS.items()}
    whole = found.low is None and found.main.itemsize >= 4
    if name is not None and not (found == known[name] if name in known else whole):
        raise ValueError(
            f"the EMA of {label} must be in the format {name}, got {found.main} and {found.low}: "
            "the file is damaged, or a distributed load has cast it"
        )


def _check_step(source: Source, tree: Tree) -> None:
    # A run without the callback carries an old EMA along.
    steps = [g["ema_global_step"] for g in tree["param_groups"] if "ema_global_step" in g]
    if source.step is not None and steps and max(steps) != source.step:
        raise ValueError(
            f"the EMA must be of the checkpoint's step {source.step}, got one of step "
            f"{max(steps)}: a run without EMACallback has carried it along. Take "
            f"checkpoint-{max(steps)}"
        )


def _from_model(entries: dict[str, Entry], source: Source) -> dict[str, Entry]:
    model = _one_model(source, entries)
    taken = {
        name: replace(entry, main=model[name], exchanged=False) if entry.exchanged else entry
        for name, entry in entries.items()
    }
    swapped = [(e.main, taken[name].main) for name, e in entries.items() if e.exchanged]
    if all(torch.equal(own.load(), other.load()) for own, other in swapped):
        raise ValueError(
            "the optimizer was saved while the EMA weights were swapped in, and the model was not: "
            "both hold the training weights, and the EMA is in neither"
        )
    return taken


def _one_model(source: Source, entries: Mapping[str, Entry]) -> Model:
    """The model that has all of these entries."""
    fit = [
        model
        for model in source.models.values()
        if all(n in model and model[n].shape == e.main.shape for n, e in entries.items())
    ]
    if not fit or (entries and len(fit) > 1):
        got = f"{len(fit)} of the models {sorted(source.models)}"
        raise ValueError(
            "the checkpoint was taken while the EMA weights were swapped in: the EMA is in the "
            f"model's file that was saved with it, got {got} that has every name: pass model= "
            "(--model) that file"
            if entries
            else f"the model's file must hold weights by name, got none in {source.kind}"
        )
    shapes = [{name: part.shape for name, part in model.items()} for model in fit]
    if any(other != shapes[0] for other in shapes):
        raise ValueError(f"the file must hold one model, got {sorted(source.models)}: pass its own")
    return fit[0]


def _names(group: Mapping[str, Any]) -> list[str] | None:
    found = group.get("param_names") or group.get("ema_entries", {}).get("param_names")
    if found and len(found) == len(group["params"]) and all(isinstance(n, str) for n in found):
        return list(found)
    return None


def _clean(name: str | None) -> str | None:
    """A name as the bare model has it; None for the empty one of what is not in the model."""
    return ".".join(part for part in (name or "").split(".") if part != "_orig_mod") or None


def _collide(names: list[str]) -> bool:
    return len(set(names)) < len(names)
