"""A folder of a distributed checkpoint as a tree, in one process and without running its pickles.

Torch reads ``.metadata`` and every plain value by an unrestricted unpickler. Here the first may
name what torch writes into it and nothing else, and the values go through ``weights_only``.
"""

import io
import pathlib
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem

from .._checkpoint.parts import Part

_CLASSES = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size"},
    "collections": {"OrderedDict"},
}
_PATHS = ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")
# The options of a param group that say something of the EMA.
_OPTIONS = ("params", "param_names")


def tree_of_folder(folder: Path) -> dict[Any, Any]:
    """What was given to ``dcp.save``, its tensors as parts that are read on demand.

    Of the plain values those are read that tell of an EMA; the others are None.
    """
    reader = _Reader(folder)
    metadata = reader.read_metadata()
    reader.set_up_storage_reader(metadata, is_coordinator=True)
    tree: dict[Any, Any] = {}
    for key, path in metadata.planner_data.items():
        stored = metadata.state_dict_metadata[key]
        node = tree
        for step in path[:-1]:
            node = node.setdefault(step, {})
        if isinstance(stored, TensorStorageMetadata):
            node[path[-1]] = Part(
                stored.size, stored.properties.dtype, _Read(reader, metadata, key, stored)
            )
        else:
            last = str(path[-1]).rpartition(".")[2]
            wanted = last.startswith("ema_") or last in _OPTIONS
            node[path[-1]] = _value(reader, metadata, key) if wanted else None
    listed: dict[Any, Any] = _with_lists(tree)
    return listed


class _Reader(FileSystemReader):
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with open(Path(self.path) / ".metadata", "rb") as file:
            found = _Unpickler(file).load()
        if not isinstance(found, Metadata) or not isinstance(found.planner_data, dict):
            raise ValueError(
                f"{self.path}/.metadata must be as dcp.save writes it, got something else: pass "
                "the folder that dcp.save was given"
            )
        return found


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name in _CLASSES.get(module, ()):
            return super().find_class(module, name)
        if module == "torch" and isinstance(found := getattr(torch, name, None), torch.dtype):
            return found
        if module in ("pathlib", "pathlib._local") and name in _PATHS:
            # As a pure path: that of another system cannot be made, and none is needed.
            return pathlib.PurePosixPath if "Posix" in name else pathlib.PureWindowsPath
        raise pickle.UnpicklingError(f"{module}.{name} is no part of a distributed checkpoint")


class _Planner(DefaultLoadPlanner):
    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        self.state_dict[read_item.dest_index.fqn] = torch.load(value, weights_only=True)


class _Read:
    """Reads one tensor, whole."""

    def __init__(
        self, reader: _Reader, metadata: Metadata, key: str, stored: TensorStorageMetadata
    ) -> None:
        self._source, self._key, self._stored = (reader, metadata), key, stored

    def __call__(self) -> Tensor:
        target = torch.empty(self._stored.size, dtype=self._stored.properties.dtype)
        _fill(*self._source, {self._key: target})
        return target


def _value(reader: _Reader, metadata: Metadata, key: str) -> Any:
    state: dict[str, Any] = {key: io.BytesIO()}
    _fill(reader, metadata, state)
    return state[key]


def _fill(reader: _Reader, metadata: Metadata, state: dict[str, Any]) -> None:
    # Not dcp.load: it would ask the other ranks of a program that has some.
    planner = _Planner(flatten_state_dict=False, flatten_sharded_tensors=False)
    planner.set_up_planner(state, metadata, is_coordinator=True)
    plan = reader.prepare_local_plan(planner.create_local_plan())
    reader.read_data(plan, planner).wait()


def _with_lists(node: Any) -> Any:
    if not isinstance(node, dict):
        return node
    if node and all(isinstance(key, int) for key in node):
        return [_with_lists(node[key]) for key in sorted(node)]
    return {key: _with_lists(item) for key, item in node.items()}
