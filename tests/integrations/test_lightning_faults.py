"""``EMAWeights`` beside other callbacks and hooks of Lightning."""

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger
from lightning_runs import Net, fit, loader, weights
from torch.optim.lr_scheduler import ExponentialLR

from ema_optim.integrations.lightning import EMAWeights

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),
    pytest.mark.filterwarnings("ignore::lightning.pytorch.utilities.warnings.PossibleUserWarning"),
]


class Scheduled(Net):
    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.1)
        return [optimizer], [ExponentialLR(optimizer, 0.9)]


class Unscheduled(Net):
    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.1)


@pytest.mark.parametrize("cls", [Scheduled, Unscheduled])
def test_learning_rate_monitor_keeps_its_key(tmp_path, cls):
    monitor = LearningRateMonitor()
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "max_epochs": 1}
    logs = {"logger": CSVLogger(tmp_path), "log_every_n_steps": 1, "enable_checkpointing": False}
    trainer = pl.Trainer(accelerator="cpu", callbacks=[EMAWeights(0.5), monitor], **quiet, **logs)
    trainer.fit(cls(), loader(), loader())
    assert list(monitor.lrs) == ["lr-AdamW"]


class Migrates(Net):
    def on_load_checkpoint(self, checkpoint):
        for name, value in checkpoint["state_dict"].items():
            checkpoint["state_dict"][name] = torch.full_like(value, 7.0)


class Once(Migrates):
    def on_load_checkpoint(self, checkpoint):
        checkpoint.pop("epoch_of_old")
        super().on_load_checkpoint(checkpoint)


class See(pl.Callback):
    def on_train_start(self, trainer, module):
        self.seen = weights(module)


def saved(folder):
    trainer = fit(Net(), [EMAWeights(0.5)])
    trainer.save_checkpoint(folder / "a.ckpt")
    checkpoint = torch.load(folder / "a.ckpt", weights_only=False)
    torch.save({**checkpoint, "epoch_of_old": 1}, folder / "a.ckpt")
    return folder / "a.ckpt"


# Lightning hands the module the EMA weights alone; the training weights stand under another key.
def test_migration_of_a_checkpoint_reaches_the_training_weights(tmp_path):
    see = See()
    fit(Migrates(), [EMAWeights(0.5), see], ckpt_path=saved(tmp_path), max_epochs=9)
    assert all(bool((value == 7.0).all()) for value in see.seen)


def test_migration_that_cannot_be_made_twice_is_refused(tmp_path):
    with pytest.raises(RuntimeError, match="must change the training weights as it has"):
        fit(Once(), [EMAWeights(0.5)], ckpt_path=saved(tmp_path), max_epochs=9)


# Lightning's DeepSpeed strategy refuses CPUs: its engine is never built here.
def test_under_deepspeed_the_remedy_is_the_engines_own_door():
    from types import SimpleNamespace

    from lightning.pytorch.strategies import DeepSpeedStrategy

    strategy = DeepSpeedStrategy.__new__(DeepSpeedStrategy)
    with pytest.raises(ValueError, match=r"EMAEngine\(trainer.strategy.model, decay\)"):
        EMAWeights(0.9).on_fit_start(SimpleNamespace(strategy=strategy), None)
