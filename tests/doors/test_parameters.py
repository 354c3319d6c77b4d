"""Kinds of parameters and options of their groups: what is averaged, and with which decay."""

import pytest
import torch
from reference import Reference
from steps import ema_of, param, train
from torch.optim import SGD, AdamW

from ema_optim import EMAOptimizer, debiased_decay

KINDS = {
    "complex": lambda: param(3, dtype=torch.complex64),
    "0-dim": lambda: param(),
    "empty": lambda: param(0, 4),
    "transposed": lambda: torch.nn.Parameter(torch.randn(4, 3).t()),
    "channels_last": lambda: torch.nn.Parameter(
        torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    ),
    "sliced": lambda: torch.nn.Parameter(torch.randn(4, 6)[:, :2]),
    "float64": lambda: param(3, dtype=torch.float64),
    "bf16": lambda: param(300, 7, dtype=torch.bfloat16),
    "large": lambda: param(600_000),
}


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.float64])
def test_every_kind_of_parameter_in_one_group_is_averaged(dtype):
    params = [make() for make in KINDS.values()]
    optimizer = EMAOptimizer(SGD(params, lr=0.1, foreach=False), 0.5, dtype=dtype)
    reference = Reference(params, 0.5)
    for _ in range(5):
        train(optimizer)
        reference.update()
    for p, expected in zip(params, reference.emas, strict=True):
        ema = ema_of(optimizer, p)
        tolerance = 1e-12 if ema.dtype in (torch.float64, torch.complex128) else 1e-6
        torch.testing.assert_close(ema.to(expected.dtype), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", ["transposed", "channels_last"])
def test_ema_has_the_strides_of_its_parameter(name):
    p = KINDS[name]()
    optimizer = EMAOptimizer(SGD([p], lr=0.1))
    train(optimizer)
    assert ema_of(optimizer, p).stride() == p.stride()


def test_parameter_without_a_gradient_is_averaged_and_stays_its_own_value():
    used, unused = param(3), param(3)
    optimizer = EMAOptimizer(AdamW([used, unused]), 0.9)
    for _ in range(5):
        used.grad = torch.ones(3)
        optimizer.step()
    assert torch.equal(ema_of(optimizer, unused), unused)
    assert unused not in optimizer.inner.state


def test_frozen_parameter_has_no_ema_until_it_is_unfrozen():
    p, frozen = param(3), param(3).requires_grad_(False)
    optimizer = EMAOptimizer(SGD([p, frozen], lr=0.1), 0.9)
    train(optimizer, 5)
    assert "ema" not in optimizer.state[frozen]
    frozen.requires_grad_()
    reference = Reference([frozen], 0.9)
    train(optimizer)
    reference.update()
    torch.testing.assert_close(ema_of(optimizer, frozen).double(), reference.emas[0])
    assert optimizer.state[frozen]["ema_step"] == 1
    assert optimizer.state[p]["ema_step"] == 6


def test_late_parameter_has_a_schedule_of_its_own():
    early, late = param(3, dtype=torch.float64), param(3, dtype=torch.float64)
    optimizer = EMAOptimizer(SGD([early], lr=0.1), debiased_decay(0.9))
    train(optimizer, 7)
    optimizer.add_param_group({"params": [late]})
    reference = Reference([late], debiased_decay(0.9))
    for _ in range(4):
        train(optimizer)
        reference.update()
    torch.testing.assert_close(ema_of(optimizer, late), reference.emas[0], rtol=0, atol=1e-14)


def test_stride_and_start_run_on_the_optimizers_clock_for_a_late_parameter():
    early, late = param(3), param(3)
    optimizer = EMAOptimizer(SGD([early], lr=0.1), 0.9, update_every=4, update_after_step=2)
    train(optimizer, 4)
    optimizer.add_param_group({"params": [late]})
    start = late.detach().clone()
    train(optimizer, 2)  # step 6 = 2 + 4: two steps after the birth of the late one
    expected = start.lerp(late.detach(), 1 - 0.9**2)
    torch.testing.assert_close(ema_of(optimizer, late), expected)
    assert optimizer.state[late]["ema_step"] == 2 + 2


def test_tied_parameter_is_averaged_once():
    tied = param(3)
    with pytest.warns(UserWarning, match="duplicate parameters"):
        optimizer = EMAOptimizer(SGD([tied, tied], lr=0.1), 0.5)
    reference = Reference([tied], 0.5)
    train(optimizer)
    reference.update()
    torch.testing.assert_close(ema_of(optimizer, tied).double(), reference.emas[0])


def test_parameter_that_leaves_the_groups_loses_its_ema():
    p, leaver = param(3), param(3)
    optimizer = EMAOptimizer(SGD([p, leaver], lr=0.1))
    train(optimizer)
    optimizer.param_groups[0]["params"].pop()
    train(optimizer)
    assert list(optimizer.state) == [p]


def test_parameter_replaced_in_place_in_its_group_is_followed():
    # Accelerate's FSDP2 path replaces group["params"][i] after construction.
    old, new = param(3), param(3)
    optimizer = EMAOptimizer(SGD([old], lr=0.1), 0.5)
    train(optimizer)
    optimizer.param_groups[0]["params"][0] = new
    reference = Reference([new], 0.5)
    train(optimizer)
    reference.update()
    torch.testing.assert_close(ema_of(optimizer, new).double(), reference.emas[0])
    assert old not in optimizer.state


def test_model_cast_in_training_keeps_its_fp32_ema():
    model = torch.nn.Linear(3, 2)
    optimizer = EMAOptimizer(SGD(model.parameters(), lr=0.1), 0.5)
    train(optimizer)
    held = ema_of(optimizer, model.weight).clone()
    model.to(torch.bfloat16)
    train(optimizer)
    expected = held.lerp(model.weight.detach().float(), 0.5)
    assert torch.equal(ema_of(optimizer, model.weight), expected)


def test_group_options_override_the_optimizers_decay():
    params = [param(3) for _ in range(3)]
    own = [{"ema_decay": 0.25}, {"ema_enabled": False}, {}]
    groups = [{"params": [p], **options} for p, options in zip(params, own, strict=True)]
    optimizer = EMAOptimizer(SGD(groups, lr=0.1), 0.75)
    references = Reference(params[:1], 0.25), Reference(params[2:], 0.75)
    for _ in range(4):
        train(optimizer)
        [reference.update() for reference in references]
    torch.testing.assert_close(ema_of(optimizer, params[0]).double(), references[0].emas[0])
    torch.testing.assert_close(ema_of(optimizer, params[2]).double(), references[1].emas[0])
    assert params[1] not in optimizer.state


def test_ema_decay_changed_in_a_live_group_is_honoured_like_lr():
    p = param(3)
    optimizer = EMAOptimizer(SGD([p], lr=0.1), 0.9)
    train(optimizer, 2)
    optimizer.param_groups[0]["ema_decay"] = 0.0
    train(optimizer)
    assert torch.equal(ema_of(optimizer, p), p)


def test_bad_live_ema_decay_raises_before_anything_moves():
    p = param(3)
    optimizer = EMAOptimizer(SGD([p], lr=0.1), 0.9)
    train(optimizer, 2)
    weights, ema = p.detach().clone(), ema_of(optimizer, p).clone()
    optimizer.param_groups[0]["ema_decay"] = 1.5
    with pytest.raises(ValueError, match=r"ema_decay .* must be in \[0, 1\], got 1.5"):
        train(optimizer)
    assert torch.equal(p, weights)
    assert torch.equal(ema_of(optimizer, p), ema)


def test_bad_value_of_a_schedule_raises_before_anything_moves():
    p = param(3)
    optimizer = EMAOptimizer(SGD([p], lr=0.1), lambda u: 0.5 if u < 3 else float("nan"))
    train(optimizer, 2)
    weights = p.detach().clone()
    with pytest.raises(ValueError, match="nan"):
        train(optimizer)
    assert torch.equal(p, weights)
    assert optimizer.state[p]["ema_step"] == 2


@pytest.mark.parametrize(
    ("group", "error", "message"),
    [
        ({}, TypeError, "with 'params'"),
        ({"params": [torch.zeros(2)], "ema_decay": -1.0}, ValueError, "got -1.0"),
    ],
)
def test_bad_new_group_changes_nothing(group, error, message):
    optimizer = EMAOptimizer(SGD([param(3)], lr=0.1))
    with pytest.raises(error, match=message):
        optimizer.add_param_group(group)
    assert len(optimizer.param_groups) == 1


def test_an_empty_group_beside_others_is_legal_as_it_is_for_torch():
    # Trainers build a group for weights without decay that is empty for LoRA adapters.
    p = param(3)
    optimizer = EMAOptimizer(SGD([{"params": [p]}, {"params": []}], lr=0.1), 0.1)
    train(optimizer, 3)
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.state[p]["ema_step"] == 3


def test_one_layer_cast_in_training_is_followed():
    model = torch.nn.Sequential(*[torch.nn.Linear(2, 2) for _ in range(3)])
    optimizer = EMAOptimizer(SGD(model.parameters(), lr=0.1), 0.5)
    train(optimizer)
    held = ema_of(optimizer, model[1].weight).clone()
    model[1].bfloat16()
    train(optimizer)
    expected = held.lerp(model[1].weight.detach().float(), 0.5)
    assert torch.equal(ema_of(optimizer, model[1].weight), expected)
