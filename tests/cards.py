"""The card that tests marked ``gpu`` run on, and small runs there.

``EMA_OPTIM_TEST_DEVICE=cpu`` runs them on a CPU instead: whether the tests themselves are sound.
"""

import contextlib
import os

import pytest
import torch

from ema_optim import EMAOptimizer

DEVICE = os.environ.get("EMA_OPTIM_TEST_DEVICE", "cuda")
ON_CARD = DEVICE != "cpu"
gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(ON_CARD and not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.filterwarnings("ignore:an EMA in bfloat16|the EMA still holds"),
]


def net(dtype=torch.float32, device=DEVICE, width=64):
    """The same weights on every device."""
    torch.manual_seed(0)
    layers = [torch.nn.Linear(16, width), torch.nn.GELU(), torch.nn.Linear(width, width)]
    return torch.nn.Sequential(*layers, torch.nn.GELU(), torch.nn.Linear(width, 1)).to(
        device, dtype
    )


def batch(number, dtype=torch.float32, device=DEVICE):
    generator = torch.Generator().manual_seed(number)
    return torch.randn(32, 16, generator=generator).to(device, dtype)


def wrapped(model, decay=0.9, lr=1e-3, **options):
    params = list(model.parameters())
    if params[0].dtype == torch.float16:  # in which Adam's epsilon is 0
        return EMAOptimizer(torch.optim.SGD(params, lr=10 * lr), decay, **options)
    inner = torch.optim.AdamW(params, lr=lr, fused=ON_CARD or None)
    return EMAOptimizer(inner, decay, **options)


def backward(model, inputs):
    model.zero_grad(set_to_none=False)
    model(inputs).float().square().mean().backward()


def train(model, optimizer, numbers, each=lambda: None):
    dtype = next(model.parameters()).dtype
    for number in numbers:
        backward(model, batch(number, dtype, next(model.parameters()).device))
        optimizer.step()
        each()


def weights_of(model):
    return [param.detach().clone() for param in model.parameters()]


@contextlib.contextmanager
def no_synchronisation():
    """Raise where the host waits for the card."""
    if ON_CARD:
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if ON_CARD:
            torch.cuda.set_sync_debug_mode("default")


def captured(run):
    """``run`` as a CUDA graph, recorded after warm-up steps of the caller; its replay."""
    if not ON_CARD:
        return run
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


@contextlib.contextmanager
def side_stream():
    """Where the steps before a capture are to be made."""
    if not ON_CARD:
        yield
        return
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        yield
    torch.cuda.current_stream().wait_stream(side)
