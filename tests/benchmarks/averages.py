"""The contenders: ema_optim, the bare torch calls, and every peer with its best settings.

A factory takes a model (a ``ParameterList``) and a decay. Peers start without warm-up, so that they
average at every call after the first, which some of them make a copy.
"""

import importlib.util
import operator
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn

from ema_optim import EMAOptimizer


@dataclass
class Average:
    """One EMA of a model.

    ``emas`` gives its tensors in the order of the model's parameters. ``swap_in`` and ``swap_out``
    are the contender's own way to evaluate on the EMA weights, where it has one.
    """

    update: Callable[[], object]
    emas: Callable[[], list]
    swap_in: Callable[[], object] | None = None
    swap_out: Callable[[], object] | None = None
    params: list | None = None  # its own weights, where they are not the model's


BASE = "`_foreach_lerp_`, ready lists"
OURS = "**ema_optim**"
MUL_ADD = "`_foreach_mul_` + `_foreach_add_` (NeMo's arithmetic)"
TIMM = "timm ModelEmaV3 (foreach)"
TORCH_EMA = "torch-ema"
DIFFUSERS = "diffusers EMAModel (foreach)"
LIGHTNING = "Lightning EMAWeightAveraging"


def foreach_lerp(model, decay):
    params, emas = _lists(model)
    return Average(_no_grad(lambda: torch._foreach_lerp_(emas, params, 1 - decay)), lambda: emas)


def fused_sgd(model, decay):
    """The one CPU kernel that is faster: SGD with ``gradient = weights`` and weight decay 1.

    It walks raw memory, so that every call has to look at the layout of every tensor first.
    """
    params, emas = _lists(model)
    sizes = [param.numel() for param in params]
    dense, numel = torch.Tensor.is_contiguous, torch.Tensor.numel

    def update():
        if not all(map(dense, params)) or not all(map(operator.eq, map(numel, params), sizes)):
            raise RuntimeError("a layout has changed")
        torch._fused_sgd_(
            emas,
            params,
            [],
            lr=1 - decay,
            weight_decay=1,
            momentum=0,
            maximize=True,
            dampening=0,
            nesterov=False,
            is_first_step=False,
        )

    return Average(_no_grad(update), lambda: emas)


def foreach_mul_add(model, decay):
    params, emas = _lists(model)

    def update():
        torch._foreach_mul_(emas, decay)
        torch._foreach_add_(emas, params, alpha=1 - decay)

    return Average(_no_grad(update), lambda: emas)


def ema_optim(model, decay):
    optimizer = EMAOptimizer(torch.optim.SGD(model.parameters(), lr=1e-3), decay)
    # What EMAOptimizer.step() does around the inner step, its checks included.
    shadow = optimizer._ema
    return Average(
        lambda: shadow.finish_step(shadow.begin_step()),
        lambda: emas_of(optimizer, model),
        optimizer.eval,
        optimizer.train,
    )


def emas_of(optimizer, model):
    return [optimizer._ema.slots[param].ema for param in model]


def averaged_model_multi(model, decay):
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))
    return Average(lambda: ema.update_parameters(model), lambda: list(ema.module))


def averaged_model(model, decay):
    ema = AveragedModel(model, avg_fn=get_ema_avg_fn(decay))
    return Average(lambda: ema.update_parameters(model), lambda: list(ema.module))


def timm(model, decay):
    # In fp32 whatever the weights are: what it recommends for narrower ones.
    ema = _timm_module().ModelEmaV3(model, decay=decay, foreach=True, dtype=torch.float32)
    return Average(lambda: ema.update(model), lambda: list(ema.module))


def ema_pytorch_foreach(model, decay):
    return _ema_pytorch(model, decay, use_foreach=True)


def ema_pytorch(model, decay):
    return _ema_pytorch(model, decay, use_foreach=False)


def torch_ema(model, decay):
    from torch_ema import ExponentialMovingAverage

    params = list(model)
    ema = ExponentialMovingAverage(params, decay, use_num_updates=False)

    def swap_in():
        ema.store(params)
        ema.copy_to(params)

    return Average(
        lambda: ema.update(params), lambda: ema.shadow_params, swap_in, lambda: ema.restore(params)
    )


