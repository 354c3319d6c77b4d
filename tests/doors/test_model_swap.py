"""``EMAModel.use_ema``: averages in, weights and buffers back, also when something fails."""

import copy
import itertools

import pytest
import torch
from interrupts import Interrupt, failing_copy
from models import averages, each_dtype, everything, move, trained, values
from reference import same
from torch import nn

from ema_optim import EMAModel
from ema_optim._shadow.buffers import HeldBuffers


@each_dtype
@pytest.mark.parametrize("use_buffers", [False, True])
def test_use_ema_puts_the_averages_in_and_the_weights_back(dtype, use_buffers):
    model, ema = trained(dtype=dtype, use_buffers=use_buffers)
    before, expected = everything(model, ema), averages(ema)
    addresses = [p.data_ptr() for p in model.state_dict(keep_vars=True).values()]
    with ema.use_ema():
        assert ema.swapped
        inside = values(model)
        assert all(same(inside[name], value.to(dtype)) for name, value in expected.items())
        untouched = set(inside) - set(expected) - {"tied.weight"}
        assert all(same(inside[name], before[0][name]) for name in untouched)
    assert not ema.swapped
    assert same(everything(model, ema), before)
    assert [p.data_ptr() for p in model.state_dict(keep_vars=True).values()] == addresses


@each_dtype
@pytest.mark.parametrize("use_buffers", [False, True])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_use_ema_puts_the_weights_back_after_an_exception(dtype, use_buffers, error):
    model, ema = trained(dtype=dtype, use_buffers=use_buffers)
    before = everything(model, ema)

    def fail():
        with ema.use_ema():
            raise error("in the block")

    with pytest.raises(error, match="in the block"):
        fail()
    assert same(everything(model, ema), before)


def fails_in_use_ema(ema, monkeypatch, nth):
    with monkeypatch.context() as patch:
        patch.setattr(torch, "_foreach_copy_", failing_copy(nth, 1.0))
        try:
            with ema.use_ema():
                pass
        except Interrupt:
            return True
    return False


@each_dtype
def test_use_ema_loses_nothing_whichever_copy_fails(monkeypatch, dtype):
    model, ema = trained(dtype=dtype)
    before = everything(model, ema)
    for nth in itertools.count():
        failed = fails_in_use_ema(ema, monkeypatch, nth)
        assert not ema.swapped
        assert same(everything(model, ema), before)
        if not failed:
            break
    assert nth >= 2  # at least one on the way in and one on the way out


def test_use_ema_puts_the_weights_back_although_a_buffer_cannot_be(monkeypatch):
    def fail(held):
        raise Interrupt

    model, ema = trained()
    before = values(model)["first.weight"]
    monkeypatch.setattr(HeldBuffers, "put_back", fail)
    with pytest.raises(Interrupt), ema.use_ema():
        pass
    assert not ema.swapped
    assert torch.equal(model.first.weight, before)
    ema.reset()  # refused while swapped


@pytest.mark.parametrize("use_buffers", [False, True])
def test_use_ema_before_any_average_changes_nothing(use_buffers):
    model, ema = trained(steps=2, use_buffers=use_buffers, update_after_step=2)
    before = everything(model, ema)
    with ema.use_ema():
        assert same(values(model), before[0])
        assert not ema.swapped
    assert same(everything(model, ema), before)


@each_dtype
@pytest.mark.parametrize("fail", [False, True])
def test_buffers_changed_inside_use_ema_are_put_back(dtype, fail):
    model, ema = trained(dtype=dtype)
    before = everything(model, ema)
    try:
        with ema.use_ema():
            model(torch.randn(5, 3).to(dtype))  # in training mode: statistics move
            assert int(model.norm.num_batches_tracked) == 5
            assert not torch.equal(model.norm.running_mean, before[0]["norm.running_mean"])
            if fail:
                raise ValueError
    except ValueError:
        assert fail
    assert same(everything(model, ema), before)


def test_integer_buffers_changed_inside_use_ema_are_put_back_when_others_are_averaged():
    model, ema = trained(use_buffers=True)
    with ema.use_ema():
        assert int(model.norm.num_batches_tracked) == 4
        model.norm.num_batches_tracked.add_(3)
    assert int(model.norm.num_batches_tracked) == 4


# Observers of quantization-aware training resize their buffers in place, also in evaluation.
@pytest.mark.parametrize("use_buffers", [False, True])
def test_a_buffer_resized_inside_use_ema_is_put_back(use_buffers):
    model, ema = trained(use_buffers=use_buffers)
    before = everything(model, ema)
    with ema.use_ema():
        model.norm.running_mean.resize_(9).fill_(1.0)
    assert same(everything(model, ema), before)


