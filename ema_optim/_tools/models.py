"""What a model's file adds to the EMA of a checkpoint: names, and the EMA itself after a swap."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from .._arithmetic.fingerprint import fingerprint, kinds, kinds_of
from .._checkpoint.parts import unique
from .entries import Entry
from .matching import Slot, match
from .sources import Model, Source, open_models


def named(entries: list[Entry], source: Source, model: Path | None) -> dict[str, Entry]:
    """The entries by name, every ``main`` being that of the EMA.

    Args:
        entries: Of the source.
        source: What was opened; a model in it may hold the EMA.
        model: What the user has named for the model's file.

    Raises:
        ValueError: A name or an EMA is not in the files, or not beyond doubt.
    """
    given = None if model is None else open_models(model)
    if any(entry.name is None for entry in entries):
        entries = _matched(entries, given)
    by_name = {str(entry.name): entry for entry in entries}
    if not any(entry.exchanged for entry in entries):
        return by_name
    held = _model_with(by_name, source if given is None else given)
    return {
        name: replace(entry, main=held[name], exchanged=False) if entry.exchanged else entry
        for name, entry in by_name.items()
    }


def _matched(entries: list[Entry], given: Source | None) -> list[Entry]:
    if given is None:
        raise ValueError(
            "the file holds the EMA by position, without names (the optimizer was not built from "
            "named_parameters()): pass model= (--model) a file or folder with the model's weights "
            "of about the same step"
        )
    known = {entry.name for entry in entries}
    free = {name: part for name, part in unique(_only_model(given)).items() if name not in known}
    slots = [Slot(e.label, e.group, e.main) for e in entries if e.name is None]
    names = iter(match(slots, free, given.ordered))
    return [replace(e, name=next(names)) if e.name is None else e for e in entries]


def _only_model(source: Source) -> Model:
    shapes = [{n: part.shape for n, part in model.items()} for model in source.models.values()]
    if not shapes or any(other != shapes[0] for other in shapes):
        raise ValueError(
            "the model's file must hold the weights of one model by name, got "
            f"{sorted(source.models)} in a {source.kind}: pass the model's own"
        )
    return next(iter(source.models.values()))


def _model_with(entries: Mapping[str, Entry], source: Source) -> Model:
    """The model that the EMA weights were in when the optimizer was saved."""
    alike = [model for model in source.models.values() if _has(model, entries)]
    fit = [model for model in alike if _held(model, entries) is not False]
    if len(fit) != 1:
        got = "other weights" if alike and not fit else f"{len(fit)} in {sorted(source.models)}"
        raise ValueError(
            "the checkpoint was taken while the EMA weights were swapped in: the EMA is in the "
            f"model's file that was saved with it, got {got}: pass model= (--model) that file"
        )
    if _held(fit[0], entries) is None:
        _refuse_same(fit[0], entries)
    return fit[0]


def _has(model: Model, entries: Mapping[str, Entry]) -> bool:
    for name, entry in entries.items():
        part = model.get(name)
        if part is None or part.shape != entry.main.shape:
            return False
        if entry.exchanged and part.dtype != entry.main.dtype:  # rounded
            return False
    return True


def _held(model: Model, entries: Mapping[str, Entry]) -> bool | None:
    """Whether it is what the model held then; None where the checkpoint does not say."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name, entry in entries.items():
        if entry.held:
            groups.setdefault((entry.group, entry.held), []).append(name)
    told = []
    for (_, text), names in groups.items():
        tensors = [model[name].load() for name in names]
        if kinds(text) == kinds_of(tensors):
            told.append(fingerprint(tensors) == text)
    return all(told) if told else None


def _refuse_same(model: Model, entries: Mapping[str, Entry]) -> None:
    swapped = [(entry.main, model[name]) for name, entry in entries.items() if entry.exchanged]
    if all(torch.equal(own.load(), other.load()) for own, other in swapped):
        raise ValueError(
            "the optimizer was saved while the EMA weights were swapped in, and the model was not: "
            "both hold the training weights, and the EMA is in neither"
        )
