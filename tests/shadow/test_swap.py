"""The exchange of training weights and EMA weights, in every way it is entered and left."""

import contextlib

import pytest
import torch
from interrupts import Interrupt
from measured import peak_allocation
from reference import same
from steps import copies, emas, train
from torch.optim import SGD

from ema_optim import EMAOptimizer
from ema_optim._shadow import swap as swapping

DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.complex64]
MIB = 2**20


def trained(dtype=torch.float32, size=(6, 5), steps=3, **kwargs):
    params = [torch.nn.Parameter(torch.randn(size, dtype=dtype)) for _ in range(3)]
    optimizer = EMAOptimizer(SGD(params, lr=0.5), decay=0.1, **kwargs)
    train(optimizer, steps)
    return params, optimizer


@contextlib.contextmanager
def mode(optimizer):
    optimizer.eval()
    try:
        yield
    finally:
        optimizer.train()


ENTRANCES = [lambda optimizer: optimizer.swap_ema_weights(), mode]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("entrance", ENTRANCES, ids=["block", "mode"])
def test_swap_puts_ema_in_and_everything_back_bit_for_bit(dtype, entrance):
    params, optimizer = trained(dtype)
    weights, averages = copies(params), emas(optimizer)
    with entrance(optimizer):
        assert optimizer.swapped
        assert all(torch.equal(p, e.to(dtype)) for p, e in zip(params, averages, strict=True))
    assert not optimizer.swapped
    assert same(copies(params), weights)
    assert same(emas(optimizer), averages)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_training_goes_on_after_a_swap_as_if_there_had_been_none(dtype):
    finals = []
    for swaps in (0, 2):
        torch.manual_seed(1)
        params, optimizer = trained(dtype)
        for _ in range(swaps):
            with optimizer.swap_ema_weights():
                pass
        torch.manual_seed(2)
        train(optimizer, 3)
        finals.append((copies(params), optimizer.state_dict()))
    assert same(*finals)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_addresses_do_not_change(dtype):
    params, optimizer = trained(dtype)
    before = [p.data_ptr() for p in params]
    with optimizer.swap_ema_weights():
        inside = [p.data_ptr() for p in params]
    assert before == inside == [p.data_ptr() for p in params]


def test_exception_in_the_block_restores():
    params, optimizer = trained()
    weights = copies(params)
    with pytest.raises(KeyError), optimizer.swap_ema_weights():
        raise KeyError
    assert same(copies(params), weights)
    train(optimizer)


class Broken:
    """Raises at the n-th multi-tensor copy, before or after doing it, and never again."""

    def __init__(self, monkeypatch, at, after):
        self.real, self.at, self.after, self.calls = torch._foreach_copy_, at, after, 0
        monkeypatch.setattr(torch, "_foreach_copy_", self)

    def __call__(self, targets, sources):
        self.calls += 1
        if self.calls == self.at and not self.after:
            raise Interrupt
        self.real(targets, sources)
        if self.calls == self.at and self.after:
            raise Interrupt


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("at", range(1, 14))
def test_interrupt_anywhere_in_the_exchange_restores(monkeypatch, dtype, after, at):
    params, optimizer = trained(dtype, size=(300, 1000))  # more than one scratch buffer
    weights, averages = copies(params), emas(optimizer)
    broken = Broken(monkeypatch, at, after)
    with contextlib.suppress(Interrupt), optimizer.swap_ema_weights():
        pass
    monkeypatch.undo()
    assert broken.calls >= at or dtype is torch.bfloat16
    assert not optimizer.swapped
    assert same(copies(params), weights)
    assert same(emas(optimizer), averages)
    train(optimizer)


@pytest.mark.parametrize("name", ["put_in", "swap_in", "put_back", "put_back_for_good"])
@pytest.mark.parametrize("after", [False, True])
def test_interrupt_between_two_calls_never_lets_a_step_run_on_ema_weights(monkeypatch, name, after):
    params, optimizer = trained()
    weights, real, calls = copies(params), getattr(swapping, name), []

    def interrupted(*args):
        calls.append(args)
        if after or len(calls) > 1:
            real(*args)
        if len(calls) == 1:
            raise Interrupt

    monkeypatch.setattr(swapping, name, interrupted)
    with pytest.raises(Interrupt), optimizer.swap_ema_weights():
        pass
    monkeypatch.undo()
    optimizer.train()
    assert same(copies(params), weights)
    train(optimizer)


