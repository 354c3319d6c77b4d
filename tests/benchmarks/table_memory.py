"""Peak extra memory of an update and of a swap, counted at the allocator."""

import report
import table_mixed
import torch
from averages import BASE, OURS, UPDATES, ema_optim
from harness import update_memory
from live_bytes import check_counter
from shapes import describe
from table_swap import SWAPS, swap_memory

TEXT = (
    "The most memory that is live at any moment beyond what is live before: the EMA itself is not "
    "in it. Read off the allocator, after the counter was checked on known allocations."
)


def run(bench):
    check_counter()
    for name in bench.models:
        yield report.table(
            f"Extra memory, {describe(name, bench.quick)}",
            TEXT,
            *report.by_row("peak", _columns(bench, name)),
        )


def _columns(bench, name):
    model = bench.model(name)
    peaks = {
        "update": update_memory(bench, model, UPDATES),
        "swap": swap_memory(bench, model, SWAPS),
    }
    narrow = model.to(torch.bfloat16)
    mixed = {row: make for row, make in table_mixed.FACTORIES.items() if row != BASE}
    peaks["update, bf16 weights"] = update_memory(bench, narrow, mixed)
    peaks["swap, bf16 weights"] = swap_memory(bench, narrow, {OURS: ema_optim})
    return {
        title: {row: report.mib(peak) for row, peak in column.items()}
        for title, column in peaks.items()
    }
