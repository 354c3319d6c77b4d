"""From a folder of snapshots to the EMA weights of any window, and to what its error would be."""

from collections.abc import Iterator
from pathlib import Path

from .._arithmetic.laws import law_of, law_text
from .._checkpoint.snapshot_files import snapshots_in
from .._checkpoint.writer import write
from .._version import __version__
from ..schedules import Decay, power_decay
from ..snapshots import EMASnapshots

_WIDTHS = (0.02, 0.03, 0.04, 0.05, 0.06, 0.075, 0.09, 0.1, 0.12, 0.15, 0.175, 0.2, 0.225, 0.25)


def synthesize(
    folder: Path,
    output: Path,
    decay: Decay,
    step: int | None = None,
    max_error: float = 0.05,
    force: bool = False,
) -> dict[str, str]:
    """Write what ``EMASnapshots.synthesize`` returns to a safetensors file, tensor by tensor.

    Args:
        folder: The snapshots.
        output: The file to write; it appears when it is whole.
        decay: As ``EMASnapshots.synthesize`` takes it, like the next two.
        step: Of which step.
        max_error: The largest told error that is accepted.
        force: Whether ``output`` may be replaced.

    Returns:
        What was written into the header.

    Raises:
        FileNotFoundError, FileExistsError: There is no ``folder``, or an ``output``.
        ValueError: As for ``EMASnapshots.synthesize``.
    """
    _check_there(folder)
    if output.exists() and not force:
        raise FileExistsError(f"{output} must not be there yet: pass --force to replace it")
    parts, (last, told) = EMASnapshots(folder)._parts(decay, step, max_error)
    header = {
        "ema_optim": __version__,
        "ema_source": str(folder),
        "ema_step": str(last.average.step),
        "ema_decay": law_text(law_of(decay)),
        "ema_told_error": f"{told:.3g}",
    }
    write(output, parts, {"format": "pt", **header})
    return header


def table(folder: Path, step: int | None = None) -> Iterator[str]:
    """Lines: the snapshots in a folder, and the told error of power functions at one step."""
    _check_there(folder)
    snapshots = EMASnapshots(folder)
    last = snapshots._solve(0.0, step)[0][-1][0].average.step
    yield f"{'snapshot':<32} {'step':>10}  decay"
    for one in snapshots_in(folder):
        yield f"{one.path.name:<32} {one.average.step:>10}  {one.average.decay}"
    yield ""
    yield f"{'sigma_rel':<10} told error at step {last}: 0.05 is 5 % of the way to the weights"
    for width in _WIDTHS:
        yield f"{width:<10} {snapshots.error(power_decay(width), step):.2g}"


def _check_there(folder: Path) -> None:
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} must be a folder with snapshots, got none")
