"""Folders of weights, as ``save_pretrained`` writes them."""

import glob
import os
from typing import Any

import safetensors.torch
import torch

from .. import _carry, _restore
from .._shadow import no_autograd
from ..optimizer import EMAOptimizer


def ema_folder(model: Any, checkpoint: str) -> str:
    """Where the EMA weights of a checkpoint are.

    An adapter lies one level deeper: on a resume the Trainer takes every folder in a checkpoint
    that holds adapter weights for one more adapter of the model, and loads it.
    """
    folder = os.path.join(checkpoint, "ema")
    return os.path.join(folder, "adapter") if hasattr(model, "peft_config") else folder


def save_model(model: Any, folder: str) -> None:
    """Write the weights that are in the model now, so that ``from_pretrained`` finds them."""
    if hasattr(model, "save_pretrained"):
        model.save_pretrained(folder)
        return
    os.makedirs(folder, exist_ok=True)
    safetensors.torch.save_model(model, os.path.join(folder, "model.safetensors"))


def load_best(optimizer: EMAOptimizer, model: Any, checkpoint: str) -> None:
    """Put the EMA weights of a checkpoint into the model; the optimizer keeps its own EMA."""
    file = os.path.join(checkpoint, "optimizer.pt")
    if not os.path.isfile(file):
        _load_saved(model, ema_folder(model, checkpoint))
        return
    saved = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    loaded = _restore.read(optimizer._ema, optimizer.param_groups, _carry.uncarry(saved))
    with no_autograd():
        for param, slot in loaded.slots.items():
            param.detach().copy_(slot.ema)


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
        model.load_state_dict(safetensors.torch.load_file(file), strict=False)
