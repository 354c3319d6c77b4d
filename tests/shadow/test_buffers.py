"""Which buffers are averaged, and that the others are the model's own."""

import copy

import pytest
import torch
from models import move
from reference import same, through_file
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from ema_optim import EMAModel

STATISTICS = {f"norm.{name}" for name in ("running_mean", "running_var")}


class OwnNorm(nn.BatchNorm1d):
    """A subclass of a norm class of torch, with a buffer of its own."""

    def __init__(self, size):
        super().__init__(size)
        self.register_buffer("bound", torch.ones(size))


class Net(nn.Module):
    """Running statistics, and what else people keep in buffers."""

    def __init__(self, norm=nn.BatchNorm1d):
        super().__init__()
        self.norm = norm(3)
        self.last = nn.Linear(3, 3)
        self.register_buffer("mask", torch.full((3, 3), -torch.inf).triu(1))
        self.register_buffer("expert_bias", torch.zeros(3))
        self.register_buffer("cache", torch.zeros(3), persistent=False)
        self.register_buffer("seen", torch.tensor(0))

    def forward(self, batch):
        self.expert_bias += batch.detach().mean(0)
        self.cache = self.cache + 1
        self.seen += 1
        return self.last(self.norm(batch)) @ self.mask.exp()


def trained(use_buffers, steps=4, model=None):
    model = Net() if model is None else model
    ema = EMAModel(model, 0.5, use_buffers=use_buffers)
    move(model, steps, ema)
    return model, ema


def averaged(model, ema):
    """The names of the averaged buffers."""
    return set(ema.get_ema_state()) - {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize(
    "norm", [nn.BatchNorm1d, OwnNorm, nn.SyncBatchNorm, lambda n: nn.LazyBatchNorm1d()]
)
def test_true_averages_the_running_statistics_alone(norm):
    model = Net(norm)
    model.eval() if norm is nn.SyncBatchNorm else model(torch.randn(5, 3))
    model, ema = trained(True, model=model)
    assert averaged(model, ema) == STATISTICS


@pytest.mark.parametrize(
    "norm",
    [
        lambda n: nn.BatchNorm1d(n, track_running_stats=False),
        lambda n: nn.Identity(),
        nn.LayerNorm,
        nn.InstanceNorm1d,
    ],
)
@pytest.mark.filterwarnings("ignore:input's size")
def test_a_model_without_running_statistics_has_no_averaged_buffer(norm):
    model, ema = trained(True, model=Net(norm))
    assert averaged(model, ema) == set()
    resumed = EMAModel(copy.deepcopy(model), 0.5)
    resumed.load_state_dict(through_file(ema.state_dict()))
    assert same(resumed.state_dict(), ema.state_dict())


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        ([], set()),
        (["expert_bias"], {"expert_bias"}),
        (("*bias", "norm.running_*"), {"expert_bias"} | STATISTICS),
        (["*.running_mean"], {"norm.running_mean"}),
        (["[ce]*"], {"cache", "expert_bias"}),
    ],
)
def test_patterns_average_the_buffers_that_they_name(patterns, expected):
    model, ema = trained(patterns)
    assert averaged(model, ema) == expected


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda m: torch.compile(m, backend="eager")])
def test_patterns_are_of_the_bare_models_names(wrap):
    model = Net()
    ema = EMAModel(wrap(model), 0.5, use_buffers=["expert_bias"])
    assert averaged(model, ema) == {"expert_bias"}


def test_a_named_buffer_is_averaged_as_the_formula_says():
    model = Net()
    ema, expected = EMAModel(model, 0.5, use_buffers=["expert_*"]), model.expert_bias.clone()
    for step in range(4):
        move(model, 1, ema, seed=step)
        expected = torch.lerp(expected, model.expert_bias, 0.5)
    assert torch.equal(ema.get_ema_state()["expert_bias"], expected)


# lerp(-inf, -inf) is NaN: an averaged causal mask made every output NaN.
@pytest.mark.parametrize("use_buffers", [True, ["expert_bias"]])
def test_buffers_that_are_not_averaged_are_the_models_own_in_the_block(use_buffers):
    model, ema = trained(use_buffers)
    own = {n: b.clone() for n, b in model.named_buffers() if n not in averaged(model, ema)}
    with ema.use_ema():
        assert all(torch.equal(b, own[n]) for n, b in model.named_buffers() if n in own)
        assert model.eval()(torch.randn(5, 3)).isfinite().all()


# An average of unit vectors is shorter, and the layer divides by the norm that they give.
def test_spectral_norm_keeps_its_unit_vectors():
    torch.manual_seed(0)
    model = nn.Sequential(spectral_norm(nn.Linear(6, 6)), nn.BatchNorm1d(6))
    ema = EMAModel(model, 0.5, use_buffers=True)
    for _ in range(20):
        model(torch.randn(5, 6))
        with torch.no_grad():
            for param in model.parameters():
                param.add_(torch.randn_like(param))
        ema.update()
    with ema.use_ema():
        for vector in (b for n, b in model.named_buffers() if n[-3:] in ("._u", "._v")):
            torch.testing.assert_close(vector.norm(), torch.tensor(1.0))


