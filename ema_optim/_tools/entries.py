"""The EMA in a source, one entry for each parameter: where its values are and what it is called."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import NoneType
from typing import Any

from .._arithmetic.formats import FORMATS, Format, format_of
from .._checkpoint.carry import carried_buffers, notes_of, uncarry
from .._checkpoint.notes import parse
from .._checkpoint.parts import Part, plain
from .._shadow.options import format_name
from .sources import Source, Tree


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
        held: The fingerprint of what the model held of this group, where the file has it.
    """

    label: str
    group: str
    main: Part
    low: Part | None
    exchanged: bool
    step: Any
    name: str | None
    held: str | None


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
    counts = Counter(entry.name for entry in found if entry.name is not None)
    if twice := sorted(name for name, count in counts.items() if count > 1):
        raise ValueError(
            f"every EMA must have a name of its own, got {twice[0]} twice, in {sorted(wanted)}: "
            "pass key= (--key) to take one of them"
        )
    return found


def _read(source: Source, where: str, tree: Tree) -> Iterator[Entry]:
    names = [_names(group) for group in tree["param_groups"]]
    if not any(names):
        names = list(source.names.get(where, names))
    if (buffers := carried_buffers(tree["param_groups"])) is not None:
        yield from _read(source, f"{where} buffers", dict(buffers))
    carried, tree = tree, uncarry(tree)
    _check_step(source, carried)
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
    main, low, step = saved["ema"], saved.get("ema_low") or None, saved.get("ema_step")
    plain_one = isinstance(main, Part) and isinstance(low, (Part, NoneType))
    if not plain_one or main.dtype is None:
        raise ValueError(
            f"the EMA of {label} must be a whole, plain tensor, got {type(main).__name__}: a "
            "sharded one is saved with torch.distributed.checkpoint"
        )
    notes = parse(group.get("ema_format"), "a param group")
    _check_format(format_of(main.dtype, low.dtype if low else None), notes.format, label)
    if isinstance(step, Part) and step.is_weight:
        raise ValueError(
            f"the EMA of {label} must be as it was saved, got one that was cast: an optimizer "
            "without an EMA has carried it along and saved it. Take an earlier checkpoint"
        )
    exchanged = bool(plain(group.get("ema_swapped"))) and not saved.get("ema_weights")
    return Entry(label, place, main, low, exchanged, step, name, notes.model)


def _check_format(found: Format, name: str | None, label: str) -> None:
    known = {format_name(dtype): format for dtype, format in FORMATS.items()}
    whole = found.low is None and found.main.itemsize >= 4
    if name is not None and not (found == known[name] if name in known else whole):
        raise ValueError(
            f"the EMA of {label} must be in the format {name}, got {found.main} and {found.low}: "
            "the file is damaged, or a distributed load has cast it"
        )


def _check_step(source: Source, tree: Tree) -> None:
    # A run without the callback carries an old EMA along.
    step = notes_of(tree["param_groups"]).get("ema_global_step")
    if source.step is not None and step not in (None, source.step):
        raise ValueError(
            f"the EMA must be of the checkpoint's step {source.step}, got one of step {step}: a "
            f"run without EMACallback has carried it along. Take checkpoint-{step}"
        )


def _names(group: Mapping[str, Any]) -> list[str] | None:
    found = group.get("param_names") or group.get("ema_entries", {}).get("param_names")
    if found and len(found) == len(group["params"]) and all(isinstance(n, str) for n in found):
        return list(found)
    return None


def _clean(name: str | None) -> str | None:
    """A name as the bare model has it; None for the empty one of what is not in the model."""
    return ".".join(part for part in (name or "").split(".") if part != "_orig_mod") or None
