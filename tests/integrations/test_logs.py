"""What the package says: its log, the category of its warnings, and when they are given."""

import logging
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from ranks import on_ranks

from ema_optim import EMAModel, EMAOptimizer, EMAWarning, _warnings

ROOT = Path(__file__).parents[2]


@pytest.fixture
def nothing_told(monkeypatch):
    monkeypatch.setattr(_warnings, "_told", set())


def optimizer(decay):
    return EMAOptimizer(torch.optim.SGD(torch.nn.Linear(2, 2).parameters(), lr=0.1), decay)


def model(decay):
    return EMAModel(torch.nn.Linear(2, 2), decay)


@pytest.mark.parametrize("build", [optimizer, model])
def test_decay_that_looks_like_tau_is_told_once_with_the_remedy(build, nothing_told):
    with pytest.warns(EMAWarning, match=r"decay=0.005 looks like tau.* here 0.995") as told:
        build(0.005)
    assert told[0].filename == __file__
    build(0.3)


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.999, 1.0, lambda update: 0.1])
@pytest.mark.parametrize("build", [optimizer, model])
def test_other_decays_are_not_told(build, decay, nothing_told):
    build(decay)


@pytest.mark.parametrize("build", [optimizer, model])
def test_auto_without_a_trainer_names_what_to_pass(build):
    with pytest.raises(TypeError, match=r"got 'auto': pass compute_optimal_decay.total_steps."):
        build("auto")


def test_every_warning_goes_through_one_category():
    files = (ROOT / "ema_optim").rglob("*.py")
    assert {f.name for f in files if "warnings.warn(" in f.read_text()} == {"_warnings.py"}
    assert issubclass(EMAWarning, UserWarning)


def heard(call, *ignored):
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for category in ignored:
            warnings.simplefilter("ignore", category)
        call()
    return [str(warning.message) for warning in told]


def test_a_filter_by_category_silences_the_package(nothing_told):
    assert heard(lambda: optimizer(0.01), EMAWarning) == []


class Lines(logging.Handler):
    def __init__(self):
        super().__init__()
        self.lines = []

    def emit(self, record):
        self.lines.append(record.getMessage())


@on_ranks(2)
def test_one_rank_warns_and_logs_unless_the_others_may_not_know(world):
    handler, logger = Lines(), logging.getLogger("ema_optim")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logging.disable(logging.NOTSET)  # tests of trainers in the same process keep them silent
    _warnings.log("a %s", "line")
    logger.removeHandler(handler)
    first = torch.distributed.get_rank() == 0
    assert handler.lines == (["a line"] if first else [])
    assert heard(lambda: _warnings.warn("all know")) == (["all know"] if first else [])
    assert heard(lambda: _warnings.warn("a part", every_rank=True)) == ["a part"]


def test_log_is_silent_unless_asked_for():
    code = "import ema_optim._warnings as w; w.log('a %s', 'line')"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (run.stdout, run.stderr, run.returncode) == ("", "", 0)


# Torch's compiler asks its own library by a deprecated name.
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_compiling_is_logged_before_it_takes_its_time(caplog):
    caplog.set_level(logging.INFO, "ema_optim")
    made = optimizer(0.9)
    made.compile(backend="eager")
    for _ in range(4):
        sum(p.sum() for p in made.param_groups[0]["params"]).backward()
        made.step()
    told = [record.getMessage() for record in caplog.records if record.name == "ema_optim"]
    assert told == ["compiling the step of SGD and the EMA of 2 tensors: seconds to minutes"]
