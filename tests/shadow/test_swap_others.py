"""Who else writes while the EMA weights are in: optimizers, loads, other averages, threads."""

import contextlib
import copy
import pickle
import threading
import warnings

import pytest
import torch
from interrupts import Run
from torch.optim import SGD
from torch.optim.optimizer import _global_optimizer_pre_hooks

from ema_optim import EMAModel, EMAOptimizer

pytestmark = pytest.mark.filterwarnings("ignore:the EMA still holds")


@pytest.mark.parametrize("student_first", [False, True])
def test_teacher_and_student_in_one_autocast_region_keep_their_own_weights(student_first):
    # torch.autocast keeps the casts of the weights until its outermost region ends.
    torch.manual_seed(0)
    model, batch = torch.nn.Linear(4, 4), torch.randn(2, 4)
    optimizer = EMAOptimizer(SGD(model.parameters(), lr=1.0), 0.5)
    model(batch).sum().backward()
    optimizer.step()

    def forward(ema):
        with optimizer.swap_ema_weights(ema), torch.autocast("cpu", torch.bfloat16):
            return model(batch)

    apart = {ema: forward(ema) for ema in (False, True)}
    order = (False, True) if student_first else (True, False)
    with torch.autocast("cpu", torch.bfloat16):
        together = {ema: forward(ema) for ema in order}
    assert all(torch.equal(apart[ema], together[ema]) for ema in order)


def test_a_step_of_any_optimizer_inside_a_block_raises_before_it_writes():
    run = Run(door=EMAModel)
    with run.ema.use_ema():
        inside = run.weights()
        with pytest.raises(RuntimeError, match=r"step\(\) of SGD over parameters that hold EMA"):
            run.inner.step()
        assert all(map(torch.equal, run.weights(), inside))
        other = torch.nn.Parameter(torch.ones(2))
        other.grad = torch.ones(2)
        SGD([other], lr=1.0).step()  # of others' parameters: free
    assert run.whole()
    assert not _global_optimizer_pre_hooks
    run.step()


def test_a_load_into_the_model_inside_a_block_raises_and_a_copy_is_free():
    run = Run(door=EMAModel)
    weights = run.model.state_dict()
    with run.ema.use_ema():
        with pytest.raises(RuntimeError, match="of a model whose parameters hold EMA weights"):
            run.model.load_state_dict(weights)
        for copied in (copy.deepcopy(run.model), pickle.loads(pickle.dumps(run.model))):
            copied.load_state_dict(weights)
    assert run.whole()
    run.model.load_state_dict(weights)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_write_inside_a_block_is_told_by_name(dtype):
    run = Run(dtype)
    averages = run.averages()
    with (
        pytest.warns(UserWarning, match="^parameter 1: written to while"),
        run.ema.swap_ema_weights(),
        torch.no_grad(),
    ):
        run.params[1].fill_(9.0)
    assert torch.equal(run.weights()[1], run.expected[0][1])
    kept = averages["1"] if dtype is torch.bfloat16 else torch.full((2,), 9.0)
    assert torch.equal(run.averages()["1"], kept)


def test_nested_blocks_of_two_averages_are_right():
    run = Run()
    other = EMAModel(run.model, 0.5)
    run.step()
    other.update()
    run.expected, others = (run.weights(), run.averages()), other.get_ema_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the inner swap is no write of a user
        warnings.filterwarnings("ignore", "the EMA still holds")
        for outer, inner in [(run.ema, other), (other, run.ema)]:
            with outer.swap_ema_weights(), inner.use_ema():
                pass
    assert run.whole()
    assert all(torch.equal(value, others[name]) for name, value in other.get_ema_state().items())


def test_what_crosses_the_swap_of_another_average_raises_and_loses_nothing():
    run = Run()
    second, third = EMAOptimizer(SGD(run.params, lr=0.1), 0.5), EMAModel(run.model, 0.5)
    second.step()
    run.expected = run.weights(), run.averages()
    run.ema.eval()
    for act in (second.step, third.update, third.apply_ema, third.reset, second.apply_ema):
        with pytest.raises(RuntimeError, match="another object"):
            act()
    second.eval()
    with pytest.raises(RuntimeError, match="swapped later"):
        run.ema.train()
    second.train()
    run.ema.train()
    assert run.whole()


def test_a_step_beside_a_swap_of_another_thread_is_refused():
    run, refused = Run(), []

    def step():
        with contextlib.suppress(RuntimeError):
            run.step()
            return
        refused.append(True)

    with run.ema._ema.swap.alone("a swap"):
        thread = threading.Thread(target=step)
        thread.start()
        thread.join()
    assert refused
    assert run.whole()


def test_after_eval_with_nothing_swapped_in_a_step_is_free():
    params = Run().params
    optimizer = EMAOptimizer(SGD(params, lr=0.1), 0.5)
    optimizer.eval()
    assert not optimizer.swapped
    optimizer.step()
