"""``python -m ema_optim``: from files that the real engines have written to weights and facts."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import lightning.pytorch as pl
import peft
import pytest
import torch
import torch.distributed.checkpoint as dcp
import transformers
from ranks import on_ranks, run_on
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from sharded import equal, plain_model, sharded_model, train, whole_ema
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
)
from torch.optim import SGD, AdamW

import ema_optim
from ema_optim import EMACallback, EMAModel, EMAOptimizer, export_ema
from ema_optim.__main__ import main
from ema_optim.integrations.lightning import EMAWeights

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

FORMATS = [None, torch.float64, "float24", "float32_compensated", torch.bfloat16]


def exported(source, folder, **options):
    export_ema(source, folder / "ema.safetensors", force=True, **options)
    return load_file(folder / "ema.safetensors")


def same(left, right):
    """Bit-equal, names and dtypes too."""
    alike = left.keys() == right.keys() and all(left[k].dtype == right[k].dtype for k in left)
    return alike and equal(left, right)


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 2))


def named(model):
    return AdamW(model.named_parameters(), lr=0.05)


def unnamed(model):
    return AdamW(model.parameters(), lr=0.05)


def run(model, optimizer, steps=4):
    for step in range(steps):
        optimizer.zero_grad()
        inputs = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
        dtype = next(model.parameters()).dtype
        model(inputs.to(dtype)).float().square().mean().backward()
        optimizer.step()
    return model, optimizer


def trained(inner=named, weights=torch.float32, **options):
    model = net().to(weights)
    return run(model, EMAOptimizer(inner(model), decay=0.6, **options))


def saved(folder, name="checkpoint.pt", **content):
    torch.save(content, folder / name)
    return folder / name


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_export_equals_get_ema_state(dtype, weights, swapped, tmp_path):
    model, optimizer = trained(weights=weights, dtype=dtype)
    if swapped:
        optimizer.eval()
    file = saved(tmp_path, model=model.state_dict(), optimizer=optimizer.state_dict())
    assert same(exported(file, tmp_path), optimizer.get_ema_state(model))


def test_optimizers_state_dict_alone_is_a_source(tmp_path):
    model, optimizer = trained()
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    expected = optimizer.get_ema_state(model)
    assert same(exported(tmp_path / "optimizer.pt", tmp_path), expected)
    assert same(exported(tmp_path, tmp_path), expected)  # the folder that it is in


def test_file_of_an_old_torch_is_a_source(tmp_path):
    model, optimizer = trained()
    file = tmp_path / "old.pt"
    torch.save(optimizer.state_dict(), file, _use_new_zipfile_serialization=False)
    assert same(exported(file, tmp_path), optimizer.get_ema_state(model))


def test_nested_checkpoint_is_a_source(tmp_path):
    model, optimizer = trained()
    nested = {"inner": b"its own form", "ema": optimizer.state_dict()}
    file = saved(tmp_path, optimizer=nested, epoch=3)
    assert same(exported(file, tmp_path), optimizer.get_ema_state(model))


@pytest.mark.parametrize("use_buffers", [False, True])
def test_emamodel_state_is_a_source_by_name(use_buffers, tmp_path):
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
    ema, sgd = EMAModel(model, decay=0.5, use_buffers=use_buffers), SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        run(model, sgd, steps=1)
        ema.update()
    file = saved(tmp_path, ema=ema.state_dict(), optimizer=sgd.state_dict())
    assert same(exported(file, tmp_path), ema.get_ema_state())


def test_frozen_and_disabled_parameters_are_left_out(tmp_path):
    model = net()
    model[1].requires_grad_(False)
    params = list(model.named_parameters())
    groups = [{"params": params[:2]}, {"params": params[2:]}]
    optimizer = EMAOptimizer(AdamW(groups, lr=0.1), decay=0.5)
    run(model, optimizer)
    optimizer.param_groups[0]["ema_enabled"] = False
    got = exported(saved(tmp_path, optimizer=optimizer.state_dict()), tmp_path)
    assert same(got, optimizer.get_ema_state(model))
    assert set(got) == {"2.weight", "2.bias", "3.weight", "3.bias"}


def test_average_that_has_not_begun_is_the_weights(tmp_path):
    model, optimizer = trained(update_after_step=10)
    got = exported(saved(tmp_path, optimizer=optimizer.state_dict()), tmp_path)
    assert equal(got, dict(model.named_parameters()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_dtype_rounds_to_nearest(dtype, tmp_path):
    model, optimizer = trained(weights=torch.bfloat16)
    got = exported(saved(tmp_path, o=optimizer.state_dict()), tmp_path, dtype=dtype)
    expected = {n: t.to(dtype) for n, t in optimizer.get_ema_state(model).items()}
    assert same(got, expected)


def test_compensated_ema_has_more_digits_in_fp64(tmp_path):
    _, optimizer = trained(dtype="float32_compensated")
    state = optimizer.state_dict()
    got = exported(saved(tmp_path, o=state), tmp_path, dtype=torch.float64)
    entry = state["state"][0]
    assert torch.equal(got["0.weight"], entry["ema"].double() + entry["ema_low"].double())
    assert not torch.equal(got["0.weight"], entry["ema"].double())


# Names from a model's file.


def order_of(kind):
    """An optimizer without names: in the model's order, or weight decay apart and unsorted."""

    def build(model):
        if kind == "one group":
            return unnamed(model)
        params = dict(model.named_parameters())
        plain = [params[n] for n in ("1.bias", "3.bias", "2.bias", "1.weight", "0.bias")]
        decayed = [params[n] for n in ("2.weight", "0.weight", "3.weight")]
        return AdamW([{"params": decayed}, {"params": plain, "weight_decay": 0.0}], lr=0.05)

    return build


