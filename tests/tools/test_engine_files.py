"""The tools read the files that the real engines have written."""

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed.checkpoint as dcp
import transformers
from exports import exported, llama, named, net, same, trained, trainer_run, unnamed
from ranks import on_ranks, run_on
from sharded import plain_model, sharded_model, train, whole_ema
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
)
from torch.optim import SGD, AdamW

from ema_optim import EMACallback, EMAModel, EMAOptimizer
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
    from sharded_trainers import accelerated, steps

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
    from sharded_trainers import class_of, sharded_fit
    from trainers import llama, saves

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
