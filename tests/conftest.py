import pytest
import torch
from interpreted import on_cpu, stood_in  # noqa: F401
from ranks import stop_pools

from ema_optim import _warnings


@pytest.fixture(autouse=True)
def _some_things_are_told_already(monkeypatch):
    # Small decays keep tests of a few steps short. These warnings have tests of their own.
    monkeypatch.setattr(_warnings, "_told", {"tau", "folders", "statistics"})


@pytest.fixture(autouse=True)
def _one_seed_and_one_thread():
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True, scope="session")
def _no_processes_left():
    yield
    stop_pools()