@pytest.mark.parametrize("kind", ["one group", "weight decay apart"])
@pytest.mark.parametrize("file", ["model.pt", "model.safetensors"])
def test_model_file_gives_the_names(kind, file, tmp_path):
    model, optimizer = trained(order_of(kind))
    save = torch.save if file.endswith(".pt") else save_file
    save(model.state_dict(), tmp_path / file)
    source = saved(tmp_path, optimizer=optimizer.state_dict())
    got = exported(source, tmp_path, model=tmp_path / file)
    assert same(got, optimizer.get_ema_state(model))


def test_tied_weights_have_their_first_name(tmp_path):
    model = net()
    model[2].weight = nn.Parameter(model[2].weight.detach().clone())
    model.append(nn.Linear(8, 8)), model[4].register_parameter("weight", model[2].weight)
    optimizer = EMAOptimizer(unnamed(model[:4]), decay=0.5)
    run(model[:4], optimizer)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    source = saved(tmp_path, optimizer=optimizer.state_dict())
    got = exported(source, tmp_path, model=tmp_path / "model.pt")
    assert same(got, optimizer.get_ema_state(model))


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


# What is refused: what makes the source (and the model's file), and words of the message.


def no_names(folder):
    return saved(folder, optimizer=trained(unnamed)[1].state_dict()), None


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


# The engines' own files.


def llama(adapter=False):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    config = transformers.LlamaConfig(vocab_size=32, num_attention_heads=2, **sizes)
    model = transformers.LlamaForCausalLM(config)
    lora = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    return peft.get_peft_model(model, lora) if adapter else model


