"""``strip_ema_state_dict`` against what the bare inner optimizer writes."""

import copy

import pytest
import torch
from reference import same
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

from ema_optim import EMAOptimizer, strip_ema_state_dict


def net(weights):
    """The second layer never has a gradient, the third is frozen, the last is named like a key."""
    torch.manual_seed(0)
    layers = {name: nn.Linear(2, 2) for name in ("a", "unused", "frozen", "ema")}
    layers["frozen"].requires_grad_(False)
    return nn.ModuleDict(layers).to(weights)


def trained(build, wrap=True, steps=3, weights=torch.float32, **options):
    """A model and its optimizer, bare or with an EMA, after the same steps."""
    model = net(weights)
    first, second = [*model["a"].parameters()], [*model.parameters()][2:]
    optimizer = build([{"params": first, "lr": 0.1}, {"params": second, "lr": 0.2}])
    if wrap:
        optimizer = EMAOptimizer(optimizer, decay=0.1, **options)
    for _ in range(steps):
        for param in [*first, *model["ema"].parameters()]:
            param.grad = param.detach().sin()
        optimizer.step()
    return model, optimizer


BUILDERS = {
    "AdamW": torch.optim.AdamW,
    "AdamW fused amsgrad": lambda p: torch.optim.AdamW(p, fused=True, amsgrad=True),
    "SGD": torch.optim.SGD,
    "SGD momentum": lambda p: torch.optim.SGD(p, momentum=0.9),
    "RMSprop": lambda p: torch.optim.RMSprop(p, centered=True, momentum=0.5),
    "Adagrad": torch.optim.Adagrad,
}
each_inner = pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def by_index(model, optimizer):
    return optimizer.state_dict()


def by_name(model, optimizer, **options):
    return get_optimizer_state_dict(model, optimizer, options=StateDictOptions(**options))


def flattened(model, optimizer):
    return by_name(model, optimizer, flatten_optimizer_state_dict=True)


each_form = pytest.mark.parametrize("form", [by_index, by_name, flattened])


@each_inner
@each_form
@each_dtype
@pytest.mark.parametrize("options", [{}, {"update_after_step": 9}, {"dtype": torch.float64}])
def test_stripped_checkpoint_is_what_the_inner_optimizer_writes(build, form, dtype, options):
    stripped = strip_ema_state_dict(form(*trained(build, weights=dtype, **options)))
    assert same(stripped, form(*trained(build, wrap=False, weights=dtype)))


@each_inner
@pytest.mark.parametrize("steps", [0, 1, 3])
def test_stripped_checkpoint_resumes_the_bare_optimizer(build, steps):
    model, optimizer = trained(build, steps=steps)
    resumed, bare = trained(build, wrap=False, steps=0)
    resumed.load_state_dict(model.state_dict())
    bare.load_state_dict(strip_ema_state_dict(copy.deepcopy(optimizer.state_dict())))
    for one, its in ((model, optimizer), (resumed, bare)):
        for param in one.parameters():  # the unused layer has its first gradient here
            param.grad = param.detach().cos() if param.requires_grad else None
        its.step()
    assert same([*resumed.parameters()], [*model.parameters()])


@each_form
@each_dtype
def test_group_options_of_the_ema_are_stripped(form, dtype):
    model, optimizer = trained(torch.optim.AdamW, steps=0, weights=dtype)
    optimizer.param_groups[0]["ema_decay"] = 0.05
    optimizer.param_groups[1]["ema_enabled"] = False
    optimizer.step()
    keys = str([*_keys(strip_ema_state_dict(form(model, optimizer)))])
    assert "ema_" not in keys
    assert "lr" in keys


def _keys(tree):
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
        yield key
        if isinstance(value, (dict, list)):
            yield from _keys(value)


@each_form
@each_dtype
def test_argument_is_unchanged_and_its_tensors_are_shared(form, dtype):
    saved = form(*trained(torch.optim.AdamW, weights=dtype))
    before, addresses = copy.deepcopy(saved), {id(v) for v in _leaves(saved)}
    stripped = strip_ema_state_dict(saved)
    assert same(saved, before)
    assert {id(v) for v in _leaves(stripped)} <= addresses
    stripped.clear()
    assert same(saved, before)


def _leaves(tree):
    for value in tree.values() if isinstance(tree, dict) else tree:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (dict, list)):
            yield from _leaves(value)


@each_form
def test_a_stripped_checkpoint_may_be_changed_without_changing_the_argument(form):
    saved = form(*trained(torch.optim.AdamW))
    before = copy.deepcopy(saved)
    stripped = strip_ema_state_dict(saved)
    for part in ("state", "param_groups"):
        for entry in _entries(stripped.get(part, {})):
            entry["added"] = 1
    assert same(saved, before)


def _entries(tree):
    return tree.values() if isinstance(tree, dict) else tree


@each_form
def test_stripping_twice_or_what_has_no_ema_changes_nothing(form):
    bare = form(*trained(torch.optim.AdamW, wrap=False))
    assert same(strip_ema_state_dict(bare), bare)
    stripped = strip_ema_state_dict(form(*trained(torch.optim.AdamW)))
    assert same(strip_ema_state_dict(stripped), stripped)


@each_form
@each_dtype
@pytest.mark.parametrize("enter", ["block", "eval", "pending"])
def test_a_swapped_checkpoint_is_refused(form, dtype, enter):
    model, optimizer = trained(torch.optim.AdamW, weights=dtype)
    optimizer.eval()
    if enter == "block":
        optimizer.train()
        with optimizer.swap_ema_weights():
            saved = form(model, optimizer)
    else:
        if enter == "pending":
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        saved = form(model, optimizer)
    with pytest.raises(ValueError, match=r"swapped.*train\(\).*save again"):
        strip_ema_state_dict(saved)


@each_form
def test_a_checkpoint_after_a_swap_is_stripped(form):
    model, optimizer = trained(torch.optim.AdamW)
    with optimizer.swap_ema_weights():
        pass
    bare = form(*trained(torch.optim.AdamW, wrap=False))
    assert same(strip_ema_state_dict(form(model, optimizer)), bare)


@pytest.mark.parametrize("form", [by_name, flattened])
def test_a_checkpoint_of_a_fresh_optimizer_is_stripped(form):
    # Torch makes the state of a fresh optimizer by a step with learning rate 0.
    with_ema = form(*trained(torch.optim.AdamW, steps=0))
    bare = form(*trained(torch.optim.AdamW, wrap=False, steps=0))
    assert same(strip_ema_state_dict(with_ema), bare)


@pytest.mark.parametrize(
    "wrong",
    [
        {},
        {"model": {}, "optimizer": {}},
        {"state": {}},
        {"param_groups": []},
        {"a.weight": torch.ones(1)},
        {"state.a.exp_avg": torch.ones(1), "other": 1},
    ],
)
def test_what_is_no_optimizer_checkpoint_is_a_type_error(wrong):
    with pytest.raises(TypeError, match="state dict"):
        strip_ema_state_dict(wrong)
