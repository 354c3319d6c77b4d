"""Opens what a user has: a checkpoint folder or file, as optimizers and models that are in it."""

import json
import pickle
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from .._checkpoint.parts import CODES, Part, tree_of

Tree = dict[str, Any]
Model = dict[str, Part]

# What the Trainer and Accelerate call an optimizer's file or folder.
_OPTIMIZERS = ("optimizer.pt", "optimizer.bin", "optimizer_0")
_MODELS = (
    "model*.safetensors",
    "diffusion_pytorch_model*.safetensors",
    "adapter_model*.safetensors",
    "pytorch_model*.bin",
    "pytorch_model_fsdp_0",
)


@dataclass
class Source:
    """What is in a file or folder.

    Attributes:
        kind: What it is, in words.
        optimizers: State dicts that hold an EMA, by where they are.
        models: Models' weights, by where they are, in the file's order.
        ordered: Whether that order is the one in which the model registers its parameters.
        names: The parameters' names beside the optimizers, where a trainer has written them there.
        step: The trainer's own step.
    """

    kind: str
    optimizers: dict[str, Tree] = field(default_factory=dict)
    models: dict[str, Model] = field(default_factory=dict)
    ordered: bool = False
    names: dict[str, list[list[str]]] = field(default_factory=dict)
    step: int | None = None


def open_source(path: Path) -> Source:
    """Find the optimizers that hold an EMA, and models beside them.

    Raises:
        FileNotFoundError: There is nothing at ``path``.
        ValueError: It is nothing that holds an EMA, or cannot be read safely.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} must be a checkpoint's file or folder, got nothing there")
    found = _open_folder(path) if path.is_dir() and not is_distributed(path) else _open_tree(path)
    if not found.optimizers:
        raise ValueError(
            f"{path} must hold the state of an EMAOptimizer or EMAModel, got none that has an EMA: "
            "pass the checkpoint that optimizer.state_dict() was saved in"
        )
    return found


def open_models(path: Path) -> Source:
    """The models' weights in a file or folder."""
    if not path.exists():
        raise FileNotFoundError(f"the model must be a file or folder, got nothing at {path}")
    if path.is_dir() and not is_distributed(path):
        return _models_beside(path)
    return _open_safetensors(path) if path.suffix == ".safetensors" else _open_tree(path)


def is_distributed(path: Path) -> bool:
    """Whether ``dcp.save`` has written this folder."""
    return (path / ".metadata").is_file()


def _open_folder(folder: Path) -> Source:
    for name in _OPTIMIZERS:
        if not (folder / name).exists():
            continue
        found, beside = _open_tree(folder / name), _models_beside(folder)
        found.kind = f"checkpoint folder, {name}"
        found.models, found.ordered = beside.models, beside.ordered
        state = folder / "trainer_state.json"
        if state.is_file():
            found.kind = f"Trainer checkpoint, {name}"
            found.step = json.loads(state.read_text()).get("global_step")
        return found
    inside = sorted(child.name for child in folder.iterdir())[:8]
    raise ValueError(
        f"{folder} must hold {', '.join(_OPTIMIZERS)} or .metadata (a distributed checkpoint), got "
        f"{inside}: pass one checkpoint-N, or the file itself"
    )


def _models_beside(folder: Path) -> Source:
    found = Source("model folder")
    for pattern in _MODELS:
        for path in sorted(folder.glob(pattern)):
            part = open_models(path)
            found.ordered = part.ordered
            for model in part.models.values():
                found.models.setdefault(str(folder), {}).update(model)
        if found.models:
            break
    return found


def _open_safetensors(path: Path) -> Source:
    from safetensors import SafetensorError, safe_open

    try:
        file: Any = safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{path} must be a safetensors file, got {error}") from None
    slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
    model = {
        name: Part(
            torch.Size(found.get_shape()),
            CODES.get(found.get_dtype()),
            partial(file.get_tensor, name),
        )
        for name, found in slices.items()
    }
    return Source("safetensors file", models={str(path): model})


