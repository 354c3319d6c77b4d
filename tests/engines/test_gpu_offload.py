"""The EMA in pinned host memory beside weights on a real accelerator."""

import pytest
import torch
from cards import DEVICE, ON_CARD, gpu, no_synchronisation
from reference import same, through_file
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import AdamW

from ema_optim import EMAModel, EMAOptimizer
from ema_optim._arithmetic.formats import FORMATS

pytestmark = gpu
on_card_alone = pytest.mark.skipif(not ON_CARD, reason="on a CPU there is nothing to move")
DECAY = 0.75
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
strides = pytest.mark.parametrize("every", [1, 3])


def net(dtype=torch.float32, width=512):
    torch.manual_seed(0)
    layers = [nn.Linear(width, width) for _ in range(4)]
    return nn.Sequential(*layers).to(DEVICE, dtype)


def optimizer_of(model, **options):
    return EMAOptimizer(AdamW(model.parameters(), lr=0.01), DECAY, device="cpu", **options)


def move(model, optimizer, steps, seen=None):
    """Steps one close after the other; ``seen`` is told of the weights after each."""
    for step in range(steps):
        optimizer.zero_grad()
        for param in model.parameters():
            param.grad = torch.sin(param.detach() * (step + 1))
        optimizer.step()
        if seen is not None:
            seen.append([p.detach().clone() for p in model.parameters()])


def average_of(first, seen, every):
    """The EMA that the host makes of copies of the weights."""
    emas = [weights.float().cpu() for weights in first]
    for weights in seen[every - 1 :: every]:
        pairs = zip(emas, weights, strict=True)
        emas = [torch.lerp(ema, w.float().cpu(), 1 - DECAY**every) for ema, w in pairs]
    return emas


@each_dtype
@strides
def test_the_worker_averages_the_weights_of_every_step(dtype, every):
    model, seen = net(dtype, width=2048), []
    optimizer = optimizer_of(model, update_every=every)
    first = [p.detach().clone() for p in model.parameters()]
    move(model, optimizer, 9, seen)
    assert same(list(optimizer.get_ema_state(model).values()), average_of(first, seen, every))
    for slot in optimizer._ema.slots.values():
        assert slot.host == slot.ema.is_pinned() == ON_CARD
        assert slot.staging is None or slot.staging.is_pinned()


@each_dtype
@pytest.mark.parametrize("format", [None, *FORMATS])
def test_the_ema_is_that_of_a_run_beside_the_weights_up_to_the_last_bits(dtype, format):
    models = net(dtype), net(dtype)
    emas = [
        EMAModel(m, DECAY, dtype=format, device=d)
        for m, d in zip(models, (None, "cpu"), strict=True)
    ]
    for model, ema in zip(models, emas, strict=True):
        inner = AdamW(model.parameters(), lr=0.01)
        for _ in range(4):
            move(model, inner, 1)
            ema.update()
    states = [ema.get_ema_state(device="cpu") for ema in emas]
    torch.testing.assert_close(*states, rtol=1e-2 if format == torch.bfloat16 else 1e-4, atol=1e-4)


@each_dtype
def test_swapped_weights_are_the_ema_and_come_back(dtype):
    model = net(dtype)
    optimizer = optimizer_of(model)
    move(model, optimizer, 3)
    before = [p.detach().clone() for p in model.parameters()]
    expected = [ema.to(dtype) for ema in optimizer.get_ema_state(model).values()]
    with optimizer.swap_ema_weights():
        assert same([p.detach().cpu() for p in model.parameters()], expected)
    assert same([p.detach() for p in model.parameters()], before)
    optimizer.apply_ema()
    assert same([p.detach().cpu() for p in model.parameters()], expected)


@pytest.mark.parametrize("swapped", [False, True])
@each_dtype
def test_a_run_resumes_bit_for_bit(dtype, swapped):
    model, whole = net(dtype), net(dtype)
    optimizer, uninterrupted = optimizer_of(model), optimizer_of(whole)
    move(whole, uninterrupted, 3)
    move(whole, uninterrupted, 3)
    move(model, optimizer, 3)
    if swapped:
        optimizer.eval()
    saved = through_file((model.state_dict(), optimizer.state_dict()))
    model = net(dtype)
    optimizer = optimizer_of(model)
    model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    optimizer.train()
    move(model, optimizer, 3)
    assert same(optimizer.get_ema_state(model), uninterrupted.get_ema_state(whole))
    assert same(model.state_dict(), whole.state_dict())


@on_card_alone
def test_no_byte_of_the_device_is_for_the_ema():
    module, used = torch.get_device_module(DEVICE), []
    for wrap in (False, True):
        model = net(torch.bfloat16, width=1024)
        inner = AdamW(model.parameters(), lr=0.01)
        optimizer = EMAOptimizer(inner, DECAY, device="cpu") if wrap else inner
        before = module.memory_allocated()
        move(model, optimizer, 3)
        optimizer.state_dict()
        used.append(module.memory_allocated() - before)
        del model, inner, optimizer
    assert used[0] == used[1]


# Torch loads a full state dict into templates of one device alone: "Device mismatch".
@on_card_alone
def test_a_full_state_dict_is_refused_and_nothing_changes():
    full, model, other = StateDictOptions(full_state_dict=True), net(), net()
    optimizer, loading = optimizer_of(model), optimizer_of(other)
    move(model, optimizer, 2)
    move(other, loading, 4)
    before = loading.get_ema_state(other), other.state_dict()
    state = get_optimizer_state_dict(model, optimizer, options=full)
    with pytest.raises(ValueError, match="Device mismatch"):
        set_optimizer_state_dict(other, loading, state, options=full)
    assert same((loading.get_ema_state(other), other.state_dict()), before)
    loading.load_ema_state(other, optimizer.get_ema_state(model))
    assert same(loading.get_ema_state(other), optimizer.get_ema_state(model))


def test_what_is_moved_to_the_device_stays_in_host_memory():
    model = net()
    optimizer = optimizer_of(model)
    move(model, optimizer, 2)
    for param in model.parameters():  # as Lightning moves an optimizer
        optimizer.state[param] = {
            key: value.to(DEVICE) if value.dim() else value
            for key, value in dict(optimizer.state[param]).items()
        }
    assert all(slot.ema.is_pinned() == ON_CARD for slot in optimizer._ema.slots.values())


def test_a_step_does_not_wait_for_the_device():
    model = net(torch.bfloat16)
    optimizer = optimizer_of(model, update_every=4)
    move(model, optimizer, 4)
    optimizer._ema.offload.settle()
    with no_synchronisation():
        move(model, optimizer, 4)
    optimizer.state_dict()


def test_another_device_is_refused():
    with pytest.raises(ValueError, match=r"None .* 'cpu'"):
        EMAOptimizer(AdamW(net().parameters()), device="cuda:1")
