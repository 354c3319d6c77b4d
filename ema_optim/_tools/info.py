"""What is in a checkpoint, in a few lines."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .._checkpoint.carry import notes_of, uncarry
from .._checkpoint.notes import parse
from .._checkpoint.parts import plain
from .._checkpoint.windows import told
from .entries import Entry, entries_of
from .sources import Source, open_source


def info(path: Path) -> list[str]:
    """Lines that say what a checkpoint holds, for each optimizer with an EMA in it."""
    source = open_source(path)
    lines = [f"file      {path} ({source.kind})"]
    for where in source.optimizers:
        entries = entries_of(source, where)
        if where and len(source.optimizers) > 1:
            lines += ["", f"key       {where}"]
        lines += [f"{name:<9} {text}" for name, text in _told(source, entries, where).items()]
    return lines


def facts(source: Source, entries: Sequence[Entry], key: str | None) -> dict[str, Any]:
    """What the files say of their EMA; None for what they do not say."""
    trees = source.optimizers.values() if key is None else [source.optimizers[key]]
    groups = [group for tree in trees for group in uncarry(tree)["param_groups"]]
    saved = [group for tree in trees for group in tree["param_groups"]]
    steps = [int(plain(group["ema_step"])) for group in groups if "ema_step" in group]
    notes = [parse(group.get("ema_format"), "a param group") for group in groups]
    formats = [note.format for note in notes]
    noted = notes_of(saved).get("ema_global_step")
    return {
        "ema_source": source.kind,
        "ema_step": max(steps or _steps(entries)),
        "ema_global_step": noted if source.step is None else source.step,
        "ema_decay": _decay(groups, told(notes)),
        "ema_format": _one(formats),
        "ema_swapped": any(bool(plain(group.get("ema_swapped"))) for group in groups),
    }


def _told(source: Source, entries: Sequence[Entry], where: str) -> dict[str, str]:
    known, steps = facts(source, entries, where), _steps(entries)
    own = f"{min(steps):,}" + (f" to {max(steps):,}" if min(steps) < max(steps) else "")
    step = known["ema_global_step"]
    kinds = sorted({_dtypes(entry) for entry in entries})
    values = sum(entry.main.shape.numel() for entry in entries)
    names = all(entry.name is not None for entry in entries)
    return {
        "steps": f"{known['ema_step']:,} optimizer steps"
        + ("" if step is None else f", saved at the trainer's step {step:,}"),
        "updates": f"each parameter's EMA has counted {own} steps",
        "decay": "not in the file" if known["ema_decay"] is None else str(known["ema_decay"]),
        "format": f"{known['ema_format'] or 'not in the file'} ({', '.join(kinds)})",
        "swapped": _swapped(known, entries),
        "tensors": f"{len(entries):,}, {values:,} values",
        "names": "yes" if names else "no: export needs --model",
    }


def _decay(groups: Sequence[Mapping[str, Any]], law: str | None) -> Any:
    """By which decay the EMA was made: the groups' own, or the optimizer's."""
    own = [plain(group.get("ema_decay")) for group in groups]
    if law is None:
        return _one(own)
    found = {law if decay is None else decay: None for decay in own}
    return ", ".join(map(str, found)) + (" (by param group)" if len(found) > 1 else "")


def _dtypes(entry: Entry) -> str:
    dtypes = [str(part.dtype) for part in (entry.main, entry.low) if part is not None]
    return " + ".join(dtype.removeprefix("torch.") for dtype in dtypes)


def _swapped(known: Mapping[str, Any], entries: Sequence[Entry]) -> str:
    if not known["ema_swapped"]:
        return "no"
    if any(entry.exchanged for entry in entries):
        return "yes: the EMA weights are in the model's file that was saved with it"
    return "yes: the EMA weights are in this file all the same"


def _steps(entries: Sequence[Entry]) -> list[int]:
    return [int(plain(entry.step)) for entry in entries if entry.step is not None] or [0]


def _one(values: Sequence[Any]) -> Any:
    """The value if there is one for all."""
    return values[0] if values and all(value == values[0] for value in values) else None
