"""What an EMA adds to a whole optimizer step."""

import report
import torch
from averages import OURS, UPDATES, Average, emas_of
from harness import race_updates
from shapes import describe
from timing import Row, quartiles, ratios

from ema_optim import EMAOptimizer

# No weight moves: the check of the EMA counts on that. A step costs what it costs at any rate.
RATE = 1e-20
INNERS = {
    "AdamW fused": lambda params: torch.optim.AdamW(params, lr=RATE, fused=True),
    "AdamW foreach": lambda params: torch.optim.AdamW(params, lr=RATE, foreach=True),
    "SGD momentum": lambda params: torch.optim.SGD(params, lr=RATE, momentum=0.9, foreach=True),
}
ALONE = "inner step alone"
HELD = 6  # weights, gradients, two moments, two temporaries of the foreach form
STRIDES = (1, 2, 4, 8)
TEXT = (
    "What the EMA adds to the step: median [quartiles] in % of the inner step alone, whose time is "
    "in the first row. Everybody but ema_optim is called after the inner step."
)
TEXT_STRIDES = "The same, over 8 steps each. An update applies `decay ** update_every`."


def run(bench):
    for name in bench.models:
        columns = {title: _steps(bench, name, title) for title in INNERS}
        yield report.table(f"Step, {describe(name, bench.quick)}", TEXT, *_rows(columns))
    columns = {describe(name, bench.quick): _strides(bench, name) for name in bench.models}
    yield report.table("`update_every`, AdamW fused", TEXT_STRIDES, *_rows(columns))


def _rows(columns):
    return report.by_row("whole step", columns)


def _steps(bench, name, title):
    model = bench.model(name)
    inner = inner_with_state(model, INNERS[title])

    def row(contender, average):
        return Row(contender, average.update if contender == OURS else _after(inner, average))

    factories = UPDATES | {OURS: lambda model, decay: wrapped(inner, model, decay)}
    extra = [Row(ALONE, inner.step)]
    return _cells(race_updates(bench, name, model, factories, row, extra, held=HELD))


def _strides(bench, name):
    model = bench.model(name)
    inner = inner_with_state(model, INNERS["AdamW fused"])
    factories = {f"update_every={every}": _strider(inner, every) for every in STRIDES}
    extra = [Row(ALONE, _times(inner.step, 8))]
    # A decay nearer to 1: 8 times the updates of the other tables.
    return _cells(
        race_updates(bench, name, model, factories, extra=extra, decay=0.999, calls=8, held=HELD)
    )


def _strider(inner, every):
    def make(model, decay):
        average = wrapped(inner, model, decay, update_every=every)
        return Average(_times(average.update, 8), average.emas)

    return make


def inner_with_state(model, make):
    generator = torch.Generator(model[0].device).manual_seed(1)
    for param in model:
        param.grad = torch.empty_like(param).normal_(0, 1e-3, generator=generator)
    inner = make(list(model))
    inner.step()
    return inner


def wrapped(inner, model, decay, **options):
    # All rows step the same inner optimizer: its cost does not depend on the values in its state.
    optimizer = EMAOptimizer(inner, decay, **options)
    return Average(optimizer.step, lambda: emas_of(optimizer, model))


def _after(inner, average):
    def step():
        inner.step()
        average.update()

    return step


def _times(step, count):
    def steps():
        for _ in range(count):
            step()

    return steps


def _cells(results):
    cells = {ALONE: ""}
    for times in results:
        overhead = ratios(times, ALONE, less=1.0)
        cells |= {name: report.percent(value) for name, value in overhead.items()}
    together = [taken for times in results for taken in times[ALONE]]
    return cells | {ALONE: report.milliseconds(quartiles(together)[0])}
