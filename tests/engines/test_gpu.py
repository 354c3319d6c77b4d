"""On a card: averages, formats, swaps, checkpoints, AMP, and that no step waits for the card."""

import math

import pytest
import torch
from cards import DEVICE, ON_CARD, backward, batch, gpu, net, no_synchronisation, train, weights_of
from cards import wrapped as optimizer_of
from reference import Reference, same, through_file

from ema_optim import EMAModel, EMAOptimizer, warmup_decay
from ema_optim._arithmetic.noise import Noise

pytestmark = gpu
# How an EMA is kept, and how far it may be from the average in float64.
LIMITS = {None: 1e-6, "float32_compensated": 1e-6, "float24": 3e-4, torch.bfloat16: 2e-2}
formats = pytest.mark.parametrize("ema_dtype", LIMITS, ids=str)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


def farthest(emas, reference):
    pairs = zip(emas, reference.emas, strict=True)
    return max(float((ema.double() - r).abs().max() / r.abs().max()) for ema, r in pairs)


@dtypes
@formats
@pytest.mark.parametrize("every", [1, 3])
def test_the_ema_is_the_average_in_float64(dtype, ema_dtype, every):
    model = net(dtype)
    optimizer = optimizer_of(model, dtype=ema_dtype, update_every=every)
    reference = Reference(model.parameters(), 0.9, every)
    train(model, optimizer, range(24), reference.update)
    assert farthest(optimizer.get_ema_state(model).values(), reference) < LIMITS[ema_dtype]


@dtypes
@formats
def test_a_swap_shows_the_ema_and_gives_the_weights_back(dtype, ema_dtype):
    model = net(dtype)
    optimizer = optimizer_of(model, dtype=ema_dtype)
    train(model, optimizer, range(5))
    before, ema = weights_of(model), optimizer.get_ema_state(model).values()
    where = [param.data_ptr() for param in model.parameters()]
    with optimizer.swap_ema_weights():
        for param, average in zip(model.parameters(), ema, strict=True):
            # An EMA that is kept as bf16 and int8 breaks ties another way than a cast.
            ties = 2**-7 if ema_dtype == "float24" else 0
            torch.testing.assert_close(param, average.to(dtype), rtol=ties, atol=0)
    assert all(map(torch.equal, before, model.parameters()))
    assert where == [param.data_ptr() for param in model.parameters()]


# The list operators of a card have to move the version counters, or gradients are wrong in silence.
def test_a_swap_between_forward_and_backward_raises_in_backward():
    model = net()
    optimizer = optimizer_of(model)
    train(model, optimizer, range(2))
    loss = model(batch(3)).square().mean()
    with optimizer.swap_ema_weights(), pytest.raises(RuntimeError, match="modified by an inplace"):
        loss.backward()


@formats
def test_a_run_goes_on_bit_for_bit_from_a_file(ema_dtype):
    (model, optimizer), (other, resumed) = (
        (model, optimizer_of(model, warmup_decay(0.99), dtype=ema_dtype))
        for model in (net(), net())
    )
    train(model, optimizer, range(6))
    saved = through_file([model.state_dict(), optimizer.state_dict()])
    other.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    for run in ((model, optimizer), (other, resumed)):
        train(*run, range(6, 9))
    assert same(optimizer.get_ema_state(model), resumed.get_ema_state(other))


def averaged(device, ema_dtype):
    """What an average is after five updates of weights that are the same on every device."""
    torch.manual_seed(0)
    param = torch.nn.Parameter(torch.randn(100_003).to(device))
    steps = torch.linspace(-1e-2, 1e-2, param.numel()).to(device)
    ema = EMAModel(torch.nn.ParameterList([param]), 0.99, dtype=ema_dtype)
    for _ in range(5):
        with torch.no_grad():
            param.add_(steps)
        ema.update()
    return ema.get_ema_state()["0"].cpu()


