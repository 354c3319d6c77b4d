"""What N windows cost beside N ``_foreach_lerp_``: ``python tests/benchmarks/windows.py``.

The update alone, one thread; interleaved rounds, ratios to one ``_foreach_lerp_`` on ready lists.
"""

import os
import random
import statistics
import time
import warnings

import torch
from shapes import describe, make_model, shapes_of
from tqdm import tqdm

from ema_optim import EMAOptimizer

WINDOWS = {"a": 0.999, "b": 0.9995, "c": 0.9999, "d": 0.99}
ROUNDS = 15


def lora():
    """What a LoRA of rank 16 on every matrix of 32 layers of width 1,024 trains."""
    return [shape for _ in range(32 * 6) for shape in ((16, 1024), (1024, 16))]


def rows_of(shapes):
    """Calls to be timed, by name, and the number of averages each makes."""
    model = make_model(shapes, "cpu", seed=0)
    weights = [param.detach() for param in model]
    copies = [[weight.clone() for weight in weights] for _ in WINDOWS]
    rows = {}
    for count in range(1, len(WINDOWS) + 1):
        decays = dict(list(WINDOWS.items())[:count])
        optimizer = EMAOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), decays)
        rows[f"{count} x _foreach_lerp_"] = lambda n=count: lerps(copies[:n], weights)
        rows[f"ema_optim, {count} windows"] = lambda o=optimizer: update(o._ema)
    return rows


def lerps(copies, weights):
    with torch.no_grad():
        for copy in copies:
            torch._foreach_lerp_(copy, weights, 1e-3)


def update(shadow):
    shadow.finish_step(shadow.begin_step())


def timed(rows):
    times = {name: [] for name in rows}
    for number in tqdm(range(ROUNDS + 2)):
        for name, run in random.sample(list(rows.items()), len(rows)):
            begin = time.perf_counter()
            run()
            if number > 1:  # the first ones make lists and pages
                times[name].append(time.perf_counter() - begin)
    return times


def main():
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    random.seed(0)
    print(f"torch {torch.__version__}, one thread, load {os.getloadavg()[0]:.1f}")
    models = {name: shapes_of(name) for name in ("small", "resnet50", "gpt2")}
    for name, shapes in {"lora": lora(), **models}.items():
        times = timed(rows_of(shapes))
        base = times["1 x _foreach_lerp_"]
        known = f"{len(shapes)} tensors, 6.3M parameters" if name == "lora" else describe(name)
        print(f"\n{known}; 1 is {statistics.median(base) * 1e3:.2f} ms")
        for row, seconds in times.items():
            ratios = [own / one for own, one in zip(seconds, base, strict=True)]
            low, median, high = statistics.quantiles(ratios, n=4)
            print(f"    {row:24} {median:5.2f} [{low:.2f}..{high:.2f}]", flush=True)


if __name__ == "__main__":
    main()
