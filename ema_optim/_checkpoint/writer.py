"""A safetensors file that is written tensor by tensor.

``safetensors.torch.save_file`` wants all tensors in memory at once. The format is a header of JSON
and the bytes behind it; the library itself reads the file back before it gets its name.
"""

import ctypes
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from .parts import CODES, Part

_NAMES = {dtype: code for code, dtype in CODES.items()}
_ALIGNMENT = 8


def in_order(parts: Mapping[str, Part]) -> list[str]:
    """The names in the order in which ``write`` loads them."""
    # Wider ones first: every tensor is aligned then.
    return sorted(parts, key=lambda name: -_size(parts[name]))


def write(
    path: Path, parts: Mapping[str, Part], metadata: Mapping[str, str], quiet: bool = False
) -> None:
    """Write tensors under another name, check the file and rename it.

    Args:
        path: The file; one that is there is replaced.
        parts: By name. Each is loaded once, when it is its turn.
        metadata: For the header.
        quiet: Whether to show no progress. Default: it is shown on a terminal.
    """
    from safetensors import safe_open
    from tqdm import tqdm

    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    order, total = in_order(parts), sum(_bytes(part) for part in parts.values())
    shown = {"unit": "B", "unit_scale": True, "disable": quiet or None, "desc": path.name}
    try:
        with open(aside, "wb") as file, tqdm(total=total, **shown) as bar:
            file.write(_header({name: parts[name] for name in order}, metadata))
            for name in order:
                bar.update(_put(file, parts[name]))
            file.flush()
            os.fsync(file.fileno())
        with safe_open(aside, framework="pt") as written:
            assert set(written.keys()) == set(parts), "the file does not hold what was written"
        os.replace(aside, path)
    finally:
        with suppress(FileNotFoundError):
            os.unlink(aside)


def _put(file: IO[bytes], part: Part) -> int:
    tensor = part.load().contiguous()  # kept alive while its memory is read
    return file.write(_memory(tensor))


def _header(parts: Mapping[str, Part], metadata: Mapping[str, str]) -> bytes:
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for name, part in parts.items():
        start, end = end, end + _bytes(part)
        header[name] = {
            "dtype": _NAMES[part.dtype] if part.dtype in _NAMES else _refuse(name, part),
            "shape": list(part.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _refuse(name: str, part: Part) -> str:
    raise ValueError(
        f"{name} must have one of the dtypes {[str(d) for d in _NAMES]}, got {part.dtype}: "
        "safetensors has no other; pass dtype= (--dtype)"
    )


def _memory(tensor: Tensor) -> memoryview:
    """The bytes of a tensor, not copied (and without numpy, which torch does not need)."""
    if not tensor.nbytes:
        return memoryview(b"")
    return memoryview((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr()))


def _size(part: Part) -> int:
    return part.dtype.itemsize if part.dtype is not None else 0


def _bytes(part: Part) -> int:
    return torch.Size(part.shape).numel() * _size(part)