@formats
def test_an_ema_is_the_same_on_a_card_but_for_the_last_bit_of_fp32(ema_dtype):
    here, there = averaged("cpu", ema_dtype), averaged(DEVICE, ema_dtype)
    # Such a bit decides now and then which way a narrow format is rounded.
    unit = {"float24": 2**-15, torch.bfloat16: 2**-7}.get(ema_dtype, 2**-22)
    torch.testing.assert_close(there, here, rtol=unit, atol=1e-7)
    if ema_dtype in ("float24", torch.bfloat16):
        assert (there != here).float().mean() < 0.02


@pytest.mark.parametrize("bits", [8, 16])
def test_the_noise_is_the_same_on_a_card(bits):
    drawn = []
    for device in map(torch.device, ("cpu", DEVICE)):
        out = torch.empty(10_007, dtype=torch.int32, device=device)
        Noise(bits, 7, [2**32 - 5000], [10_007], 10_007, device).fill_(out)
        drawn.append(out.cpu())
    assert torch.equal(*drawn)


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_a_scaler_skips_is_not_averaged(fused):
    model = net()
    inner = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=fused and ON_CARD)
    optimizer, reference = EMAOptimizer(inner, 0.9), Reference(model.parameters(), 0.9)
    scaler = torch.amp.GradScaler(DEVICE, init_scale=2.0**4)
    for number in range(12):
        optimizer.zero_grad()
        scaler.scale(model(batch(number)).square().mean()).backward()
        if number in (3, 7):
            next(model.parameters()).grad[0, 0] = math.inf
        before = weights_of(model)
        scaler.step(optimizer)
        scaler.update()
        if not all(map(torch.equal, before, model.parameters())):
            reference.update()
    assert reference.step == 10
    assert optimizer.ema_metrics()["ema_updates"] == 10
    assert farthest(optimizer.get_ema_state(model).values(), reference) < 1e-6


OPTIONS = [
    {},
    {"update_every": 2},
    {"decay": warmup_decay(0.99)},
    {"dtype": "float24"},
    {"dtype": torch.bfloat16},
    {"dtype": "float32_compensated"},
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_step_never_waits_for_the_card(options, dtype):
    model = net(dtype)
    optimizer = optimizer_of(model, **options)
    train(model, optimizer, range(3))
    for inputs in [batch(number, dtype) for number in range(3, 6)]:
        with no_synchronisation():
            backward(model, inputs)
            optimizer.step()


def test_a_load_and_a_save_never_wait_for_the_card():
    model = net()
    optimizer = optimizer_of(model)
    train(model, optimizer, range(3))
    with no_synchronisation():
        saved = optimizer.inner.state_dict()
        optimizer.inner.load_state_dict(saved)
        optimizer.zero_grad()
        optimizer.train()


def peak_of(run):
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def swap(optimizer):
    with optimizer.swap_ema_weights():
        pass


@pytest.mark.skipif(not ON_CARD, reason="the allocator of a card")
@pytest.mark.parametrize("act", [EMAOptimizer.update, swap], ids=lambda act: act.__name__)
@pytest.mark.parametrize("shapes", [[(6000, 6000)] * 2, [(1024,)] * 500])
def test_an_update_and_a_swap_take_no_more_than_the_scratch(act, shapes):
    params = [torch.nn.Parameter(torch.ones(shape, device=DEVICE)) for shape in shapes]
    optimizer = EMAOptimizer(torch.optim.SGD(params, lr=0.1), 0.1)
    params[0].grad = torch.zeros_like(params[0])
    optimizer.step()
    size = sum(param.numel() for param in params)
    assert peak_of(lambda: act(optimizer)) <= 4 * min(size, 2**24) + 2**20


@pytest.mark.skipif(not ON_CARD, reason="the allocator of a card")
@pytest.mark.parametrize(("device", "copies"), [(None, True), ("cpu", False)])
def test_a_checkpoint_of_narrow_weights_costs_the_card_a_copy_or_nothing(device, copies):
    model = net(torch.bfloat16, width=2048)
    optimizer = optimizer_of(model)
    train(model, optimizer, range(2))
    optimizer.checkpoint_device = device
    needed = sum(p.numel() * p.element_size() for p in model.parameters())
    peak = peak_of(optimizer.state_dict)
    assert (peak >= needed) == copies
    assert copies or peak < needed / 8
