"""EMA and AdamW in one compiled graph, relative to the eager fused AdamW."""

import inspect
import shutil

import report
import torch
from averages import Average, check_updates, emas_of, foreach_lerp, scale_
from harness import DECAY
from shapes import describe
from table_step import INNERS, RATE, inner_with_state
from table_update import ratio_cells
from timing import Row, race

from ema_optim import EMAOptimizer

EAGER = "AdamW fused, eager"
ONE_GRAPH = "**ema_optim, AdamW and EMA in one graph**"
# What compile() sets on a CPU: else the bias corrections are computed for every few elements.
TUNED = {"realize_opcount_threshold": 6}
TEXT = (
    "Median [quartiles] of the time per step; 1 is the eager fused AdamW without an EMA. Compile "
    "time (minutes for 161 tensors) is not in it: it falls into the warm-up rounds. `compile()` "
    "sets `realize_opcount_threshold=6` on a CPU, which makes AdamW itself faster."
)


def run(bench):
    # Compiling a graph takes time with every tensor; this size is what it is good for.
    name = "resnet50"
    if missing := _missing(bench):
        bench.note(f"compiled: left out, {missing}")
        return
    column = {describe(name, bench.quick): _column(bench, name)}
    yield report.table("Compiled step", TEXT, *report.by_row("step", column))


def _missing(bench):
    if bench.device == "cpu" and not any(map(shutil.which, ("c++", "g++", "clang++"))):
        return "no C++ compiler"
    return "" if hasattr(EMAOptimizer, "compile") else "EMAOptimizer has no compile()"


def _column(bench, name):
    model = bench.model(name)
    makers = (INNERS["AdamW fused"], _capturable, _capturable, _capturable)
    eager, default, tuned, one_graph = (inner_with_state(model, make) for make in makers)
    lerp = foreach_lerp(model, DECAY)
    compiled = _compiled_step(default), _compiled_step(tuned, options=TUNED)
    optimizer = EMAOptimizer(one_graph, DECAY)
    optimizer.compile()
    optimizer.step()
    scale_(model, 2.0)
    rows = [
        Row(EAGER, eager.step),
        Row(f"{EAGER}, + `_foreach_lerp_`", _both(eager.step, lerp.update)),
        Row("AdamW compiled", compiled[0]),
        Row("AdamW compiled + `_foreach_lerp_`", _both(compiled[0], lerp.update)),
        Row("AdamW compiled, our setting", compiled[1]),
        Row("AdamW compiled, our setting, + `_foreach_lerp_`", _both(compiled[1], lerp.update)),
        Row(ONE_GRAPH, optimizer.step),
    ]
    times = race(bench, name, rows)
    ours = Average(optimizer.step, lambda: emas_of(optimizer, model))
    check_updates(ONE_GRAPH, ours, model, bench.calls(name), DECAY)
    return ratio_cells([times], EAGER)


def _capturable(params):
    # A rate that is a tensor: a float would be compiled into the graph. On a CPU that takes the
    # form without foreach, on a GPU the capturable one.
    rate = torch.tensor(RATE, device=params[0].device)
    on_gpu = params[0].is_cuda
    return torch.optim.AdamW(params, lr=rate, foreach=on_gpu, capturable=on_gpu)


def _compiled_step(inner, **options):
    # Undecorated: the decorators of step() break the graph in two places.
    step = torch.compile(inspect.unwrap(type(inner).step), **options)

    @torch.no_grad()
    def run():
        step(inner)

    return run


def _both(step, update):
    def run():
        step()
        update()

    return run
