"""Parameters, steps with gradients out of nothing, and what the tests read of an optimizer."""

import torch


def param(*shape, **kwargs):
    return torch.nn.Parameter(torch.randn(shape, **kwargs))


def train(optimizer, steps=1, gradient=torch.randn_like):
    """Steps in which every parameter that wants a gradient has ``gradient(parameter)``."""
    for _ in range(steps):
        for group in optimizer.param_groups:
            for p in group["params"]:
                if p.requires_grad:
                    p.grad = gradient(p.detach())
        optimizer.step()


def train_alike(optimizer, steps=1):
    """The same steps for whoever has the same weights."""
    train(optimizer, steps, torch.sin)


def ema_of(optimizer, p):
    return optimizer.state[p]["ema"]


def emas(optimizer):
    """Copies of the EMA of every parameter."""
    return copies(ema_of(optimizer, p) for g in optimizer.param_groups for p in g["params"])


def copies(tensors):
    return [tensor.detach().clone() for tensor in tensors]
