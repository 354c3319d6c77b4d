"""Tests that run on several real processes: ``@on_ranks(2, 4)``.

The body of such a test runs on every rank of a gloo group. The processes are started once for each
number of ranks and serve all tests; a rank that fails or hangs ends them.
"""

import contextlib
import functools
import importlib.util
import inspect
import os
import sys
import tempfile
import time
import traceback
import warnings
from multiprocessing.connection import wait
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
    if failures := pool_of(world).attempt(body, arguments):
        pytest.fail("\n".join(failures), pytrace=False)


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

    def attempt(self, body, arguments):
        """Run a function on every rank and return what went wrong."""
        if not self.processes:
            self.start()
        for pipe in self.pipes:
            pipe.send((inspect.getfile(body), body.__name__, arguments))
        failures = self.failures()
        if failures:
            self.stop()
        return failures

    def failures(self):
        silent, found = dict(enumerate(self.pipes)), []
        end = time.monotonic() + SECONDS
        while silent and (ready := wait(silent.values(), max(0, end - time.monotonic()))):
            for rank in [rank for rank, pipe in silent.items() if pipe in ready]:
                if text := answer(silent.pop(rank)):
                    found.append(f"rank {rank}: {text}")
                    end = min(end, time.monotonic() + 5)  # the others may wait for it for ever
        return found + [f"rank {rank}: no answer" for rank in silent]

    def stop(self):
        for process in self.processes:
            process.kill()
            process.join()
        if self.processes:
            self.store.cleanup()
        self.pipes, self.processes = [], []


def answer(pipe):
    try:
        return pipe.recv()
    except (EOFError, ConnectionResetError):
        return "the process has died"


def module_of(file):
    """The module of a file, under its own name, as the other files import it."""
    name = Path(file).stem  # unique among all folders of tests
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, file)
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def serve(rank, world, store, pipe):
    warnings.simplefilter("error")
    short = (
        "the EMA (will )?still hold|an EMA in bfloat16|decay=.* looks like tau|the model files hold"
    )
    warnings.filterwarnings("ignore", short)  # short runs
    torch.set_num_threads(1)
    # What torchrun sets, for the engines that look there.
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    os.environ.update({name: str(value) for name, value in names.items()}, OMP_NUM_THREADS="1")
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
    with contextlib.suppress(EOFError):  # the tests have ended
        while True:
            file, name, arguments = pipe.recv()
            try:
                torch.manual_seed(0)
                found = getattr(module_of(file), name)
                body = getattr(found, "body", found)
                given = {"world": world} if "world" in inspect.signature(body).parameters else {}
                body(**given, **arguments)
                pipe.send("")
            except BaseException:
                pipe.send(traceback.format_exc())
            sys.stdout.flush()
