"""An accelerator made of Python: streams, events and a worker, in any order that their waits allow.

``Late`` has tensors of the CPU and does every copy, and every update, as late as the waits allow.
``World`` has numbers in place of tensors, and leaves to ``choose`` what is done next.
"""

import threading
from collections import deque
from contextlib import contextmanager
from functools import partial

import torch

from ema_optim._engines import offload
from ema_optim._engines.offload import Accelerator


class LateStream:
    """Copies that wait until somebody waits for them."""

    def __init__(self):
        self.lock, self.copies = threading.RLock(), deque()

    def catch_up(self):
        with self.lock, torch.no_grad():
            while self.copies:
                self.copies.popleft()()

    def wait_event(self, event):
        event.synchronize()


class LateEvent:
    def __init__(self, stream):
        self.synchronize = stream.catch_up


class LateJob:
    """A job of the worker that is done, after those before it, when somebody waits for it."""

    def __init__(self, job, before):
        self.job, self.before, self.error, self.is_done = job, before, None, False

    def done(self):
        return self.is_done

    def exception(self):
        if not self.is_done:
            if self.before is not None:
                self.before.exception()
            self.is_done, self.before = True, None
            try:
                self.job()
            except Exception as error:
                self.error = error
        return self.error


class Late(Accelerator):
    """Takes the CPU for an accelerator. Its main stream does everything at once."""

    def __init__(self):
        super().__init__()
        self.streams, self.last = (LateStream(), LateStream()), None

    def serves(self, tensor):
        return True

    def main(self, device):
        return self.streams[0]

    def side(self, device):
        return self.streams[1]

    def event(self, stream):
        return LateEvent(stream)

    def copy_(self, targets, sources, stream):
        stream.copies.append(partial(torch._foreach_copy_, targets, sources))

    def start(self, job):
        self.last = LateJob(job, self.last)
        return self.last


class Early(Late):
    """Its worker does everything at once."""

    def start(self, job):
        done = super().start(job)
        done.exception()
        return done


class Threaded(Late):
    """Its worker is a thread, as on a real one."""

    start = Accelerator.start


@contextmanager
def taken_for(accelerator):
    """Whatever is built inside takes the CPU for this accelerator."""
    real, offload.Accelerator = offload.Accelerator, accelerator
    try:
        yield
    finally:
        offload.Accelerator = real


def on_host(build, *args, accelerator=Late, **options):
    """``build(..., device="cpu")`` for weights on an accelerator."""
    with taken_for(accelerator):
        return build(*args, device="cpu", **options)


class Cell:
    """A number in some memory."""

    device = "accelerator"

    def __init__(self, value=0.0):
        self.value, self.version = value, 0


class Stream:
    """Operations in a row; each may have to wait for events of other streams."""

    def __init__(self, world):
        self.world, self.ops, self.waits, self.queued, self.done = world, deque(), [], 0, 0

    def add(self, op):
        self.ops.append((op, self.waits))
        self.waits, self.queued = [], self.queued + 1
        self.world.go_on()

    def wait_event(self, event):
        self.waits = [*self.waits, event]

    def is_ready(self):
        return bool(self.ops) and all(event.happened() for event in self.ops[0][1])

    def run(self):
        self.ops.popleft()[0]()
        self.done += 1


class Event:
    def __init__(self, stream):
        self.stream, self.at, self.waits = stream, stream.queued, list(stream.waits)

    def happened(self):
        return self.stream.done >= self.at and all(event.happened() for event in self.waits)

    def synchronize(self):
        self.stream.world.until(self.happened)


class Job:
    def __init__(self, world, job):
        self.world, self.job, self.is_done, self.error = world, job, False, None

    def done(self):
        return self.is_done

    def exception(self):
        self.world.until(self.done)
        return self.error


class Worker:
    def __init__(self):
        self.jobs, self.works = deque(), False

    def is_ready(self):
        return bool(self.jobs) and not self.works

    def run(self):
        job, self.works = self.jobs[0], True
        try:
            job.job()
        except Exception as error:
            job.error = error
        self.works, job.is_done = False, True
        self.jobs.popleft()


class World:
    """An accelerator; ``choose(n)`` says which of n things is done next."""

    def __init__(self, choose):
        self.choose = choose
        self.streams, self.worker = (Stream(self), Stream(self)), Worker()

    def ready(self):
        return [agent for agent in (*self.streams, self.worker) if agent.is_ready()]

    def go_on(self):
        """Whatever of the others' work is done before the host's next call."""
        while (agents := self.ready()) and (chosen := self.choose(len(agents) + 1)):
            agents[chosen - 1].run()

    def until(self, holds):
        while not holds():
            agents = self.ready()
            agents[self.choose(len(agents))].run()

    def write(self, cell, value):
        """What an optimizer's kernel, or a swap, does."""
        cell.version += 1
        self.streams[0].add(partial(setattr, cell, "value", value))

    def main(self, device):
        return self.streams[0]

    def side(self, device):
        return self.streams[1]

    def event(self, stream):
        return Event(stream)

    def copy_(self, targets, sources, stream):
        for target, source in zip(targets, sources, strict=True):
            stream.add(lambda t=target, s=source: setattr(t, "value", s.value))

    def held(self, weights):
        return weights

    def versions(self, held):
        return [cell.version for cell in held]

    def start(self, job):
        job = Job(self, job)
        self.worker.jobs.append(job)
        self.go_on()
        return job


def every_order(run):
    """What ``run(choose)`` returns for every sequence of choices."""
    path = []
    while True:
        steps = iter(range(10_000))

        def choose(count, steps=steps):
            now = next(steps)
            if now == len(path):
                path.append([0, count])
            return path[now][0]

        yield run(choose)
        while path and path[-1][0] + 1 == path[-1][1]:
            path.pop()
        if not path:
            return
        path[-1][0] += 1