def _open_tree(path: Path) -> Source:
    tree = _load_folder(path) if path.is_dir() else tree_of(_load(path))
    kind = "distributed checkpoint" if path.is_dir() else "checkpoint file"
    found = Source(kind, ordered=path.is_file())
    for where, node in _walk(tree, ()):
        if is_optimizer(node):
            if has_ema(state_dict := _torch_form(node)):
                found.optimizers[where] = state_dict
        elif model := {k: v for k, v in node.items() if isinstance(v, Part) and isinstance(k, str)}:
            found.models[where] = model
    if isinstance(tree, dict) and "callbacks" in tree and "optimizer_states" in tree:
        found.kind = "Lightning checkpoint"
        found.names = _lightning_names(tree)
        found.step = tree.get("global_step")
    return found


def _load_folder(path: Path) -> Any:
    from .distributed import tree_of_folder

    try:
        return tree_of_folder(path)
    except pickle.UnpicklingError as error:
        raise _unsafe(path, error) from None


def _load(path: Path) -> Any:
    if path.suffix == ".safetensors":
        raise ValueError(
            f"{path} must hold the state of an EMAOptimizer or EMAModel, got a model's weights: "
            "pass the checkpoint that optimizer.state_dict() was saved in"
        )
    try:
        try:
            return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        except RuntimeError as error:
            if "mmap" not in str(error):
                raise
            return torch.load(path, map_location="cpu", weights_only=True)  # of an old torch
    except pickle.UnpicklingError as error:
        raise _unsafe(path, error) from None
    except OSError:
        raise
    except Exception as error:  # whatever torch's unpickler meets in a file that is none
        told = f"{type(error).__name__}: {_first(error)}"
        raise ValueError(f"{path} must be a file of torch.save, got {told}") from None


def _unsafe(path: Path, error: Exception) -> ValueError:
    return ValueError(
        f"{path} must hold tensors and plain values alone, got {_first(error)}: it is read with "
        "weights_only=True, since unpickling anything else can run code. Save the state dicts "
        "without other objects or, if you trust the file, call export_ema() after "
        "torch.serialization.add_safe_globals()"
    )


def _first(error: Exception) -> str:
    """What a message of torch's unpickler is about."""
    if named := re.search(r"GLOBAL (\S+)", str(error)):
        return named[1]
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _walk(tree: Any, where: tuple[Any, ...]) -> Iterator[tuple[str, Tree]]:
    """Every dict that may be an optimizer's or a model's, by its place."""
    if isinstance(tree, list):
        tree = dict(enumerate(tree))
    if not isinstance(tree, Mapping) or len(where) > 4:
        return
    yield ".".join(map(str, where)), dict(tree)
    if not is_optimizer(tree):
        for key, node in tree.items():
            yield from _walk(node, (*where, key))


def is_optimizer(tree: Mapping[Any, Any]) -> bool:
    """Whether a dict is an optimizer's state dict, or flattened."""
    groups = tree.get("param_groups")
    if isinstance(tree.get("state"), Mapping) and isinstance(groups, list):
        return all(isinstance(group, Mapping) and "params" in group for group in groups)
    return bool(tree) and all(str(key).startswith(("state.", "param_groups.")) for key in tree)


def has_ema(state_dict: Tree) -> bool:
    """Whether some parameter of an optimizer's state dict has an EMA."""
    carried = [g.get("ema_entries", {}).get("params", ()) for g in state_dict["param_groups"]]
    entries = [*state_dict["state"].values(), *(e for params in carried for e in params)]
    return any(isinstance(entry, Mapping) and "ema" in entry for entry in entries)


def _torch_form(tree: Tree) -> Tree:
    """The flattened form of distributed checkpoints as state and param groups by name."""
    if "param_groups" in tree:
        return tree
    state: Tree = {}
    groups: Tree = {}
    for key, value in tree.items():
        kind, _, rest = key.partition(".")
        name, _, option = rest.rpartition(".")
        (state if kind == "state" else groups).setdefault(name, {})[option] = value
    return {"state": state, "param_groups": [{**g, "params": [n]} for n, g in groups.items()]}


def _lightning_names(tree: Tree) -> dict[str, list[list[str]]]:
    for entry in tree["callbacks"].values():
        if isinstance(entry, Mapping) and "param_names" in entry:
            return {f"optimizer_states.{i}": names for i, names in enumerate(entry["param_names"])}
    return {}