@pytest.mark.parametrize(
    ("enter", "act", "message"),
    [
        ("block", lambda o: o.step(), r"step\(\) inside swap_ema_weights\(\): leave the block"),
        ("block", lambda o: o.train(), r"train\(\) inside swap_ema_weights\(\): leave the block"),
        (
            "block",
            lambda o: o.swap_ema_weights().__enter__(),
            r"\(\) inside swap_ema_weights\(\)",
        ),
        ("block", lambda o: o.load_ema_state(torch.nn.Linear(1, 1), {}), "leave the block"),
        ("eval", lambda o: o.step(), r"step\(\) after eval\(\): call optimizer.train\(\)"),
        ("eval", lambda o: o.swap_ema_weights().__enter__(), r"call optimizer.train\(\) first"),
    ],
)
def test_what_must_not_happen_while_swapped_raises_and_changes_nothing(enter, act, message):
    params, optimizer = trained()
    entrance = ENTRANCES[enter == "eval"]
    weights, averages = copies(params), emas(optimizer)
    with entrance(optimizer):
        with pytest.raises(RuntimeError, match=message):
            act(optimizer)
        assert same(copies(params), averages)
    assert same(copies(params), weights)
    assert same(emas(optimizer), averages)


@pytest.mark.parametrize("entrance", ENTRANCES, ids=["block", "mode"])
def test_eval_while_swapped_is_a_no_op(entrance):
    params, optimizer = trained()
    weights = copies(params)
    with entrance(optimizer):
        inside = copies(params)
        optimizer.eval()
        optimizer.eval()
        assert same(copies(params), inside)
    assert same(copies(params), weights)


@pytest.mark.parametrize("after", [0, 100])
def test_swap_before_the_first_counted_step_is_a_no_op(after):
    params, optimizer = trained(steps=0 if not after else 3, update_after_step=after)
    weights = copies(params)
    with optimizer.swap_ema_weights():
        assert not optimizer.swapped
        assert same(copies(params), weights)
        with pytest.raises(RuntimeError, match="inside"):
            optimizer.step()
    assert same(copies(params), weights)


def test_disabled_swap_is_an_ordinary_block():
    params, optimizer = trained()
    weights = copies(params)
    with optimizer.swap_ema_weights(enabled=False):
        assert same(copies(params), weights)
        train(optimizer)


def test_parameter_without_a_counted_ema_is_left_alone():
    _, optimizer = trained()
    late = torch.nn.Parameter(torch.randn(3))
    optimizer.add_param_group({"params": [late]})
    value = late.detach().clone()
    with optimizer.swap_ema_weights():
        assert torch.equal(late, value)


def test_swap_between_forward_and_backward_raises_in_backward():
    # Written through .data it would give the gradient at the wrong weights without a word.
    params, optimizer = trained()
    loss = (params[0] * params[0]).sum()
    with (
        optimizer.swap_ema_weights(),
        pytest.raises(RuntimeError, match="modified by an inplace operation"),
    ):
        loss.backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_swap_in_inference_mode_is_undone_outside(dtype):
    params, optimizer = trained(dtype)
    weights = copies(params)
    with torch.inference_mode():
        optimizer.eval()
    optimizer.train()
    assert same(copies(params), weights)
    train(optimizer)


@pytest.mark.parametrize("cuts", [(slice(0, 6), slice(4, 10)), (slice(0, 10), slice(2, 5))])
def test_overlapping_parameters_are_restored_bit_for_bit(cuts):
    memory = torch.randn(10)
    params = [torch.nn.Parameter(memory[cut]) for cut in cuts]
    optimizer = EMAOptimizer(SGD(params, lr=0.5, foreach=False), decay=0.1)
    train(optimizer, 3)
    weights, averages = memory.clone(), emas(optimizer)
    with optimizer.swap_ema_weights():
        assert torch.equal(params[1], averages[1])
    assert torch.equal(memory, weights)
    assert same(emas(optimizer), averages)


