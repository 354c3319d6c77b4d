"""``EMASnapshots``: files of averages, and any window chosen after the training."""

import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ._arithmetic.average import non_finite
from ._arithmetic.synthesis import Average, Solver
from ._checkpoint.parts import CODES, Part
from ._checkpoint.snapshot_files import (
    Snapshot,
    combined,
    file_name,
    header_of,
    left_by_killed,
    snapshots_in,
)
from ._checkpoint.writer import in_order, write
from ._door import Door, NamedDoor
from ._engines.sharding import is_first_rank, is_sharded, raise_together
from ._shadow import names, pending, swap
from ._shadow.holdings import no_autograd
from ._shadow.options import whole_format
from ._shadow.shadow_set import ShadowSet
from ._warnings import log, warn
from .schedules import Decay, as_decay


class EMASnapshots:
    """A folder of EMA weights of some steps, from which other windows are made afterwards.

    ``wanted = sum of x_i * snapshot_i``, with ``sum of x_i = 1`` and the x that lack of every
    update what the wanted average lacks of it, as nearly as possible.

    One snapshot per window (with a decay of 0.999, every 1,000 steps) gives every longer window to
    about 1 % of the distance between the weights and their average, and half the window to 12 %;
    twice as many are about four times as exact. The error is told before a tensor is read. Files
    are ordinary safetensors by parameter name, deployable as they are.

    Args:
        folder: Where the files are, of one run; made when it is needed.

    Example::

        snapshots = EMASnapshots("run/snapshots")
        ...  # in the training, once per window
        snapshots.save(optimizer, model)
        ...  # afterwards
        model.load_state_dict(snapshots.synthesize(0.9998), strict=False)

    Source: after Karras et al. 2024, arXiv 2312.02696, section 3, with another metric, under which
    averages of real trainings are nearer to the wanted ones.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self._known: tuple[list[Snapshot], Solver] | None = None

    def save(
        self, ema: Door, model: nn.Module | None = None, dtype: torch.dtype | None = None
    ) -> None:
        """Write the EMA weights of this step, one file for each window; right at any time.

        A file appears when it is whole. After a load the first call removes the snapshots of steps
        later than the loaded one: they are of another course of the run. On several ranks every
        rank calls this; the first one writes, sharded weights are gathered one by one.

        Args:
            ema: An ``EMAOptimizer`` or ``EMAModel``.
            model: The model, to name the parameters of an ``EMAOptimizer``.
            dtype: Of the files: ``torch.float16`` halves them and adds about 0.14 % of the distance
                between weights and EMA at a constant learning rate, ``torch.bfloat16`` 1.2 %.
                Default None: the EMA's own.

        Raises:
            TypeError: The decay is a function that is none of the package's schedules.
            ValueError: The folder holds snapshots of another run, or a param group has an
                ``ema_decay`` of its own.
            RuntimeError: No step was counted yet; on other ranks, where the first one has failed.
        """
        shadow, model = _source(ema, model)
        _check_dtype(dtype)
        if not shadow.step:
            raise RuntimeError("save() before the first step: there is no average yet")
        spread = self._check(shadow)
        _on_first(partial(self._make_room, shadow), spread)
        _warn_of_late(shadow, model)
        for name, average in shadow.averages("EMASnapshots.save()").items():
            path = self.folder / file_name(name, average.step)
            with no_autograd():
                parts: dict[str, Part] = {}
                for beside in ema._shadows():  # a trainer's callback may average buffers too
                    parts |= _parts(beside.windows[name], model, dtype)
                _write(path, parts, header_of(name, average), spread)
            shadow.origin.files.add(str(path))

    def error(self, decay: Decay, step: int | None = None) -> float:
        """The error of ``synthesize``, told without reading a tensor.

        Args:
            decay: The average that is wanted: a float, or a schedule such as ``power_decay(0.12)``.
            step: Of which step, one that has a snapshot (default: the last).

        Returns:
            The expected distance between what is made and the true EMA, over that between the
            training weights and the true EMA: 1.0 is no better than the training weights. Right
            within a factor of two while the learning rate is constant; too low where that is
            decayed to zero, or where the window reaches back to the first steps.

        Raises:
            ValueError: As for ``synthesize``, the limit apart.
        """
        return self._solve(decay, step)[1]

    def synthesize(
        self, decay: Decay, step: int | None = None, *, max_error: float = 0.05
    ) -> dict[str, Tensor]:
        """The EMA weights that a training with ``decay`` would have had at a step.

        A kept window comes back bit for bit. Files are read tensor by tensor.

        Args:
            decay: As for ``error``.
            step: As for ``error``. Later files are not used.
            max_error: The largest told error that is accepted.

        Returns:
            Tensors by parameter name in fp32 (fp64 and complex ones as they are), ready for
            ``model.load_state_dict(strict=False)``.

        Raises:
            ValueError: The told error is above ``max_error``; there are no snapshots, or none of
                that step; a file is damaged or of another model.
        """
        parts, _ = self._parts(decay, step, max_error)
        return {name: part.load() for name, part in parts.items()}

    def __repr__(self) -> str:
        """The folder."""
        return f"{type(self).__name__}({str(self.folder)!r})"

    def _parts(
        self, decay: Decay, step: int | None, max_error: float
    ) -> tuple[dict[str, Part], tuple[Snapshot, float]]:
        """The tensors to be made, and the snapshot of the step with the told error."""
        if not max_error >= 0:
            raise ValueError(f"max_error must be at least 0, got {max_error}: 0.05 is the default")
        used, told = self._solve(decay, step)
        if not told <= max_error:
            raise ValueError(
                f"max_error must be at least {told * 1.005:.3g} for {decay} at step "
                f"{used[-1][0].average.step}, the error told in advance, got {max_error}: choose a "
                "longer window or one nearer to those kept, save snapshots more often (once per "
                "window), or pass a larger max_error"
            )
        kept = [(snapshot, x) for snapshot, x in used if x]
        return combined(kept), (used[-1][0], told)

    def _solve(self, decay: Decay, step: int | None) -> tuple[list[tuple[Snapshot, float]], float]:
        """The snapshots up to a step with their coefficients, and the told error."""
        decay, found = as_decay(decay), snapshots_in(self.folder)
        if not found:
            raise ValueError(f"{self.folder} must hold snapshots, got none: save() makes them")
        steps = sorted({snapshot.average.step for snapshot in found})
        step = steps[-1] if step is None else step
        if step not in steps:
            raise ValueError(f"step must be that of a snapshot, one of {steps}, got {step}")
        if self._known is None or self._known[0] != found:
            self._known = found, Solver([snapshot.average for snapshot in found])
        last = next(one for one in reversed(found) if one.average.step == step)
        coefficients, told = self._known[1].solve(last.average._replace(decay=decay))
        pairs = zip(found, coefficients, strict=True)
        return [(one, x) for one, x in pairs if one.average.step <= step], told

    def _check(self, shadow: ShadowSet) -> bool:
        """Raise as ``save`` does; return whether other ranks wait for what the first one does."""
        averages = shadow.averages("EMASnapshots.save()")
        for name, average in averages.items():
            header_of(name, average)
        spread = any(map(is_sharded, shadow.members()))
        _on_first(partial(self._refuse_another_run, shadow, averages), spread)
        return spread

    def _refuse_another_run(self, shadow: ShadowSet, averages: Mapping[str, Average]) -> None:
        later, before = self._others(shadow)
        strange = [one for one in before if not _is_of(one, averages)]
        for one in strange or (later if shadow.origin.step is None else ()):
            raise ValueError(
                f"{self.folder} must be empty or this run's, got {one.path.name} with decay "
                f"{one.average.decay}: give every run its own folder"
            )

    def _make_room(self, shadow: ShadowSet) -> None:
        """Make the folder, and remove what another course of this run has left in it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for one in self._others(shadow)[0]:
            log("%s is of a later step than the loaded one: removed", one.path)
            one.path.unlink()
        for path in left_by_killed(self.folder):
            path.unlink()

    def _others(self, shadow: ShadowSet) -> tuple[list[Snapshot], list[Snapshot]]:
        """What was there before the run began or was loaded: of later steps, and the others."""
        own, begun = shadow.origin.files, shadow.origin.step or 0
        others = [one for one in snapshots_in(self.folder) if str(one.path) not in own]
        later = [one for one in others if one.average.step > begun]
        return later, [one for one in others if one.average.step <= begun]