def trainer_run(folder, model, callbacks, optimizers=(None, None), **options):
    rows = torch.randint(0, 32, (16, 12), generator=torch.Generator().manual_seed(0))
    settings = {"max_steps": 4, "save_steps": 4, "use_cpu": True, "report_to": "none"}
    args = transformers.TrainingArguments(
        str(folder), per_device_train_batch_size=4, disable_tqdm=True, **{**settings, **options}
    )
    data = [{"input_ids": row, "labels": row} for row in rows]
    trainer = transformers.Trainer(
        model, args, train_dataset=data, callbacks=callbacks, optimizers=optimizers
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize("dtype", [None, "float24"])
@pytest.mark.parametrize("adapter", [False, True])
def test_trainer_checkpoint_is_a_source(adapter, dtype, tmp_path):
    callback = EMACallback(decay=0.5, dtype=dtype)
    trainer_run(tmp_path, llama(adapter), [callback])
    assert same(exported(tmp_path / "checkpoint-4", tmp_path), callback.get_ema_state())


def test_trainer_checkpoint_of_a_bf16_model_is_a_source(tmp_path):
    callback = EMACallback(decay=0.5)
    trainer_run(tmp_path, llama().bfloat16(), [callback])
    assert same(exported(tmp_path / "checkpoint-4", tmp_path), callback.get_ema_state())


def test_old_ema_that_a_run_without_the_callback_carried_along_is_refused(tmp_path):
    trainer_run(tmp_path, llama(), [EMACallback(decay=0.5)])
    args = {"max_steps": 8}
    rows = torch.randint(0, 32, (16, 12))
    settings = transformers.TrainingArguments(
        str(tmp_path), save_steps=8, use_cpu=True, report_to="none", disable_tqdm=True, **args
    )
    data = [{"input_ids": row, "labels": row} for row in rows]
    trainer = transformers.Trainer(llama(), settings, train_dataset=data)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    with pytest.raises(ValueError, match="step 8, got one of step 4"):
        exported(tmp_path / "checkpoint-8", tmp_path)


@pytest.mark.parametrize("inner", [named, unnamed])
def test_trainer_without_the_callback_leaves_the_ema_in_the_models_file(inner, tmp_path):
    model = llama()
    optimizer = EMAOptimizer(inner(model), decay=0.5)
    options = {"eval_strategy": "no"}
    trainer = trainer_run(tmp_path, model, [], (optimizer, None), **options)
    optimizer.eval()
    trainer._save_checkpoint(model, None)
    folder = tmp_path / "checkpoint-4"
    model_file = {"model": folder} if inner is unnamed else {}
    assert same(exported(folder, tmp_path, **model_file), optimizer.get_ema_state(model))


class Lit(pl.LightningModule):
    def __init__(self, build):
        super().__init__()
        self.net, self.head, self.build = net(), nn.Linear(2, 2), build

    def training_step(self, batch, index):
        inputs = torch.randn(8, 4, generator=torch.Generator().manual_seed(self.global_step))
        losses = self.head(self.net(inputs)).square().mean()
        if self.automatic_optimization:
            return losses
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(losses)
        for optimizer in self.optimizers():
            optimizer.step()

    def configure_optimizers(self):
        made = self.build(self)
        self.automatic_optimization = not isinstance(made, tuple)
        return made


def two(module):
    return unnamed(module.net), SGD(module.head.parameters(), lr=0.1)


def lightning_run(folder, module, callbacks):
    options = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    trainer = pl.Trainer(
        max_epochs=1, callbacks=callbacks, accelerator="cpu", default_root_dir=folder,
        enable_checkpointing=False, **options,
    )  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader(range(4)))
    trainer.save_checkpoint(folder / "last.ckpt")
    return trainer


@pytest.mark.parametrize("dtype", [None, "float24"])
@pytest.mark.parametrize("build", [unnamed, two])
def test_lightning_checkpoint_is_a_source(build, dtype, tmp_path):
    module = Lit(build)
    trainer = lightning_run(tmp_path, module, [EMAWeights(decay=0.5, dtype=dtype)])
    states = [optimizer.get_ema_state(module) for optimizer in trainer.optimizers]
    expected = {name: tensor for state in states for name, tensor in state.items()}
    assert same(exported(tmp_path / "last.ckpt", tmp_path), expected)


def test_lightning_checkpoint_taken_while_swapped_without_the_callback_is_a_source(tmp_path):
    module = Lit(lambda module: EMAOptimizer(named(module), decay=0.5))
    trainer = lightning_run(tmp_path, module, [])
    optimizer = trainer.optimizers[0]
    optimizer.eval()
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    assert same(exported(tmp_path / "last.ckpt", tmp_path), optimizer.get_ema_state(module))


def write_sharded(world, folder, flat, dtype, swapped):
    model = sharded_model(world)
    optimizer = EMAOptimizer(AdamW(model.parameters(), lr=0.1, foreach=False), 0.5, dtype=dtype)
    train(model, optimizer, range(4))
    if swapped:
        optimizer.eval()
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    state = get_optimizer_state_dict(model, optimizer, options=options)
    weights = get_model_state_dict(model)
    dcp.save({"app": {"model": weights, "optimizer": state}}, checkpoint_id=folder / "dcp")
    expected = whole_ema(optimizer, model)
    if torch.distributed.get_rank() == 0:
        torch.save(expected, folder / "expected.pt")


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize(("dtype", "swapped"), [(None, False), (None, True), ("float24", True)])
def test_distributed_checkpoint_is_a_source(world, flat, dtype, swapped, tmp_path):
    arguments = {"folder": tmp_path, "flat": flat, "dtype": dtype, "swapped": swapped}
    run_on(world, write_sharded, **arguments)
    assert same(exported(tmp_path / "dcp", tmp_path), torch.load(tmp_path / "expected.pt"))


