"""The EMA in host memory: all that is known of streams, events, pinned memory and the worker.

    weights (device) --copy, side stream--> staging (pinned) --update, worker thread--> EMA (host)

The training goes on meanwhile. Five waits keep it, the copy and the update apart:

    copy waits for step         the copy is of what the inner step has written
    write waits for copy        nobody writes to weights that are being copied
    worker waits for copy       the update is of what has arrived
    staging waits for worker    no copy overwrites what an update still reads
    read waits for worker       whoever reads the EMA finds every update made

In the first two the device waits, in the third the worker, in the last two the host.
"""

from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from .._arithmetic.formats import Format
from .._arithmetic.scratch import batches_of, carve, columns
from .quantized import is_quantized
from .sharding import PLAIN, local, with_part

Tensors = list[Tensor]

_version = attrgetter("_version")


class Accelerator:
    """The streams and events of the accelerator that torch knows, and a worker thread."""

    def __init__(self) -> None:
        self._sides: dict[torch.device, torch.Stream] = {}
        self._worker: ThreadPoolExecutor | None = None

    def serves(self, tensor: Tensor) -> bool:
        """Whether a tensor lies in an accelerator's memory."""
        return tensor.device.type not in ("cpu", "meta")

    def is_pinned(self, tensor: Tensor) -> bool:
        """Whether a tensor lies in pinned host memory."""
        return tensor.device.type == "cpu" and tensor.is_pinned()

    def main(self, device: torch.device) -> Any:
        """The stream that the training uses now."""
        return torch.accelerator.current_stream(device)

    def side(self, device: torch.device) -> Any:
        """The stream for copies."""
        if device not in self._sides:
            self._sides[device] = torch.Stream(device)
        return self._sides[device]

    def event(self, stream: Any) -> Any:
        """An event at the end of what is on a stream now."""
        return stream.record_event()

    def copy_(self, targets: Tensors, sources: Tensors, stream: Any) -> None:
        """Copy on a stream, without waiting for it."""
        before = torch.accelerator.current_stream()
        torch.accelerator.set_stream(stream)
        try:
            torch._foreach_copy_(targets, sources, non_blocking=True)
        finally:
            torch.accelerator.set_stream(before)

    def held(self, weights: Tensors) -> Tensors:
        """References that keep the memory of weights from being given to others."""
        return list(map(Tensor.detach, weights))

    def versions(self, held: Tensors) -> list[int]:
        """What torch has counted of writes to each of them."""
        return list(map(_version, held))

    def start(self, job: Callable[[], None]) -> Any:
        """Have the worker thread do a job after those that it has."""
        if self._worker is None:
            self._worker = ThreadPoolExecutor(1, thread_name_prefix="ema")
        return self._worker.submit(job)


@dataclass(eq=False)
class _Copy:
    """A copy that a write to the weights has to wait for.

    Attributes:
        copied: The event at its end.
        held: The weights, and their ``versions`` when it was queued.
        arrived: Whether it was seen to have ended before anybody wrote to them.
    """

    copied: Any
    held: Any
    versions: list[int]
    arrived: bool = False


