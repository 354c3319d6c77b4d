"""Tiny Lightning models and their trainers."""

import lightning.pytorch as pl
import torch
from reference import Reference, wide
from torch import nn
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import ExponentialLR
from torch.utils.data import DataLoader, TensorDataset

DECAY = 0.25  # after the two steps of the shortest epoch the initial weights are 6 % of the EMA


class Net(pl.LightningModule):
    """BatchNorm for its buffers, a tied layer, and a parameter that never has a gradient."""

    def __init__(self, kind="automatic", build=lambda optimizer: optimizer):
        super().__init__()
        self.kind, self.build = kind, build
        self.automatic_optimization = kind == "automatic"
        self.first, self.norm, self.last = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)
        self.tied, self.unused = self.first, nn.Parameter(torch.ones(2))
        self.in_validation = lambda: None

    def loss(self):
        # New data at every step, from the step alone: the same in a run that was resumed.
        random = torch.Generator().manual_seed(self.global_step)
        inputs = torch.randn(8, 4, generator=random).to(self.last.weight.dtype)
        return self.last(self.norm(self.first(inputs)).relu()).square().mean()

    def training_step(self, batch, batch_idx):
        if self.automatic_optimization:
            return self.loss()
        optimizers = self.optimizers()
        for optimizer in optimizers if isinstance(optimizers, list) else [optimizers]:
            self.toggle_optimizer(optimizer)
            optimizer.zero_grad()
            self.manual_backward(self.loss())
            optimizer.step()
            self.untoggle_optimizer(optimizer)

    def validation_step(self, batch, batch_idx):
        self.in_validation()
        self.log("val", float(self.global_step))

    test_step = predict_step = lambda self, batch, batch_idx: torch.zeros(())

    def configure_optimizers(self):
        if self.kind == "two optimizers":
            adamw = AdamW([*self.first.parameters(), self.unused], lr=0.1)
            return self.build(adamw), self.build(SGD(self.last.parameters(), lr=0.1, momentum=0.9))
        optimizer = self.build(AdamW(self.parameters(), lr=0.1))
        return [optimizer], [{"scheduler": ExponentialLR(optimizer, 0.9), "interval": "step"}]


class Watch(pl.Callback):
    """Averages by itself, and notes the weights and what they should be wherever it is asked."""

    def __init__(self):
        self.evaluated, self.expected, self.left_with = [], [], None

    def on_train_start(self, trainer, pl_module):
        self.reference, self.step = Reference(pl_module.parameters(), DECAY), trainer.global_step

    def on_train_batch_end(self, trainer, pl_module, *args):
        if trainer.global_step > self.step:
            self.reference.update()
        self.step = trainer.global_step
        self.weights = weights(pl_module)

    def on_validation_batch_end(self, trainer, pl_module, *args):
        if trainer.sanity_checking:
            return
        self.evaluated.append([wide(p) for p in pl_module.parameters()])
        self.expected.append(self.reference.emas)

    on_test_batch_end = on_predict_batch_end = on_validation_batch_end

    def on_validation_end(self, trainer, pl_module):
        self.left_with = weights(pl_module)

    def on_exception(self, trainer, pl_module, exception):
        self.left_with = weights(pl_module)


def weights(model):
    return [p.detach().clone() for p in model.parameters()]


def loader():
    return DataLoader(TensorDataset(torch.zeros(4, 1)))


def make_trainer(callbacks=(), **kwargs):
    kwargs = {"max_epochs": 3, "enable_checkpointing": False, "limit_val_batches": 2} | kwargs
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return pl.Trainer(accelerator="cpu", callbacks=list(callbacks), **quiet, **kwargs)


def fit(model, callbacks=(), ckpt_path=None, **kwargs):
    trainer = make_trainer(callbacks, **kwargs)
    trainer.fit(model, loader(), loader(), ckpt_path=ckpt_path)
    return trainer


def new(*args, **kwargs):
    torch.manual_seed(0)
    return Net(*args, **kwargs)
