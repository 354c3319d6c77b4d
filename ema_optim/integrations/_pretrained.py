"""Folders of weights, as ``save_pretrained`` writes them."""

import glob
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
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
from .._door import Door
from .._engines.sharding import is_sharded
from .._shadow import names
from .._shadow.holdings import no_autograd
from .._shadow.slots import read_
from .._version import __version__
from .._warnings import log, warn
from ..optimizer import EMAOptimizer
from ._buffers import buffers_of
from ._trainer_optimizer import step_of


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


@contextmanager
def written_aside(checkpoint: str, writes: bool = True) -> Iterator[str]:
    """A folder to write into in place of ``checkpoint``, whose ``ema`` is then moved there whole.

    A save that is killed so leaves no ``checkpoint/ema`` in which files are missing. Only the rank
    that writes touches the disk.
    """
    aside, there = os.path.join(checkpoint, "ema.tmp"), os.path.join(checkpoint, "ema")
    if writes:
        shutil.rmtree(aside, ignore_errors=True)  # of a save that was killed
    yield aside
    if writes:
        shutil.rmtree(there, ignore_errors=True)
        os.replace(os.path.join(aside, "ema"), there)
        shutil.rmtree(aside)


def metadata(optimizer: Door, step: int) -> dict[str, str]:
    """What the header of a file says of the EMA weights in it, as ``export_ema`` has it."""
    shadow = optimizer._ema
    told = {"ema_step": shadow.step, "ema_decay": shadow.decay_in_force(), "ema_global_step": step}
    return {"ema_optim": __version__, **{name: str(value) for name, value in told.items()}}


@contextmanager
def marked(header: Mapping[str, str]) -> Iterator[None]:
    """Add to the header of every safetensors file that is written inside.

    The models' and PEFT's own ``save_pretrained`` write the files, in shards and under names that
    they alone know, and take no metadata; a header that is changed later moves all bytes behind it.
    """
    library: Any = safetensors.torch
    written = library.serialize_file

    def serialize_file(tensors: Any, filename: Any, metadata: Any = None) -> None:
        written(tensors, filename, metadata={**(metadata or {}), **header})

    library.serialize_file = serialize_file
    try:
        yield
    finally:
        library.serialize_file = written


def save_model(model: Any, folder: str, header: Mapping[str, str], writes: bool = True) -> None:
    """Write the weights that are in the model now, so that ``from_pretrained`` finds them.

    Args:
        model: The model; where it is sharded, every rank calls this.
        folder: Where to write.
        header: What the files say of their weights.
        writes: Whether this rank is the one that writes.
    """
    whole = _whole_state(model) if sharded(model) else None
    if writes:
        with marked(header):
            _write(model, folder, whole)
        _add_to_card(os.path.join(folder, "README.md"), header)
        log("EMA weights of step %s in %s", header["ema_global_step"], folder)


def _add_to_card(file: str, header: Mapping[str, str]) -> None:
    told = "".join(f"- {name}: {value}\n" for name, value in header.items())
    with open(file, "a", encoding="utf-8") as card:  # PEFT has begun one
        card.write(
            "\n# EMA weights\n\nThe weights in this folder are an exponential moving average over "
            f"the training, kept by ema_optim; `from_pretrained` loads them.\n\n{told}"
        )


def _write(model: Any, folder: str, whole: dict[str, Any] | None) -> None:
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
    return _is_zero3(model) or any(map(is_sharded, names.named_parameters(model).values()))


def _is_zero3(model: Any) -> bool:
    return any(hasattr(param, "ds_id") for param in model.parameters())


def _whole_state(model: Any) -> dict[str, Any]:
    """The whole weights on the first rank's CPU, gathered one at a time; empty on the others."""
    if _is_zero3(model):
        from ._trainer_deepspeed import whole_state

        return whole_state(model)
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
    loaded = read.read(optimizer._ema, carry.uncarry(saved))
    step = _step_of(checkpoint)
    if step_of(saved["param_groups"]) not in (None, step) or loaded.cold:
        warn(
            f"{checkpoint} holds no EMA of step {step}, since a run without the callback has "
            "written it: the model keeps its training weights"
        )
        return
    with no_autograd():
        read_(loaded.slots, list(loaded.slots.values()))
    buffers, averaged = buffers_of([optimizer]), carry.carried_buffers(saved["param_groups"])
    if buffers is not None and averaged is not None:
        buffers.show(averaged)


def _step_of(checkpoint: str) -> int:
    """The Trainer's step at which a checkpoint was written, as it says itself."""
    with open(os.path.join(checkpoint, "trainer_state.json"), encoding="utf-8") as file:
        return int(json.load(file)["global_step"])


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
    state = {k: v for file in files for k, v in safetensors.torch.load_file(file).items()}
    if _uncovered(model, state) and hasattr(model, "from_pretrained"):
        # Some models name their weights otherwise in files: their own class knows how.
        state = _converted(model, folder)
    if uncovered := _uncovered(model, state):
        raise RuntimeError(
            f"{folder} must hold the EMA of every weight, it lacks {', '.join(uncovered)}: its "
            "save was cut short. Leave save_only_model=False, or set load_best_model_at_end=False"
        )
    _load_state(model, state)


def _uncovered(model: nn.Module, state: Mapping[str, Tensor]) -> list[str]:
    """The parameters for which a file has no weights, under none of their names."""
    covered = {p for n, p in model.named_parameters(remove_duplicate=False) if n in state}
    return [name for name, param in model.named_parameters() if param not in covered]


def _converted(model: Any, folder: str) -> dict[str, Tensor]:
    """The weights in a folder under the model's names; those that are not there are left out."""
    try:
        made, info = type(model).from_pretrained(
            folder, config=model.config, output_loading_info=True
        )
    except (OSError, ValueError):  # a shard that its index lists is not there
        return {}
    missing = set(info["missing_keys"])
    found = made.state_dict().items()  # what an index lists and no file holds stays on meta
    return {k: v for k, v in found if k not in missing and not v.is_meta}


def _load_state(model: Any, state: dict[str, Any]) -> None:
    if not sharded(model):
        model.load_state_dict(state, strict=False)
        return
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=False)
    first = torch.distributed.get_rank() == 0
    set_model_state_dict(model, state if first else {}, options=options)


def members(model: nn.Module) -> list[Tensor]:
    """The parameters of a model, sharded ones as they are sharded."""
    return list(names.named_parameters(model).values())
