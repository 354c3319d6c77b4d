"""``update()``: a step that was made elsewhere; and that none is captured in a CUDA graph."""

import copy

import pytest
import torch
from reference import same

from ema_optim import EMAModel, EMAOptimizer, equal_average, power_decay, warmup_decay

STEPS = 14
pytestmark = pytest.mark.filterwarnings("ignore:an EMA in bfloat16|the EMA still holds")


def built(weights=torch.float32, **options):
    torch.manual_seed(3)
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 2))
    model.to(weights)
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": 0.2}]
    if (own := options.pop("own_decay", None)) is not None:
        groups[1]["ema_decay"] = own
    return model, EMAOptimizer(torch.optim.SGD(groups, lr=0.1, momentum=0.9), **options)


def train(model, step, number):
    generator = torch.Generator().manual_seed(number)
    batch = torch.randn(8, 5, generator=generator).to(next(model.parameters()).dtype)
    model.zero_grad()
    model(batch).square().mean().backward()
    step()


def elsewhere(optimizer):
    optimizer.inner.step()
    optimizer.update()


def everything(model, optimizer):
    ema, metrics = optimizer.get_ema_state(model), optimizer.ema_metrics()
    return copy.deepcopy([ema, metrics, optimizer.state_dict(), dict(model.state_dict())])


OPTIONS = [
    {"decay": 0.9},
    {"decay": 0.0},
    {"decay": 1.0},
    {"decay": warmup_decay(0.99)},
    {"decay": equal_average(), "update_every": 4},
    {"decay": 0.9, "update_every": 3, "update_after_step": 5},
    {"decay": power_decay(0.1), "update_after_step": 1},
    {"decay": 0.9, "update_after_step": 4, "dtype": "float24"},
    {"decay": 0.9, "dtype": torch.bfloat16, "update_every": 2},
    {"decay": 0.9, "own_decay": 0.5, "dtype": "float32_compensated"},
    {"weights": torch.bfloat16, "decay": 0.9, "dtype": "float24", "update_after_step": 2},
    {"weights": torch.bfloat16, "decay": warmup_decay(0.9), "own_decay": 0.7},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("eager", [{0}, {0, 1, 2, 6, 7}], ids=["one", "several"])
def test_inner_step_and_update_are_a_step(options, eager):
    (model, optimizer), (other, ours) = built(**options), built(**options)
    for number in range(STEPS):
        train(model, optimizer.step, number)
        train(other, ours.step if number in eager else lambda: elsewhere(ours), number)
        assert same(optimizer.get_ema_state(model), ours.get_ema_state(other)), number
    assert same(everything(model, optimizer), everything(other, ours))


def test_update_goes_on_from_a_checkpoint():
    (model, optimizer), (other, ours) = (built(decay=warmup_decay(0.9)) for _ in range(2))
    for number in range(6):
        train(model, optimizer.step, number)
    other.load_state_dict(model.state_dict())
    ours.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for number in range(6, 9):
        train(model, optimizer.step, number)
        train(other, lambda: elsewhere(ours), number)
    assert same(everything(model, optimizer), everything(other, ours))


def dry(model, optimizer):
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    train(model, optimizer.step, 0)


def cold(model, optimizer):
    optimizer.load_state_dict(optimizer.inner.state_dict())


def pending(model, optimizer):
    train(model, optimizer.step, 0)
    with optimizer.swap_ema_weights():
        saved, weights = optimizer.state_dict(), model.state_dict()
        weights = {name: tensor.clone() for name, tensor in weights.items()}
    optimizer.load_state_dict(saved)
    model.load_state_dict(weights)


def after_eval(model, optimizer):
    train(model, optimizer.step, 0)
    optimizer.eval()


def after_reset(model, optimizer):
    train(model, optimizer.step, 0)
    optimizer.reset()


REFUSED = [
    (lambda *_: None, "must follow a step of the EMAOptimizer, got none"),
    (dry, "must follow a step of the EMAOptimizer, got none"),
    (cold, "must follow a step of the EMAOptimizer, got none"),
    (after_reset, "must follow a step of the EMAOptimizer, got none"),
    (after_eval, r"update\(\) after eval\(\): call optimizer.train\(\) first"),
    (pending, "the step was made from the EMA weights"),
]


@pytest.mark.parametrize(("prepare", "message"), REFUSED, ids=lambda p: getattr(p, "__name__", ""))
def test_update_refuses_and_changes_nothing(prepare, message):
    model, optimizer = built(decay=0.5)
    prepare(model, optimizer)
    weights = [param.detach().clone() for param in model.parameters()]
    before = optimizer._ema.step, len(optimizer._ema.slots)
    with pytest.raises(RuntimeError, match=message):
        optimizer.update()
    assert (optimizer._ema.step, len(optimizer._ema.slots)) == before
    assert all(map(torch.equal, weights, model.parameters()))


def test_update_inside_a_swap_is_refused():
    model, optimizer = built(decay=0.5)
    train(model, optimizer.step, 0)
    with (
        optimizer.swap_ema_weights(),
        pytest.raises(RuntimeError, match="leave the block first"),
    ):
        optimizer.update()


@pytest.fixture
def capturing(monkeypatch):
    """A CPU that is asked as an accelerator is, and answers that it captures."""
    asked = []

    def ask():
        asked.append(1)
        return True

    monkeypatch.setattr(torch.cpu, "is_current_stream_capturing", ask, raising=False)
    return asked


@pytest.mark.parametrize("call", ["step", "update"])
def test_a_captured_step_is_refused_before_anything_moves(call, monkeypatch, request):
    model, optimizer = built(decay=0.5)
    train(model, optimizer.step, 0)
    before = everything(model, optimizer)
    asked = request.getfixturevalue("capturing")
    with pytest.raises(RuntimeError, match=r"capture optimizer.inner.step\(\), call update\(\)"):
        getattr(optimizer, call)()
    assert asked == [1]
    assert same(everything(model, optimizer), before)


def test_the_first_step_is_not_captured_either(capturing):
    model, optimizer = built(decay=0.5)
    with pytest.raises(RuntimeError, match="must not be captured"):
        train(model, optimizer.step, 0)
    assert not optimizer.inner.state
    assert not optimizer._ema.slots


def test_a_captured_update_of_a_model_is_refused(capturing):
    ema = EMAModel(torch.nn.Linear(2, 2), decay=0.5)
    with pytest.raises(RuntimeError, match=r"count nothing: call update\(\) after each replay"):
        ema.update()
    assert ema.ema_metrics()["ema_updates"] == 0


# Torch's builds without CUDA raise when they are asked.
def test_nobody_is_asked_about_weights_on_a_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: 1 / 0)
    model, optimizer = built(decay=0.5)
    train(model, optimizer.step, 0)
    elsewhere(optimizer)
    assert optimizer.ema_metrics()["ema_updates"] == 2
