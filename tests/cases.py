"""Rows: every optimizer and option row of torch's own tests, and schedule-free."""

import warnings
from dataclasses import dataclass, field
from typing import Any

import schedulefree
import torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch's test helpers warn at import of what they lack
    from torch.testing._internal.common_optimizers import optim_db


@dataclass
class Case:
    name: str
    cls: type
    kwargs: dict[str, Any] = field(default_factory=dict)
    sparse: bool = False
    closure: bool = False

    @property
    def late_grads(self):
        # Torch's fused SGD mixes missing and present momentum buffers up in one call.
        return not (self.cls is torch.optim.SGD and self.kwargs.get("fused"))

    def build(self, params):
        optimizer = self.cls(params, **self.kwargs)
        getattr(optimizer, "train", lambda: None)()
        return optimizer

    def __repr__(self):
        return self.name


def _torch_cases():
    for info in optim_db:
        impls = [{}, *({impl: True} for impl in info.supported_impls)]
        for row in info.optim_inputs_func(device="cpu"):
            for impl in impls:
                kwargs = {**row.kwargs, **impl}
                if not _is_legal(kwargs):
                    continue
                name = "-".join([info.optim_cls.__name__, row.desc.replace(" ", "_"), *impl])
                yield Case(
                    name,
                    info.optim_cls,
                    kwargs,
                    info.only_supports_sparse_grads,
                    info.step_requires_closure,
                )


def _is_legal(kwargs):
    # Torch refuses the others itself: "`fused` does not support `differentiable`", and a tensor
    # learning rate with foreach needs capturable.
    tensor_lr = isinstance(kwargs.get("lr"), torch.Tensor)
    if kwargs.get("foreach") and (tensor_lr and not kwargs.get("capturable")):
        return False
    return sum(bool(kwargs.get(key)) for key in ("foreach", "fused", "differentiable")) <= 1


SCHEDULE_FREE = [
    Case("AdamWScheduleFree", schedulefree.AdamWScheduleFree, {"lr": 0.01, "foreach": False}),
    Case("SGDScheduleFree", schedulefree.SGDScheduleFree, {"lr": 0.1, "foreach": True}),
]
OPTIMIZERS = [*_torch_cases(), *SCHEDULE_FREE]
# Torch loads the state of a differentiable optimizer as leaves that require a gradient, and its
# next step refuses to write into them: the bare optimizer cannot resume either.
RESUMABLE = [case for case in OPTIMIZERS if not case.kwargs.get("differentiable")]


class Problem:
    """Three weights with reproducible gradients; the last has none before the third step."""

    def __init__(self, case, seed=0):
        self.case = case
        self.random = torch.Generator().manual_seed(seed)
        self.params = [self._param(shape) for shape in ((4, 3), (5, 5), (3, 6))]
        self.step_number = 0

    def _param(self, shape):
        param = torch.randn(shape, generator=self.random).requires_grad_()
        if not self.case.kwargs.get("differentiable"):
            return param
        param = param.clone()  # a differentiable step writes into its parameters
        param.retain_grad()
        return param

    def grads(self):
        self.step_number += 1
        for index, param in enumerate(self.params):
            noise = torch.randn(param.shape, generator=self.random)
            if index < 2 or self.step_number > 2 or not self.case.late_grads:
                grad = param.detach() + noise
                param.grad = grad.to_sparse() if self.case.sparse else grad

    def step(self, optimizer):
        if not self.case.closure:
            self.grads()
            optimizer.step()
            return
        noise = [torch.randn(p.shape, generator=self.random) for p in self.params]

        def closure():
            optimizer.zero_grad()
            pairs = zip(self.params, noise, strict=True)
            loss = sum((param - target).square().sum() for param, target in pairs)
            loss.backward()
            return loss

        optimizer.step(closure)
