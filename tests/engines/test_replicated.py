"""Replicated training on real process groups: DDP, accumulation, ZeRO."""

import contextlib
import itertools
import warnings

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks, run_on
from sharded import (
    DECAY,
    batch,
    equal,
    optimizer_of,
    outputs,
    plain_model,
    whole_ema,
    whole_weights,
)
from torch.nn.parallel import DistributedDataParallel

from ema_optim import EMAModel, EMAOptimizer

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch's own use of torch.jit.script, at import
    from torch.distributed.optim import ZeroRedundancyOptimizer

EMAAdamW = EMAOptimizer.for_class(torch.optim.AdamW, decay=DECAY)


def on_every_rank(tensors):
    """Whether all ranks hold the same bits."""
    held = [None] * dist.get_world_size()
    dist.all_gather_object(held, {name: t.clone() for name, t in tensors.items()})
    return all(equal(held[0], other) for other in held)


def part(step, micro=0, micros=1):
    """This rank's rows of the joined batch (or of one of its micro-batches)."""
    world, rank = dist.get_world_size(), dist.get_rank()
    return batch(step, torch.float64).chunk(world * micros)[rank * micros + micro]


def train(model, optimizer, steps, micros=1):
    for step in steps:
        optimizer.zero_grad()
        for micro in range(micros):
            last = micro == micros - 1
            waits = contextlib.nullcontext() if last else model.no_sync()
            with waits:
                (model(part(step, micro, micros)).square().mean() / micros).backward()
        optimizer.step()


def joined(steps):
    """One process with the joined batches."""
    model = plain_model(torch.float64)
    optimizer = optimizer_of(model)
    for step in steps:
        optimizer.zero_grad()
        model(batch(step, torch.float64)).square().mean().backward()
        optimizer.step()
    return whole_weights(model), whole_ema(optimizer, model)


def near(left, right):
    return left.keys() == right.keys() and all(
        torch.allclose(left[name], right[name], rtol=1e-9, atol=1e-12) for name in left
    )


def replicated(static=False):
    return DistributedDataParallel(plain_model(torch.float64), static_graph=static)


@pytest.mark.parametrize("micros", [1, 2])
@on_ranks(2, 4)
def test_ddp_averages_as_one_process_with_the_joined_batch(world, micros):
    model = replicated()
    optimizer = optimizer_of(model)
    train(model, optimizer, range(5), micros)
    weights, emas = joined(range(5))
    assert near(whole_weights(model.module), weights)
    assert near(whole_ema(optimizer, model), emas)
    assert optimizer.param_groups[0]["ema_step"] == 5
    assert on_every_rank(whole_ema(optimizer, model))


@on_ranks(2)
def test_all_ranks_evaluate_the_same_ema_and_train_on(world):
    model = replicated()
    optimizer = optimizer_of(model)
    for step in range(4):
        train(model, optimizer, [step])
        with optimizer.swap_ema_weights():
            assert on_every_rank({"outputs": outputs(model)})
            assert equal(whole_weights(model.module), whole_ema(optimizer, model))
    assert near(whole_weights(model.module), joined(range(4))[0])


@on_ranks(2)
def test_one_rank_may_evaluate_alone(world):
    model = replicated()
    optimizer = optimizer_of(model)
    train(model, optimizer, range(2))
    if dist.get_rank() == 0:
        with optimizer.swap_ema_weights():
            outputs(model.module)
        optimizer.ema_metrics()
        optimizer.get_ema_state(model)
    train(model, optimizer, range(2, 4))
    assert on_every_rank(whole_ema(optimizer, model))
    assert near(whole_weights(model.module), joined(range(4))[0])


@on_ranks(2)
def test_ema_model_over_ddp_has_the_bare_names_and_averages(world):
    model = replicated()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, foreach=False)
    ema = EMAModel(model, DECAY)
    for step in range(4):
        train(model, optimizer, [step])
        ema.update()
    assert near(ema.get_ema_state(), joined(range(4))[1])


def zero_outside(model):
    zero = ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, lr=0.1, foreach=False)
    return EMAOptimizer(zero, DECAY)


def zero_inside(model):
    return ZeroRedundancyOptimizer(model.parameters(), EMAAdamW, lr=0.1, foreach=False)


@on_ranks(2, 4)
def test_around_zero_every_rank_holds_the_whole_average(world):
    model = replicated()
    optimizer = zero_outside(model)
    train(model, optimizer, range(4))
    weights, emas = joined(range(4))
    assert near(whole_ema(optimizer, model), emas)
    with optimizer.swap_ema_weights():
        assert near(whole_weights(model.module), emas)
    assert near(whole_weights(model.module), weights)
    assert on_every_rank(whole_ema(optimizer, model))


@on_ranks(2, 4)
def test_inside_zero_every_rank_averages_what_it_steps(world):
    model = replicated()
    optimizer = zero_inside(model)
    train(model, optimizer, range(4))
    own = optimizer.optim.get_ema_state(model)
    names = [None] * world
    dist.all_gather_object(names, sorted(own))
    assert sorted(itertools.chain(*names)) == sorted(whole_weights(model.module))
    emas = joined(range(4))[1]
    assert near(own, {name: emas[name] for name in own})


def zero_saves(make, file, world):
    model = replicated()
    optimizer = ZERO[make](model)
    train(model, optimizer, range(3))
    zero = getattr(optimizer, "inner", optimizer)
    zero.consolidate_state_dict(to=0)
    if dist.get_rank() == 0:
        torch.save([model.module.state_dict(), optimizer.state_dict()], file)


def zero_goes_on(make, file, world):
    model = replicated()
    optimizer = ZERO[make](model)
    weights, state = torch.load(file, weights_only=False)
    model.module.load_state_dict(weights)
    optimizer.load_state_dict(state)
    train(model, optimizer, range(3, 6))
    weights, emas = joined(range(6))
    own = getattr(optimizer, "optim", optimizer).get_ema_state(model)
    assert near(whole_weights(model.module), weights)
    assert near(own, {name: emas[name] for name in own})


ZERO = {"outside": zero_outside, "inside": zero_inside}


@pytest.mark.parametrize("make", ZERO)
@pytest.mark.parametrize("ranks", [4, 2])
def test_zero_resumes_on_other_numbers_of_ranks(tmp_path, make, ranks):
    run_on(4, zero_saves, make=make, file=tmp_path / "zero.pt")
    run_on(ranks, zero_goes_on, make=make, file=tmp_path / "zero.pt")
