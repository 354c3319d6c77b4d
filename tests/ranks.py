"""Tests that run on several real processes: ``@on_ranks(2, 4)``.

The body of such a test runs on every rank of a gloo group. The processes are started once for each
number of ranks and serve all tests; a rank that fails or hangs ends them.
"""

import contextlib
import functools
import importlib
import inspect
import sys
import tempfile
import traceback
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

SECONDS = 120


def on_ranks(*sizes):
    """Run the body of a test on every rank of groups of these sizes."""

    def decorate(body):
        @functools.wraps(body)
        def test(world, **arguments):
            run_on(world, body, **arguments)

        own = [p for p in inspect.signature(body).parameters.values() if p.name != "world"]
        world = inspect.Parameter("world", inspect.Parameter.POSITIONAL_OR_KEYWORD)
        test.__signature__ = inspect.Signature([world, *own])
        test.body = body
        return pytest.mark.parametrize("world", sizes)(test)

    return decorate


def run_on(world, body, **arguments):
    """Run a function of a test module on every rank of a group."""
    pool_of(world).run(Path(inspect.getfile(body)).stem, body.__name__, arguments)


@functools.cache
def pool_of(world):
    return Pool(world)


def stop_pools():
    """End all processes."""
    if pool_of.cache_info().currsize:
        for world in (1, 2, 4):
            pool_of(world).stop()
        pool_of.cache_clear()


class Pool:
    """Processes that form one gloo group and wait for tests."""

    def __init__(self, world):
        self.world, self.pipes, self.processes = world, [], []

    def start(self):
        context = mp.get_context("spawn")
        self.store = tempfile.TemporaryDirectory()
        for rank in range(self.world):
            ours, theirs = context.Pipe()
            arguments = (rank, self.world, f"file://{self.store.name}/store", theirs)
            process = context.Process(target=serve, args=arguments, daemon=True)
            process.start()
            self.pipes.append(ours)
            self.processes.append(process)

    def run(self, module, name, arguments):
        if not self.processes:
            self.start()
        for pipe in self.pipes:
            pipe.send((module, name, arguments))
        failures = [f"rank {rank}: {text}" for rank, text in enumerate(self.answers()) if text]
        if failures:
            self.stop()
            pytest.fail("\n".join(failures), pytrace=False)

    def answers(self):
        for pipe in self.pipes:
            try:
                yield pipe.recv() if pipe.poll(SECONDS) else f"no answer in {SECONDS} s"
            except EOFError:
                yield "the process has died"

    def stop(self):
        for process in self.processes:
            process.kill()
            process.join()
        if self.processes:
            self.store.cleanup()
        self.pipes, self.processes = [], []


def serve(rank, world, store, pipe):
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", "the EMA still holds")  # the runs are short
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
    with contextlib.suppress(EOFError):  # the tests have ended
        while True:
            module, name, arguments = pipe.recv()
            try:
                torch.manual_seed(0)
                found = getattr(importlib.import_module(module), name)
                body = getattr(found, "body", found)
                given = {"world": world} if "world" in inspect.signature(body).parameters else {}
                body(**given, **arguments)
                pipe.send("")
            except BaseException:
                pipe.send(traceback.format_exc())
            sys.stdout.flush()
