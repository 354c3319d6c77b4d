"""Whole runs of a small model: trained, saved, loaded."""

import copy

import torch
from reference import through_file
from torch.optim import AdamW

from ema_optim import EMAOptimizer


class Run:
    """A small model in training; batches come from a generator of its own."""

    def __init__(self, dtype=torch.float32, seed=0, optimizer=AdamW, ema_dtype=None, **kwargs):
        torch.manual_seed(seed)
        self.model = torch.nn.Sequential(
            torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 2)
        ).to(dtype)
        kwargs = {"decay": 0.25, "dtype": ema_dtype, **kwargs}
        self.optimizer = EMAOptimizer(optimizer(self.model.parameters(), lr=0.05), **kwargs)

    def train(self, steps, seed=0):
        batches = torch.Generator().manual_seed(seed)
        for _ in range(steps):
            batch = torch.randn(8, 4, generator=batches).to(next(self.model.parameters()).dtype)
            self.optimizer.zero_grad()
            self.model(batch).square().sum().backward()
            self.optimizer.step()
        return self

    def save(self):
        return through_file({"model": self.model.state_dict(), "o": self.optimizer.state_dict()})

    def load(self, saved, model_first=True):
        loads = [
            lambda: self.model.load_state_dict(saved["model"]),
            lambda: self.optimizer.load_state_dict(saved["o"]),
        ]
        for load in loads if model_first else reversed(loads):
            load()
        return self

    def weights(self):
        return {name: param.detach().clone() for name, param in self.model.named_parameters()}

    def ema(self):
        return self.optimizer.get_ema_state(self.model)

    def facts(self):
        return copy.deepcopy([self.model.state_dict(), self.optimizer.state_dict()])


def swapped_save(run, entrance="eval"):
    if entrance == "eval":
        run.optimizer.eval()
        saved = run.save()
        run.optimizer.train()
        return saved
    with run.optimizer.swap_ema_weights():
        return run.save()