class Counter(nn.Module):
    """Replaces its buffer instead of writing into it."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.register_buffer("mean", torch.zeros(2))

    def forward(self, batch):
        self.mean = 0.9 * self.mean + 0.1 * batch
        return self.weight * batch


def test_buffers_replaced_inside_use_ema_are_put_back():
    model = Counter()
    ema = EMAModel(model, 0.0)
    ema.update()
    with ema.use_ema():
        model(torch.ones(2))
    assert torch.equal(model.mean, torch.zeros(2))


def test_buffers_that_a_forward_replaces_are_averaged():
    model = Counter()
    ema, expected = EMAModel(model, 0.5, use_buffers=["mean"]), torch.zeros(2)
    for _ in range(4):
        model(torch.ones(2))
        model.weight.data.add_(1.0)  # an update at resting weights is warned of
        ema.update()
        expected = torch.lerp(expected, model.mean, 0.5)
    assert torch.equal(averages(ema)["mean"], expected)


def test_a_buffer_replaced_inside_use_ema_does_not_take_the_average_along():
    model = Counter()
    ema = EMAModel(model, 0.1, use_buffers=["mean"])
    for _ in range(3):
        model(torch.ones(2))
        ema.update()
    before = everything(model, ema)
    with ema.use_ema():
        model(torch.ones(2))
        ema.ema_metrics()
        ema.get_ema_state()
    assert same(everything(model, ema), before)


@each_dtype
def test_get_ema_state_is_the_same_inside_use_ema(dtype):
    _, ema = trained(dtype=dtype, use_buffers=True)
    expected = ema.get_ema_state()
    assert same(expected, averages(ema))
    with ema.use_ema():
        assert same(ema.get_ema_state(), expected)


@each_dtype
def test_apply_makes_the_averages_the_weights(dtype):
    model, ema = trained(dtype=dtype)
    expected, buffers = averages(ema), copy.deepcopy(model.norm.running_mean)
    ema.apply_ema()
    assert all(same(values(model)[name], value.to(dtype)) for name, value in expected.items())
    assert same(averages(ema), expected)
    assert torch.equal(model.norm.running_mean, buffers)
    assert not ema.swapped


@each_dtype
@pytest.mark.parametrize("use_buffers", [False, True])
def test_apply_inside_use_ema_is_apply_outside(dtype, use_buffers):
    model, ema = trained(dtype=dtype, use_buffers=use_buffers)
    other_model, other = trained(dtype=dtype, use_buffers=use_buffers)
    with ema.use_ema():
        ema.apply_ema()
        assert not ema.swapped
    other.apply_ema()
    assert same(everything(model, ema), everything(other_model, other))
    move(model, 2, ema)
    move(other_model, 2, other)
    assert same(everything(model, ema), everything(other_model, other))


@pytest.mark.parametrize(
    "forbidden",
    [
        lambda ema, saved: ema.update(),
        lambda ema, saved: ema.reset(),
        lambda ema, saved: ema.state_dict(),
        lambda ema, saved: ema.load_state_dict(saved),
        lambda ema, saved: ema.use_ema().__enter__(),
    ],
    ids=["update", "reset", "state_dict", "load_state_dict", "use_ema"],
)
@each_dtype
@pytest.mark.parametrize("after", [0, 9])
def test_what_use_ema_forbids_changes_nothing(forbidden, dtype, after):
    model, ema = trained(dtype=dtype, use_buffers=True, update_after_step=after)
    before = everything(model, ema)
    with ema.use_ema():
        inside = values(model)
        with pytest.raises(RuntimeError, match=r"inside use_ema\(\): leave the block first"):
            forbidden(ema, before[1])
        assert same(values(model), inside)
    assert same(everything(model, ema), before)


# A scripted module refuses hooks on its load_state_dict.
@pytest.mark.filterwarnings("ignore:`torch.jit.script`")
def test_a_scripted_model_is_swapped():
    model = torch.jit.script(nn.Linear(2, 2))
    ema = EMAModel(model, 0.1)
    before = model.weight.detach().clone()
    for _ in range(3):
        with torch.no_grad():
            model.weight.add_(1.0)
        ema.update()
    weights = model.weight.detach().clone()
    with ema.use_ema():
        # 0.1 of 0.1 of (0.1 of 0 and 0.9 of 1) and 0.9 of 2, and 0.9 of 3
        torch.testing.assert_close(model.weight, before + 0.009 + 0.18 + 2.7)
    assert torch.equal(model.weight, weights)
