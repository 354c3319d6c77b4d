"""What ``skip_non_finite=True`` costs: ``python tests/benchmarks/guard.py``.

An update with it (on a CPU, which looks at the weights; and in the form of an accelerator, which
never waits) beside the same update without, interleaved in one process.
"""

import argparse

import report
import torch
from harness import Bench
from shapes import describe
from timing import Row, quartiles, race

from ema_optim import EMAOptimizer
from ema_optim._arithmetic import guard


def nothing():
    pass


def updater(model, **options):
    inner = torch.optim.AdamW(model, lr=1e-4)
    inner.step = nothing
    optimizer = EMAOptimizer(inner, decay=0.99, **options)
    for _ in range(3):
        optimizer.step()
    return optimizer.step


def never_waiting(step):
    def run():
        looks, guard.is_read_at_once = guard.is_read_at_once, lambda device: False
        step()
        guard.is_read_at_once = looks

    return run


def cells(bench, name):
    model = bench.model(name)
    for param in model:
        param.grad = torch.full_like(param, 1e-3)
    guarded = updater(list(model), skip_non_finite=True)
    rows = [
        Row("without", updater(list(model))),
        Row("looks at the weights", guarded),
        Row("never waits", never_waiting(guarded)),
    ]
    with torch.no_grad():
        times = race(bench, name, rows)
    pairs = {row.name: zip(times[row.name], times["without"], strict=True) for row in rows[1:]}
    return {row: report.ratio(quartiles([a / b for a, b in p])) for row, p in pairs.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default="small,resnet50")
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    torch.set_num_threads(1)
    bench = Bench(options.models.split(","), rounds=options.rounds)
    columns = {describe(name): cells(bench, name) for name in bench.models}
    bench.progress.close()
    header, rows = report.by_row("", columns)
    text = "Median [quartiles] of ratios to the update without."
    print(report.table("The guard against non-finite weights", text, header, rows))
    print(report.conditions(bench, "malloc: default"))


if __name__ == "__main__":
    main()
