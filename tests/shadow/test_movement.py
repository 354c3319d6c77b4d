"""``EMAModel.update()`` per micro-batch is noticed, and nothing else is taken for it."""

import copy
import warnings

import pytest
import torch
from torch import nn

from ema_optim import EMAModel

MESSAGE = "not after every micro-batch"


def net():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    model.register_parameter("unused", nn.Parameter(torch.zeros(())))
    return model


def run(moves, model=None, step=None, zero_grad=True, ema=None):
    """The numbers of the updates that warn; ``moves`` says where the optimizer steps before."""
    model = net() if model is None else model
    ema = EMAModel(model, 0.9, use_buffers=True) if ema is None else ema
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    warned = []
    for update, move in enumerate(moves, start=1):
        model(torch.randn(5, 3)).sum().backward()
        if move:
            (step or optimizer.step)()
            if zero_grad:
                optimizer.zero_grad()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            ema.update()
        warned += [update for warning in caught if MESSAGE in str(warning.message)]
    return warned


def every(k, updates=24):
    return [update % k == 0 for update in range(1, updates + 1)]


# The loop of lightly and of Accelerate's accumulate() with the update outside of the branch.
@pytest.mark.parametrize("k", [3, 4, 8])
@pytest.mark.parametrize("zero_grad", [True, False])
def test_an_update_per_micro_batch_is_warned_of_once(k, zero_grad):
    assert len(run(every(k), zero_grad=zero_grad)) == 1


@pytest.mark.parametrize(
    ("moves", "warned"),
    [
        ([1, 0, 0, 0, 1, 0, 0, 0], [4]),
        ([0, 0, 0, 0], [4]),
        ([1] * 9 + [0, 0, 1, 0, 1], [13]),
        ([1, 0, 0, 1, 1] * 5, []),
    ],
)
def test_the_warning_comes_at_three_of_the_last_four(moves, warned):
    assert run(moves) == warned


@pytest.mark.parametrize("moves", [every(1), every(2), [1, 1, 1, 0] * 6, [0, 0, 1, 1, 1, 1, 1]])
def test_updates_after_steps_are_not_warned_of(moves):
    # A step that a GradScaler skips is an update with unmoved weights, and so is a resume.
    assert run(moves) == []


def data_step(model):
    def step():
        for param in model.parameters():
            if param.grad is not None:
                param.data.sub_(param.grad, alpha=0.1)

    return step


# Fused kernels and replayed graphs write without a word to autograd, as .data does.
def test_weights_that_move_without_their_version_counter_are_not_warned_of():
    model = net()
    assert run(every(1), model, data_step(model)) == []
    assert len(run(every(4), model, data_step(model))) == 1


@pytest.mark.parametrize("grads", [True, False])
def test_parameters_that_rest_among_others_are_not_warned_of(grads):
    model = net()
    model.unused.grad = torch.zeros(()) if grads else None
    assert run(every(1), model) == []


def test_layers_that_are_frozen_later_are_not_warned_of():
    model = net()
    ema = EMAModel(model, 0.9)
    assert run(every(1, 8), model, ema=ema) == []
    model[0].requires_grad_(False)
    model[1].requires_grad_(False)
    assert run(every(1, 8), model, ema=ema) == []
    model[2] = nn.Linear(4, 2)
    assert run(every(1, 12), model, ema=ema) == []


def test_a_model_that_is_frozen_in_whole_is_not_warned_of():
    model = net()
    ema = EMAModel(model, 0.9)
    assert run(every(1, 8), model, ema=ema) == []
    model.requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        [ema.update() for _ in range(8)]


def test_a_copy_watches_its_own_weights():
    model = net()
    ema = EMAModel(model, 0.9)
    run(every(1, 8), model, ema=ema)
    other = copy.deepcopy(ema)
    assert run(every(1, 8), other.model, ema=other) == []
    assert run(every(4, 8), other.model, ema=other) == [3]


def test_nothing_is_looked_at_in_a_long_run():
    ema = EMAModel(net(), 0.9)
    run(every(1, 120), ema.model, ema=ema)
    assert run(every(4, 16), ema.model, ema=ema) == []
