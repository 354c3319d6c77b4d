"""Seconds of a synthesis before a tensor is read: ``python tests/benchmarks/synthesis.py``.

Every target is new, so nothing but what the solver keeps of its inputs is used again. Then the
errors that are told, by how often one ordinary EMA, or the weights alone, are saved.
"""

import os
import sys
import time

import torch
from tqdm import tqdm

from ema_optim import equal_average, power_decay, warmup_decay
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


WINDOW, WINDOWS = 1000, 20  # decay 0.999 in a run of 20,000 steps
EVERY = {"2 windows": 2000, "1 window": 1000, "1/2 window": 500, "1/4 window": 250}
WANTED = {
    "half the window": 1 - 2 / WINDOW,
    "1.5 times": 1 - 1 / (1.5 * WINDOW),
    "twice": 1 - 1 / (2 * WINDOW),
    "4 times": 1 - 1 / (4 * WINDOW),
    "power .10": power_decay(0.10),
    "power .20": power_decay(0.20),
    "plain mean": equal_average(),
}


def print_spacing():
    steps = WINDOW * WINDOWS
    print(f"told error, decay {1 - 1 / WINDOW}, {steps} steps, by the steps between two snapshots")
    print(f"{'':<12}" + "".join(f"{name:>17}" for name in WANTED))
    for name, every in EVERY.items():
        for decay, kept in ((1 - 1 / WINDOW, name), (0.0, f"{name}*")):
            solver = Solver([Average(decay, n) for n in range(every, steps + 1, every)])
            told = [solver.solve(Average(decay, steps))[1] for decay in WANTED.values()]
            print(f"{kept:<12}" + "".join(f"{error:>17.4f}" for error in told))
    print("* the training weights alone")


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
    print_spacing()


if __name__ == "__main__":
    sys.exit(main())
