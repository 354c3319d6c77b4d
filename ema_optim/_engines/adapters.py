"""LoRA adapters merged into their base weights, which a swap cannot see.

``merge_adapter`` adds the adapter's product to the base weights, ``unmerge_adapter`` takes it off
again. With a swap in between, one of them is of the EMA weights and the other of the training
weights, and the difference stays in the base weights.
"""

from typing import Any

from torch import nn


def merged_layers(model: nn.Module) -> list[Any]:
    """The adapter layers that are merged now; known by PEFT's attribute, without importing it."""
    return [module for module in model.modules() if getattr(module, "merged_adapters", None)]


def refuse_merged(model: nn.Module) -> None:
    """Raise RuntimeError where a swap would not reach the forward."""
    if merged_layers(model):
        raise RuntimeError(
            "a swap with merged adapters: the forward would not see the EMA weights. Call "
            "unmerge_adapter() first"
        )


def unmerge(model: nn.Module) -> bool:
    """Take merged adapters off again, with the weights they were merged with still in."""
    layers = merged_layers(model)
    for layer in layers:
        layer.unmerge()
    return bool(layers)


def raise_unmerged() -> None:
    """Say what was undone, once the training weights are back."""
    raise RuntimeError(
        "merge_adapter() inside a swap: it was undone, and the training weights are back. To "
        "deploy, merge a deepcopy of the model inside the swap"
    )