def _is_of(snapshot: Snapshot, averages: Mapping[str, Average]) -> bool:
    """Whether a snapshot may be an earlier one of these averages; of other names it may."""
    own = averages.get(snapshot.name, snapshot.average)
    return own._replace(step=0) == snapshot.average._replace(step=0)


def _source(ema: Door, model: nn.Module | None) -> tuple[ShadowSet, nn.Module]:
    if isinstance(ema, NamedDoor) and model is None:
        raise TypeError(
            "model must be given with an EMAOptimizer, got None: save(optimizer, model)"
        )
    own = model if isinstance(ema, NamedDoor) else getattr(ema, "model", None)
    if not isinstance(ema, Door) or not isinstance(own, nn.Module):
        raise TypeError(f"ema must be an EMAOptimizer with its model, or an EMAModel, got {ema!r}")
    swap.recover(ema._ema)
    pending.check_model(ema._ema)
    ema._look()
    return ema._ema, own


def _warn_of_late(shadow: ShadowSet, model: nn.Module) -> None:
    """Warn once of parameters of which a header will not be true: a schedule counts their steps."""
    if not any(callable(window.decay) for window in shadow.windows.values()):
        return
    found = {
        name: shadow.find(param) for param, name in names.unique_members(shadow, model).items()
    }
    late = [name for name, slot in found.items() if slot and shadow.ema_step(slot) < shadow.step]
    if late:
        shadow.warned.once(
            "late",
            f"the EMA of {', '.join(late[:3])}{' and others' if late[3:] else ''} has counted "
            f"fewer steps than the snapshot's {shadow.step}, and its schedule goes by them: the "
            "error of other windows is not told right for it. A constant decay has no such counter",
        )


