"""What only a GPU shows: the time of the card and of the host, kernels, waits, memory."""

from contextlib import contextmanager
from dataclasses import dataclass

import report
import table_mixed
import torch
from averages import OURS, UPDATES, Average, emas_of
from harness import DECAY, primed
from shapes import describe
from table_step import INNERS, inner_with_state, wrapped
from table_swap import FORGETFUL, SWAPS, there_and_back
from timing import cuda_seconds, host_seconds, nothing, quartiles
from torch.profiler import ProfilerActivity, profile

from ema_optim import EMAOptimizer
from ema_optim._arithmetic import scratch

TEXT = (
    "Of one call: median of the time on the card and of the time until it returns on the host; the "
    "bytes that must be moved, in % of the bandwidth of a copy in the same run; device operations "
    "(kernels and copies); host synchronisations; peak extra memory."
)
TEXT_SIZES = (
    "The same sizes of scratch for every kind: time on the card / on the host. `WIDE` and `NARROW` "
    "of `_arithmetic/scratch.py` are the choice."
)
SYNCHRONISATIONS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
POWERS = (18, 20, 22, 24, 26)
# Bytes of an EMA element in each format.
FORMATS = {None: 4, "float32_compensated": 6, "float24": 3, torch.bfloat16: 2}


def run(bench):
    if bench.device != "cuda":
        bench.note("gpu: left out, needs --device cuda")
        return
    card = Card(bench, _copy_bandwidth(bench))
    bench.note(f"copy bandwidth {card.copy / 1e9:,.0f} GB/s")
    for name in bench.models:
        title = describe(name, bench.quick)
        for kind, measured in (
            ("update", _updates(card, name, torch.float32, UPDATES)),
            ("update of bf16 weights", _updates(card, name, torch.bfloat16, _mixed())),
            ("update by format, bf16 weights", _formats(card, name)),
            ("swap in and back", _swaps(card, name)),
            ("step", _steps(card, name)),
        ):
            yield report.table(f"On the GPU: {kind}, {title}", TEXT, *_rows(kind, measured))
    yield _sizes(card, bench.models[-1])


@dataclass
class Card:
    """Measures calls on the card.

    ``copy`` is the bandwidth of a copy in bytes a second.
    """

    bench: object
    copy: float

    def measure(self, name, run, size=0):
        """All that is told of one call, which has to move ``size`` bytes."""
        seconds, host = self.times(name, run)
        operations, syncs = _count(run)
        return {
            "card": report.milliseconds(seconds),
            "host": report.milliseconds(host),
            "bandwidth": f"{100 * size / seconds / self.copy:.0f} %" if size else "",
            "operations": operations,
            "waits": syncs,
            "extra memory": report.mib(self.bench.peak(run)),
        }

    def times(self, name, run):
        """Median seconds on the card, and on the host until the call returns."""
        calls, warmup = self.bench.calls(name), self.bench.warmup
        kinds = (cuda_seconds, host_seconds)
        return (quartiles([kind(run) for _ in range(calls)][warmup:])[0] for kind in kinds)


def _updates(card, name, dtype, factories, bytes_of_ema=lambda title: 4):
    model, rows = card.bench.model(name, dtype=dtype), {}
    elements = sum(param.numel() for param in model)
    for title, factory in factories.items():
        size = elements * (dtype.itemsize + 2 * bytes_of_ema(title))
        # One at a time: the memory of the card is measured.
        with primed(card.bench, {title: factory}, model, DECAY) as averages:
            for average in averages.values():
                rows[title] = card.measure(name, average.update, size)
                average = None
    return rows


def _mixed():
    return {row: make for row, make in table_mixed.FACTORIES.items() if row != table_mixed.BASE}


def _formats(card, name):
    factories = {str(dtype): _in_format(dtype) for dtype in FORMATS}
    widths = {str(dtype): width for dtype, width in FORMATS.items()}
    return _updates(card, name, torch.bfloat16, factories, widths.get)


def _in_format(dtype):
    def make(model, decay):
        inner = torch.optim.SGD(model.parameters(), lr=1e-3)
        shadow = (optimizer := EMAOptimizer(inner, decay, dtype=dtype))._ema
        return Average(
            lambda: shadow.finish_step(shadow.begin_step()),
            lambda: emas_of(optimizer, model),
            optimizer.eval,
            optimizer.train,
        )

    return make


def _swaps(card, name):
    rows = {}
    narrow = {f"{OURS}, bf16 weights": SWAPS[OURS]}
    for dtype, factories in ((torch.float32, SWAPS), (torch.bfloat16, narrow)):
        model = card.bench.model(name, dtype=dtype)
        for title, factory in factories.items():
            with primed(card.bench, {title: factory}, model, FORGETFUL) as averages:
                for average in averages.values():
                    rows[title] = card.measure(name, there_and_back(average))
                    average = None
    return rows


def _steps(card, name):
    rows, model = {}, card.bench.model(name)
    for title, make in INNERS.items():
        inner = inner_with_state(model, make)
        optimizer = wrapped(inner, model, DECAY)
        optimizer.update()
        rows[title] = card.measure(name, inner.step)
        rows[f"{title}, {OURS}"] = card.measure(name, optimizer.update)
    return rows


def _sizes(card, name):
    rows = {}
    for power in POWERS:
        with _scratch_of(2**power):
            rows[f"2**{power}"] = {
                "bf16 weights": _both(card, name, torch.bfloat16, None),
                "float24 of bf16 weights": _both(card, name, torch.bfloat16, "float24"),
                "swap in and back, fp32": _both(card, name, torch.float32, None, swap=True),
            }
    title = f"On the GPU: elements of the scratch, {describe(name, card.bench.quick)}"
    return report.table(title, TEXT_SIZES, *_rows("elements", rows))


def _both(card, name, dtype, ema_dtype, swap=False):
    model, factory = card.bench.model(name, dtype=dtype), _in_format(ema_dtype)
    with primed(card.bench, {"": factory}, model, FORGETFUL) as averages:
        run = there_and_back(averages[""]) if swap else averages[""].update
        cells = map(report.milliseconds, card.times(name, run))
        return " / ".join(cells)


@contextmanager
def _scratch_of(size):
    kept = scratch.WIDE, scratch.NARROW
    try:
        scratch.WIDE = scratch.NARROW = size
        yield
    finally:
        scratch.WIDE, scratch.NARROW = kept


def _rows(first, measured):
    columns = {}
    for row, cells in measured.items():
        for column, cell in cells.items():
            columns.setdefault(column, {})[row] = cell
    return report.by_row(first, columns)


def _copy_bandwidth(bench):
    source, target = (torch.empty(2**20 if bench.quick else 2**28, device="cuda") for _ in range(2))
    times = [cuda_seconds(lambda: target.copy_(source)) for _ in range(20)]
    return 2 * source.nbytes / quartiles(times[5:])[0]


def _count(run):
    operations, syncs = _profiled(run)
    own = _profiled(nothing)[1]  # the profiler synchronises at its end
    return operations, syncs - own


def _profiled(run):
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        run()
    events = profiler.events()
    operations = sum(event.device_type == torch.autograd.DeviceType.CUDA for event in events)
    return operations, sum(event.name in SYNCHRONISATIONS for event in events)