def resize_in_place(norm):
    norm.running_mean.resize_(5).fill_(2.0)


def replace_by_another_shape(norm):
    norm.running_mean = torch.full((5,), 2.0)


# Per-channel observers resize their buffers at the first batch; torch's error named none.
@pytest.mark.parametrize("resize", [resize_in_place, replace_by_another_shape])
def test_a_running_statistic_of_another_shape_begins_anew(resize):
    model, ema = trained(True)
    resize(model.norm)
    for value, expected in ((2.0, 2.0), (4.0, 3.0)):
        model.norm.running_mean.fill_(value)
        ema.update()
        average = ema.state_dict()["state"]["norm.running_mean"]["ema"]
        assert torch.equal(average, torch.full((5,), expected))


def test_a_running_statistic_that_is_not_finite_does_not_stop_the_run():
    model, ema = trained(True)
    model.norm.running_var.fill_(torch.inf)
    move(model, 4, ema)
    with pytest.warns(UserWarning, match="1 of 6 EMA tensors hold NaN or infinite values"):
        assert not ema.get_ema_state()["norm.running_var"].isfinite().any()


@pytest.mark.parametrize("resize", [resize_in_place, replace_by_another_shape])
def test_a_named_buffer_of_another_shape_is_named_and_nothing_changes(resize):
    model, ema = trained(["norm.*mean"])
    saved = copy.deepcopy(ema.state_dict())
    kept, before = model.norm.running_mean, model.norm.running_mean.clone()
    resize(model.norm)
    for call in (ema.update, ema.get_ema_state, ema.state_dict, ema.use_ema().__enter__):
        with pytest.raises(ValueError, match=r"norm\.running_mean must keep its shape.*\(5,\)"):
            call()
    model.norm.running_mean = kept
    with torch.no_grad():
        kept.resize_(3).copy_(before)
    assert same(ema.state_dict(), saved)
    resize(model.norm)
    ema.reset()
    assert torch.equal(ema.get_ema_state()["norm.running_mean"], torch.full((5,), 2.0))


@pytest.mark.parametrize(
    ("use_buffers", "error", "message"),
    [
        (["seen"], ValueError, r"buffer seen must hold real or complex.*int64"),
        (["norm.*"], ValueError, r"buffer norm\.num_batches_tracked must"),
        (["expert_bias", "bias"], ValueError, r"'bias', which matches none of \['cache', "),
        (["last.weight"], ValueError, r"'last.weight', which matches none"),
        ("expert_bias", TypeError, "must be True, False or a list of names, got 'expert_bias'"),
        (1, TypeError, "must be True, False or a list"),
        (None, TypeError, "must be True, False or a list"),
        ([1], TypeError, r"must list names \(shell patterns\), got 1"),
    ],
)
def test_what_names_no_buffer_of_floats_is_refused(use_buffers, error, message):
    with pytest.raises(error, match=message):
        EMAModel(Net(), 0.5, use_buffers=use_buffers)


# A cache made in the forward is in no file: the model that resumes has none yet.
@pytest.mark.parametrize("patterns", [["cache", "expert_bias"], ["cache"]])
def test_a_temporary_buffer_is_in_no_checkpoint(patterns):
    model, ema = trained(patterns)
    saved = through_file(ema.state_dict())
    assert "cache" not in saved["state"]
    resumed_model = Net()
    resumed_model.load_state_dict(model.state_dict())
    resumed = EMAModel(resumed_model, 0.5, use_buffers=patterns)
    resumed.load_state_dict(saved)
    move(model, 4, ema, seed=1)
    move(resumed_model, 4, resumed, seed=1)
    assert same(resumed.state_dict(), ema.state_dict())


@pytest.mark.parametrize("use_buffers", [True, False, ["norm.running_mean"]])
def test_saved_averages_of_buffers_that_are_no_longer_averaged_are_ignored(use_buffers):
    # As use_buffers=True saved once: every buffer of floats, persistent or not.
    ema = trained(["expert_bias", "norm.running_*"])[1]
    saved = copy.deepcopy(ema.state_dict())
    saved["state"]["cache"] = saved["state"]["expert_bias"]
    for key in ("params", "ema_params"):
        saved["param_groups"][1][key].append("cache")
    other = EMAModel(Net(), 0.5, use_buffers=use_buffers)
    other.load_state_dict(saved)
    expected = ema.get_ema_state()
    assert all(torch.equal(value, expected[n]) for n, value in other.get_ema_state().items())
