"""The EMA inside the param groups of a checkpoint: every optimizer brings it through unharmed."""

import copy

import pytest
import torch
from reference import same, through_file
from torch.optim import SGD, AdamW

from ema_optim import EMAOptimizer, strip_ema_state_dict
from ema_optim._checkpoint import carry

DTYPES = [torch.float32, torch.bfloat16, torch.float64]
INNERS = [lambda groups: AdamW(groups, lr=0.05), lambda groups: SGD(groups, lr=0.05)]


def make(dtype=torch.float32, inner=INNERS[0], seed=0):
    """Two groups; the last parameter never has a gradient."""
    torch.manual_seed(seed)
    params = [torch.nn.Parameter(torch.randn(3, 2).to(dtype)) for _ in range(4)]
    groups = [{"params": params[:1], "ema_decay": 0.25}, {"params": params[1:]}]
    return params, EMAOptimizer(inner(groups), decay=0.1)


def step(params, optimizer, steps=3):
    for _ in range(steps):
        for p in params[:-1]:
            p.grad = torch.randn_like(p)
        optimizer.step()


def trained(*args, **kwargs):
    params, optimizer = make(*args, **kwargs)
    step(params, optimizer)
    return params, optimizer


def bare(params, inner=INNERS[0]):
    return inner([{"params": params[:1]}, {"params": params[1:]}])


@pytest.mark.parametrize("inner", INNERS, ids=["adamw", "sgd"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("swapped", [False, True])
def test_uncarry_inverts_carry(dtype, inner, swapped):
    _, optimizer = trained(dtype, inner)
    if swapped:
        optimizer.eval()
    state_dict = optimizer.state_dict()
    carried = through_file(carry.carry(state_dict))
    assert not any("ema" in entry for entry in carried["state"].values())
    assert same(carry.uncarry(carried), state_dict)


@pytest.mark.parametrize("saved", [{}, {"state": {}, "param_groups": {}}, {"model": torch.ones(1)}])
def test_uncarry_leaves_what_is_no_checkpoint_of_torch_as_it_is(saved):
    assert same(carry.uncarry(saved), saved)


def test_uncarry_leaves_a_checkpoint_without_entries_as_it_is():
    state_dict = trained()[1].state_dict()
    for saved in (state_dict, strip_ema_state_dict(state_dict)):
        assert same(carry.uncarry(saved), saved)


def test_carry_and_uncarry_leave_their_argument_alone():
    state_dict = trained()[1].state_dict()
    carried = carry.carry(state_dict)
    before = copy.deepcopy((state_dict, carried))
    carry.carry(state_dict)
    carry.uncarry(carried)
    assert same((state_dict, carried), before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bare_optimizer_trains_on_from_a_carried_checkpoint_bit_for_bit(dtype):
    params, optimizer = trained(dtype)
    again = copy.deepcopy(params)
    plain = bare(again)
    plain.load_state_dict(through_file(carry.carry(optimizer.state_dict())))
    for run in ((params, optimizer), (again, plain)):
        torch.manual_seed(1)
        step(*run)
    assert same(again, params)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("swapped", [False, True])
def test_ema_adopted_from_the_bare_optimizer_is_the_saved_one_bit_for_bit(dtype, swapped):
    params, optimizer = trained(dtype)
    if swapped:
        optimizer.eval()
    again = copy.deepcopy(params)
    plain = bare(again)
    plain.load_state_dict(through_file(carry.carry(optimizer.state_dict())))
    assert carry.is_carrying(plain.param_groups)
    fresh = EMAOptimizer(plain, decay=0.1)
    carry.adopt(fresh._ema)
    assert not carry.is_carrying(plain.param_groups)
    for run in (optimizer, fresh):
        run.train()
    assert same(again, params)
    assert same(fresh.state_dict(), optimizer.state_dict())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_carried_checkpoint_loads_into_an_ema_optimizer_like_any(dtype):
    params, optimizer = trained(dtype)
    again = EMAOptimizer(bare(params), decay=0.1)
    again.load_state_dict(through_file(carry.carry(optimizer.state_dict())))
    assert same(again.state_dict(), optimizer.state_dict())


def test_carried_checkpoint_is_stripped_like_any():
    state_dict = trained()[1].state_dict()
    assert same(strip_ema_state_dict(carry.carry(state_dict)), strip_ema_state_dict(state_dict))


def test_carried_checkpoint_taken_while_swapped_is_not_stripped():
    _, optimizer = trained()
    optimizer.eval()
    with pytest.raises(ValueError, match="must not be written while swapped"):
        strip_ema_state_dict(carry.carry(optimizer.state_dict()))


def test_bare_optimizer_hands_the_entries_on_until_they_are_dropped():
    params, optimizer = trained()
    carried = carry.carry(optimizer.state_dict())
    plain = bare(params)
    plain.load_state_dict(carried)
    handed_on = plain.state_dict()["param_groups"]
    assert same([g["ema_entries"] for g in handed_on], entries(carried))
    carry.drop(plain.param_groups)
    assert not carry.is_carrying(plain.state_dict()["param_groups"])


def entries(state_dict):
    return [group["ema_entries"] for group in state_dict["param_groups"]]


def test_entries_survive_training_of_the_bare_optimizer_unchanged():
    params, optimizer = trained()
    plain = bare(params)
    carried = carry.carry(optimizer.state_dict())
    before = copy.deepcopy(entries(carried))
    plain.load_state_dict(carried)
    step(params, plain)
    optimizer.step()  # moves the EMA whose tensors were carried
    assert same(entries(plain.state_dict()), before)


def test_damaged_entries_raise_and_name_the_parameter():
    params, optimizer = trained()
    carried = carry.carry(optimizer.state_dict())
    entries(carried)[1]["params"][0]["ema"] = torch.zeros(7)
    with pytest.raises(ValueError, match=r"ema of param_groups\[1\]\['params'\]\[0\] must have"):
        make(seed=9)[1].load_state_dict(carried)
    plain = bare(params)
    plain.load_state_dict(carried)
    fresh = EMAOptimizer(plain, decay=0.1)
    with pytest.raises(ValueError, match=r"ema of param_groups\[1\]\['params'\]\[0\] must have"):
        carry.adopt(fresh._ema)


def test_group_that_the_bare_optimizer_was_given_later_carries_nothing_and_does_no_harm():
    params, optimizer = trained()
    plain = bare(params)
    plain.load_state_dict(carry.carry(optimizer.state_dict()))
    late = torch.nn.Parameter(torch.ones(2))
    plain.add_param_group({"params": [late]})
    step([*params[:-1], late, params[-1]], plain)
    saved = plain.state_dict()
    assert same(strip_ema_state_dict(saved)["state"], saved["state"])
    wrapped = EMAOptimizer(plain, decay=0.1)
    carry.adopt(wrapped._ema)
    for p in params:
        assert same(wrapped.state[p]["ema"], optimizer.state[p]["ema"])
