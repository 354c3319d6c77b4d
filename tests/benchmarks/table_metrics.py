"""What ``ema_metrics()`` costs beside a fused AdamW step.

``python tests/benchmarks/table_metrics.py``: both are timed in turn in one process, one thread; the
figures are medians of 21 rounds.
"""

import statistics
import time

import torch

from ema_optim import EMAOptimizer

LAYERS, WIDTH, ROUNDS = 16, 1024, 21
ROWS = {"float32": (torch.float32, None), "bfloat16": (torch.bfloat16, None)}
ROWS["float32, float24 EMA"] = (torch.float32, "float24")


def milliseconds(call):
    start = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - start)


def measured(weights, stored):
    """Medians of a bare step, a wrapped step and the metrics."""
    params = [torch.nn.Parameter(torch.randn(WIDTH, WIDTH, dtype=weights)) for _ in range(LAYERS)]
    for param in params:
        param.grad = torch.randn_like(param)
    inner = torch.optim.AdamW(params, lr=1e-4, fused=True)
    optimizer = EMAOptimizer(inner, decay=0.99, dtype=stored)
    optimizer.step()
    calls = inner.step, optimizer.step, optimizer.ema_metrics
    rounds = [tuple(map(milliseconds, calls)) for _ in range(ROUNDS)]
    return [statistics.median(column) for column in zip(*rounds, strict=True)]


def main():
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(f"{LAYERS * WIDTH**2 / 1e6:.0f}M weights, torch {torch.__version__}, CPU, one thread, ms")
    print(f"{'weights':<22}{'step':>8}{'with EMA':>10}{'metrics':>9}{'metrics/step':>14}")
    for name, row in ROWS.items():
        step, both, metrics = measured(*row)
        print(f"{name:<22}{step:>8.1f}{both:>10.1f}{metrics:>9.1f}{metrics / step:>14.2f}")


if __name__ == "__main__":
    main()
