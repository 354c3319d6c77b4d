"""How many operators an update and a swap launch where every launch costs, and that no bit moves.

Counted on tensors without memory: of a list operator as torch launches it on CUDA, 64 tensors or
320 blocks of 65,536 elements at a time (two lists, MultiTensorApply.cuh).
"""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ema_optim import EMAModel, EMAOptimizer
from ema_optim._arithmetic import scratch
from ema_optim._arithmetic.exchange import Exchange
from ema_optim._shadow import swap_state
from ema_optim._shadow.slots import Slot

WIDTH, CPU = 768, torch.device("cpu")
BLOCK = [(WIDTH,), (WIDTH, 3 * WIDTH), (3 * WIDTH,), (WIDTH, WIDTH), (WIDTH,), (WIDTH,), (WIDTH,)]
BLOCK += [(WIDTH,), (WIDTH, 4 * WIDTH), (4 * WIDTH,), (4 * WIDTH, WIDTH), (WIDTH,)]
GPT2 = [(50257, WIDTH), (1024, WIDTH), *BLOCK * 12, (WIDTH,), (WIDTH,)]
FORMATS = [None, "float32_compensated", "float24", torch.bfloat16]
pytestmark = pytest.mark.filterwarnings("ignore:an EMA in bfloat16")


class Launches(TorchDispatchMode):
    total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name.startswith("_foreach"):
            blocks = sum(math.ceil(tensor.numel() / 65536) for tensor in args[0])
            self.total += max(math.ceil(len(args[0]) / 64), math.ceil(blocks / 320))
        elif not function.is_view and not name.startswith("empty"):
            self.total += 1
        return function(*args, **(kwargs or {}))


def launches(run):
    with torch.no_grad(), Launches() as counted:
        run()
    return counted.total


def gpt2(dtype, device="meta"):
    return [torch.nn.Parameter(torch.empty(s, device=device, dtype=dtype)) for s in GPT2]


def launches_of_update(dtype, ema_dtype):
    optimizer = EMAOptimizer(torch.optim.SGD(gpt2(dtype), lr=0.1), decay=0.9, dtype=ema_dtype)
    shadow = optimizer._ema
    shadow.finish_step(shadow.begin_step())
    lane = shadow.begin_step()
    return launches(lambda: shadow.finish_step(lane))


@pytest.mark.parametrize(
    ("dtype", "ema_dtype", "limit"),
    [
        (torch.float32, None, 7),
        (torch.bfloat16, None, 40),
        (torch.bfloat16, "float32_compensated", 400),
        (torch.bfloat16, "float24", 900),
        (torch.bfloat16, torch.bfloat16, 750),
    ],
)
def test_an_update_on_an_accelerator_is_few_launches(dtype, ema_dtype, limit):
    assert 0 < launches_of_update(dtype, ema_dtype) <= limit


def test_with_the_pieces_of_a_cpu_it_would_be_many(monkeypatch):
    monkeypatch.setattr(scratch, "WIDE", scratch.CHUNK)
    assert launches_of_update(torch.bfloat16, None) == 978


def test_a_swap_on_an_accelerator_is_few_launches():
    weights, emas = ([p.detach() for p in gpt2(torch.float32)] for _ in range(2))
    assert launches(Exchange(emas, weights, watched=True).run) <= 100


def test_parking_is_one_list_operator():
    params = gpt2(torch.bfloat16)
    slots = {p: Slot(torch.empty_like(p, dtype=torch.float32), None, None) for p in params}
    assert launches(lambda: swap_state.Move(slots, slots, arrived=False)) <= 8


@pytest.mark.parametrize("narrow", [False, True])
def test_no_buffer_is_larger_than_what_goes_through_it(narrow):
    few = [torch.empty(100, device="meta"), torch.empty(28, device="meta")]
    many = [torch.empty(2**30, device="meta")]
    assert scratch.needed_size(few, narrow) == 128
    assert scratch.needed_size(many, narrow) == (scratch.NARROW if narrow else scratch.WIDE)
    assert scratch.needed_size([torch.empty(2**20)], narrow) == scratch.CHUNK
    assert scratch.needed_size([]) == 0


SHAPES = [(3 * scratch.CHUNK + 5,), (700, 512), (64,), (0, 3), (), (300, 1000)]


def averaged(ema_dtype, dtype):
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]
    model = torch.nn.ParameterList(map(torch.nn.Parameter, weights))
    ema = EMAModel(model, decay=0.7, dtype=ema_dtype)
    for _ in range(3):
        with torch.no_grad():
            torch._foreach_mul_(list(model), 1.1)
        ema.update()
    with ema.use_ema():
        shown = [param.detach().clone() for param in model]
    return [*ema.get_ema_state().values(), *shown, *model]


@pytest.mark.filterwarnings("ignore:the EMA still holds")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("ema_dtype", FORMATS, ids=str)
def test_the_size_of_the_scratch_changes_no_bit(ema_dtype, dtype, monkeypatch):
    expected = averaged(ema_dtype, dtype)
    sizes = {False: scratch.WIDE, True: scratch.NARROW}
    monkeypatch.setattr(scratch, "scratch_size", lambda device, narrow=False: sizes[narrow])
    assert all(map(torch.equal, averaged(ema_dtype, dtype), expected))


@pytest.mark.parametrize("ema_dtype", ["float24", torch.bfloat16], ids=str)
def test_noise_buffers_are_made_once(ema_dtype, monkeypatch):
    made, arange = [], torch.arange
    monkeypatch.setattr(
        torch, "arange", lambda *args, **kwargs: made.append(arange(*args, **kwargs)) or made[-1]
    )
    ema = EMAModel(torch.nn.Linear(300, 200), decay=0.9, dtype=ema_dtype)
    for _ in range(2):
        ema.update()
    assert len(made) == 1