class Offload:
    """Averages on the host what lies on an accelerator, while the training goes on.

    Args:
        accelerator: Where streams, events and the worker come from; None where nothing is to be
            averaged on the host.

    Attributes:
        at_once: Whether writes are to wait for the copies of a step as soon as it has ended.
        jobs: What the worker has still to do, or has done since somebody looked.
    """

    def __init__(self, accelerator: Any = None) -> None:
        self._accelerator = accelerator
        self.at_once = True
        self._copies: list[tuple[torch.device, _Copy]] = []
        self.jobs: list[Future[None]] = []
        self._failure: RuntimeError | None = None

    @classmethod
    def to(cls, device: str | None) -> "Offload":
        """For EMAs that are to be on a device; on that of their weights, if None."""
        return cls(None if device is None else Accelerator())

    def __reduce__(self) -> Any:
        return _offload_of, (None if self._accelerator is None else type(self._accelerator),)

    def serves(self, param: Tensor) -> bool:
        """Whether the EMA of a parameter is to be in host memory, unlike the parameter."""
        return self._accelerator is not None and self._accelerator.serves(param)

    def check(self, params: Iterable[Tensor]) -> None:
        """Raise TypeError for parameters whose EMA cannot be averaged in host memory."""
        if self._accelerator is None:
            return
        for param in params:
            if self._accelerator.serves(param):
                _check_kind(param)
            elif not isinstance(param, nn.Parameter) and self._accelerator.is_pinned(param):
                raise TypeError(
                    "device='cpu' must be given for an optimizer of the model's own parameters, "
                    "got one that is offloaded itself: its param groups hold copies in pinned host "
                    "memory, of which a swap would not reach the model. Use EMAModel(model, "
                    "device='cpu') beside it"
                )

    def staging(self) -> "Staging":
        """Room for the weights of a list of tensors, to be filled by ``Staging.add``."""
        return Staging(self)

    def before_write(self) -> None:
        """Have what is written to the weights from now on wait for the copies; the host does not.

        Raises:
            RuntimeError: Somebody has written to them before; or the worker has failed.
        """
        if self._accelerator is None:
            return
        self.hold_writes()
        self._look_at_jobs(lambda job: job.done())
        if self._failure is not None:
            raise self._failure

    def hold_writes(self) -> None:
        """As ``before_write``, its errors being kept for the next call."""
        for device, copy in self._copies:
            # In this order: it may arrive in between.
            now, arrived = self._accelerator.versions(copy.held), copy.arrived
            if not arrived and now != copy.versions:
                self._failure = self._failure or RuntimeError(_WRITTEN)
            self._write_waits_for_copy(device, copy)
        self._copies = []

    def join(self) -> None:
        """Wait until every update is made. Its errors are kept for ``settle``."""
        self._read_waits_for_worker()

    def settle(self) -> None:
        """Have everything ended, before the EMA is read or the weights are written to.

        Raises:
            RuntimeError: As ``before_write``.
        """
        if self._accelerator is None:
            return
        self.join()
        self.before_write()

    def forget(self) -> None:
        """Have everything ended and its errors forgotten: the EMA begins anew."""
        if self._accelerator is not None:
            self.join()
            self._copies, self._failure = [], None

    def _look_at_jobs(self, which: Callable[[Any], bool]) -> None:
        for job in filter(which, list(self.jobs)):
            if (error := job.exception()) is not None and self._failure is None:
                self._failure = RuntimeError(f"{_FAILED} ({type(error).__name__}: {error})")
                self._failure.__cause__ = error
            with suppress(ValueError):  # another thread has looked
                self.jobs.remove(job)

    def _copy(self, staging: "Staging", weights: Tensors) -> _Copy:
        accelerator, device = self._accelerator, weights[0].device
        self._staging_waits_for_worker(staging)
        side = accelerator.side(device)
        self._copy_waits_for_step(device, side)
        held = accelerator.held(weights)
        versions = accelerator.versions(held)
        accelerator.copy_(staging.tensors, held, side)
        return _Copy(accelerator.event(side), held, versions)

    def _start(self, device: torch.device, copy: _Copy, update: Callable[[], None]) -> Any:
        self._copies.append((device, copy))
        job = self._accelerator.start(partial(self._work, copy, update))
        self.jobs.append(job)
        return job

    def _work(self, copy: _Copy, update: Callable[[], None]) -> None:
        self._worker_waits_for_copy(copy)
        copy.arrived = self._accelerator.versions(copy.held) == copy.versions
        with torch.no_grad():
            update()

    def _copy_waits_for_step(self, device: torch.device, side: Any) -> None:
        side.wait_event(self._accelerator.event(self._accelerator.main(device)))

    def _write_waits_for_copy(self, device: torch.device, copy: _Copy) -> None:
        self._accelerator.main(device).wait_event(copy.copied)

    def _worker_waits_for_copy(self, copy: _Copy) -> None:
        copy.copied.synchronize()

    def _staging_waits_for_worker(self, staging: "Staging") -> None:
        if staging.job is not None:
            staging.job.exception()  # kept for settle()

    def _read_waits_for_worker(self) -> None:
        self._look_at_jobs(lambda job: True)