def diffusers_foreach(model, decay):
    return _diffusers(model, decay, foreach=True)


def diffusers(model, decay):
    return _diffusers(model, decay, foreach=False)


def lightning(model, decay):
    from lightning.pytorch import LightningModule
    from lightning.pytorch.callbacks import EMAWeightAveraging

    module = LightningModule()
    module.weights = model
    module.to(model[0].device)  # where it keeps the average
    callback = EMAWeightAveraging(decay=decay)
    trainer = SimpleNamespace(global_step=0)  # all that the callback reads of it
    callback.setup(trainer, module, "fit")

    def update():
        trainer.global_step += 1
        callback.on_train_batch_end(trainer, module, None, None, 0)

    return Average(
        update,
        lambda: list(callback._average_model.module.weights),
        lambda: callback.on_validation_epoch_start(trainer, module),
        lambda: callback.on_validation_epoch_end(trainer, module),
    )


UPDATES = {
    BASE: foreach_lerp,
    OURS: ema_optim,
    "`_fused_sgd_` as a lerp, with its checks (not used)": fused_sgd,
    MUL_ADD: foreach_mul_add,
    TIMM: timm,
    "ema-pytorch (use_foreach)": ema_pytorch_foreach,
    "ema-pytorch": ema_pytorch,
    "AveragedModel, get_ema_multi_avg_fn": averaged_model_multi,
    "AveragedModel, get_ema_avg_fn": averaged_model,
    TORCH_EMA: torch_ema,
    DIFFUSERS: diffusers_foreach,
    "diffusers EMAModel": diffusers,
    LIGHTNING: lightning,
}


def _lists(model):
    return list(model), [param.detach().to(torch.float32, copy=True) for param in model]


def _no_grad(update):
    def run():
        with torch.no_grad():
            update()

    return run


def _ema_pytorch(model, decay, use_foreach):
    from ema_pytorch import EMA

    ema = EMA(
        model,
        beta=decay,
        min_value=decay,  # its ramp is clamped between the two
        update_after_step=0,
        update_every=1,
        include_online_model=False,
        use_foreach=use_foreach,
    )
    return Average(ema.update, lambda: list(ema.ema_model))


def _diffusers(model, decay, foreach):
    from diffusers.training_utils import EMAModel

    params = list(model)
    ema = EMAModel(params, decay=decay, min_decay=decay, foreach=foreach)

    def swap_in():
        ema.store(params)
        ema.copy_to(params)

    return Average(
        lambda: ema.step(params), lambda: ema.shadow_params, swap_in, lambda: ema.restore(params)
    )


def _timm_module():
    found = importlib.util.find_spec("timm")
    if found is None:
        raise ModuleNotFoundError("No module named 'timm'", name="timm")
    # Its one file alone: the package imports torchvision, which has to match the torch in use.
    path = Path(found.origin).parent / "utils" / "model_ema.py"
    spec = importlib.util.spec_from_file_location("timm_model_ema", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def scale_(params, factor):
    """Move the weights away from the EMA, by a power of two: no float format rounds it."""
    with torch.no_grad():
        torch._foreach_mul_(list(params), factor)


def check_updates(name, average, model, calls, decay):
    """Raise unless the EMA is where ``calls`` updates put it.

    It began at half of the weights. The tolerance is a tenth of what one call changes: a peer that
    was idle in one of the calls is found out.
    """
    left = decay**calls / 2
    tolerance = max(0.1 * left * (1 - decay), 1e-5)  # fp32 cannot tell less
    for ema, param in zip(average.emas(), average.params or model, strict=True):
        weights = param.detach().to(ema.dtype)
        # A weight of exactly 0 moves by the tiny rate of the steps, and everything is far from it.
        if not torch.allclose(ema, weights * (1 - left), rtol=tolerance, atol=1e-15):
            raise RuntimeError(f"{name}: the EMA is not where {calls} updates would put it")
