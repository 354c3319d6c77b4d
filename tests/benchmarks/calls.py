"""How many of our own functions one action calls: ``python tests/benchmarks/calls.py [-v]``.

Counted with ``sys.setprofile`` on a model of four tensors: calls of functions of the package
(comprehensions and generators left out) and those of them that cross from one file to another.
"""

import argparse
import sys
import warnings
from collections import Counter
from pathlib import Path

import torch

import ema_optim
from ema_optim import EMAOptimizer

PACKAGE = str(Path(ema_optim.__file__).parent)


class Calls:
    """Count calls while the block runs."""

    def __enter__(self):
        self.functions, self.crossings, self.depth = Counter(), 0, 0
        sys.setprofile(self.see)
        return self

    def __exit__(self, *args):
        sys.setprofile(None)

    def see(self, frame, event, argument):
        code = frame.f_code
        if event != "call" or not is_ours(code) or code.co_name.startswith("<"):
            return
        self.functions[f"{Path(code.co_filename).name}:{code.co_name}"] += 1
        caller = frame.f_back
        while caller is not None and caller.f_code.co_name.startswith("<"):
            caller = caller.f_back
        if caller is not None and is_ours(caller.f_code):
            self.crossings += caller.f_code.co_filename != code.co_filename

    def row(self, name):
        files = len({function.split(":")[0] for function in self.functions})
        total, kinds = self.functions.total(), len(self.functions)
        return f"{name:24}{total:6}{kinds:11}{files:7}{self.crossings:11}"


def is_ours(code):
    return code.co_filename.startswith(PACKAGE)


def built():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
    return model, EMAOptimizer(torch.optim.AdamW(model.parameters(), lr=1e-3), decay=0.2)


def step(model, optimizer):
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()


def actions():
    """Name and counts of each action."""
    model, optimizer = built()
    model(torch.ones(2, 4)).sum().backward()
    with Calls() as first:
        optimizer.step()
    yield "first step()", first
    with Calls() as later:
        optimizer.step()
    yield "a later step()", later
    step(model, optimizer)
    with Calls() as saved:
        state_dict = optimizer.state_dict()
    yield "state_dict()", saved
    _, fresh = built()
    with Calls() as loaded:
        fresh.load_state_dict(state_dict)
    yield "load_state_dict()", loaded
    with Calls() as swapped, optimizer.swap_ema_weights():
        pass
    yield "swap in and out", swapped
    with Calls() as exported:
        optimizer.get_ema_state(model)
    yield "get_ema_state()", exported


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-v", "--verbose", action="store_true", help="list the functions")
    verbose = parser.parse_args().verbose
    warnings.simplefilter("ignore")  # of a short run
    print(f"{'':24}{'calls':>6}{'functions':>11}{'files':>7}{'crossings':>11}")
    for name, calls in actions():
        print(calls.row(name))
        for function, count in calls.functions.most_common() if verbose else ():
            print(f"    {count:4} {function}")


if __name__ == "__main__":
    main()
