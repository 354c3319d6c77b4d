"""What only a GPU shows: bandwidth, kernels and host synchronisations of one step."""

import report
import torch
from averages import OURS, UPDATES
from harness import DECAY, fp32_bytes, primed
from shapes import describe
from table_step import INNERS, inner_with_state, wrapped
from timing import cuda_seconds, nothing, quartiles
from torch.profiler import ProfilerActivity, profile

TEXT = (
    "Bandwidth of the update (12 bytes for each parameter) in % of that of a copy measured in the "
    "same run; device operations (kernels and copies) and host synchronisations of one update."
)
TEXT_STEPS = "Device operations / host synchronisations of one step."
SYNCHRONISATIONS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")


def run(bench):
    if bench.device != "cuda":
        bench.note("gpu: left out, needs --device cuda")
        return
    copy = _copy_bandwidth(bench)
    bench.note(f"copy bandwidth {copy / 1e9:,.0f} GB/s")
    columns, steps = {}, {}
    for name in bench.models:
        model = bench.model(name)
        columns |= _columns(bench, name, model, copy)
        steps[describe(name, bench.quick)] = _steps(model)
    yield report.table("Update on the GPU", TEXT, *report.by_row("update", columns))
    yield report.table("Step on the GPU", TEXT_STEPS, *report.by_row("step", steps))


def _columns(bench, name, model, copy):
    share, operations, syncs = {}, {}, {}
    for title, factory in UPDATES.items():
        with primed(bench, {title: factory}, model, DECAY) as averages:
            for average in averages.values():
                median = _median(bench, name, average.update)
                share[title] = f"{100 * 3 * fp32_bytes(model) / median / copy:.0f} %"
                operations[title], syncs[title] = _count(average.update)
                average = None
    title = describe(name, bench.quick)
    return {title: share, f"{name}: operations": operations, f"{name}: synchronisations": syncs}


def _steps(model):
    cells = {}
    for title, make in INNERS.items():
        inner = inner_with_state(model, make)
        optimizer = wrapped(inner, model, DECAY)
        optimizer.update()
        for row, step in ((title, inner.step), (f"{title}, {OURS}", optimizer.update)):
            cells[row] = "{} / {}".format(*_count(step))
    return cells


def _median(bench, name, run):
    return quartiles([cuda_seconds(run) for _ in range(bench.calls(name))][bench.warmup :])[0]


def _copy_bandwidth(bench, size=2**28):
    source, target = (torch.empty(size, device=bench.device) for _ in range(2))
    times = [cuda_seconds(lambda: target.copy_(source)) for _ in range(20)]
    return 2 * 4 * size / quartiles(times[5:])[0]


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
