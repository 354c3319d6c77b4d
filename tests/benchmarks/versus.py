"""This tree beside an earlier commit, interleaved: ``python tests/benchmarks/versus.py COMMIT``.

Update alone, a step with AdamW, and a swap in and out, on the same shapes in one process; each as a
ratio to one ``_foreach_lerp_`` on ready lists, and this tree's to the commit's.
"""

import argparse
import importlib
import io
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import report
import torch
from harness import Bench
from shapes import describe
from timing import Row, quartiles, race, ratios

ROOT = Path(__file__).parents[2]


def package(folder):
    """``ema_optim`` as it is in a folder, beside others of the same name."""
    for name in [name for name in sys.modules if name.split(".")[0] == "ema_optim"]:
        del sys.modules[name]
    sys.path.insert(0, str(folder))
    try:
        return importlib.import_module("ema_optim")
    finally:
        sys.path.remove(str(folder))


def at(commit):
    """The package of a commit, in a folder of its own."""
    folder = tempfile.mkdtemp()
    archive = ["git", "archive", commit, "ema_optim"]
    packed = subprocess.run(archive, cwd=ROOT, check=True, capture_output=True).stdout
    with tarfile.open(fileobj=io.BytesIO(packed)) as files:
        files.extractall(folder, filter="data")
    return package(folder)


def nothing():
    pass


def optimizer_of(module, model, step):
    inner = torch.optim.AdamW(model, lr=1e-4, fused=True)
    if not step:
        inner.step = nothing
    return module.EMAOptimizer(inner, decay=0.99)


def swap(optimizer):
    with optimizer.swap_ema_weights():
        pass


def rows_of(label, module, model):
    update, step = (optimizer_of(module, list(model), step) for step in (False, True))
    for optimizer in (update, step):
        for _ in range(300 if optimizer is update else 1):  # no warning about a young average
            optimizer.step()
    yield Row(f"{label}: update", update.step)
    yield Row(f"{label}: step", step.step)
    yield Row(f"{label}: swap in and out", lambda: swap(update))


def cells(bench, name, versions):
    model = bench.model(name)
    for param in model:
        param.grad = torch.full_like(param, 1e-3)
    emas, weights = [param.detach().clone() for param in model], list(model)
    rows = [Row("base", lambda: torch._foreach_lerp_(emas, weights, 0.01))]
    rows += [row for label, module in versions.items() for row in rows_of(label, module, model)]
    with torch.no_grad():
        times = race(bench, name, rows)
    found = {row: report.ratio(value) for row, value in ratios(times, "base").items()}
    for kind in ("update", "step", "swap in and out"):
        pairs = zip(times[f"now: {kind}"], times[f"before: {kind}"], strict=True)
        found[f"now / before: {kind}"] = report.ratio(quartiles([a / b for a, b in pairs]))
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("commit")
    parser.add_argument("--models", default="small,resnet50")
    parser.add_argument("--rounds", type=int, default=40)
    options = parser.parse_args()
    torch.set_num_threads(1)
    bench = Bench(options.models.split(","), rounds=options.rounds)
    versions = {"before": at(options.commit), "now": package(ROOT)}
    columns = {describe(name): cells(bench, name, versions) for name in bench.models}
    bench.progress.close()
    text = f"Median [quartiles] of ratios; 'before' is {options.commit}."
    header, rows = report.by_row("", columns)
    print(report.table("This tree beside an earlier commit", text, header, rows))
    print(report.conditions(bench, "malloc: default"))


if __name__ == "__main__":
    main()
