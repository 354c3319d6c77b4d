import pytest
import torch
from ranks import stop_pools

from ema_optim import _warnings


@pytest.fixture(autouse=True)
def _small_decays_are_told_already(monkeypatch):
    # They keep tests of a few steps short; test_logs.py has the warning.
    monkeypatch.setattr(_warnings, "_told", {"tau"})


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
