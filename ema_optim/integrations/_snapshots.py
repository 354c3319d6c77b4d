"""The folder of snapshots of a callback: one for each optimizer, looked at before a training."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from ..optimizer import EMAOptimizer
from ..snapshots import EMASnapshots


def as_folder(snapshots: str | os.PathLike[str] | None) -> Path | None:
    """Return a callback's ``snapshots`` as a path; raise TypeError for what is none."""
    if snapshots is None or isinstance(snapshots, (str, os.PathLike)):
        return None if snapshots is None else Path(snapshots)
    raise TypeError(f"snapshots must be a folder or None, got {snapshots!r}")


def folder_of(folder: Path | None, args: Any, run: str) -> Path | None:
    """The folder of one training of a ``Trainer``: a trial of a search has one in it.

    Args:
        folder: Of the callback.
        args: The Trainer's.
        run: Where the checkpoints of the training are.
    """
    return folder if folder is None or run == str(args.output_dir) else folder / Path(run).name


def check_snapshots(folder: Path | None, optimizers: Sequence[EMAOptimizer]) -> None:
    """Raise as ``EMASnapshots.save`` would, hours before it does."""
    for snapshots, optimizer in _each(folder, optimizers):
        snapshots._check(optimizer._ema)


def save_snapshots(
    folder: Path | None, optimizers: Sequence[EMAOptimizer], model: nn.Module
) -> None:
    """Write a snapshot of every average that has begun."""
    for snapshots, optimizer in _each(folder, optimizers):
        if optimizer._ema.step:
            snapshots.save(optimizer, model)


def _each(
    folder: Path | None, optimizers: Sequence[EMAOptimizer]
) -> list[tuple[EMASnapshots, EMAOptimizer]]:
    if folder is None:
        return []
    several = len(optimizers) > 1
    folders = [folder / str(i) if several else folder for i in range(len(optimizers))]
    return [(EMASnapshots(own), one) for own, one in zip(folders, optimizers, strict=True)]
