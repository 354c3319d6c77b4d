"""``python tests/benchmarks``: measures and prints markdown tables."""

import argparse
import importlib
import os
import sys
from pathlib import Path

import report
import torch
from harness import Bench
from shapes import MODELS

TABLES = ("update", "step", "mixed", "swap", "memory", "sharded", "compiled", "gpu")

# A malloc that keeps what it was given: fresh temporaries would otherwise be paid for in page
# faults, which flatters us (most peers allocate, we hardly do) and says more about the machine than
# about anybody's code. The variables are read when a process starts.
KEEPING_MALLOC = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**40),
    "MALLOC_TOP_PAD_": str(2**26),
}
STARTED = "EMA_OPTIM_BENCHMARKS_STARTED"


def parse(argv):
    parser = argparse.ArgumentParser(prog="tests/benchmarks", description=__doc__)
    parser.add_argument("--tables", type=_names(TABLES), default=list(TABLES))
    parser.add_argument("--models", type=_names(MODELS), default=list(MODELS))
    parser.add_argument("--rounds", type=int, help="timed rounds (default: 40, big models 9)")
    parser.add_argument("--quick", action="store_true", help="does it run: tiny models, 3 rounds")
    parser.add_argument("--output", type=Path, help="write the tables here as well")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--memory", type=float, default=8.0, help="GiB for EMAs at one time")
    parser.add_argument("--malloc", choices=("keep", "default"), default="keep")
    return parser.parse_args(argv)


def _names(known):
    def split(text):
        names = text.split(",")
        if unknown := [name for name in names if name not in known]:
            raise argparse.ArgumentTypeError(f"{unknown} not in {', '.join(known)}")
        return names

    return split


def restart(options):
    """Start this process again with the environment that the measurement needs."""
    settings = {STARTED: "1", "OMP_NUM_THREADS": str(options.threads), "KINETO_LOG_LEVEL": "99"}
    settings |= KEEPING_MALLOC if options.malloc == "keep" else {}
    os.execve(sys.executable, sys.orig_argv, os.environ | settings)


def main():
    options = parse(sys.argv[1:])
    if STARTED not in os.environ:
        restart(options)
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    names = ("models", "rounds", "quick", "device", "seed", "memory")
    bench = Bench(**{name: getattr(options, name) for name in names})
    parts = []
    for table in options.tables:
        for part in importlib.import_module(f"table_{table}").run(bench):
            parts.append(part)
            bench.progress.write(part)
    bench.progress.close()
    parts.append(report.conditions(bench, f"malloc: {options.malloc}"))
    print(parts[-1])
    if options.output:
        options.output.write_text("\n".join(parts) + "\n")


if __name__ == "__main__":
    main()
