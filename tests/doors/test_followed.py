"""Who is averaged: frozen and late parameters, groups that step in turn, parameters that leave."""

import pickle
import weakref

import pytest
import torch
from reference import Reference, same
from steps import ema_of, param, train
from torch.optim import SGD, AdamW

from ema_optim import EMAModel, EMAOptimizer, equal_average, warmup_decay


def two_groups(decay=0.5, **options):
    first, second = param(3), param(2)
    inner = SGD([{"params": [first]}, {"params": [second]}], lr=0.1)
    return first, second, EMAOptimizer(inner, decay, **options)


def step_in_turn(optimizer):
    """As DeepSpeed steps: every group alone."""
    whole = optimizer.param_groups
    for group in whole:
        optimizer.param_groups = [group]
        optimizer.step()
    optimizer.param_groups = whole


# A layer frozen early would show the old average of weights that the others have adapted to.
def test_what_has_an_ema_is_averaged_frozen_or_not():
    p, other = param(3), param(3)
    optimizer = EMAOptimizer(SGD([p, other], lr=0.1), 0.9)
    reference = Reference([p], 0.9)
    for requires_grad in (True, True, False, False, False, True):
        p.requires_grad_(requires_grad)
        p.grad = None
        train(optimizer)
        reference.update()
    torch.testing.assert_close(ema_of(optimizer, p).double(), reference.emas[0])
    assert optimizer.state[p]["ema_step"] == 6


def test_the_ema_of_a_weight_frozen_after_one_step_converges_to_it():
    p = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = EMAOptimizer(SGD([p], lr=1.0), 0.5)
    p.grad = torch.ones_like(p)
    optimizer.step()
    p.requires_grad_(False)
    p.grad = None
    for _ in range(10):
        optimizer.step()
    assert ema_of(optimizer, p).item() == -1 + 0.5**11


# stylegan2 and stylegan3 let a network require gradients around its backward alone.
def test_a_gradient_is_enough_for_the_optimizer_to_follow():
    p = torch.nn.Parameter(torch.zeros(1))
    optimizer = EMAOptimizer(SGD([p], lr=1.0), 0.5)
    p.sum().backward()
    p.requires_grad_(False)
    optimizer.step()
    assert (p.item(), ema_of(optimizer, p).item()) == (-1.0, -0.5)


def test_a_gradient_is_enough_for_the_model_to_follow():
    layer = torch.nn.Linear(1, 1, bias=False).requires_grad_(False)
    ema, optimizer = EMAModel(layer, 0.5), SGD(layer.parameters(), lr=1.0)
    seen = []
    for _ in range(3):
        layer.requires_grad_(True)
        layer.weight.sum().backward()
        layer.requires_grad_(False)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        ema.update()
        seen.append(layer.weight.item())
    expected = 0.25 * seen[0] + 0.25 * seen[1] + 0.5 * seen[2]
    assert ema.state_dict()["state"]["weight"]["ema"].item() == pytest.approx(expected)


def test_the_model_goes_on_following_what_required_a_gradient_at_construction():
    layer = torch.nn.Linear(2, 2)
    ema = EMAModel(layer, 0.5)
    layer.requires_grad_(False)
    with torch.no_grad():
        layer.weight.add_(1.0)
    before = layer.weight.detach() - 1.0
    ema.update()
    expected = torch.lerp(before, layer.weight.detach(), 0.5)
    assert torch.equal(ema.state_dict()["state"]["weight"]["ema"], expected)


def test_frozen_weights_cost_nothing():
    base, adapter = param(64, 64).requires_grad_(False), param(2)
    optimizer = EMAOptimizer(SGD([base, adapter], lr=0.1), 0.5)
    train(optimizer, 3)
    assert "ema" not in optimizer.state_dict()["state"].get(0, {})
    assert set(optimizer._ema.slots) == {adapter}