def test_parameters_that_came_to_share_memory_in_training_are_restored():
    params, optimizer = trained()
    train(optimizer)
    with optimizer.swap_ema_weights():
        pass
    params[1].data = params[0].data
    weights, averages = copies(params), emas(optimizer)
    with optimizer.swap_ema_weights():
        pass
    assert same(copies(params), weights)
    assert same(emas(optimizer), averages)


def test_a_copy_that_an_interrupt_has_left_behind_is_not_put_back():
    params, optimizer = trained()
    for slot in optimizer._ema.slots.values():
        slot.parked = torch.zeros(6, 5)
    weights = copies(params)
    with optimizer.swap_ema_weights():
        pass
    assert same(copies(params), weights)


def test_neighbours_in_one_storage_are_exchanged_in_place():
    memory = torch.randn(10)
    params = [torch.nn.Parameter(memory[:5]), torch.nn.Parameter(memory[5:])]
    optimizer = EMAOptimizer(SGD(params, lr=0.5), decay=0.1)
    train(optimizer, 3)
    assert "ema_weights" not in optimizer.state[params[0]]


@pytest.mark.parametrize("entrance", [None, *ENTRANCES], ids=["outside", "block", "mode"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_apply_ema_is_one_way_and_keeps_the_ema(dtype, entrance):
    params, optimizer = trained(dtype)
    averages = emas(optimizer)
    with entrance(optimizer) if entrance else contextlib.nullcontext():
        optimizer.apply_ema()
        assert not optimizer.swapped
    assert all(torch.equal(p, e.to(dtype)) for p, e in zip(params, averages, strict=True))
    assert same(emas(optimizer), averages)
    train(optimizer)


def test_tied_and_viewed_weights_follow_the_swap():
    table = torch.nn.Embedding(4, 3)
    head = torch.nn.Linear(3, 4, bias=False)
    head.weight = table.weight
    view = table.weight.detach()[1:]
    optimizer = EMAOptimizer(SGD(table.parameters(), lr=0.5), decay=0.1)
    train(optimizer, 3)
    average = emas(optimizer)[0]
    with optimizer.swap_ema_weights():
        assert torch.equal(head.weight, average)
        assert torch.equal(view, average[1:])


@pytest.mark.parametrize(
    ("dtype", "update", "swap"),
    [(torch.float32, 0.1, 4), (torch.bfloat16, 4, 24 + 4), (torch.float64, 0.1, 4)],
    ids=str,
)
def test_extra_memory_of_update_and_swap_is_bounded(dtype, update, swap):
    _, optimizer = trained(dtype, size=(4, 1024, 1024))  # 12 Mi weights
    optimizer.inner.step = lambda: None
    assert peak_allocation(optimizer.step) <= update * MIB
    assert peak_allocation(optimizer.eval) <= swap * MIB
    assert peak_allocation(optimizer.train) <= 4 * MIB


def test_scratch_of_a_model_of_many_dtypes_is_bounded():
    dtypes = [torch.float32, torch.float64, torch.complex64, torch.complex128]
    params = [torch.nn.Parameter(torch.randn(MIB, dtype=dtype)) for dtype in dtypes]
    optimizer = EMAOptimizer(SGD(params, lr=0.5, foreach=False), decay=0.1)
    train(optimizer, 3)
    assert peak_allocation(optimizer.eval) <= 4.1 * MIB


def test_group_disabled_while_it_has_an_ema_is_neither_swapped_nor_exported():
    params, optimizer = trained()
    optimizer.param_groups[0]["ema_enabled"] = False
    weights = copies(params)
    with optimizer.swap_ema_weights():
        assert same(copies(params), weights)
    assert same(copies(params), weights)


def test_the_memory_probe_sees_what_is_allocated():
    assert 4 * MIB <= peak_allocation(lambda: torch.empty(MIB).fill_(0.0)) < 5 * MIB
