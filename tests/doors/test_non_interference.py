"""Wrapped equals bare, and interrupted equals uninterrupted, bit for bit, for every optimizer."""

import pytest
import torch
from cases import OPTIMIZERS, RESUMABLE, Problem
from reference import Reference, same, through_file

from ema_optim import EMAOptimizer, strip_ema_state_dict

STEPS = 6


@pytest.mark.parametrize("case", OPTIMIZERS, ids=repr)
def test_wrapped_trajectory_equals_bare_trajectory(case):
    bare, wrapped = Problem(case), Problem(case)
    optimizers = case.build(bare.params), EMAOptimizer(case.build(wrapped.params), decay=0.5)
    for _ in range(STEPS):
        bare.step(optimizers[0])
        wrapped.step(optimizers[1])
        assert same(wrapped.params, bare.params)
    assert same(strip_ema_state_dict(optimizers[1].state_dict()), optimizers[0].state_dict())


@pytest.mark.parametrize("case", OPTIMIZERS, ids=repr)
def test_ema_equals_float64_reference_in_lock_step(case):
    problem = Problem(case)
    optimizer = EMAOptimizer(case.build(problem.params), decay=0.5)
    reference = Reference(problem.params, 0.5)
    for _ in range(STEPS):
        problem.step(optimizer)
        reference.update()
        for param, expected in zip(problem.params, reference.emas, strict=True):
            torch.testing.assert_close(
                optimizer.state[param]["ema"].double(), expected, rtol=1e-6, atol=1e-6
            )


@pytest.mark.parametrize("case", RESUMABLE, ids=repr)
@pytest.mark.parametrize("at", [1, 4])
def test_resumed_run_equals_uninterrupted_run(case, at):
    problem, resumed = Problem(case), Problem(case)
    optimizer = EMAOptimizer(case.build(problem.params), decay=0.5)
    for step in range(STEPS):
        if step == at:
            saved = through_file([[p.detach() for p in problem.params], optimizer.state_dict()])
            again = _resume(case, resumed, problem, saved)
        problem.step(optimizer)
        if step >= at:
            resumed.step(again)
    assert same(resumed.params, problem.params)
    assert same(again.state_dict(), optimizer.state_dict())


def _resume(case, resumed, problem, saved):
    with torch.no_grad():
        for param, value in zip(resumed.params, saved[0], strict=True):
            param.copy_(value)
    optimizer = EMAOptimizer(case.build(resumed.params), decay=0.5)
    optimizer.load_state_dict(saved[1])
    resumed.random.set_state(problem.random.get_state())
    resumed.step_number = problem.step_number
    return optimizer