def test_groups_that_step_in_turn_have_a_clock_each():
    first, second, optimizer = two_groups(0.9)
    reference = Reference([first, second], 0.9)
    for _ in range(10):
        for p in (first, second):
            p.grad = torch.randn_like(p)
        step_in_turn(optimizer)
        reference.update()
    for p, expected in zip((first, second), reference.emas, strict=True):
        torch.testing.assert_close(ema_of(optimizer, p).double(), expected)
    assert [group["ema_step"] for group in optimizer.param_groups] == [10, 10]
    assert optimizer.ema_metrics()["ema_updates"] == 10


@pytest.mark.parametrize("options", [{}, {"update_every": 3}, {"update_after_step": 4}], ids=str)
@pytest.mark.parametrize("decay", [0.5, warmup_decay(0.99), equal_average()], ids=repr)
def test_stepping_in_turn_equals_stepping_together(decay, options):
    runs = []
    for turns in (True, False):
        torch.manual_seed(1)
        first, second, optimizer = two_groups(decay, **options)
        for _ in range(12):
            first.grad, second.grad = torch.randn(3), torch.randn(2)
            step_in_turn(optimizer) if turns else optimizer.step()
        runs.append(optimizer.state_dict())
    assert same(*runs)


def test_clocks_of_groups_survive_a_checkpoint():
    first, second, optimizer = two_groups(warmup_decay(0.9))
    first.grad, second.grad = torch.ones(3), torch.ones(2)
    whole = optimizer.param_groups
    for groups in ([whole[0]], [whole[0]], whole):
        optimizer.param_groups = groups
        optimizer.step()
    *params, again = two_groups(warmup_decay(0.9))
    for p, value in zip(params, (first, second), strict=True):
        p.data.copy_(value)
    again.load_state_dict(optimizer.state_dict())
    assert [group["ema_step"] for group in again.param_groups] == [3, 1]
    assert same(again.state_dict(), optimizer.state_dict())


def test_stepping_in_turn_makes_no_list_anew(monkeypatch):
    optimizer = EMAOptimizer(SGD([{"params": [param(2)]} for _ in range(3)], lr=0.1), 0.9)
    made, real = [], type(optimizer._ema)._new_lane

    def counted(self, groups):
        made.append(groups)
        return real(self, groups)

    monkeypatch.setattr(type(optimizer._ema), "_new_lane", counted)
    for group in optimizer.param_groups:
        group["params"][0].grad = torch.ones(2)
    for _ in range(20):
        step_in_turn(optimizer)
    assert len(made) == 3


def test_what_has_left_is_swapped_and_exported_but_neither_averaged_nor_saved():
    stays, left, optimizer = two_groups()
    train(optimizer, 4)
    ema, weights = ema_of(optimizer, left).clone(), left.detach().clone()
    del optimizer.param_groups[1]
    train(optimizer, 3)
    with optimizer.swap_ema_weights():
        assert torch.equal(left, ema)
    assert torch.equal(left, weights)
    exported = optimizer.get_ema_state(torch.nn.ParameterList([stays, left]))
    assert torch.equal(exported["1"], ema)
    assert set(optimizer.state_dict()["state"]) == {0}


def test_what_comes_back_goes_on_with_its_ema():
    _, left, optimizer = two_groups()
    whole = list(optimizer.param_groups)
    train(optimizer, 4)
    reference = Reference([left], 0.5)
    reference.emas = [ema_of(optimizer, left).double()]
    optimizer.param_groups = whole[:1]
    train(optimizer, 20)
    optimizer.param_groups = whole
    train(optimizer)
    reference.update()
    torch.testing.assert_close(ema_of(optimizer, left).double(), reference.emas[0])


@pytest.mark.parametrize("in_turn", [False, True])
def test_the_ema_of_a_parameter_that_nobody_has_is_freed(in_turn):
    optimizer = two_groups()[-1]
    train(optimizer, 2)
    if in_turn:
        step_in_turn(optimizer)
    gone = weakref.ref(ema_of(optimizer, optimizer.param_groups[1]["params"][0]))
    del optimizer.param_groups[1]
    train(optimizer, 10)
    assert gone() is None