def _check_dtype(dtype: object) -> None:
    allowed = [None, *(dtype for dtype in CODES.values() if not dtype.is_complex)]
    if dtype not in allowed:
        raise ValueError(f"dtype must be one of {allowed}, got {dtype!r}: None is the EMA's own")


def _parts(shadow: ShadowSet, model: nn.Module, dtype: torch.dtype | None) -> dict[str, Part]:
    found = {}
    for param, name in names.unique_members(shadow, model).items():
        own = whole_format(param.dtype, shadow.dtype).main
        kept = own if dtype is None or own.is_complex else dtype
        found[name] = Part(param.shape, kept, partial(_load, shadow, param, name, kept))
    return found


def _load(shadow: ShadowSet, param: Tensor, name: str, dtype: torch.dtype) -> Tensor:
    value: Any = names.whole(shadow, param)
    value = value.full_tensor() if is_sharded(value) else value
    value = value.to("cpu", dtype)
    if is_first_rank() and non_finite([value]):
        warn(f"the EMA of {name} is not finite in {dtype}")
    return value  # type: ignore[no-any-return]


def _on_first(action: Callable[[], None], spread: bool) -> None:
    """Do something on the first rank; what fails there fails on all, where they wait for it."""
    failed = None
    try:
        if is_first_rank():
            action()
    except Exception as error:
        failed = error
    raise_together(failed, spread)


def _write(path: Path, parts: Mapping[str, Part], header: Mapping[str, str], spread: bool) -> None:
    left = in_order(parts)

    def load(name: str) -> Tensor:
        left.remove(name)
        return parts[name].load()

    once = {name: Part(p.shape, p.dtype, partial(load, name)) for name, p in parts.items()}
    try:
        _on_first(lambda: write(path, once, header, quiet=True), spread=False)
    except Exception as error:
        failed: Exception | None = error
    else:
        failed = None
    # To gather a tensor takes all ranks, those that write nothing and one that has failed too.
    for name in left if spread else ():
        parts[name].load()
    raise_together(failed, spread)
