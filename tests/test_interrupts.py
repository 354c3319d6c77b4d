"""Interrupts of a swap, one and two of them, at every line: nothing is lost, whoever comes next."""

import contextlib
import copy
import itertools
import os
import pickle
import random
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from reference import same
from torch.optim import SGD

import ema_optim
from ema_optim import EMAModel, EMAOptimizer

PACKAGE = str(Path(ema_optim.__file__).parent)
FILES = ("swap.py", "swap_state.py", "exchange.py", "record.py", "optimizer.py", "model.py")


class Interrupt(BaseException):
    pass


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

    def __init__(self, dtype=torch.float32, door=EMAOptimizer):
        torch.manual_seed(0)
        self.model = torch.nn.ParameterList([torch.randn(3), torch.randn(2, dtype=dtype)])
        inner = SGD(self.model.parameters(), lr=0.1)
        self.ema = EMAOptimizer(inner, 0.1) if door is EMAOptimizer else EMAModel(self.model, 0.1)
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


def next_train(run):
    run.ema.train()


def next_swap(run):
    with run.ema.swap_ema_weights():
        pass


def next_read(run):
    run.averages()
    run.ema.train()


def next_saved(run):
    run.ema.state_dict()
    run.ema.train()


NEXT = [next_train, next_swap, next_read, next_saved]
KINDS = [
    (EMAOptimizer, "block", torch.float32),
    (EMAOptimizer, "block", torch.bfloat16),
    (EMAOptimizer, "mode", torch.float32),
    (EMAOptimizer, "mode", torch.bfloat16),
    (EMAModel, "block", torch.float32),
    (EMAModel, "block", torch.bfloat16),
]


def lines_of(kind):
    door, way, dtype = kind
    tracer = Tracer()
    tracer.run(getattr(Run(dtype, door), way))
    return tracer.lines


def interrupted(run, way, *at):
    tracer = Tracer(*at)
    with contextlib.suppress(Interrupt):
        tracer.run(getattr(run, way))
    return tracer


def end(run, then):
    """The next call; after ``eval()`` it is ``train()`` that a user has to call."""
    if isinstance(run.ema, EMAModel):
        then = next_swap
    elif run.ema._ema.mode == "eval":
        then = next_train
    then(run)


# Python reports what is raised while it closes a generator, and goes on.
IN_CLOSING = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@IN_CLOSING
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_an_interrupt_at_any_line_of_a_swap_loses_nothing(kind):
    door, way, dtype = kind
    for at, then in zip(range(1, lines_of(kind) + 1), itertools.cycle(NEXT), strict=False):
        run = Run(dtype, door)
        interrupted(run, way, at)
        end(run, then)
        assert run.whole(), at
        run.step()


@IN_CLOSING
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_second_interrupt_on_the_way_back_loses_nothing(kind):
    door, way, dtype = kind
    lines, thens, pairs, made = lines_of(kind), itertools.cycle(NEXT), random.Random(0), 0
    while made < 150:  # of some 10,000 pairs
        at, then = pairs.randrange(1, lines + 1), next(thens)
        second = at + pairs.randrange(1, 100)
        run = Run(dtype, door)
        made += interrupted(run, way, at, second).lines >= second
        end(run, then)
        assert run.whole(), (at, second)


def swap_for_ever(optimizer):
    while True:
        with optimizer.swap_ema_weights():
            pass


@contextlib.contextmanager
def signals(waits):
    """SIGINT after each of the waits, as KeyboardInterrupt; none comes after the block."""
    armed = [True]

    def handle(*args):
        if armed[0]:
            raise KeyboardInterrupt

    def press():
        for wait in waits:
            time.sleep(wait)
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, handle)
    thread = threading.Thread(target=press)
    thread.start()
    try:
        with contextlib.suppress(KeyboardInterrupt):
            yield
    finally:
        armed[0] = False
        thread.join()
        time.sleep(0)
        signal.signal(signal.SIGINT, before)


def test_two_signals_in_one_swap_lose_nothing():
    params = [torch.nn.Parameter(torch.randn(2_000_000)) for _ in range(4)]
    optimizer = EMAOptimizer(SGD(params, lr=0.1), 0.05)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    before = copy.deepcopy((params, optimizer.state_dict()))
    moments = random.Random(0)
    for _ in range(40):
        with signals([0.005 + moments.random() * 0.02, moments.random() * 0.01]):
            swap_for_ever(optimizer)
        optimizer.train()
        assert same(params, before[0])
        assert same(optimizer.state_dict(), before[1])


def test_a_block_whose_generator_is_gone_is_left_by_train():
    run = Run()
    block = run.ema.swap_ema_weights()
    block.__enter__()
    state = run.ema._ema.swap
    state._block = None  # as after an interrupt on the first line of the block's end
    run.ema.train()
    assert run.whole()
    block.__exit__(None, None, None)
    assert run.whole()


@IN_CLOSING
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_a_copy_of_an_interrupted_swap_holds_everything(copied):
    run = Run()
    lines = lines_of(KINDS[0])
    for at in range(lines // 4, lines, 5):
        run = Run()
        interrupted(run, "block", at, at + 3, at + 6)
        run.model, run.ema = copied((run.ema, run.model))[::-1]
        run.params = list(run.model)
        run.ema.train()
        assert run.whole()
