"""Peak extra memory of a call, counted at the allocator.

The profiler sees what the allocator hands out, also to temporaries inside one operator; a dispatch
mode would miss those (``add_`` of a bf16 tensor to an fp32 one makes a whole fp32 copy).
"""

import torch
from torch.profiler import ProfilerActivity, profile


def peak_bytes(run, device="cpu"):
    """The most bytes that were live at any moment of ``run()`` beyond those live before it."""
    return _cuda_peak(run) if device == "cuda" else _cpu_peak(run)


def check_counter():
    """Raise unless the counter reads known allocations right."""
    ema, weights = torch.zeros(1 << 20), torch.zeros(1 << 20, dtype=torch.bfloat16)
    expected = {
        "one tensor": (lambda: torch.empty(1 << 20), 4 << 20),
        "two, one after the other": (_one_after_the_other, 4 << 20),
        "two at once": (lambda: (torch.empty(1 << 20), torch.empty(1 << 20)), 8 << 20),
        "a temporary inside an operator": (lambda: ema.add_(weights, alpha=0.5), 4 << 20),
        "in place": (lambda: ema.lerp_(ema, 0.5), 0),
    }
    for what, (run, size) in expected.items():
        counted = _cpu_peak(run)
        if counted != size:
            raise RuntimeError(f"memory counter: {what}: {counted:,} bytes, expected {size:,}")


def _one_after_the_other():
    for _ in range(2):
        torch.empty(1 << 20)


def _cpu_peak(run):
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def _cuda_peak(run):
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
