"""Interrupts at any line of the code that swaps, and failures of any of its copies."""

import itertools
import os
import sys
from pathlib import Path

import torch
from reference import same
from torch.optim import SGD

import ema_optim
from ema_optim import EMAModel, EMAOptimizer

PACKAGE = str(Path(ema_optim.__file__).parent)
FILES = ("swap.py", "swap_state.py", "exchange.py", "record.py", "optimizer.py", "model.py")
FILES += ("_buffers.py",)


class Interrupt(BaseException):
    """Not an Exception, as a KeyboardInterrupt is none."""


class Tracer:
    """Raises at the given lines of swap code, counted over the life of the tracer."""

    def __init__(self, *at):
        self.at, self.lines = set(at), 0

    def __call__(self, frame, event, arg):
        name = frame.f_code.co_filename
        if not name.startswith(PACKAGE) or os.path.basename(name) not in FILES:
            return None
        if event == "line":
            self.lines += 1
            if self.lines in self.at:
                raise Interrupt
        return self

    def again(self, frame, event, arg):
        # Python ends the tracing when a tracer raises; the next call or return begins it anew.
        if sys.gettrace() is None:
            sys.settrace(self)
            while frame is not None:
                if frame.f_code.co_filename.startswith(PACKAGE):
                    frame.f_trace = self
                frame = frame.f_back

    def run(self, function, *args):
        sys.setprofile(self.again)
        sys.settrace(self)
        try:
            function(*args)
        finally:
            sys.setprofile(None)
            sys.settrace(None)


class Run:
    """Two parameters, one of them in ``dtype``, with an average that differs from the weights."""

    def __init__(self, dtype=torch.float32, door=EMAOptimizer, **options):
        torch.manual_seed(0)
        self.model = torch.nn.ParameterList([torch.randn(3), torch.randn(2, dtype=dtype)])
        inner = SGD(self.model.parameters(), lr=0.1)
        of = inner if door is EMAOptimizer else self.model
        self.ema = door(of, 0.1, **options)
        self.inner, self.params = inner, list(self.model)
        for p in self.params:
            p.grad = torch.ones_like(p)
        for _ in range(3):
            self.step()
        self.expected = self.weights(), self.averages()

    def step(self):
        (self.ema if isinstance(self.ema, EMAOptimizer) else self.inner).step()
        if isinstance(self.ema, EMAModel):
            self.ema.update()

    def weights(self):
        return [p.detach().clone() for p in self.params]

    def averages(self):
        model = () if isinstance(self.ema, EMAModel) else (self.model,)
        return self.ema.get_ema_state(*model)

    def block(self):
        with self.ema.swap_ema_weights():
            pass

    def mode(self):
        self.ema.eval()
        self.ema.train()

    def whole(self):
        weights, averages = self.expected
        return not self.ema.swapped and same(self.weights(), weights) and self.kept(averages)

    def kept(self, averages):
        return same(self.averages(), averages)


def part(tensor, share):
    return tensor.view(-1)[: int(share * tensor.numel())]


def failing_copy(nth, done):
    """A `_foreach_copy_` whose n-th call fails after copying that share of every tensor."""
    real, calls = torch._foreach_copy_, itertools.count()

    def copy(targets, sources):
        if next(calls) != nth:
            return real(targets, sources)
        real([part(t, done) for t in targets], [part(s, done) for s in sources])
        raise Interrupt

    return copy
