"""Interleaved timing: within a round every row runs once, in shuffled order.

What the machine does beside us then hits all rows alike, and a ratio within one round means more
than two averages taken one after the other.
"""

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch


def nothing():
    pass


@dataclass
class Row:
    """One contender: ``run`` is timed; ``after`` puts things back and is not.

    ``scale`` is what a timing is multiplied by: 0.5 where ``run`` goes there and back.
    """

    name: str
    run: Callable[[], object]
    after: Callable[[], object] = nothing
    scale: float = 1.0


def cpu_seconds(run):
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def cuda_seconds(run):
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def host_seconds(run):
    """Until the call returns, whatever the card still has to do."""
    torch.cuda.synchronize()
    taken = cpu_seconds(run)
    torch.cuda.synchronize()
    return taken


def race(bench, name, rows):
    """Seconds of every row in every round on the model ``name``: ``{row: [seconds, ...]}``."""
    seconds = cuda_seconds if bench.device == "cuda" else cpu_seconds
    times = {row.name: [] for row in rows}
    bench.progress.set_description(name)
    gc.collect()
    gc.disable()
    try:
        for number in range(bench.calls(name)):
            for row in bench.random.sample(rows, len(rows)):
                taken = seconds(row.run) * row.scale
                row.after()
                bench.tick()
                if number >= bench.warmup:
                    times[row.name].append(taken)
    finally:
        gc.enable()
    return times


def ratios(times, base, less=0.0):
    """Median and quartiles of each row's ratio to the base, taken round by round."""
    return {
        name: quartiles([taken / one - less for taken, one in zip(row, times[base], strict=True)])
        for name, row in times.items()
    }


def quartiles(values):
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return median, low, high
