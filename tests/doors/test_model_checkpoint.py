"""What ``EMAModel`` saves and loads."""

import copy

import pytest
import torch
from models import averages, each_dtype, everything, move, net, trained
from reference import same, through_file
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

from ema_optim import EMAModel, EMAOptimizer, warmup_decay

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
