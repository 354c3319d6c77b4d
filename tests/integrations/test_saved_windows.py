"""``snapshots=`` of the callbacks: the EMA of every checkpoint, for any window afterwards."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning_runs import DECAY as NET_DECAY
from lightning_runs import fit as fit_net
from lightning_runs import new
from reference import same
from trainers import DECAY, fit, llama, lora, plain, saves, unused_bf16

from ema_optim import EMACallback, EMASnapshots
from ema_optim.integrations._snapshots import folder_of
from ema_optim.integrations.lightning import EMAWeights

pytestmark = [
    # PEFT asks transformers for a name that transformers has renamed.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    # Lightning 2.6 asks torch 2.13's pytrees by a deprecated name.
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`.*:UserWarning"),
]


def steps_in(folder):
    return sorted(int(name[4:12]) for name in os.listdir(folder))


def function(step):
    return 0.5


@pytest.mark.parametrize("build", [llama, lora, unused_bf16])
@pytest.mark.parametrize("save_ema", [False, True])
def test_every_checkpoint_of_the_trainer_has_a_snapshot(build, save_ema, tmp_path):
    callback = EMACallback(DECAY, snapshots=tmp_path / "s", save_ema=save_ema)
    fit(build(), tmp_path / "run", callback, save_total_limit=1, **saves(2, evaluate=2))
    assert steps_in(tmp_path / "s") == [2, 4, 6, 8]
    made = EMASnapshots(tmp_path / "s").synthesize(DECAY)
    assert same(made, callback.get_ema_state())


def test_averaged_buffers_are_in_the_snapshots(tmp_path):
    callback = EMACallback(DECAY, snapshots=tmp_path / "s", use_buffers=True)
    fit(plain(), tmp_path / "run", callback, **saves(4))
    made = EMASnapshots(tmp_path / "s").synthesize(DECAY)
    assert "norm.running_mean" in made
    assert same(made, callback.get_ema_state())


def test_a_resumed_training_leaves_the_snapshots_of_an_uninterrupted_one(tmp_path):
    for name in ("whole", "resumed"):
        callback = EMACallback(DECAY, snapshots=tmp_path / name)
        fit(llama(), tmp_path / f"{name}-run", callback, **saves(2))
    (tmp_path / "resumed" / "ema-00000008.safetensors").rename(
        tmp_path / "resumed" / "ema-00000007.safetensors"  # of another course
    )
    start = tmp_path / "resumed-run" / "checkpoint-4"
    again = EMACallback(DECAY, snapshots=str(tmp_path / "resumed"))
    fit(llama(seed=1), tmp_path / "resumed-run", again, resume=start, **saves(2))
    assert steps_in(tmp_path / "resumed") == steps_in(tmp_path / "whole")
    ways = [EMASnapshots(tmp_path / name) for name in ("whole", "resumed")]
    assert same(*(way.synthesize(0.5, step=8, max_error=9) for way in ways))


def test_a_second_training_goes_on_in_the_same_folder(tmp_path):
    callback = EMACallback(DECAY, snapshots=tmp_path / "s")
    trainer = fit(llama(), tmp_path / "run", callback, **saves(4))
    trainer.train()
    assert steps_in(tmp_path / "s") == [4, 8, 12, 16]


@pytest.mark.parametrize(("run", "own"), [("out", "s"), ("out/run-3", "s/run-3")])
def test_a_trial_of_a_search_has_its_own_folder(run, own):
    assert folder_of(Path("s"), SimpleNamespace(output_dir="out"), run) == Path(own)


REFUSED = [
    ({"decay": 0.5}, ValueError, "must be empty or this run's.*give every run its own folder"),
    ({"decay": function}, TypeError, "a file cannot hold a function"),
]


@pytest.mark.parametrize(("options", "error", "message"), REFUSED)
def test_what_could_not_be_saved_is_refused_before_the_first_step(
    options, error, message, tmp_path
):
    fit(llama(), tmp_path / "run", EMACallback(DECAY, snapshots=tmp_path / "s"), **saves(4))
    model = llama()
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(error, match=message):
        fit(model, tmp_path / "other", EMACallback(snapshots=tmp_path / "s", **options))
    assert same(before, [p.detach() for p in model.parameters()])
    assert steps_in(tmp_path / "s") == [4, 8]


@pytest.mark.parametrize("callback", [EMACallback, EMAWeights])
def test_a_folder_is_a_path(callback):
    with pytest.raises(TypeError, match="snapshots must be a folder or None, got 5"):
        callback(0.9, snapshots=5)


def fit_saving(model, folder, snapshots, **options):
    every = {"every_n_epochs": 1} if model.kind != "automatic" else {"every_n_train_steps": 3}
    saver = ModelCheckpoint(folder, save_top_k=-1, filename="{step}", **every)
    callbacks = [EMAWeights(NET_DECAY, snapshots=snapshots), saver]
    return fit_net(model, callbacks, enable_checkpointing=True, **options)


def emas_of(trainer):
    return [one.get_ema_state(trainer.lightning_module) for one in trainer.optimizers]


def test_every_checkpoint_of_lightning_has_a_snapshot_and_a_resume_goes_on(tmp_path):
    whole = fit_saving(new(), tmp_path / "run", tmp_path / "s")
    assert steps_in(tmp_path / "s") == [3, 6, 9, 12]
    fit_saving(new(), tmp_path / "run", tmp_path / "s", ckpt_path=tmp_path / "run" / "step=6.ckpt")
    assert steps_in(tmp_path / "s") == [3, 6, 9, 12]
    assert same(EMASnapshots(tmp_path / "s").synthesize(NET_DECAY), emas_of(whole)[0])
    with pytest.raises(ValueError, match="give every run its own folder"):
        fit_saving(new(), tmp_path / "other", tmp_path / "s")


def test_each_of_several_optimizers_has_a_folder(tmp_path):
    trainer = fit_saving(new("two optimizers"), tmp_path / "run", tmp_path / "s")
    for index, state in enumerate(emas_of(trainer)):
        snapshots = EMASnapshots(tmp_path / "s" / str(index))
        last = max(steps_in(snapshots.folder))
        assert last == trainer.optimizers[index]._ema.step
        assert same(snapshots.synthesize(NET_DECAY), state)