@on_ranks(2)
def test_export_on_one_rank_waits_for_no_other(world, tmp_path):
    write_sharded(world, tmp_path, False, None, False)
    if torch.distributed.get_rank() == 1:
        got = exported(tmp_path / "dcp", tmp_path)
        assert same(got, torch.load(tmp_path / "expected.pt"))


@pytest.mark.parametrize("states", ["FULL_STATE_DICT", "SHARDED_STATE_DICT"])
@pytest.mark.parametrize("swapped", [False, True])
@on_ranks(2)
def test_accelerates_sharded_state_is_a_source(world, states, swapped, tmp_path):
    from test_fsdp_trainers import accelerated, steps

    accelerator, model, optimizer, own = accelerated(states)
    steps(accelerator, model, optimizer, range(3))
    if swapped:
        own.eval()
    accelerator.save_state(tmp_path)
    expected = whole_ema(own, model)
    torch.distributed.barrier()
    assert torch.distributed.get_rank() or same(exported(tmp_path, tmp_path), expected)


@pytest.mark.parametrize("states", ["FULL_STATE_DICT", "SHARDED_STATE_DICT"])
@on_ranks(2)
def test_sharded_trainers_checkpoint_is_a_source(world, states, tmp_path):
    from test_fsdp_trainers import class_of, sharded_fit
    from test_transformers import llama, saves

    callback, options = EMACallback(), {"states": states, **saves(4), **class_of(True)}
    sharded_fit(llama(), tmp_path, callback, **options)
    expected = callback.get_ema_state()
    torch.distributed.barrier()
    if torch.distributed.get_rank() == 0:
        assert same(exported(tmp_path / "checkpoint-8", tmp_path), expected)


@pytest.mark.parametrize("inner", [named, unnamed])
def test_optimizers_own_state_dict_in_a_distributed_checkpoint_is_a_source(inner, tmp_path):
    model, optimizer = trained(inner)
    content = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    dcp.save(content, checkpoint_id=tmp_path / "dcp", no_dist=True)
    model_file = {"model": tmp_path / "dcp"} if inner is unnamed else {}
    got = exported(tmp_path / "dcp", tmp_path, **model_file)
    assert same(got, optimizer.get_ema_state(model))


