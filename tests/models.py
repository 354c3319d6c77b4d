"""A small model with running statistics and tied weights, moved and averaged by ``EMAModel``."""

import copy

import pytest
import torch
from torch import nn

from ema_optim import EMAModel

each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
STATISTICS = {"norm.running_mean", "norm.running_var"}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.norm = nn.BatchNorm1d(4)
        self.last = nn.Linear(4, 4)
        self.tied = nn.Linear(4, 4, bias=False)
        self.tied.weight = self.last.weight

    def forward(self, batch):
        return self.tied(self.last(self.norm(self.first(batch))))


PARAMS = {name for name, _ in Net().named_parameters()}


def net(dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return Net().to(dtype)


def move(model, steps=1, ema=None, seed=0):
    """Some steps of a training without an optimizer: noise on the weights, a batch of data."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        with torch.no_grad():
            for param in model.parameters():
                param.add_(torch.randn(param.shape, generator=generator) * param.requires_grad)
            model(torch.randn(5, 3, generator=generator).to(next(model.parameters()).dtype))
        if ema is not None:
            ema.update()


def trained(steps=4, dtype=torch.float32, decay=0.1, **options):
    model = net(dtype)
    ema = EMAModel(model, decay, **options)
    move(model, steps, ema)
    return model, ema


def averages(ema):
    """The EMA by name; a checkpoint is read without a warning about the initial weights."""
    return {name: entry["ema"].clone() for name, entry in ema.state_dict()["state"].items()}


def values(model):
    return copy.deepcopy(dict(model.state_dict()))


def everything(model, ema):
    return values(model), copy.deepcopy(ema.state_dict()), ema.ema_metrics()
