"""Seconds of a synthesis before a tensor is read: ``python tests/benchmarks/synthesis.py``.

Every target is new, so nothing but what the solver keeps of its inputs is used again.
"""

import os
import sys
import time

import torch
from tqdm import tqdm

from ema_optim import power_decay, warmup_decay
from ema_optim._arithmetic.synthesis import Average, Solver

STEPS = 1_000_000
INPUTS = {
    "512 of power .05": (512, [power_decay(0.05)]),
    "2 x 256 of power .05 and .10": (256, [power_decay(0.05), power_decay(0.10)]),
    "512 of decay .9999": (512, [0.9999]),
    "512 of a warm-up to .9999": (512, [warmup_decay(0.9999)]),
    "2 x 512 of power .05 and .10": (512, [power_decay(0.05), power_decay(0.10)]),
}
TARGETS = [power_decay(0.15), power_decay(0.12), 0.99995, warmup_decay(0.99998)]


def main():
    torch.set_num_threads(1)
    load = os.getloadavg()[0]
    print(f"torch {torch.__version__}, one thread, load {load:.1f}; seconds [told error]")
    for name, (snapshots, decays) in tqdm(INPUTS.items()):
        steps = [STEPS * number // snapshots for number in range(1, snapshots + 1)]
        begin = time.perf_counter()
        solver = Solver([Average(decay, step) for step in steps for decay in decays])
        told = []
        for target in TARGETS:
            _, error = solver.solve(Average(target, STEPS))
            told.append(f"{target} {time.perf_counter() - begin:.2f} [{error:.1e}]")
            begin = time.perf_counter()
        print(f"{name}: {', '.join(told)}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
