"""EMA weights by parameter name: ``get_ema_state`` and ``load_ema_state``."""

import copy
import re

import pytest
import torch
from reference import same, through_file
from steps import train_alike
from torch import nn

from ema_optim import EMAOptimizer, warmup_decay


class Net(nn.Module):
    """Tied weights, a frozen layer, a layer called ``module``, one that nobody optimizes."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(3, 2)
        self.module = nn.Linear(2, 2)
        self.frozen = nn.Linear(2, 2).requires_grad_(False)
        self.other = nn.Linear(2, 2)
        self.head = nn.Linear(2, 3)
        self.head.weight = self.embed.weight
        self.scale = nn.Parameter(torch.tensor(2.0))


NAMES = {"embed.weight", "module.weight", "module.bias", "head.bias", "scale"}
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def pair(weights=torch.float32, decay=0.1, steps=0, seed=0, **options):
    torch.manual_seed(seed)
    model = Net().to(weights)
    params = [p for name, p in model.named_parameters() if not name.startswith("other")]
    optimizer = EMAOptimizer(torch.optim.SGD(params, lr=0.1), decay=decay, **options)
    train_alike(optimizer, steps)
    return model, optimizer


def weights(model):
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def everything(model, optimizer):
    return weights(model), copy.deepcopy(optimizer.state_dict())


def random_state(model, seed=1):
    generator = torch.Generator().manual_seed(seed)
    shapes = {name: p.shape for name, p in model.named_parameters() if name in NAMES}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def compiled(model):
    return torch.compile(model, backend="eager")


WRAPPERS = {
    "bare": lambda model: model,
    "compiled": compiled,
    "parallel": nn.DataParallel,
    "compiled parallel": lambda model: compiled(nn.DataParallel(model)),
    "parallel compiled": lambda model: nn.DataParallel(compiled(model)),
}
each_wrapper = pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)


@each_wrapper
def test_names_are_those_of_the_bare_model(wrap):
    model, optimizer = pair(steps=3)
    state = optimizer.get_ema_state(wrap(model))
    assert set(state) == NAMES
    assert same(state, optimizer.get_ema_state(model))


@pytest.mark.parametrize("name", ["embed", "module", "head"])
def test_names_of_a_compiled_layer_are_those_of_the_bare_model(name):
    model, optimizer = pair(steps=3)
    expected = optimizer.get_ema_state(model)
    setattr(model, name, compiled(getattr(model, name)))
    assert same(optimizer.get_ema_state(model), expected)
    optimizer.load_ema_state(model, expected)
    assert same(optimizer.get_ema_state(model), expected)


def test_names_of_a_model_inside_a_model_are_the_outer_models():
    model, optimizer = pair(steps=2)
    assert set(optimizer.get_ema_state(nn.ModuleDict({"net": model}))) == {
        f"net.{n}" for n in NAMES
    }
    assert set(optimizer.get_ema_state(model.module)) == {"weight", "bias"}


@each_dtype
def test_values_are_the_ema_of_each_param(dtype):
    model, optimizer = pair(weights=dtype, steps=3)
    state = optimizer.get_ema_state(model)
    for name, param in model.named_parameters():
        if name in NAMES:
            assert same(state[name], optimizer.state[param]["ema"])
            assert not torch.equal(state[name], param.float())


@each_dtype
def test_values_are_fresh_copies(dtype):
    model, optimizer = pair(weights=dtype, steps=3)
    before, state = everything(model, optimizer), optimizer.get_ema_state(model)
    assert not any(value.requires_grad for value in state.values())
    with torch.no_grad():
        for value in state.values():
            value.fill_(9.0)
    assert same(everything(model, optimizer), before)
    with optimizer.swap_ema_weights():
        for value in optimizer.get_ema_state(model).values():
            value.fill_(9.0)
    assert same(everything(model, optimizer), before)


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize(
    ("dtype", "wanted", "stored"),
    [
        (torch.float32, None, torch.float32),
        (torch.bfloat16, None, torch.float32),
        (torch.float64, None, torch.float64),
        (torch.bfloat16, torch.float64, torch.float64),
    ],
)
def test_values_have_the_dtype_of_the_ema(steps, dtype, wanted, stored):
    model, optimizer = pair(weights=dtype, dtype=wanted, steps=steps)
    assert {value.dtype for value in optimizer.get_ema_state(model).values()} == {stored}


@pytest.mark.parametrize(("steps", "after"), [(0, 0), (0, 4), (1, 4), (4, 4)])
@each_dtype
def test_values_are_the_weights_until_averaging_begins(steps, after, dtype):
    model, optimizer = pair(weights=dtype, steps=steps, update_after_step=after)
    with torch.no_grad():
        model.scale.add_(1.0)  # weights loaded late count too
    expected = {n: p.float() for n, p in weights(model).items() if n in NAMES}
    assert same(optimizer.get_ema_state(model), expected)
    with optimizer.swap_ema_weights():
        assert same(optimizer.get_ema_state(model), expected)


@each_dtype
def test_values_are_the_same_while_swapped(dtype):
    model, optimizer = pair(weights=dtype, steps=3)
    expected = optimizer.get_ema_state(model)
    with optimizer.swap_ema_weights():
        assert same(optimizer.get_ema_state(model), expected)
    optimizer.eval()
    assert same(optimizer.get_ema_state(model), expected)
    optimizer.train()
    assert same(optimizer.get_ema_state(model), expected)


@each_dtype
@each_wrapper
def test_values_load_into_a_model(dtype, wrap):
    model, optimizer = pair(weights=dtype, steps=3)
    state = through_file(optimizer.get_ema_state(wrap(model)))
    deployed = Net().to(dtype)
    frozen = copy.deepcopy(deployed.frozen.state_dict())
    result = deployed.load_state_dict(state, strict=False)
    assert result.unexpected_keys == []
    assert set(deployed.state_dict()) - set(state) == set(result.missing_keys)
    with optimizer.swap_ema_weights():
        assert all(same(deployed.state_dict()[name], weights(model)[name]) for name in NAMES)
    assert deployed.head.weight is deployed.embed.weight
    assert same(deployed.frozen.state_dict(), frozen)


def test_params_of_another_optimizer_or_group_are_left_out():
    model, first = pair()
    groups = [
        {"params": model.other.weight},
        {"params": model.other.bias, "ema_enabled": False},
    ]
    second = EMAOptimizer(torch.optim.SGD(groups, lr=0.1), decay=0.1)
    assert set(first.get_ema_state(model)) == NAMES
    assert set(second.get_ema_state(model)) == {"other.weight"}
    second.step()
    assert set(second.get_ema_state(model)) == {"other.weight"}
    with pytest.raises(KeyError, match=re.escape("unknown: ['other.bias']")):
        second.load_ema_state(model, dict(model.other.named_parameters(prefix="other")))


def test_a_model_without_these_params_is_an_error():
    _, optimizer = pair(steps=1)
    with pytest.raises(ValueError, match="pass the model"):
        optimizer.get_ema_state(Net())
    with pytest.raises((KeyError, ValueError)):
        optimizer.load_ema_state(Net(), random_state(Net()))


PREFIXES = ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."]


@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("prefix", PREFIXES)
@each_wrapper
def test_what_is_loaded_is_what_is_got(steps, prefix, wrap):
    model, optimizer = pair(steps=steps)
    before, state = weights(model), random_state(model)
    optimizer.load_ema_state(wrap(model), {prefix + name: v for name, v in state.items()})
    assert same(optimizer.get_ema_state(model), state)
    assert same(weights(model), before)
    assert not optimizer.swapped


# A LightningModule's network, the engine of a strategy and data-parallel wrappers prefix all names.
@pytest.mark.parametrize("prefix", ["module", "_forward_module", "model"])
@pytest.mark.parametrize("strict", [True, False])
def test_one_prefix_of_all_names_is_no_difference(prefix, strict):
    model, optimizer = pair(steps=2)
    outer, state = nn.ModuleDict({prefix: model}), random_state(model)
    prefixed = {f"{prefix}.{name}": value for name, value in state.items()}
    for owner, given in [(model, prefixed), (outer, state), (outer, prefixed), (model, state)]:
        train_alike(optimizer, 1)
        optimizer.load_ema_state(owner, given, strict)
        assert same(optimizer.get_ema_state(model), state)


@pytest.mark.parametrize("name", ["model.scale", "_forward_module.new", "other.scale"])
def test_a_prefix_that_does_not_make_all_names_fit_is_an_error(name):
    model, optimizer = pair(steps=2)
    before, state = everything(model, optimizer), random_state(model)
    with pytest.raises(KeyError, match=f"unknown: \\['{name}'\\]"):
        optimizer.load_ema_state(model, {**state, name: state["scale"]})
    assert same(everything(model, optimizer), before)


@each_dtype
@pytest.mark.parametrize("given", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_what_is_loaded_is_copied_into_the_dtype_of_the_ema(dtype, given):
    model, optimizer = pair(weights=dtype, steps=1)
    state = {name: value.to(given) for name, value in random_state(model).items()}
    expected = {name: value.float().clone() for name, value in state.items()}
    optimizer.load_ema_state(model, state)
    for value in state.values():
        value.zero_()
    assert same(optimizer.get_ema_state(model), expected)


@pytest.mark.parametrize("given", [["head.weight"], ["embed.weight", "head.weight"]])
def test_tied_weights_are_loaded_under_any_of_their_names(given):
    model, optimizer = pair(steps=2)
    state = random_state(model)
    value = state.pop("embed.weight")
    optimizer.load_ema_state(model, {**state, **dict.fromkeys(given, value)})
    assert same(optimizer.get_ema_state(model), {**state, "embed.weight": value})


def test_a_state_dict_of_an_ema_model_loads_when_not_strict():
    model, optimizer = pair(steps=2)
    state = {**copy.deepcopy(Net().state_dict()), "n_averaged": torch.tensor(3)}
    optimizer.load_ema_state(model, state, strict=False)
    assert same(optimizer.get_ema_state(model), {name: state[name] for name in NAMES})


@pytest.mark.parametrize(
    ("change", "missing", "unknown"),
    [
        ({"scale": None}, ["scale"], []),
        ({"new.weight": torch.ones(2)}, [], ["new.weight"]),
        ({"embed.weight": None}, ["embed.weight", "head.weight"], []),
        ({"scale": None, "head.bias": None, "b": 1, "a": 1}, ["head.bias", "scale"], ["a", "b"]),
        ({"frozen.weight": torch.ones(2, 2)}, [], ["frozen.weight"]),
        ({"other.bias": torch.ones(2)}, [], ["other.bias"]),
    ],
)
@pytest.mark.parametrize("steps", [0, 3])
def test_wrong_names_are_listed_and_change_nothing(change, missing, unknown, steps):
    model, optimizer = pair(steps=steps)
    before = everything(model, optimizer)
    state = {n: v for n, v in {**random_state(model), **change}.items() if v is not None}
    with pytest.raises(KeyError) as caught:
        optimizer.load_ema_state(model, state)
    assert f"missing: {missing}, unknown: {unknown}" in str(caught.value)
    assert same(everything(model, optimizer), before)


def test_names_that_fit_are_loaded_when_not_strict():
    model, optimizer = pair(steps=3)
    before, loaded = optimizer.get_ema_state(model), {"scale": torch.tensor(7.0)}
    optimizer.load_ema_state(model, {**loaded, "new": torch.ones(1)}, strict=False)
    assert same(optimizer.get_ema_state(model), {**before, **loaded})
    train_alike(optimizer, 1)
    for name, old in {**before, **loaded}.items():
        new = torch.lerp(old, weights(model)[name], 0.9)
        assert same(optimizer.get_ema_state(model)[name], new)


@pytest.mark.parametrize(
    ("value", "error"),
    [
        (torch.ones(2, 3), ValueError),
        (torch.ones(4), ValueError),
        (torch.ones(()), ValueError),
        (torch.ones(1, 2), ValueError),
        (torch.ones(2, 2, dtype=torch.complex64), ValueError),
        ([[1.0, 1.0], [1.0, 1.0]], TypeError),
    ],
)
@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("steps", [0, 3])
def test_a_tensor_that_does_not_fit_is_named_and_changes_nothing(value, error, strict, steps):
    model, optimizer = pair(steps=steps)
    before = everything(model, optimizer)
    with pytest.raises(error, match=r"module\.weight"):
        optimizer.load_ema_state(
            model, {**random_state(model), "module.weight": value}, strict=strict
        )
    assert same(everything(model, optimizer), before)


@pytest.mark.parametrize(("steps", "after"), [(0, 0), (0, 4), (2, 4), (4, 4), (7, 4), (3, 0)])
def test_the_counter_after_a_load_is_past_the_start_of_averaging(steps, after):
    model, optimizer = pair(steps=steps, update_after_step=after)
    optimizer.load_ema_state(model, random_state(model))
    saved = optimizer.state_dict()
    expected = max(steps, after + 1)
    assert saved["param_groups"][0]["ema_step"] == expected
    assert {int(entry["ema_step"]) for entry in saved["state"].values()} == {expected}


@pytest.mark.parametrize(("steps", "after"), [(0, 0), (0, 4), (2, 4), (7, 4), (3, 0)])
@each_dtype
def test_what_is_loaded_is_averaged_into_and_not_seeded_again(steps, after, dtype):
    model, optimizer = pair(weights=dtype, steps=steps, update_after_step=after)
    state = random_state(model)
    optimizer.load_ema_state(model, state)
    train_alike(optimizer, 1)
    expected = {n: torch.lerp(v, weights(model)[n].float(), 0.9) for n, v in state.items()}
    assert same(optimizer.get_ema_state(model), expected)


@pytest.mark.parametrize(
    "look", [lambda o: None, lambda o: o.ema_metrics(), lambda o: o.state_dict()]
)
def test_a_load_goes_on_with_the_schedule_of_the_run(look):
    model, optimizer = pair(decay=warmup_decay(0.9), steps=20)
    look(optimizer)
    state = random_state(model)
    optimizer.load_ema_state(model, state)
    train_alike(optimizer, 1)
    expected = {n: torch.lerp(v, weights(model)[n], 1 - 22 / 31) for n, v in state.items()}
    torch.testing.assert_close(optimizer.get_ema_state(model), expected, rtol=1e-6, atol=1e-7)


@each_dtype
def test_what_is_loaded_before_training_is_swapped_in_without_a_warning(dtype):
    model, optimizer = pair(weights=dtype, decay=0.9999)
    state = random_state(model)
    optimizer.load_ema_state(model, state)
    before = weights(model)
    with optimizer.swap_ema_weights():
        swapped_in = {name: value.to(dtype) for name, value in state.items()}
        assert same({name: weights(model)[name] for name in NAMES}, swapped_in)
    assert same(weights(model), before)
    assert optimizer.ema_metrics()["ema_initial_share"] == 0.0


def test_what_is_loaded_survives_a_checkpoint():
    model, optimizer = pair()
    state = random_state(model)
    optimizer.load_ema_state(model, state)
    other_model, other = pair()
    other.load_state_dict(through_file(optimizer.state_dict()))
    assert same(other.get_ema_state(other_model), state)
    train_alike(optimizer, 2)
    train_alike(other, 2)
    assert same(everything(other_model, other), everything(model, optimizer))


@each_dtype
@pytest.mark.parametrize("enter", ["block", "eval"])
def test_a_load_while_swapped_is_refused_and_changes_nothing(dtype, enter):
    model, optimizer = pair(weights=dtype, steps=3)
    before = everything(model, optimizer)
    if enter == "eval":
        optimizer.eval()
    with (
        optimizer.swap_ema_weights(enter == "block"),
        pytest.raises(RuntimeError, match=r"swap|eval"),
    ):
        optimizer.load_ema_state(model, random_state(model))
    optimizer.train()
    assert same(everything(model, optimizer), before)


def test_state_of_one_model_starts_the_ema_of_another():
    model, optimizer = pair(steps=5)
    other_model, other = pair(seed=3)
    other.load_ema_state(other_model, through_file(optimizer.get_ema_state(model)))
    assert same(other.get_ema_state(other_model), optimizer.get_ema_state(model))
    assert not same(weights(other_model), weights(model))
