"""``EMAModel`` in lock-step with a float64 reference and with torch's AveragedModel."""

import copy
import itertools
import math

import pytest
import torch
from reference import Reference, same, through_file, wide
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, get_swa_multi_avg_fn

from ema_optim import (
    EMAModel,
    EMAOptimizer,
    debiased_decay,
    equal_average,
    power_decay,
    warmup_decay,
)
from ema_optim._shadow.buffers import HeldBuffers

each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
STATISTICS = {"norm.running_mean", "norm.running_var"}


DECAYS = [
    *(0.0, 0.3, 0.999, 1.0),
    *(warmup_decay(0.9), debiased_decay(0.9), equal_average(), power_decay(0.1)),
]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.norm = nn.BatchNorm1d(4)
        self.last = nn.Linear(4, 4)
        self.tied = nn.Linear(4, 4, bias=False)
        self.tied.weight = self.last.weight

    def forward(self, batch):
        return self.tied(self.last(self.norm(self.first(batch))))


PARAMS = {name for name, _ in Net().named_parameters()}


def net(dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return Net().to(dtype)


def move(model, steps=1, ema=None, seed=0):
    """Some steps of a training without an optimizer: noise on the weights, a batch of data."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        with torch.no_grad():
            for param in model.parameters():
                param.add_(torch.randn(param.shape, generator=generator) * param.requires_grad)
            model(torch.randn(5, 3, generator=generator).to(model.first.weight.dtype))
        if ema is not None:
            ema.update()


def trained(steps=4, dtype=torch.float32, decay=0.1, **options):
    model = net(dtype)
    ema = EMAModel(model, decay, **options)
    move(model, steps, ema)
    return model, ema


def averages(ema):
    """The EMA by name; a checkpoint is read without a warning about the initial weights."""
    return {name: entry["ema"].clone() for name, entry in ema.state_dict()["state"].items()}


def values(model):
    return copy.deepcopy(dict(model.state_dict()))


def everything(model, ema):
    return values(model), copy.deepcopy(ema.state_dict()), ema.ema_metrics()


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize(("every", "after"), [(1, 0), (3, 0), (1, 4), (2, 3), (4, 1)])
@pytest.mark.parametrize("use_buffers", [False, True])
def test_averages_follow_the_reference_step_by_step(decay, every, after, use_buffers):
    model = net()
    options = {"update_every": every, "update_after_step": after}
    ema = EMAModel(model, decay, use_buffers=use_buffers, **options)
    tensors = dict(model.state_dict(keep_vars=True))
    names = sorted(PARAMS | STATISTICS if use_buffers else PARAMS)
    reference = Reference([tensors[name] for name in names], decay, every, after)
    for step in range(12):
        move(model, 1, ema, seed=step)
        reference.update()
        got = averages(ema)
        assert set(got) == set(names)
        for name, expected in zip(names, reference.emas, strict=True):
            torch.testing.assert_close(wide(got[name]), expected, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize(
    ("dtype", "wanted", "stored", "room"),
    [
        (torch.bfloat16, None, torch.float32, 1e-6),
        (torch.float64, None, torch.float64, 1e-14),
        (torch.float32, torch.float64, torch.float64, 1e-14),
        (torch.float64, torch.float32, torch.float32, 1e-6),
    ],
)
def test_averages_of_other_dtypes_follow_the_reference(dtype, wanted, stored, room):
    model = net(dtype)
    ema = EMAModel(model, 0.9, use_buffers=True, dtype=wanted)
    tensors = {n: t for n, t in model.state_dict(keep_vars=True).items() if t.is_floating_point()}
    names = [name for name in tensors if name != "tied.weight"]
    reference = Reference([tensors[name] for name in names], 0.9)
    for step in range(8):
        move(model, 1, ema, seed=step)
        reference.update()
    for name, expected in zip(names, reference.emas, strict=True):
        assert averages(ema)[name].dtype == stored
        torch.testing.assert_close(wide(averages(ema)[name]), expected, rtol=10 * room, atol=room)


@pytest.mark.parametrize("use_buffers", [False, True])
@pytest.mark.parametrize("decay", [0.0, 0.3, 0.999, 1.0])
def test_averages_equal_those_of_torchs_averaged_model(use_buffers, decay):
    # Torch copies at its first update: averaging begins after one step.
    model = net()
    average = get_ema_multi_avg_fn(decay)
    torchs = AveragedModel(model, multi_avg_fn=average, use_buffers=use_buffers)
    ema = EMAModel(model, decay, use_buffers=use_buffers, update_after_step=1)
    for step in range(6):
        move(model, 1, ema, seed=step)
        torchs.update_parameters(model)
        expected = torchs.module.state_dict()
        assert all(torch.equal(value, expected[name]) for name, value in averages(ema).items())


def test_equal_averages_equal_those_of_torchs_averaged_model():
    # Its default on a CPU is another formula; on an accelerator it is this one.
    model = net()
    torchs = AveragedModel(model, multi_avg_fn=get_swa_multi_avg_fn())
    default, ema = AveragedModel(model), EMAModel(model, equal_average())
    for step in range(30):
        move(model, 1, ema, seed=step)
        torchs.update_parameters(model)
        default.update_parameters(model)
        expected, near = torchs.module.state_dict(), default.module.state_dict()
        assert all(torch.equal(value, expected[name]) for name, value in averages(ema).items())
        for name, value in averages(ema).items():
            torch.testing.assert_close(value, near[name], rtol=1e-6, atol=1e-6)


def test_swapped_in_model_computes_what_torchs_averaged_model_computes():
    model = net()
    torchs = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.2), use_buffers=True)
    ema = EMAModel(model, 0.2, use_buffers=True, update_after_step=1)
    for step in range(4):
        move(model, 1, ema, seed=step)
        torchs.update_parameters(model)
    model.eval()
    torchs.eval()
    batch = torch.randn(7, 3)
    with ema.use_ema():
        assert torch.equal(model(batch), torchs(batch))


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


class Injected(BaseException):
    """Not an Exception, as a KeyboardInterrupt is none."""


def failing_copy(nth):
    real, calls = torch._foreach_copy_, itertools.count()

    def copy(targets, sources):
        real(targets, sources)
        if next(calls) == nth:
            raise Injected

    return copy


def fails_in_use_ema(ema, monkeypatch, nth):
    with monkeypatch.context() as patch:
        patch.setattr(torch, "_foreach_copy_", failing_copy(nth))
        try:
            with ema.use_ema():
                pass
        except Injected:
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
        raise Injected

    model, ema = trained()
    before = values(model)["first.weight"]
    monkeypatch.setattr(HeldBuffers, "put_back", fail)
    with pytest.raises(Injected), ema.use_ema():
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


def test_statistics_are_not_averaged_by_default():
    _, ema = trained()
    assert set(averages(ema)) == set(ema.get_ema_state()) == PARAMS


def test_averaged_statistics_are_part_of_the_averages():
    model, ema = trained(use_buffers=True)
    assert set(averages(ema)) == set(ema.get_ema_state()) == PARAMS | STATISTICS
    assert int(model.norm.num_batches_tracked) == 4
    assert not torch.equal(ema.get_ema_state()["norm.running_mean"], model.norm.running_mean)


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


@pytest.mark.parametrize("use_buffers", [False, True])
def test_averages_survive_a_cast_of_the_model_and_back(use_buffers):
    # Module.to() keeps the parameters and replaces the buffers by new tensors.
    model, ema = trained(use_buffers=use_buffers)
    expected = averages(ema)
    model.double().float()
    assert same(ema.get_ema_state(), expected)
    move(model, 1, ema, seed=9)
    weights = model.state_dict()
    expected = {name: torch.lerp(old, weights[name], 0.9) for name, old in expected.items()}
    assert same(ema.get_ema_state(), expected)


@each_dtype
def test_get_ema_state_is_the_same_inside_use_ema(dtype):
    _, ema = trained(dtype=dtype, use_buffers=True)
    expected = ema.get_ema_state()
    assert same(expected, averages(ema))
    with ema.use_ema():
        assert same(ema.get_ema_state(), expected)


def test_get_ema_state_gives_fresh_copies_that_load_into_a_model():
    model, ema = trained(use_buffers=True)
    before, state, deployed = everything(model, ema), ema.get_ema_state(), net(seed=1)
    result = deployed.load_state_dict(through_file(state), strict=False)
    assert result.unexpected_keys == []
    assert set(result.missing_keys) <= {"tied.weight", "norm.num_batches_tracked"}
    assert all(torch.equal(deployed.state_dict()[name], value) for name, value in state.items())
    for value in state.values():
        value.zero_()
    assert same(everything(model, ema), before)


@pytest.mark.parametrize(
    "wrap",
    [nn.DataParallel, lambda model: torch.compile(model, backend="eager")],
    ids=["parallel", "compiled"],
)
def test_names_are_those_of_the_bare_model(wrap):
    model = net()
    ema = EMAModel(wrap(model), 0.1, use_buffers=True)
    move(model, 3, ema)
    bare_model, bare = trained(steps=3, use_buffers=True)
    assert same(averages(ema), averages(bare))
    bare.load_state_dict(ema.state_dict())
    assert same(everything(bare_model, bare), everything(model, ema))


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


OPTIONS = [
    {},
    {"use_buffers": True},
    {"decay": warmup_decay(0.2)},
    {"update_every": 3},
    {"update_after_step": 3},
    {"update_after_step": 9},
    {"dtype": torch.float64, "use_buffers": True},
]


@each_dtype
@pytest.mark.parametrize("options", [o for o in OPTIONS if "dtype" not in o])
@pytest.mark.parametrize("model_first", [False, True])
@pytest.mark.parametrize("steps", [0, 4])
def test_resumed_run_equals_the_uninterrupted_one(dtype, options, model_first, steps):
    model, ema = trained(steps=steps, dtype=dtype, **options)
    saved = through_file([model.state_dict(), ema.state_dict()])
    resumed_model = net(dtype, seed=5)
    resumed = EMAModel(resumed_model, **{"decay": 0.1, **options})
    for load in (resumed_model, resumed) if model_first else (resumed, resumed_model):
        load.load_state_dict(saved[load is resumed])
    for _ in range(2):
        assert same(everything(resumed_model, resumed)[:2], everything(model, ema)[:2])
        move(model, 7, ema, seed=8)
        move(resumed_model, 7, resumed, seed=8)


def test_float64_averages_of_narrower_weights_resume_too():
    model, ema = trained(use_buffers=True, dtype=torch.float32)
    ema = EMAModel(model, 0.1, use_buffers=True, dtype=torch.float64)
    move(model, 3, ema)
    resumed = EMAModel(copy.deepcopy(model), 0.1, use_buffers=True, dtype=torch.float64)
    resumed.load_state_dict(through_file(ema.state_dict()))
    assert same(averages(resumed), averages(ema))


def test_a_load_copies_its_argument():
    _, ema = trained()
    other_model = net(seed=2)
    other = EMAModel(other_model, 0.1)
    saved = ema.state_dict()
    before = copy.deepcopy(saved)
    other.load_state_dict(saved)
    move(other_model, 3, other)
    assert same(saved, before)
    assert same(ema.state_dict(), before)


def test_a_load_finds_the_averages_by_name_and_not_by_position():
    first, second = (nn.ModuleDict({n: nn.Linear(2, 2) for n in names}) for names in ("ab", "ba"))
    ema, other = EMAModel(first, 0.1), EMAModel(second, 0.1)
    ema.update()
    other.load_state_dict(ema.state_dict())
    assert same(dict(sorted(other.get_ema_state().items())), ema.get_ema_state())


def test_reset_begins_anew_from_the_weights():
    model, ema = trained(use_buffers=True)
    model.load_state_dict(net(seed=7).state_dict())
    ema.reset()
    other_model = net(seed=7)
    other = EMAModel(other_model, 0.1, use_buffers=True)
    assert same(everything(model, ema), everything(other_model, other))
    move(model, 3, ema)
    move(other_model, 3, other)
    assert same(everything(model, ema), everything(other_model, other))


def test_weights_loaded_after_construction_without_reset_average_from_the_old_ones():
    model = net()
    before = values(model)
    ema = EMAModel(model, 0.5)
    model.load_state_dict(net(seed=7).state_dict())
    ema.update()
    now = values(model)
    expected = {name: torch.lerp(before[name], now[name], 0.5) for name in PARAMS}
    assert same({name: averages(ema)[name] for name in PARAMS}, expected)


def test_a_replaced_layer_is_averaged_from_its_first_update():
    model, ema = trained()
    expected, old = averages(ema), model.first.weight
    model.first = nn.Linear(3, 4)
    seed = model.first.weight.detach().clone()
    ema.update()
    assert torch.equal(averages(ema)["first.weight"], seed)
    move(model, 1, ema)
    new = torch.lerp(seed, model.first.weight.detach(), 0.9)
    assert torch.equal(averages(ema)["first.weight"], new)
    assert set(averages(ema)) == set(expected)
    held = old.detach().clone()
    with ema.use_ema():
        assert torch.equal(model.first.weight, new)
        assert torch.equal(old, held)


def test_a_frozen_param_has_no_average_until_it_is_unfrozen():
    model = net()
    model.first.requires_grad_(False)
    ema = EMAModel(model, 0.2)
    move(model, 3, ema)
    assert set(averages(ema)) == PARAMS - {"first.weight", "first.bias"}
    model.first.requires_grad_(True)
    ema.update()
    seed = model.first.weight.detach().clone()
    assert torch.equal(averages(ema)["first.weight"], seed)
    move(model, 1, ema)
    new = torch.lerp(seed, model.first.weight.detach(), 0.8)
    assert torch.equal(averages(ema)["first.weight"], new)


def test_a_param_frozen_later_is_averaged_on():
    model, ema = trained()
    model.first.requires_grad_(False)
    kept, weight = averages(ema)["first.weight"], model.first.weight.detach()
    ema.update()
    assert torch.equal(averages(ema)["first.weight"], torch.lerp(kept, weight, 0.9))
    for _ in range(20):
        model.norm.bias.data.add_(1.0)  # an update at resting weights is warned of
        ema.update()
    torch.testing.assert_close(averages(ema)["first.weight"], weight)


def test_tied_weights_are_averaged_once_and_stay_tied():
    model, ema = trained()
    assert "tied.weight" not in averages(ema)
    with ema.use_ema():
        assert model.tied.weight is model.last.weight
        assert torch.equal(model.tied.weight, ema.get_ema_state()["last.weight"])
    ema.apply_ema()
    assert model.tied.weight is model.last.weight


@pytest.mark.parametrize("steps", [0, 1, 4])
@pytest.mark.parametrize("after", [0, 2, 9])
def test_averages_are_the_weights_until_averaging_begins(steps, after):
    model, ema = trained(steps=steps, update_after_step=after, use_buffers=True)
    weights = {n: v for n, v in values(model).items() if n in PARAMS | STATISTICS}
    assert same(dict(sorted(averages(ema).items())), dict(sorted(weights.items()))) == (
        steps <= after
    )
    assert ema.ema_metrics()["ema_updates"] == max(0, steps - after)


@pytest.mark.parametrize("bad", [lambda u: "0.9", lambda u: 1.5, lambda u: math.nan])
def test_an_update_that_a_schedule_fails_changes_nothing(bad):
    model = net()
    ema = EMAModel(model, lambda update: 0.1 if update < 3 else bad(update))
    move(model, 2, ema)
    before = everything(model, EMAModel(model)), averages(ema), ema.state_dict()["param_groups"]
    with pytest.raises((TypeError, ValueError), match=r"decay\(3\)"):
        ema.update()
    after = everything(model, EMAModel(model)), averages(ema), ema.state_dict()["param_groups"]
    assert same(after, before)


@each_dtype
def test_everything_works_inside_inference_mode_and_after_it(dtype):
    model, other_model = net(dtype), net(dtype)
    with torch.inference_mode():
        ema = EMAModel(model, 0.1, use_buffers=True)
        ema.update()
        with ema.use_ema():
            pass
    other = EMAModel(other_model, 0.1, use_buffers=True)
    other.update()
    for one, its in ((model, ema), (other_model, other)):
        move(one, 2, its)
        with its.use_ema(), torch.inference_mode():
            one(torch.ones(5, 3, dtype=dtype))
    assert same(everything(model, ema), everything(other_model, other))


def test_a_deep_copy_goes_on_by_itself():
    model, ema = trained(use_buffers=True)
    copied_model, copied = copy.deepcopy((model, ema))
    before = everything(model, ema)
    assert copied.model is copied_model
    move(copied_model, 3, copied, seed=4)
    assert same(everything(model, ema), before)
    move(model, 3, ema, seed=4)
    assert same(everything(model, ema), everything(copied_model, copied))


def test_complex_and_0_dim_params_are_averaged():
    model = nn.ParameterDict({"z": torch.ones(3, dtype=torch.complex64), "s": torch.tensor(1.0)})
    ema = EMAModel(model, 0.25)
    with torch.no_grad():
        model["z"].mul_(1 + 4j)
        model["s"].fill_(5.0)
    ema.update()
    expected = {"z": torch.full((3,), 1 + 3j), "s": torch.tensor(4.0)}
    with pytest.warns(UserWarning, match="25% of the initial weights"):
        assert same(ema.get_ema_state(), {name: expected[name] for name in ema.get_ema_state()})


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"model": None}, TypeError, "model must be a torch.nn.Module"),
        ({"model": [torch.nn.Linear(1, 1)]}, TypeError, "model must be a torch.nn.Module"),
        ({"decay": 1.1}, ValueError, r"decay must be in \[0, 1\], got 1.1"),
        ({"decay": -1e-9}, ValueError, r"decay must be in \[0, 1\]"),
        ({"decay": math.nan}, ValueError, r"decay must be in \[0, 1\], got nan"),
        ({"decay": "0.9"}, TypeError, "decay must be"),
        ({"decay": None}, TypeError, "decay must be"),
        ({"decay": True}, TypeError, "decay must be"),
        ({"decay": lambda update: 2.0}, ValueError, r"decay\(1\) must be in \[0, 1\], got 2.0"),
        ({"decay": warmup_decay}, TypeError, "factory"),
        ({"update_every": 0}, ValueError, "update_every must be at least 1"),
        ({"update_every": 2.0}, TypeError, "update_every must be an int"),
        ({"update_every": True}, TypeError, "update_every must be an int"),
        ({"update_after_step": -1}, ValueError, "update_after_step must be at least 0"),
        ({"update_after_step": None}, TypeError, "update_after_step must be an int"),
        ({"dtype": torch.float16}, ValueError, "stops moving"),
        ({"dtype": torch.int64}, ValueError, "dtype must be"),
        ({"dtype": "float32"}, ValueError, "dtype must be one of"),
    ],
)
def test_wrong_arguments_are_refused(kwargs, error, message):
    with pytest.raises(error, match=message):
        EMAModel(**{"model": nn.Linear(1, 1), **kwargs})


def without(key):
    def change(saved):
        del saved["state"]["first.weight"][key]

    return change


def with_entry(key, value):
    def change(saved):
        saved["state"]["first.weight"][key] = value

    return change


def renamed(saved):
    saved["state"]["new.weight"] = saved["state"].pop("first.weight")
    names = saved["param_groups"][0]["params"]
    names[names.index("first.weight")] = "new.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (renamed, r"\['first.weight'\]"),
        (lambda saved: saved["param_groups"][0]["params"].append("more"), r"\['more'\]"),
        (lambda saved: saved["param_groups"].pop(), "norm.running_mean"),
        (without("ema"), r"ema of first\.weight"),
        (without("ema_step"), r"ema_step of first\.weight"),
        (with_entry("ema", torch.ones(3, 4)), r"first\.weight must have shape \(4, 3\)"),
        (with_entry("ema", torch.ones(())), r"first\.weight must have shape"),
        (with_entry("ema", 1.0), r"first\.weight must be a tensor"),
        (with_entry("ema_step", torch.tensor(-1)), r"ema_step of first\.weight"),
        (with_entry("ema_step", torch.tensor(1.5)), r"ema_step of first\.weight"),
        (with_entry("ema_step", "many"), r"ema_step of first\.weight"),
    ],
)
def test_a_damaged_checkpoint_is_refused_and_changes_nothing(change, message):
    _, ema = trained(use_buffers=True)
    other_model, other = trained(steps=2, use_buffers=True)
    before, saved = everything(other_model, other), copy.deepcopy(ema.state_dict())
    change(saved)
    with pytest.raises((TypeError, ValueError), match=message):
        other.load_state_dict(saved)
    assert same(everything(other_model, other), before)


@pytest.mark.parametrize("wrong", [{}, {"state": {}}, net().state_dict()])
def test_what_is_no_checkpoint_is_refused(wrong):
    model, ema = trained()
    before = everything(model, ema)
    with pytest.raises((TypeError, ValueError), match=r"checkpoint|state_dict"):
        ema.load_state_dict(wrong)
    assert same(everything(model, ema), before)


def test_a_checkpoint_of_an_optimizer_by_names_loads_but_not_a_swapped_one():
    model, other_model = net(), net()
    optimizer = EMAOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), decay=0.1)
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()
    ema = EMAModel(other_model, 0.1)
    ema.load_state_dict(get_optimizer_state_dict(model, optimizer))
    assert same(ema.get_ema_state(), optimizer.get_ema_state(model))
    before = everything(other_model, ema)
    with optimizer.swap_ema_weights():
        swapped = get_optimizer_state_dict(model, optimizer)
    with pytest.raises((ValueError, RuntimeError), match="swapped"):
        ema.load_state_dict(swapped)
    assert same(everything(other_model, ema), before)


@pytest.mark.parametrize("use_buffers", [True, ["norm.running_*"]])
def test_a_checkpoint_that_lacks_averaged_buffers_is_refused(use_buffers):
    _, ema = trained()
    model, other = trained(steps=2, use_buffers=use_buffers)
    before = everything(model, other)
    with pytest.raises(ValueError, match=r"norm\.running_mean"):
        other.load_state_dict(ema.state_dict())
    assert same(everything(model, other), before)


def test_a_checkpoint_of_narrow_weights_holds_the_averages_alone():
    _, ema = trained(dtype=torch.bfloat16)
    assert {key for entry in ema.state_dict()["state"].values() for key in entry} == {
        "ema",
        "ema_step",
    }


@pytest.mark.parametrize("names", [["first.weight"], None])
def test_a_checkpoint_that_lost_an_average_is_refused(names):
    _, ema = trained()
    saved = ema.state_dict()
    for name in names or list(saved["state"]):
        del saved["state"][name]
    _, other = trained(steps=1)
    with pytest.raises(ValueError, match=r"ema of first\.weight must be in the checkpoint"):
        other.load_state_dict(saved)


def test_saving_does_not_change_the_average():
    finals = []
    for saves in (False, True):
        model = net()
        ema = EMAModel(model, 0.5)
        with torch.no_grad():
            model.first.weight.add_(1.0)
        if saves:
            ema.state_dict()
        ema.update()
        finals.append(averages(ema))
    assert same(*finals)
