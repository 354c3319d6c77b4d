"""Evaluating on the EMA weights and going back, relative to one ``_foreach_lerp_``."""

import averages
import report
import torch
from averages import BASE, OURS, Average
from harness import DECAY, fp32_bytes, primed
from timing import Row, race, ratios

from ema_optim import EMAOptimizer
from ema_optim._shadow import swap

# So small that the EMA has forgotten its initial weights after one update: no warning of it.
FORGETFUL = 0.05
TEXT = (
    "Median [quartiles] of the time of one swap, relative to one `_foreach_lerp_` of the same "
    "tensors: the way in alone, and half of the way in and back. Extra memory is the peak over "
    "both. ema_optim: `eval()` and `train()`, which also look for NaNs. torch-ema and diffusers: "
    "`store()` and `copy_to()`, then `restore()`; the others exchange."
)


def base(model, decay):
    return averages.foreach_lerp(model, DECAY)


def exchange_alone(model, decay):
    """What eval() and train() do without looking for NaNs and without their checks."""
    optimizer = EMAOptimizer(torch.optim.SGD(model.parameters(), lr=1e-3), decay)
    shadow = optimizer._ema
    return Average(
        lambda: shadow.finish_step(shadow.begin_step()),
        lambda: averages.emas_of(optimizer, model),
        lambda: swap.swap_in(shadow, shadow.counted()),
        lambda: swap.put_back(shadow),
    )


def clone_all(model, decay):
    average = averages.foreach_lerp(model, decay)
    emas, params = average.emas(), list(model)

    @torch.no_grad()
    def exchange():
        held = [param.clone() for param in params]
        torch._foreach_copy_(params, emas)
        torch._foreach_copy_(emas, held)

    return Average(average.update, average.emas, exchange, exchange)


def clone_each(model, decay):
    average = averages.foreach_lerp(model, decay)
    emas, params = average.emas(), list(model)

    @torch.no_grad()
    def exchange():
        for ema, param in zip(emas, params, strict=True):
            held = param.clone()
            param.copy_(ema)
            ema.copy_(held)

    return Average(average.update, average.emas, exchange, exchange)


SWAPS = {
    OURS: averages.ema_optim,
    "ema_optim, the exchange alone": exchange_alone,
    "one temporary per tensor (NeMo's way)": clone_each,
    "everything cloned, two copies": clone_all,
    averages.TORCH_EMA: averages.torch_ema,
    averages.DIFFUSERS: averages.diffusers_foreach,
    averages.LIGHTNING: averages.lightning,
}


def run(bench):
    columns = {}
    for name in bench.models:
        model = bench.model(name)
        for times in _race_swaps(bench, name, model):
            for (row, way), value in ratios(times, (BASE, "")).items():
                if way:
                    columns.setdefault(f"{name}: {way}", {})[row] = report.ratio(value)
        peaks = swap_memory(bench, model, SWAPS)
        columns[f"{name}: extra memory"] = {row: report.mib(peak) for row, peak in peaks.items()}
    yield report.table("Swap", TEXT, *report.by_row("swap", columns))


def swap_memory(bench, model, factories):
    """Peak extra bytes of a swap and back, by contender; one of them at a time."""
    peaks = {}
    for name, factory in factories.items():
        with primed(bench, {name: factory}, model, FORGETFUL) as built:
            for average in built.values():
                peaks[name] = bench.peak(there_and_back(average))
                average = None
    return peaks


def _race_swaps(bench, name, model):
    for group in bench.groups({BASE: base, **SWAPS}, fp32_bytes(model)):
        with primed(bench, group, model, FORGETFUL) as built:
            lerp = built.pop(BASE)
            rows = [Row((BASE, ""), lerp.update)]
            for title, average in built.items():
                check_swap(title, average, model)
                rows += _ways(title, average)
            yield race(bench, name, rows)
            for title, average in built.items():
                check_swap(title, average, model)
            del lerp, rows, average


def _ways(title, average):
    return [
        Row((title, "in"), average.swap_in, after=average.swap_out),
        Row((title, "in and back / 2"), there_and_back(average), scale=0.5),
    ]


def there_and_back(average):
    def swap():
        average.swap_in()
        average.swap_out()

    return swap


def check_swap(title, average, model):
    """Raise unless a swap puts the EMA in (half of the weights) and the weights back."""
    before = [param.detach().clone() for param in model]
    average.swap_in()
    swapped = all(torch.equal(param * 2, old) for param, old in zip(model, before, strict=True))
    average.swap_out()
    restored = all(map(torch.equal, model, before))
    if not (swapped and restored):
        raise RuntimeError(f"{title}: the swap did not exchange EMA weights and training weights")