def test_distributed_folder_of_an_emamodel_is_a_source(tmp_path):
    model = plain_model()
    ema = EMAModel(model, decay=0.5)
    for step in range(3):
        train(model, EMAOptimizer(SGD(model.parameters(), lr=0.1)), [step])
        ema.update()
    dcp.save({"ema": ema.state_dict()}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    assert same(exported(tmp_path / "dcp", tmp_path), ema.get_ema_state())


# The written file.


def test_header_says_what_these_weights_are(tmp_path):
    _, optimizer = trained()
    optimizer.param_groups[0]["ema_decay"] = 0.6
    file = saved(tmp_path, optimizer=optimizer.state_dict())
    told = export_ema(file, tmp_path / "ema.safetensors")
    with safe_open(tmp_path / "ema.safetensors", "pt") as written:
        assert written.metadata() == told
    versions = {"ema_optim": ema_optim.__version__, "format": "pt"}
    facts = {"ema_source": "checkpoint file", "ema_step": "4", "ema_decay": "0.6"}
    assert told == versions | facts


def test_tensors_of_every_shape_and_layout_are_written(tmp_path):
    shapes = {"a scalar": (), "empty": (0, 3), "odd": (3,), "image": (2, 3, 4, 5)}
    tensors = {name: torch.randn(shape) for name, shape in shapes.items()}
    tensors["image"] = tensors["image"].contiguous(memory_format=torch.channels_last)
    params = [(name, nn.Parameter(tensor)) for name, tensor in tensors.items()]
    params += [("double", nn.Parameter(torch.randn(2).double()))]
    params += [("complex", nn.Parameter(torch.randn(2, dtype=torch.complex64)))]
    optimizer = EMAOptimizer(SGD(params, lr=0.1), decay=0.5)
    for _, param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    got = exported(saved(tmp_path, o=optimizer.state_dict()), tmp_path)
    assert all(torch.equal(got[name], optimizer.state[param]["ema"]) for name, param in params)
    text = (tmp_path / "ema.safetensors").read_bytes()
    header = json.loads(text[8 : 8 + int.from_bytes(text[:8], "little")])
    starts = {name: entry["data_offsets"][0] for name, entry in header.items() if name in got}
    assert all(starts[name] % got[name].itemsize == 0 for name in got)


def test_output_is_replaced_only_when_asked_and_only_when_whole(tmp_path, monkeypatch):
    file, output = saved(tmp_path, o=trained()[1].state_dict()), tmp_path / "ema.safetensors"
    output.write_text("mine")
    with pytest.raises(FileExistsError, match="--force"):
        export_ema(file, output)
    monkeypatch.setattr("os.replace", lambda *names: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export_ema(file, output, force=True)
    assert output.read_text() == "mine"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint.pt", "ema.safetensors"]


def test_ema_that_is_not_finite_is_told(tmp_path):
    model, optimizer = trained()
    with torch.no_grad():
        optimizer.state[model[0].weight]["ema"].fill_(1e6)
    file = saved(tmp_path, o=optimizer.state_dict())
    with pytest.warns(UserWarning, match=r"0\.weight is not finite: torch.float16 is too narrow"):
        exported(file, tmp_path, dtype=torch.float16)


MEMORY = """
import resource, sys, torch
from ema_optim import export_ema
import safetensors, tqdm
torch.zeros(2, 2) + 1
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
export_ema(sys.argv[1], sys.argv[2])
print((peak() - before) // 1024)
"""


def test_memory_is_that_of_a_few_tensors(tmp_path):
    # bf16 is decoded to fp32: no mapped page of the file can stand in for the values.
    params = [(f"w{i}", nn.Parameter(torch.ones(2**20))) for i in range(64)]
    optimizer = EMAOptimizer(SGD(params, lr=0.1), decay=0.5, dtype=torch.bfloat16)
    for _, param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    state = optimizer.state_dict()
    for entry in state["state"].values():
        entry.pop("ema_weights")
    file = saved(tmp_path, o=state)
    command = [sys.executable, "-c", MEMORY, str(file), str(tmp_path / "ema.safetensors")]
    used = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert int(used) < 200  # the mapped file has 128 MB, the output 256


# The command line.


def test_command_line_exports(tmp_path, capsys):
    model, optimizer = trained(unnamed)
    file = saved(tmp_path, model=model.state_dict(), optimizer=optimizer.state_dict())
    output = tmp_path / "ema.safetensors"
    command = ["export", str(file), "-o", str(output), "--model", str(file), "--dtype", "bfloat16"]
    assert main(command) == 0
    assert "by values" in capsys.readouterr().out
    assert load_file(output)["0.weight"].dtype == torch.bfloat16


def test_what_the_user_can_mend_is_told_in_one_line(tmp_path):
    source, _ = no_names(tmp_path)
    command = [sys.executable, "-m", "ema_optim", "export", str(source), "-o", "ema.safetensors"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment())
    assert (done.returncode, done.stdout) == (2, "")
    assert "--model" in done.stderr
    assert done.stderr.count("\n") == 1


def environment():
    return os.environ | {"PYTHONPATH": str(Path(ema_optim.__file__).parent.parent)}


INFO = {
    "steps": "4 optimizer steps",
    "updates": "each parameter's EMA has counted 4 steps",
    "decay": "not in the file",
    "format": "float24 (bfloat16 + int8)",
    "swapped": "no",
    "tensors": "8, 146 values",
    "names": "yes",
}


def test_info_says_what_is_in_a_file(tmp_path, capsys):
    file = saved(tmp_path, optimizer=trained(dtype="float24")[1].state_dict())
    assert main(["info", str(file)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"file      {file} (checkpoint file)"
    assert dict(line.split(None, 1) for line in lines[1:]) == INFO


def test_info_says_what_export_will_need(tmp_path, capsys):
    _, optimizer = trained(unnamed)
    optimizer.eval()
    main(["info", str(saved(tmp_path, optimizer=optimizer.state_dict()))])
    told = capsys.readouterr().out
    assert "yes: the EMA weights are in the model's file" in told
    assert "no: export needs --model" in told


def test_info_of_a_trainer_checkpoint_knows_the_trainers_step(tmp_path, capsys):
    trainer_run(tmp_path, llama(), [EMACallback(decay=0.5)])
    main(["info", str(tmp_path / "checkpoint-4")])
    assert "Trainer checkpoint, optimizer.pt" in (told := capsys.readouterr().out)
    assert "saved at the trainer's step 4" in told


def test_without_a_command_versions_are_told(capsys):
    assert main([]) == 0
    told = capsys.readouterr().out
    assert f"ema_optim          {ema_optim.__version__}" in told
    assert torch.__version__ in told
    assert transformers.__version__ in told


# Curves.


HISTORY = [
    {"step": 10, "loss": 3.0, "ema_decay": 0.5, "ema_distance": 0.1, "learning_rate": 0.1},
    {"step": 10, "eval_loss": 2.0, "eval_runtime": 1.0},
    {"step": 10, "eval_training_loss": 2.5, "eval_training_runtime": 1.0},
    {"step": 20, "loss": 2.0, "ema_decay": 0.6, "ema_distance": 0.2, "learning_rate": 0.1},
    {"step": 20, "eval_loss": 1.0, "eval_accuracy": 0.5, "eval_runtime": 1.0},
    {"step": 20, "eval_training_loss": 1.5, "eval_training_accuracy": 0.4},
]
PANELS = ["eval_loss", "eval_accuracy", "ema_distance", "ema_decay"]


def test_plot_draws_every_metric_twice(tmp_path, capsys):
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": HISTORY}))
    output = tmp_path / "curves.png"
    assert main(["plot", str(tmp_path / "trainer_state.json"), "-o", str(output)]) == 0
    assert capsys.readouterr().out == f"{output}: {', '.join(PANELS)}\n"
    assert output.read_bytes().startswith(b"\x89PNG")


def test_curves_of_one_metric_are_told_apart(tmp_path):
    from ema_optim._tools.plot import panels_of, read

    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": HISTORY}))
    curves = read(tmp_path)  # the folder will do
    assert curves["eval_training_loss"] == {10: 2.5, 20: 1.5}
    labels = {name: label for name, label, _ in panels_of(curves)["eval_loss"]}
    assert labels == {
        "loss": "loss of the steps",
        "eval_training_loss": "training weights",
        "eval_loss": "EMA weights",
    }
    alone = {"eval_loss": curves["eval_loss"]}  # of which weights, the log does not say
    assert panels_of(alone)["eval_loss"][0][1] == "eval_loss"


def test_tensorboard_gives_the_trainers_curves(tmp_path):
    pytest.importorskip("tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    from ema_optim._tools.plot import read

    with SummaryWriter(tmp_path / "runs" / "one") as writer:
        for entry in HISTORY:
            for name, value in entry.items():
                tag = name.replace("eval_", "eval/") if "eval_" in name else f"train/{name}"
                writer.add_scalar(tag, value, entry["step"])
    curves = read(tmp_path)
    assert curves["eval_training_loss"] == {10: 2.5, 20: 1.5}
    assert curves["loss"] == {10: 3.0, 20: 2.0}


NO_LOGS = [
    ("nothing.json", None, "got nothing there"),
    ("trainer_state.json", "{}", "no log_history"),
    ("trainer_state.json", "text", "no log_history"),
    ("trainer_state.json", '{"log_history": [{"step": 1, "epoch": 1}]}', "must hold losses"),
]


@pytest.mark.parametrize(("name", "text", "words"), NO_LOGS)
def test_what_is_no_log_is_told(name, text, words, tmp_path, capsys):
    if text is not None:
        (tmp_path / name).write_text(text)
    assert main(["plot", str(tmp_path / name), "-o", str(tmp_path / "curves.png")]) == 2
    assert words in capsys.readouterr().err
    assert main(["plot", str(Path(__file__).parent), "-o", "curves.png"]) == 2
    assert "no event files" in capsys.readouterr().err