def _offload_of(kind: Any) -> Offload:
    return Offload(None if kind is None else kind())


class Staging:
    """Pinned memory for the weights of EMA tensors that are averaged together.

    Attributes:
        tensors: One for each, of the dtype of its weights.
        job: The update that reads them, or has read them last.
    """

    def __init__(self, offload: Offload) -> None:
        self._offload = offload
        self.tensors: Tensors = []
        self.job: Any = None

    def add(self, tensor: Tensor) -> None:
        """Use what this rank holds of a tensor made by ``host_like``."""
        self.tensors.append(local(tensor))

    def average(self, weights: Tensors, update: Callable[[Tensors], None]) -> None:
        """Call ``update`` with a copy of the weights of this moment, at a later one."""
        copy = self._offload._copy(self, weights)
        self.job = self._offload._start(weights[0].device, copy, partial(update, self.tensors))

    def fetched(self, weights: Tensors) -> Tensors:
        """A copy of the weights of this moment, waited for; good until the next call."""
        self._offload._worker_waits_for_copy(self._offload._copy(self, weights))
        return self.tensors


def host_like(param: Tensor, dtype: torch.dtype) -> Tensor:
    """An empty tensor in host memory, pinned where that is of use, to keep values of ``param``."""
    part = local(param)
    pinned = part.device.type not in ("cpu", "meta")
    options: Any = {"dtype": dtype, "device": "cpu", "pin_memory": pinned}
    empty = torch.empty_like(part, requires_grad=False, **options)
    return empty if type(param) in PLAIN else with_part(param, empty)


def decode_across_(format: Format, targets: Tensors, mains: Tensors, lows: Tensors) -> None:
    """As ``Format.decode_``, from host memory into an accelerator's, through a small buffer."""
    rows = zip(mains, targets, *([lows] if lows else []), strict=True)
    buffer: Tensor | None = None
    for batch in batches_of(rows):
        mains_, targets_, *lows_ = columns(batch)
        size = sum(map(Tensor.numel, mains_))
        if buffer is None or len(buffer) < size:
            options: Any = {"device": "cpu", "pin_memory": targets_[0].device.type != "cpu"}
            buffer = torch.empty(size, dtype=targets_[0].dtype, **options)
        values = carve(buffer, mains_)
        format.decode_(values, mains_, *(lows_ or [[]]))
        torch._foreach_copy_(targets_, values)


def _check_kind(param: Tensor) -> None:
    kind = str(param.dtype) if param.is_complex() else str(param.layout)
    quantized = type(param) not in PLAIN and is_quantized(param)
    if quantized or param.is_complex() or param.layout != torch.strided:
        kind = type(param).__name__ if quantized else kind
        raise TypeError(
            "device='cpu' takes dense, real, unquantized parameters, got one of "
            f"{kind}: give its group 'ema_enabled': False, or leave device out (the EMA then lies "
            "where the weights lie)"
        )


_WRITTEN = (
    "weights were written to between two steps, while the copy for their EMA in host memory was "
    "under way: the EMA may hold a part of either. Write before optimizer.step(), or use "
    "update_every=1 (the device then waits for the copy), or leave device out. This EMA is good "
    "again after load_state_dict() or reset()"
)
_FAILED = (
    "the update of the EMA in host memory has failed, in part or whole: resume from a checkpoint, "
    "or call reset() to begin anew"
)
