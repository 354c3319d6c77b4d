"""Folders of weights, as ``save_pretrained`` writes them."""

import glob
import os
from collections.abc import Mapping
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)

from .._checkpoint import carry, read
from .._engines.quantized import write_
from .._engines.sharding import is_sharded, local, part_for
from .._shadow import names
from .._shadow.shadow_set import no_autograd
from .._shadow.store import read_
from .._warnings import warn
from ..optimizer import EMAOptimizer


def ema_folder(model: Any, checkpoint: str) -> str:
    """Where the EMA weights of a checkpoint are.

    An adapter lies one level deeper: on a resume the Trainer takes every folder in a checkpoint
    that holds adapter weights for one more adapter of the model, and loads it.
    """
    folder = os.path.join(checkpoint, "ema")
    return os.path.join(folder, "adapter") if hasattr(model, "peft_config") else folder


def is_there(checkpoint: str) -> bool:
    """Whether a checkpoint was written; warn where it was not."""
    if not os.path.isdir(checkpoint):
        warn(f"there is no {checkpoint} to write the EMA weights into; they are in none")
        return False
    return True


def save_model(model: Any, folder: str, writes: bool = True) -> None:
    """Write the weights that are in the model now, so that ``from_pretrained`` finds them.

    Args:
        model: The model; where it is sharded, every rank calls this.
        folder: Where to write.
        writes: Whether this rank is the one that writes.
    """
    whole = _whole_state(model) if sharded(model) else None
    if not writes:
        return
    if hasattr(model, "save_pretrained"):
        model.save_pretrained(folder, **({} if whole is None else {"state_dict": whole}))
        return
    os.makedirs(folder, exist_ok=True)
    file = os.path.join(folder, "model.safetensors")
    if whole is None:
        safetensors.torch.save_model(model, file)
    else:
        safetensors.torch.save_file(whole, file)


def sharded(model: Any) -> bool:
    """Whether the weights of a model are spread over ranks."""
    return any(map(is_sharded, names.named_parameters(model).values()))


def _whole_state(model: Any) -> dict[str, Any]:
    """The whole weights on the first rank's CPU, gathered one at a time; empty on the others."""
    options = StateDictOptions(
        full_state_dict=True, cpu_offload=True, ignore_frozen_params=hasattr(model, "peft_config")
    )
    return get_model_state_dict(model, options=options)


def load_best(optimizer: EMAOptimizer, model: Any, checkpoint: str) -> None:
    """Put the EMA weights of a checkpoint into the model; the optimizer keeps its own EMA."""
    file = os.path.join(checkpoint, "optimizer.pt")
    if not os.path.isfile(file):
        _load_saved(model, ema_folder(model, checkpoint))
        return
    saved = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    loaded = read.read(optimizer._ema, optimizer.param_groups, carry.uncarry(saved))
    with no_autograd():
        read_(loaded.slots, list(loaded.slots.values()))


def _load_saved(model: Any, folder: str) -> None:
    """Load what ``save_model`` has written: for checkpoints without an optimizer."""
    if hasattr(model, "peft_config"):
        for name in model.active_adapters:
            own = os.path.join(folder, name)  # where save_pretrained puts all but "default"
            model.load_adapter(own if os.path.isdir(own) else folder, name)
        return
    files = glob.glob(os.path.join(glob.escape(folder), "*.safetensors"))
    if not files:
        raise RuntimeError(
            f"{folder} must hold the EMA weights of the best checkpoint, it does not: with "
            "save_only_model=True leave save_ema=True, or set load_best_model_at_end=False"
        )
    for file in files:
        _load_file(model, file)


def _load_file(model: Any, file: str) -> None:
    if not sharded(model):
        model.load_state_dict(safetensors.torch.load_file(file), strict=False)
        return
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=False)
    first = torch.distributed.get_rank() == 0
    state: dict[str, Any] = dict(safetensors.torch.load_file(file)) if first else {}
    set_model_state_dict(model, state, options=options)


def members(model: nn.Module) -> list[Tensor]:
    """The parameters of a model, sharded ones as they are sharded."""
    return list(names.named_parameters(model).values())


def copy_state(state: Mapping[str, Tensor], named: Mapping[str, Tensor]) -> None:
    """Copy values by name into parameters, each rank its own part."""
    with no_autograd():
        for name, value in state.items():
            write_(local(named[name]), part_for(named[name], value))
