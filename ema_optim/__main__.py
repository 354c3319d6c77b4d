"""``python -m ema_optim``: versions, and what can be done with the files of a training."""

import argparse
import platform
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from ._tools.export import DTYPES, export_ema
from ._tools.info import info
from ._version import __version__
from .schedules import as_decay, power_decay

_PACKAGES = (
    "transformers",
    "accelerate",
    "peft",
    "lightning",
    "pytorch-lightning",
    "deepspeed",
    "diffusers",
    "torchao",
    "safetensors",
    "tqdm",
    "matplotlib",
    "tensorboard",
)
_DESCRIPTION = "From the files of a training to EMA weights, facts and curves. Alone: versions."
_KINDS = "checkpoint-N of the Trainer, a .pt or .ckpt file, or a distributed checkpoint's folder"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        The exit code: 2 for what the user can mend, told in one line.
    """
    parser = _parser()
    args = parser.parse_args(arguments)
    try:
        args.run(args)
    except (ValueError, TypeError, KeyError, OSError, ImportError, RuntimeError) as error:
        told = error.args[0] if isinstance(error, KeyError) and error.args else error
        print(f"{parser.prog}: {' '.join(str(told).split())}", file=sys.stderr)
        return 2
    return 0


def _versions(args: argparse.Namespace) -> None:
    found = {"ema_optim": __version__, "python": platform.python_version()}
    found["torch"] = torch.__version__
    accelerator = (
        torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    )
    found["device"] = "CPU alone" if accelerator is None else _device(accelerator)
    found |= {name: _version(name) for name in _PACKAGES}
    width = max(map(len, found))
    print("\n".join(f"{name:<{width}}  {text}" for name, text in found.items()))
    print("\npython -m ema_optim --help lists the commands")


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _device(accelerator: torch.device) -> str:
    count = torch.accelerator.device_count()
    name = torch.cuda.get_device_name() if accelerator.type == "cuda" else accelerator.type
    return f"{count} x {name}"


def _export(args: argparse.Namespace) -> None:
    dtype = DTYPES.get(args.dtype)
    written = export_ema(
        args.source, args.output, model=args.model, dtype=dtype, key=args.key, force=args.force
    )
    print(f"{args.output}: " + ", ".join(f"{key} {value}" for key, value in written.items()))


def _info(args: argparse.Namespace) -> None:
    print("\n".join(info(args.source)))


def _synthesize(args: argparse.Namespace) -> None:
    from ._tools.synthesize import synthesize, table

    decay = args.decay if args.sigma_rel is None else power_decay(args.sigma_rel)
    if decay is None:
        print("\n".join(table(args.folder, args.step)))
        return
    if args.output is None:
        raise ValueError("a file must be given to write to, got none: pass -o ema.safetensors")
    written = synthesize(
        args.folder, args.output, as_decay(decay), args.step, args.max_error, args.force
    )
    print(f"{args.output}: " + ", ".join(f"{key} {value}" for key, value in written.items()))


def _plot(args: argparse.Namespace) -> None:
    from ._tools.plot import plot

    print(f"{args.output}: {', '.join(plot(args.source, args.output))}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m ema_optim", description=_DESCRIPTION)
    parser.set_defaults(run=_versions)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")

    export = commands.add_parser("export", help="the EMA weights in a checkpoint as safetensors")
    export.set_defaults(run=_export)
    export.add_argument("source", type=Path, metavar="SOURCE", help=_KINDS)
    export.add_argument("-o", "--output", type=Path, required=True, help="ema.safetensors, say")
    export.add_argument("--model", type=Path, help="the model's file or folder, for names")
    export.add_argument("--dtype", choices=DTYPES, help="of the weights (default: float32)")
    export.add_argument("--key", help="where the optimizer is in the file, if there are several")
    export.add_argument("--force", action="store_true", help="replace the output")

    told = commands.add_parser("info", help="what is in a checkpoint")
    told.set_defaults(run=_info)
    told.add_argument("source", type=Path, metavar="SOURCE", help=_KINDS)

    made = commands.add_parser(
        "synthesize", help="any window from a folder of snapshots; without one, the told errors"
    )
    made.set_defaults(run=_synthesize)
    made.add_argument("folder", type=Path, metavar="FOLDER", help="what EMASnapshots has saved")
    window = made.add_mutually_exclusive_group()
    window.add_argument("--sigma-rel", type=float, help="the width of a power function, 0.12 say")
    window.add_argument("--decay", type=float, help="a constant decay per optimizer step")
    made.add_argument("--step", type=int, help="of a snapshot (default: the last)")
    made.add_argument("--max-error", type=float, default=0.05, help="(default: 0.05)")
    made.add_argument("-o", "--output", type=Path, help="ema.safetensors, say")
    made.add_argument("--force", action="store_true", help="replace the output")

    plot = commands.add_parser("plot", help="curves of the training weights and of the EMA")
    plot.set_defaults(run=_plot)
    plot.add_argument("source", type=Path, help="trainer_state.json, or a TensorBoard folder")
    plot.add_argument("-o", "--output", type=Path, default=Path("curves.png"), help="a PNG")
    return parser


if __name__ == "__main__":
    sys.exit(main())
