"""What a call allocates."""

import itertools

import torch


def peak_allocation(function):
    """The most bytes allocated at one time while the function ran, inside operators too."""
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu, profile_memory=True) as profile:
        function()
    events = profile.profiler.kineto_results.events()
    steps = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    return max(itertools.accumulate((size for _, size in steps), initial=0))
