"""Interrupts of a swap, one and two of them, at every line: nothing is lost, whoever comes next."""

import contextlib
import copy
import itertools
import os
import pickle
import random
import signal
import threading
import time

import pytest
import torch
from interrupts import Interrupt, Run, Tracer
from reference import same
from torch.optim import SGD

from ema_optim import EMAModel, EMAOptimizer


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
