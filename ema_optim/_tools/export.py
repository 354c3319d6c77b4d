"""``export_ema``: the EMA weights in a checkpoint as a safetensors file."""

from functools import partial
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor

from .._arithmetic.average import non_finite
from .._arithmetic.formats import format_of
from .._checkpoint.parts import Part
from .._checkpoint.writer import write
from .._version import __version__
from .._warnings import warn
from .entries import Entry, entries_of
from .info import facts
from .models import named
from .sources import Source, open_source

DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float64": torch.float64,
}


def export_ema(
    source: str | PathLike[str],
    output: str | PathLike[str],
    *,
    model: str | PathLike[str] | None = None,
    dtype: torch.dtype | None = None,
    key: str | None = None,
    force: bool = False,
) -> dict[str, str]:
    """Write the EMA weights in a checkpoint to a safetensors file, without the training code.

    Of several windows the first is written. One tensor is in memory at a time; no GPU and no model
    class are needed. The values are those of ``get_ema_state()``, whatever the storage format, and
    whether or not the checkpoint was taken while the EMA weights were swapped in. Files are read
    without running what is pickled in them.

    Args:
        source: A ``checkpoint-N`` folder of the Hugging Face Trainer, a file with the state dict of
            an ``EMAOptimizer`` or ``EMAModel`` in it, a Lightning ``.ckpt``, or the folder of a
            distributed checkpoint.
        output: The file to write; it appears when it is whole.
        model: A file or folder with the model's weights. Needed where the checkpoint holds the EMA
            by position (an inner optimizer that was not built from ``named_parameters()``): names
            are given by shapes and values then, and refused where these leave a doubt. Needed also
            where it was taken while swapped and the model's file is not beside it.
        dtype: Of the weights. Default None: fp32, and fp64 or complex where the EMA is that.
        key: Where the optimizer is in the file, if there are several and one is meant.
        force: Whether ``output`` may be replaced.

    Returns:
        What was written into the header: ``ema_optim`` (the package's version), ``ema_source``,
        ``ema_step`` and, where they are known, ``ema_decay`` (of several windows all of them, the
        first one first) and ``ema_global_step``.

    Raises:
        FileNotFoundError, FileExistsError: There is no ``source``, or an ``output``.
        ValueError: The file holds no EMA, cannot be read safely, is damaged, or does not say which
            name belongs to which tensor; nothing is written then.
    """
    source, output = Path(source), Path(output)
    if dtype is not None and dtype not in DTYPES.values():
        raise ValueError(f"dtype must be one of {list(DTYPES)}, got {dtype}")
    if output.exists() and not force:
        raise FileExistsError(f"{output} must not be there yet: pass force=True (--force)")
    if not output.absolute().parent.is_dir():
        raise FileNotFoundError(f"the folder of {output} must be there, got none: make it first")
    opened = open_source(source)
    entries = entries_of(opened, key)
    by_name = named(entries, opened, None if model is None else Path(model))
    parts = {name: _decoded(name, entry, dtype) for name, entry in by_name.items()}
    header = _metadata(opened, entries, key)
    write(output, parts, header)
    return header


def _decoded(name: str, entry: Entry, dtype: torch.dtype | None) -> Part:
    own = entry.main.dtype
    assert own is not None
    if dtype is None or own.is_complex:
        dtype = own if own.itemsize >= 4 else torch.float32
    return Part(entry.main.shape, dtype, partial(_load, name, entry, dtype))


def _load(name: str, entry: Entry, dtype: torch.dtype) -> Tensor:
    main, low = entry.main.load(), entry.low.load() if entry.low else None
    value = main
    if low is not None or main.dtype != dtype:
        value = torch.empty(main.shape, dtype=dtype)
        stored = format_of(main.dtype, None if low is None else low.dtype)
        stored.decode_([value], [main], [] if low is None else [low])
    if non_finite([value]):
        told = "" if non_finite([main]) else f": {dtype} is too narrow for it"
        warn(f"the EMA of {name} is not finite{told}")
    return value


def _metadata(source: Source, entries: list[Entry], key: str | None) -> dict[str, str]:
    known = facts(source, entries, key)
    wanted = ("ema_source", "ema_step", "ema_decay", "ema_global_step")
    told = {name: str(known[name]) for name in wanted if known.get(name) is not None}
    by = {} if all(entry.name for entry in entries) else {"ema_names": "from --model, by values"}
    return {"format": "pt", "ema_optim": __version__, **told, **by}
