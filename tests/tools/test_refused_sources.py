"""Doubt about names or weights is refused, and nothing is written."""

import os
import pickle
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from exports import exported, named, net, no_names, run, same, saved, trained, unnamed
from safetensors.torch import save_file
from torch import nn
from torch.optim import SGD

from ema_optim import EMAOptimizer, export_ema

pytestmark = [
    # What torch says where a distributed checkpoint is saved by one process.
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
    pytest.mark.filterwarnings("ignore:an EMA in bfloat16"),  # said of every such EMA
    pytest.mark.filterwarnings("ignore:the EMA still holds"),  # short runs
    # Lightning 2.6 asks torch 2.13's pytrees by a deprecated name.
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    # PEFT asks transformers for a name that transformers has renamed.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]


def fresh(model, inner=unnamed):
    """Two biases of one shape, all zeros: no value tells which is which."""
    for layer in model:
        nn.init.zeros_(layer.bias)
    optimizer = EMAOptimizer(inner(model), decay=0.5, update_after_step=9)
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
    optimizer.step()
    return model, optimizer


def test_order_of_one_group_decides_between_equal_values(tmp_path):
    model, optimizer = fresh(net())
    torch.save(model.state_dict(), tmp_path / "model.pt")
    source = saved(tmp_path, optimizer=optimizer.state_dict())
    got = exported(source, tmp_path, model=tmp_path / "model.pt")
    assert same(got, optimizer.get_ema_state(model))


def doubtful(folder):
    """Equal values in a file that does not keep the order."""
    model, optimizer = fresh(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
    save_file(model.state_dict(), folder / "model.safetensors")
    return saved(folder, optimizer=optimizer.state_dict()), folder / "model.safetensors"


def reversed_groups(model):
    return SGD([{"params": list(layer.parameters())} for layer in reversed(model)], lr=0.1)


def two_groups(folder):
    """Equal values in an optimizer whose groups may lie in any order."""
    model, optimizer = fresh(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), reversed_groups)
    torch.save(model.state_dict(), folder / "model.pt")
    return saved(folder, optimizer=optimizer.state_dict()), folder / "model.pt"


def other_run(folder):
    """Another run's model, in another order than the optimizer's."""
    save_file(net(seed=1).state_dict(), folder / "other.safetensors")
    return saved(folder, optimizer=trained(unnamed)[1].state_dict()), folder / "other.safetensors"


def smaller(folder):
    torch.save(net()[:2].state_dict(), folder / "smaller.pt")
    return saved(folder, optimizer=trained(unnamed)[1].state_dict()), folder / "smaller.pt"


def empty(folder):
    (folder / "empty").mkdir()
    return saved(folder, optimizer=trained(unnamed)[1].state_dict()), folder / "empty"


@pytest.mark.parametrize(("gap", "certain"), [(0.3, True), (0.45, False)])
def test_values_decide_where_the_next_weights_are_twice_as_far(gap, certain, tmp_path):
    params = [(name, nn.Parameter(torch.zeros(4))) for name in ("one", "other")]
    optimizer = EMAOptimizer(SGD([p for _, p in params], lr=1.0), decay=0.5)
    save_file(
        {"z": torch.full((4,), gap), "a": torch.full((4,), 1 + gap)}, tmp_path / "m.safetensors"
    )
    for value, (_, param) in enumerate(params):
        optimizer.state[param] = {
            "ema": torch.full((4,), float(value)),
            "ema_step": torch.tensor(1),
        }
    source = saved(tmp_path, o=optimizer.state_dict())
    if certain:
        got = exported(source, tmp_path, model=tmp_path / "m.safetensors")
        assert (got["z"][0], got["a"][0]) == (0, 1)
    else:
        with pytest.raises(ValueError, match="beyond doubt"):
            exported(source, tmp_path, model=tmp_path / "m.safetensors")


def swapped_alone(folder):
    _, optimizer = trained()
    optimizer.eval()
    return saved(folder, optimizer=optimizer.state_dict()), None


def swapped_too_late(folder):
    model, optimizer = trained()
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer.eval()
    return saved(folder, model=weights, optimizer=optimizer.state_dict()), None


def swapped_too_late_of_old(folder):
    """The same without the fingerprint of what the model held."""
    content = torch.load(swapped_too_late(folder)[0], weights_only=True)
    for group in content["optimizer"]["param_groups"]:
        group["ema_format"] = "default"
    return saved(folder, **content), None


def rounded(folder):
    model, optimizer = trained()
    optimizer.eval()
    state = optimizer.state_dict()
    return saved(folder, model=model.bfloat16().state_dict(), optimizer=state), None


def two_optimizers(folder):
    states = {name: trained()[1].state_dict() for name in ("generator", "critic")}
    return saved(folder, **states), None


def without_ema(folder):
    return saved(folder, optimizer=named(net()).state_dict()), None


def not_plain(folder):
    return saved(folder, optimizer=trained()[1].state_dict(), args=Path), None


def one_tensor(folder):
    torch.save(torch.ones(3), folder / "tensor.pt")
    return folder / "tensor.pt", None


def not_torch(folder):
    (folder / "text.pt").write_text("hello")
    return folder / "text.pt", None


def weights_file(folder):
    save_file(net().state_dict(), folder / "model.safetensors")
    return folder / "model.safetensors", None


def no_checkpoint(folder):
    (folder / "checkpoint-3").mkdir()
    return folder, None


def cast(folder):
    model, optimizer = trained()
    bare = named(model)
    bare.load_state_dict(optimizer.state_dict())
    return saved(folder, optimizer=bare.state_dict()), None


def damaged(folder):
    state = trained()[1].state_dict()
    state["state"][0]["ema"] = state["state"][0]["ema"].half()
    return saved(folder, optimizer=state), None


def wicked(folder):
    """A folder of a distributed checkpoint whose metadata would run code."""

    class Wicked:
        def __reduce__(self):
            return os.mkdir, (str(folder / "was_run"),)

    with open(folder / ".metadata", "wb") as file:
        pickle.dump(Wicked(), file)
    return folder, None


def wicked_value(folder):
    """Metadata as torch writes it, with a value that needs more than plain unpickling."""
    state = trained()[1].state_dict()
    state["param_groups"][0]["ema_decay"] = Path("half")
    dcp.save({"optimizer": state}, checkpoint_id=folder / "dcp", no_dist=True)
    return folder / "dcp", None


REFUSED = [
    (doubtful, "beyond doubt"),
    (two_groups, "beyond doubt"),
    (other_run, "beyond doubt"),
    (smaller, r"must have 4 weights of shape \(8,\)"),
    (empty, "weights of one model by name"),
    (no_names, "by position, without names"),
    (swapped_alone, "swapped in: the EMA is in the model's file"),
    (swapped_too_late, "got other weights: pass model="),
    (swapped_too_late_of_old, "the EMA is in neither"),
    (rounded, "got 0 in"),
    (two_optimizers, "name of its own"),
    (without_ema, "got none that has an EMA"),
    (not_plain, "got pathlib.Path: it is read with weights_only=True"),
    (one_tensor, "got none that has an EMA"),
    (not_torch, "a file of torch.save"),
    (weights_file, "got a model's weights"),
    (no_checkpoint, "pass one checkpoint-N"),
    (cast, "one that was cast"),
    (damaged, "in the format default"),
    (wicked, "no part of a distributed checkpoint"),
    (wicked_value, "weights_only=True"),
    (lambda folder: (folder / "nothing", None), "got nothing there"),
]


@pytest.mark.parametrize(("make", "words"), REFUSED, ids=[row[0].__name__ for row in REFUSED])
def test_doubt_is_refused_and_nothing_is_written(make, words, tmp_path):
    source, model = make(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        export_ema(source, tmp_path / "ema.safetensors", model=model)
    assert not list(tmp_path.glob("*ema.safetensors*"))
    assert not (tmp_path / "was_run").exists()


def test_key_takes_one_of_two_optimizers(tmp_path):
    model, optimizer = trained()
    other = trained(weights=torch.bfloat16)[1]
    file = saved(tmp_path, critic=other.state_dict(), generator=optimizer.state_dict())
    assert same(exported(file, tmp_path, key="generator"), optimizer.get_ema_state(model))
    with pytest.raises(ValueError, match="key must be one of"):
        exported(file, tmp_path, key="discriminator")


@pytest.mark.parametrize("old", [False, True])
def test_of_two_models_the_one_that_held_the_ema_is_taken(old, tmp_path):
    model, optimizer = trained()
    optimizer.eval()
    content = {"before": net().state_dict(), "model": model.state_dict()}
    state = optimizer.state_dict()
    if old:
        state["param_groups"][0]["ema_format"] = "default"
    file = saved(tmp_path, **content, optimizer=state)
    if old:
        with pytest.raises(ValueError, match="got 2 in"):
            exported(file, tmp_path)
    else:
        assert same(exported(file, tmp_path), optimizer.get_ema_state(model))


def test_two_optimizers_of_one_model_are_exported_together(tmp_path):
    model = net()
    parts = [list(model.named_parameters())[:2], list(model.named_parameters())[2:]]
    optimizers = [EMAOptimizer(SGD(part, lr=0.1), decay=0.5) for part in parts]
    for optimizer in optimizers:
        run(model, optimizer)
    file = saved(tmp_path, optimizers=[optimizer.state_dict() for optimizer in optimizers])
    expected = {k: v for o in optimizers for k, v in o.get_ema_state(model).items()}
    assert same(exported(file, tmp_path), expected)


def test_flag_and_format_may_say_more(tmp_path):
    model, optimizer = trained(weights=torch.bfloat16)
    optimizer.eval()
    state = optimizer.state_dict()
    for group in state["param_groups"]:
        group |= {"ema_swapped": "sum=12", "ema_format": "default; later=1"}
    file = saved(tmp_path, o=state)
    assert same(exported(file, tmp_path), optimizer.get_ema_state(model))
