"""The kernel on a CPU, in Triton's interpreter (slow, but the same) or of torch's operators."""

import importlib.util
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ema_optim._arithmetic import fused
from ema_optim._arithmetic.formats import format_of


def interpreted_kernel(patch, row=512, step=256):
    """A copy of the kernel's module that runs on CPU tensors, with rows of few elements."""
    patch.setenv("TRITON_INTERPRET", "1")
    from triton.runtime import interpreter

    def fma(self, x, y, z):  # numpy has none; a product of two float32 is exact in float64
        wide = x.data.astype(np.float64) * y.data.astype(np.float64) + z.data.astype(np.float64)
        return interpreter.TensorHandle(wide.astype(x.data.dtype), x.dtype)

    patch.setattr(interpreter.InterpreterBuilder, "create_fma", fma)
    path = Path(fused.__file__).with_name("kernel.py")
    spec = importlib.util.spec_from_file_location("ema_optim._arithmetic.interpreted", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.ROW, module._STEP = row, step
    module.launch = np.errstate(invalid="ignore")(module.launch)  # a GPU says nothing either
    return module


@pytest.fixture
def on_cpu(monkeypatch):
    """Have the kernel average CPU tensors."""
    # The interpreter of Triton 3.2 takes arrays of one element for numbers, numpy 2.4 does not.
    pytest.importorskip("triton", "3.3", reason="the kernel is Triton's: pip install triton")
    module = interpreted_kernel(monkeypatch)
    monkeypatch.setattr(fused, "_kernel", lambda: module)
    monkeypatch.setattr(fused, "_DEVICES", {"cpu"})
    fused._is_right.cache_clear()
    yield module
    fused._is_right.cache_clear()


@pytest.fixture
def stood_in(monkeypatch):
    """Have the eager form stand in for the kernel: it reads ``held`` on the device as well."""
    aim = fused.Plan.aim

    def aimed(plan, weights, decay):
        plan.weights = weights
        return aim(plan, weights, decay)

    def launch(plan, update, held=None):
        parts = [plan._mains, plan._lows]
        new = [[tensor.clone() for tensor in part] for part in parts]
        form = format_of(*(part[0].dtype if part else None for part in parts))
        form.update_(*new, plan.weights, update)
        for old, made in zip([*plan._mains, *plan._lows], chain(*new), strict=True):
            old.copy_(made if held is None else torch.where(held != 0, old, made))

    monkeypatch.setattr(fused.Plan, "aim", aimed)
    monkeypatch.setattr(fused.Plan, "launch", launch)
    monkeypatch.setattr(fused, "_kernel", lambda: SimpleNamespace(ROW=512))
    monkeypatch.setattr(fused, "_is_right", lambda *kind: True)
    monkeypatch.setattr(fused, "_DEVICES", {"cpu"})
