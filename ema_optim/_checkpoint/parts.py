"""A tensor in a file: its shape and dtype are known, its values are read on demand."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# The dtypes of safetensors that a weight may have.
CODES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "C64": torch.complex64,
}


@dataclass(frozen=True, eq=False)
class Part:
    """One tensor of a file.

    Attributes:
        shape: Its shape.
        dtype: Its dtype; None for one that no weight has.
        load: Reads it; a view of the file where the file can be mapped into memory.
        place: Where its values lie; the same for tied weights that the file holds once.
    """

    shape: torch.Size
    dtype: torch.dtype | None
    load: Callable[[], Tensor]
    place: object = None

    @property
    def is_weight(self) -> bool:
        return self.dtype is not None and (self.dtype.is_floating_point or self.dtype.is_complex)


def part_of(tensor: Tensor) -> Part:
    """A tensor that is there already (mapped from its file)."""
    place = tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.shape
    return Part(tensor.shape, tensor.dtype, lambda: tensor.detach(), place)


def tree_of(value: Any) -> Any:
    """A copy of nested dicts and lists in which every tensor is a ``Part``."""
    if isinstance(value, Tensor):
        if type(value) not in (Tensor, torch.nn.Parameter) or value.layout != torch.strided:
            return value  # a sharded or quantized one: it is no weight of a file for one process
        return part_of(value)
    if isinstance(value, Mapping):
        return {key: tree_of(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(tree_of, value)) if type(value) in (list, tuple) else list(value)
    return value


def plain(value: Any) -> Any:
    """A number that may be kept as a tensor."""
    if isinstance(value, Part):
        value = value.load()
    return value.item() if isinstance(value, Tensor) and value.numel() == 1 else value


def unique(named: Mapping[str, Part]) -> dict[str, Part]:
    """The weights of a model under their first names, in the file's order."""
    seen: set[object] = set()
    first: dict[str, Part] = {}
    for name, part in named.items():
        if part.is_weight and (part.place is None or part.place not in seen):
            seen.add(part.place)
            first[name] = part
    return first
