"""The kernel on a CPU, in Triton's interpreter: slow, one operation after another, but the same."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from ema_optim._arithmetic import fused


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
    pytest.importorskip("triton", reason="the kernel is Triton's: pip install triton")
    module = interpreted_kernel(monkeypatch)
    monkeypatch.setattr(fused, "_kernel", lambda: module)
    monkeypatch.setattr(fused, "_DEVICES", {"cpu"})
    fused._is_right.cache_clear()
    yield module
    fused._is_right.cache_clear()
