"""What an update of each storage format would cost as one compiled kernel of one tensor.

    python tests/benchmarks/compiled_formats.py

The package keeps the eager update, also under ``EMAOptimizer.compile()``. The kernels here hash
once per element, where the eager form shares a hash between several; each is checked against fp32.
"""

import statistics
import time

import torch
from accuracy_formats import print_table
from tqdm import tqdm

from ema_optim._arithmetic.formats import FORMATS, Update

SIZE, ROUNDS, WEIGHT = 4 << 20, 15, 1e-3
NEAR = {"float32_compensated": 1e-6, "float24": 1e-4, torch.bfloat16: 2e-2}


def random_bits(ramp, key):
    """lowbias32 (C. Wellons, public domain) of the position."""
    x = ramp * -1640531535 + key
    x = (x ^ ((x >> 16) & 0xFFFF)) * 0x7FEB352D
    x = (x ^ ((x >> 15) & 0x1FFFF)) * -2073254261
    return x ^ ((x >> 16) & 0xFFFF)


def compensated(main, low, weights, ramp, key):
    step = low + WEIGHT * (weights - main)
    total = main + step
    low.copy_(step - (total - main))
    main.copy_(total)


def float24(main, low, weights, ramp, key):
    pattern = (main.view(torch.int16).to(torch.int32) << 16) + (low.to(torch.int32) << 8)
    ema = torch.lerp(pattern.view(torch.float32), weights, WEIGHT)
    bits = ema.view(torch.int32) + (random_bits(ramp, key) & 0xFF)
    low.copy_(bits >> 8)
    main.copy_(((bits + (1 << 15)) & -(1 << 16)).view(torch.float32))


def bfloat16(main, low, weights, ramp, key):
    ema = torch.lerp(main.float(), weights, WEIGHT)
    bits = ema.view(torch.int32) + (random_bits(ramp, key) & 0xFFFF)
    main.copy_((bits & -(1 << 16)).view(torch.float32))


KERNELS = {"float32_compensated": compensated, "float24": float24, torch.bfloat16: bfloat16}


def made(form, values):
    main = torch.empty_like(values, dtype=form.main)
    lows = [torch.empty_like(values, dtype=form.low)] if form.low else []
    form.encode_([main], lows, [values])
    return main, lows


def check(name, main, lows, start, weights):
    """The first update, against fp32."""
    expected, found = torch.lerp(start, weights, WEIGHT), torch.empty_like(start)
    FORMATS[name].decode_([found], [main], lows)
    if (found - expected).norm() > NEAR[name] * expected.norm():
        raise RuntimeError(f"{name}: the compiled kernel is wrong")


def timed(function):
    begin = time.process_time()
    function()
    return time.process_time() - begin


def rows_of(name, form, start, weights, ramp, key):
    main, lows = made(form, start)
    other, others = made(form, start)
    kernel = torch.compile(KERNELS[name])
    low = lows[0] if lows else None
    kernel(main, low, weights, ramp, key)
    check(name, main, lows, start, weights)
    first = Update(1 - WEIGHT, 1, [0])
    yield "eager", lambda: form.update_([other], others, [weights], first)
    yield "compiled", lambda: kernel(main, low, weights, ramp, key)


def main():
    torch.set_num_threads(1)
    torch.manual_seed(0)
    start, weights = torch.randn(SIZE), torch.randn(SIZE)
    ramp, key, plain = (
        torch.arange(SIZE, dtype=torch.int32),
        torch.tensor(7, dtype=torch.int32),
        start,
    )
    plain = start.clone()
    contenders = {("float32", "eager"): lambda: torch._foreach_lerp_([plain], [weights], WEIGHT)}
    for name, form in FORMATS.items():
        for kind, function in rows_of(name, form, start, weights, ramp, key):
            contenders[str(name).removeprefix("torch."), kind] = function
    times = {key: [] for key in contenders}
    for _ in tqdm(range(ROUNDS), unit="round"):
        for key, function in contenders.items():
            times[key].append(timed(function))
    base = statistics.median(times["float32", "eager"][2:])
    rows = []
    for name in dict.fromkeys(name for name, _ in contenders):
        ratios = [times.get((name, kind)) for kind in ("eager", "compiled")]
        rows.append(
            [name, *(f"{statistics.median(r[2:]) / base:.1f}x" if r else "" for r in ratios)]
        )
    print(f"torch {torch.__version__}, {SIZE:,} elements, fp32: {1000 * base:.2f} ms")
    print_table("update of one tensor", ["format", "eager", "compiled"], rows)


if __name__ == "__main__":
    with torch.no_grad():
        main()