def test_what_has_left_survives_a_pickle_while_somebody_has_it():
    _, left, optimizer = two_groups()
    train(optimizer, 4)
    ema = ema_of(optimizer, left).clone()
    del optimizer.param_groups[1]
    train(optimizer)
    copied, still = pickle.loads(pickle.dumps((optimizer, left)))
    assert torch.equal(copied._ema.ema_of(still), ema)


# torch.utils.swap_tensors refuses a tensor that has weak references.
def test_a_model_may_be_converted_by_swapping_tensors():
    layer = torch.nn.Linear(2, 2)
    optimizer = EMAOptimizer(SGD(layer.parameters(), lr=0.1), 0.5)
    train(optimizer, 2)
    layer.zero_grad()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        layer.double()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    train(optimizer, 2)
    assert ema_of(optimizer, layer.weight).dtype == torch.float64


@pytest.mark.parametrize("decay", [0.9, warmup_decay(0.9)], ids=repr)
def test_parameters_added_one_at_a_time_have_an_age_each(decay):
    optimizer, references = EMAOptimizer(SGD([param(2)], lr=0.1), decay, update_every=2), {}
    for step in range(12):
        if step % 2 == 0:  # a stride begins: the first update of each covers all of it
            late = optimizer.param_groups[0]["params"][0] if step == 0 else param(2)
            _ = step and optimizer.add_param_group({"params": [late]})
            references[late] = Reference([late], decay, 2)
        train(optimizer)
        for reference in references.values():
            reference.update()
    for p, reference in references.items():
        torch.testing.assert_close(ema_of(optimizer, p).double(), reference.emas[0])


def test_parameters_added_one_at_a_time_share_a_bucket():
    optimizer = EMAOptimizer(SGD([param(2)], lr=0.1), 0.9)
    for _ in range(30):
        optimizer.add_param_group({"params": [param(2)]})
        train(optimizer)
    train(optimizer)
    (lane,) = optimizer._ema._lanes
    assert len(lane.buckets) <= 2  # the last one was a placeholder when the lists were made


class Unmoving(torch.optim.Optimizer):
    """An inner optimizer that takes any shape."""

    def __init__(self, params):
        super().__init__(params, {"lr": 1.0})

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.detach().add_(1.0)


@pytest.mark.parametrize("shape", [(1,), (8,), (2, 4)], ids=str)
def test_another_shape_begins_anew_before_the_step(shape):
    p = param(4)
    optimizer = EMAOptimizer(Unmoving([p]), 0.5)
    optimizer.step()
    p.data = torch.zeros(shape)
    with pytest.warns(UserWarning, match="another shape"):
        optimizer.step()
    assert torch.equal(ema_of(optimizer, p), torch.full(shape, 0.5))
    assert optimizer.state[p]["ema_step"] == 1


def test_lazy_parameters_are_followed_once_they_have_a_shape():
    model = torch.nn.Sequential(torch.nn.LazyLinear(3), torch.nn.Linear(3, 1))
    optimizer, ema = EMAOptimizer(SGD(model.parameters(), lr=0.1), 0.5), EMAModel(model, 0.5)
    assert set(optimizer.get_ema_state(model)) == {"1.weight", "1.bias"}
    assert set(ema.get_ema_state()) == {"1.weight", "1.bias"}
    assert optimizer.ema_metrics()["ema_updates"] == 0
    for _ in range(4):
        model(torch.randn(2, 5)).sum().backward()
        optimizer.step()
        ema.update()
    assert (
        set(ema.get_ema_state())
        == set(optimizer.get_ema_state(model))
        == {"0.weight", "0.bias", "1.weight", "1.bias"}
    )


# Nothing averaged is never silent (huggingface/diffusers#5783: an EMA that was never stepped).


def read_all(optimizer, model):
    with optimizer.swap_ema_weights():
        pass
    optimizer.get_ema_state(model)


