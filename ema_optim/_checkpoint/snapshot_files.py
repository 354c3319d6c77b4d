"""Snapshots on disk: one average of one step in each safetensors file, its law in the header.

NAME-00001000.safetensors    header key "ema_optim": {"format": 1, "name", "step", "decay",
                             "update_every", "update_after_step"} as JSON
"""

import json
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._arithmetic.laws import decay_of, law_of
from .._arithmetic.synthesis import Average
from .._shadow.options import as_count
from .parts import CODES, Part

_KEY, _FORMAT = "ema_optim", 1
_NAME = re.compile(r"[^\W\d]\w*-\d{8,}\.safetensors")
_ASIDE = re.compile(rf"\.{_NAME.pattern}\.\d+\.part")


class Snapshot(NamedTuple):
    """A file and what its header says."""

    path: Path
    name: str
    average: Average


def file_name(name: str, step: int) -> str:
    """How the file of a window and a step is called."""
    return f"{name}-{step:08d}.safetensors"


def header_of(name: str, average: Average) -> dict[str, str]:
    """What the file says of itself.

    Raises:
        TypeError: The decay is a function of the user's.
    """
    told = {"format": _FORMAT, "name": name} | average._asdict() | {"decay": law_of(average.decay)}
    return {"format": "pt", _KEY: json.dumps(told, allow_nan=False)}


def snapshots_in(folder: Path) -> list[Snapshot]:
    """The snapshots in a folder by step and name; other files are ignored.

    Raises:
        ValueError: A file that is called like a snapshot is damaged, or a newer version's.
    """
    paths = folder.iterdir() if folder.is_dir() else ()
    found = map(_read, (path for path in paths if _NAME.fullmatch(path.name)))
    return sorted(filter(None, found), key=lambda snapshot: (snapshot.average.step, snapshot.name))


def left_by_killed(folder: Path) -> list[Path]:
    """What a writer that was killed has left in a folder."""
    return [path for path in folder.iterdir() if _ASIDE.fullmatch(path.name)]


def combined(used: Sequence[tuple[Snapshot, float]]) -> dict[str, Part]:
    """The tensors ``sum of coefficient * tensor``, each made when it is loaded.

    In fp32 or wider, complex ones complex; what is no float or complex tensor is the last file's.

    Args:
        used: At least one snapshot with its coefficient, the last one last.

    Raises:
        ValueError: A file is damaged, or has other tensors than the last one.
    """
    files = [(_open(snapshot.path), coefficient) for snapshot, coefficient in used]
    kinds = [_kinds(file) for file, _ in files]
    for (snapshot, _), kind in zip(used, kinds, strict=True):
        _check_alike(snapshot.path, kind, used[-1][0].path, kinds[-1])
    return {
        name: Part(torch.Size(shape), _sum_dtype(code), partial(_combine, files, name, code))
        for name, (shape, code) in kinds[-1].items()
    }


def _combine(files: Sequence[tuple[Any, float]], name: str, code: str) -> Tensor:
    dtype = _sum_dtype(code)
    if dtype is None:
        last: Tensor = files[-1][0].get_tensor(name)
        return last.clone()
    if [coefficient for _, coefficient in files] == [1.0]:  # that very tensor
        kept: Tensor = files[0][0].get_tensor(name).to(dtype, copy=True)
        return kept
    total = torch.zeros(files[-1][0].get_slice(name).get_shape(), dtype=dtype)
    for file, coefficient in files:
        total.add_(file.get_tensor(name).to(dtype), alpha=coefficient)
    return total


def _sum_dtype(code: str) -> torch.dtype | None:
    own = CODES.get(code)
    return torch.float32 if own is not None and own.itemsize < 4 else own


def _check_alike(
    path: Path, kinds: dict[str, Any], last: Path, wanted: dict[str, tuple[list[int], str]]
) -> None:
    if other := sorted(kinds.keys() ^ wanted.keys()):
        raise ValueError(
            f"{path} must have the tensors of {last}, got {other[0]} in one of the two alone: they "
            "are of different models"
        )
    for name, (shape, code) in wanted.items():
        if kinds[name][0] != shape or _sum_dtype(kinds[name][1]) != _sum_dtype(code):
            raise ValueError(
                f"{name} in {path} must have the shape and kind of that in {last}, {shape} {code}, "
                f"got {kinds[name][0]} {kinds[name][1]}: they are of different models"
            )


def _kinds(file: Any) -> dict[str, tuple[list[int], str]]:
    slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  # no mapping
    return {name: (part.get_shape(), part.get_dtype()) for name, part in slices.items()}


def _open(path: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(
            f"{path} is damaged ({error}): remove it, the other snapshots do without it"
        ) from error


def _read(path: Path) -> Snapshot | None:
    text = (_open(path).metadata() or {}).get(_KEY)
    try:
        told = json.loads(text or "null")
    except json.JSONDecodeError:  # the version of a package that has exported the file
        return None
    if not isinstance(told, dict):
        return None
    try:
        if told.pop("format") != _FORMAT:
            raise ValueError("a newer version of ema_optim may read it")
        name, decay = str(told.pop("name")), decay_of(told.pop("decay"))
        average = Average(decay, **told)
        for count in ("step", "update_every"):
            as_count(count, getattr(average, count), least=1)
        as_count("update_after_step", average.update_after_step, least=0)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} says of itself {text}, which is no snapshot: {error}") from error
    return Snapshot(path, name, average)
