"""``EMAModel`` in lock-step with a float64 reference and with torch's AveragedModel."""

import copy
import math

import pytest
import torch
from models import PARAMS, STATISTICS, averages, each_dtype, everything, move, net, trained, values
from reference import Reference, same, through_file, wide
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, get_swa_multi_avg_fn

from ema_optim import (
    EMAModel,
    debiased_decay,
    equal_average,
    power_decay,
    warmup_decay,
)

DECAYS = [
    *(0.0, 0.3, 0.999, 1.0),
    *(warmup_decay(0.9), debiased_decay(0.9), equal_average(), power_decay(0.1)),
]


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


def test_statistics_are_not_averaged_by_default():
    _, ema = trained()
    assert set(averages(ema)) == set(ema.get_ema_state()) == PARAMS


def test_averaged_statistics_are_part_of_the_averages():
    model, ema = trained(use_buffers=True)
    assert set(averages(ema)) == set(ema.get_ema_state()) == PARAMS | STATISTICS
    assert int(model.norm.num_batches_tracked) == 4
    assert not torch.equal(ema.get_ema_state()["norm.running_mean"], model.norm.running_mean)