def test_an_inner_step_past_the_wrapper_is_told_once():
    model = torch.nn.Linear(2, 2)
    optimizer = EMAOptimizer(AdamW(model.parameters()), 0.5)
    read_all(optimizer, model)  # before the first step: silent
    model(torch.randn(1, 2)).sum().backward()
    optimizer.inner.step()
    with pytest.warns(UserWarning, match="nothing was averaged though") as seen:
        read_all(optimizer, model)
    assert len(seen) == 1


def test_reading_before_averaging_begins_is_silent():
    model = torch.nn.Linear(2, 2)
    optimizer = EMAOptimizer(AdamW(model.parameters()), 0.5, update_after_step=3)
    for _ in range(3):
        train(optimizer)
        read_all(optimizer, model)


def test_a_model_that_was_never_updated_is_told_once_its_weights_have_moved():
    model = torch.nn.Linear(2, 2)
    ema = EMAModel(model, 0.5)
    ema.get_ema_state()
    with torch.no_grad():
        model.weight.add_(1.0)
    with pytest.warns(UserWarning, match="nothing was averaged though"):
        ema.get_ema_state()
    ema.get_ema_state()


@pytest.mark.parametrize("door", ["optimizer", "model"])
def test_a_step_without_anything_to_average_does_not_count_and_is_told_once(door):
    model = torch.nn.Linear(2, 2).requires_grad_(False)
    optimizer = EMAOptimizer(SGD(model.parameters(), lr=0.1), 0.5)
    ema, step = (optimizer, optimizer.step)
    if door == "model":
        ema = EMAModel(model, 0.5)
        step = ema.update
    with pytest.warns(UserWarning, match="nothing was averaged at this step"):
        step()
    step()
    assert ema.ema_metrics()["ema_updates"] == 0


def test_groups_without_an_ema_on_purpose_are_silent():
    optimizer = EMAOptimizer(AdamW([{"params": [param(2)], "ema_enabled": False}]), 0.5)
    train(optimizer, 2)
    with optimizer.swap_ema_weights():
        pass


def test_a_reset_begins_as_newly_built():
    p = param(3)
    optimizer = EMAOptimizer(SGD([p], lr=0.1, momentum=0.9), 0.5, update_after_step=2)
    train(optimizer, 5)
    momentum = optimizer.state[p]["momentum_buffer"].clone()
    optimizer.reset()
    assert [group["ema_step"] for group in optimizer.param_groups] == [0]
    assert torch.equal(optimizer.state[p]["momentum_buffer"], momentum)
    reference = Reference([p], 0.5, update_after_step=2)
    for _ in range(5):
        train(optimizer)
        reference.update()
    torch.testing.assert_close(ema_of(optimizer, p).double(), reference.emas[0])


def test_a_reset_inside_a_swap_is_refused():
    optimizer = EMAOptimizer(SGD([param(3)], lr=0.1), 0.5)
    train(optimizer, 5)
    with optimizer.swap_ema_weights(), pytest.raises(RuntimeError, match="leave the block"):
        optimizer.reset()


def test_moments_are_forgotten_and_the_ema_goes_on():
    p = param(3)
    optimizer, reference = EMAOptimizer(AdamW([p]), 0.5), Reference([p], 0.5)
    for _ in range(2):
        train(optimizer, 1)
        reference.update()
        optimizer.inner.state.clear()
    torch.testing.assert_close(ema_of(optimizer, p).double(), reference.emas[0])
    assert optimizer.state[p]["ema_step"] == 2


class Rate(torch.Tensor):
    """A learning rate that notes who asks for its value."""

    asked = 0

    def __float__(self):
        Rate.asked += 1
        return 0.1


# float() of a learning rate on an accelerator waits for everything that was queued before it.
def test_no_step_but_the_first_looks_at_the_learning_rate():
    optimizer = EMAOptimizer(SGD([param(2)], lr=0.1), 0.5)
    optimizer.inner.step = lambda: None
    optimizer.param_groups[0]["lr"] = torch.tensor(0.1).as_subclass(Rate)
    seen = []
    for _ in range(3):
        optimizer.step()
        seen.append(Rate.asked)
    assert seen == [1, 1, 1]
