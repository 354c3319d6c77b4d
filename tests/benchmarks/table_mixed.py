"""bf16 weights with an fp32 EMA, relative to the fp32 ``_foreach_lerp_`` on the same shapes."""

import report
import torch
from averages import BASE, MUL_ADD, OURS, TIMM, Average, ema_optim, foreach_mul_add, timm
from harness import race_updates, update_memory
from shapes import describe
from table_update import ratio_cells

TEXT = (
    "Median [quartiles] of the time per update and the peak of extra memory in one; 1 is the "
    "same update of fp32 weights. timm keeps its EMA in fp32 (`dtype=torch.float32`)."
)


def fp32_base(model, decay):
    """The base beside a bf16 model: the same shapes in fp32, with weights of its own."""
    params, emas = ([param.detach().float() for param in model] for _ in range(2))
    return Average(
        lambda: torch._foreach_lerp_(emas, params, 1 - decay), lambda: emas, params=params
    )


def cast_list(model, decay):
    params, emas = list(model), [param.detach().float() for param in model]

    @torch.no_grad()
    def update():
        torch._foreach_lerp_(emas, [param.float() for param in params], 1 - decay)

    return Average(update, lambda: emas)


def cast_each(model, decay):
    params, emas = list(model), [param.detach().float() for param in model]

    @torch.no_grad()
    def update():
        for ema, param in zip(emas, params, strict=True):
            ema.lerp_(param.float(), 1 - decay)

    return Average(update, lambda: emas)


FACTORIES = {
    BASE: fp32_base,
    OURS: ema_optim,
    "the whole list cast, then `_foreach_lerp_`": cast_list,
    "per tensor, `lerp_(p.float())`": cast_each,
    MUL_ADD: foreach_mul_add,
    TIMM: timm,
}


def run(bench):
    columns = {}
    for name in bench.models:
        model = bench.model(name, dtype=torch.bfloat16)
        title = describe(name, bench.quick)
        columns[title] = ratio_cells(race_updates(bench, name, model, FACTORIES))
        peaks = update_memory(bench, model, FACTORIES)
        columns[f"{name}: extra memory"] = {row: report.mib(peak) for row, peak in peaks.items()}
    yield report.table("bf16 weights, fp32 EMA", TEXT, *report.by_row("mixed update", columns))
