"""In company: learning-rate schedulers, gradient scalers, gradient accumulation, torch.compile."""

import pytest
import torch
from reference import same, through_file
from torch.optim import SGD, AdamW
from torch.optim import lr_scheduler as lrs

from ema_optim import EMAOptimizer


def build(wrap=True, **kwargs):
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 3)
    inner = AdamW(model.parameters(), lr=0.1, **kwargs)
    return model, EMAOptimizer(inner, 0.1) if wrap else inner


SCHEDULERS = {
    "LambdaLR": lambda o: lrs.LambdaLR(o, lambda t: 1 / (1 + t)),
    "OneCycleLR": lambda o: lrs.OneCycleLR(o, max_lr=0.3, total_steps=20),
    "ReduceLROnPlateau": lambda o: lrs.ReduceLROnPlateau(o, patience=1),
    "SequentialLR": lambda o: lrs.SequentialLR(
        o, [lrs.LinearLR(o, 0.5, total_iters=3), lrs.ExponentialLR(o, 0.9)], milestones=[3]
    ),
    "CosineAnnealingLR": lambda o: lrs.CosineAnnealingLR(o, T_max=10),
}


def run_scheduled(optimizer, scheduler, steps):
    series = []
    for _ in range(steps):
        for p in optimizer.param_groups[0]["params"]:
            p.grad = torch.ones_like(p)
        optimizer.step()
        plateau = isinstance(scheduler, lrs.ReduceLROnPlateau)
        scheduler.step(*([1.0] if plateau else []))
        series += [(group["lr"], group["betas"]) for group in optimizer.param_groups]
    return series


@pytest.mark.filterwarnings(
    "ignore:The epoch parameter"
)  # torch 2.6's SequentialLR warns of itself
@pytest.mark.parametrize("name", SCHEDULERS)
def test_scheduler_gives_the_series_of_the_bare_optimizer_also_after_a_load(name):
    results = []
    for wrap in (False, True):
        model, optimizer = build(wrap)
        scheduler = SCHEDULERS[name](optimizer)
        series = run_scheduled(optimizer, scheduler, 6)
        saved = through_file([optimizer.state_dict(), scheduler.state_dict(), model.state_dict()])
        model, optimizer = build(wrap)
        scheduler = SCHEDULERS[name](optimizer)
        optimizer.load_state_dict(saved[0])
        scheduler.load_state_dict(saved[1])
        model.load_state_dict(saved[2])
        results.append((series + run_scheduled(optimizer, scheduler, 6), model.state_dict()))
    assert same(*results)


def test_scheduler_built_on_the_inner_before_wrapping_reaches_the_groups():
    model, inner = build(wrap=False)
    scheduler = lrs.ExponentialLR(inner, 0.5)
    optimizer = EMAOptimizer(inner, 0.1)
    run_scheduled(optimizer, scheduler, 2)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.025)
    assert optimizer.state[model.weight]["ema_step"] == 2


def test_scheduler_from_lr_zero_counts_one_step_less():
    # A first step with lr 0 moves nothing, and may be the dry step of a distributed checkpoint.
    model, optimizer = build()
    scheduler = lrs.LambdaLR(optimizer, lambda t: t / 5)
    run_scheduled(optimizer, scheduler, 4)
    assert optimizer.state[model.weight]["ema_step"] == 3


def run_scaled(wrap, overflow_at, **kwargs):
    model, optimizer = build(wrap, **kwargs)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    emas = []
    for step in range(5):
        optimizer.zero_grad()
        loss = model(torch.full((2, 4), step + 1.0)).square().sum()
        scaler.scale(loss * (float("inf") if step == overflow_at else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
        if wrap and step >= 0 and model.weight in optimizer.state:
            state = optimizer.state[model.weight]
            emas.append((state["ema"].clone(), state["ema_step"].item()))
    return model.state_dict(), scaler.state_dict(), emas


@pytest.mark.parametrize(
    "kwargs", [{"foreach": True}, {"foreach": False}, {"fused": True}], ids=str
)
@pytest.mark.parametrize("overflow_at", [None, 0, 3])
def test_scaled_trajectory_equals_bare_and_a_skipped_step_does_not_count(kwargs, overflow_at):
    bare, wrapped = (
        run_scaled(False, overflow_at, **kwargs),
        run_scaled(True, overflow_at, **kwargs),
    )
    assert same(wrapped[:2], bare[:2])
    emas = wrapped[2]
    assert emas[-1][1] == (5 if overflow_at is None else 4)
    if overflow_at == 3:
        assert torch.equal(emas[3][0], emas[2][0])
        assert emas[3][1] == emas[2][1] == 3


def test_weights_loaded_after_a_skipped_first_step_are_where_the_ema_begins():
    model, optimizer = build(fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(model(torch.ones(1, 4)).sum() * float("inf")).backward()
    scaler.step(optimizer)
    scaler.update()
    with torch.no_grad():
        model.weight.fill_(5.0)
    optimizer.zero_grad()
    model.weight.grad = torch.zeros_like(model.weight)
    optimizer.param_groups[0]["weight_decay"] = 0.0
    optimizer.step()
    assert torch.equal(optimizer.state[model.weight]["ema"], torch.full((3, 4), 5.0))


def test_scaler_finds_no_amp_attributes_where_the_inner_has_none():
    _, optimizer = build(foreach=False)
    for name in ("grad_scale", "found_inf", "_step_supports_amp_scaling"):
        assert hasattr(optimizer, name) == hasattr(optimizer.inner, name)
        optimizer.grad_scale = 1.0
    assert optimizer.inner.grad_scale == 1.0
    del optimizer.grad_scale
    assert not hasattr(optimizer.inner, "grad_scale")


def test_gradient_accumulation_counts_optimizer_steps():
    model, optimizer = build()
    for micro_step in range(8):
        model(torch.ones(2, 4)).sum().backward()
        if micro_step % 4 == 3:
            optimizer.step()
            optimizer.zero_grad()
    assert optimizer.state[model.weight]["ema_step"] == 2


def test_compiled_model_sees_the_swap():
    model, optimizer = build()
    compiled = torch.compile(model, backend="aot_eager")
    batch = torch.ones(2, 4)
    for _ in range(3):
        optimizer.zero_grad()
        compiled(batch).square().sum().backward()
        optimizer.step()
    ema = optimizer.get_ema_state(compiled)
    with optimizer.swap_ema_weights(), torch.no_grad():
        inside = compiled(batch)
    expected = torch.nn.functional.linear(batch, ema["weight"], ema["bias"])
    torch.testing.assert_close(inside, expected)


def test_autocast_training_averages_the_fp32_weights():
    model, optimizer = build()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(torch.ones(2, 4)).float().sum().backward()
    optimizer.step()
    assert optimizer.state[model.weight]["ema"].dtype == torch.float32
    assert "ema_weights" not in optimizer.state[model.weight]


def test_clip_grad_and_foreign_optimizer_attributes_go_through():
    model = torch.nn.Linear(2, 2)
    optimizer = EMAOptimizer(SGD(model.parameters(), lr=0.1))
    optimizer.note = "kept"  # schedulers and engines set attributes
    model(torch.ones(1, 2)).sum().backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    assert optimizer.note == "kept"
    assert isinstance(optimizer, torch.optim.Optimizer)
