"""The one kernel against the eager form, bit for bit, in Triton's interpreter or on a GPU."""

import importlib
from itertools import accumulate

import pytest
import torch

from ema_optim import EMAOptimizer, EMAWarning
from ema_optim._arithmetic import fused
from ema_optim._arithmetic.formats import FORMATS, Update, format_of
from ema_optim._arithmetic.guard import guarded_update_

FORMAT_ROWS = [None, *FORMATS]
WEIGHT_ROWS = [torch.float32, torch.bfloat16, torch.float16]
each_format = pytest.mark.parametrize("name", FORMAT_ROWS, ids=str)
INTS = {2: torch.int16, 4: torch.int32}
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def format_by(name):
    return format_of(torch.float32) if name is None else FORMATS[name]


def normal(*shapes, dtype=torch.float32, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


class Averaged:
    """EMA tensors of some values, and where they start."""

    def __init__(self, name, values, starts=None, met=None):
        self.format = format_by(name)
        self.mains, self.lows = fused._stored(self.format, values)
        sizes = [value.numel() for value in values]
        self.starts = starts or list(accumulate(sizes[:-1], initial=0))
        self.plan = fused.Plan(self.format, self.mains, self.lows, self.starts, met)

    def eager(self, weights, decay, number):
        update = Update(decay, number, self.starts)
        self.format.update_(self.mains, self.lows, weights, update)
        return self

    def kernel(self, weights, decay, number, held=None):
        assert self.plan.aim(weights, decay)
        self.plan.launch(Update(decay, number, self.starts), held)
        return self

    def same(self, other):
        # The interpreter rounds to bfloat16 its own way: a last bit of the remainder.
        rtol = 2.0**-30 if self.mains[0].dtype == torch.float32 and self.lows else 0.0
        pairs = zip(self.decoded(), other.decoded(), strict=True)
        return all(torch.allclose(*pair, rtol=rtol, atol=0.0, equal_nan=True) for pair in pairs)

    def decoded(self):
        wide = [torch.empty_like(main, dtype=torch.float64) for main in self.mains]
        self.format.decode_(wide, self.mains, self.lows)
        return wide


@pytest.mark.parametrize("dtype", WEIGHT_ROWS, ids=str)
@each_format
def test_the_kernel_is_the_eager_form(on_cpu, name, dtype):
    values = normal(1300, (7, 30), (), (0, 3), (5, 2, 3))
    values[1] = values[1].t()
    starts = [2**32 - 700, 5, 2**31 - 1, 9, 2**35 + 1]
    eager, kernel = (Averaged(name, values, starts) for _ in range(2))
    weights = [w.to(dtype) for w in normal(1300, (7, 30), (), (0, 3), (5, 2, 3), seed=2)]
    weights[1] = weights[1].t()
    weights[0][5:8] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    ones = torch.tensor(-1 if dtype.itemsize == 4 else 2**15 - 1).to(INTS[dtype.itemsize])
    weights[0][8] = ones.view(dtype)  # a NaN that noise would overflow
    for number, decay in enumerate((0.99, 0.4, 0.9), 40):
        assert kernel.kernel(weights, decay, number).same(eager.eager(weights, decay, number))
    assert not kernel.same(Averaged(name, values, starts))


@pytest.mark.parametrize("held", [1.0, 2.0, torch.nan])
@each_format
def test_what_is_held_back_changes_nothing(on_cpu, name, held):
    values, weights = normal(600, 3), normal(600, 3, seed=2)
    before, after = (Averaged(name, values) for _ in range(2))
    assert after.kernel(weights, 0.5, 1, torch.tensor(held)).same(before)
    assert not after.kernel(weights, 0.5, 1, torch.tensor(0.0)).same(before)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@each_format
def test_an_element_whose_weight_is_not_finite_keeps_its_ema(on_cpu, name, bad):
    met, seen = torch.zeros(2, dtype=torch.bool), torch.zeros(2, dtype=torch.bool)
    values, weights = normal(600, 70), normal(600, 70, seed=2)
    eager, kernel = Averaged(name, values), Averaged(name, values, met=met)
    assert kernel.kernel(weights, 0.5, 1).same(eager.eager(weights, 0.5, 1))
    assert not met.any()
    weights[1][3] = bad
    parts, update = (eager.mains, eager.lows), Update(0.5, 2, eager.starts)
    guarded_update_(eager.format, parts, weights, update, seen)
    assert kernel.kernel(weights, 0.5, 2).same(eager)
    assert met.tolist() == seen.tolist() == [False, True]


def test_the_table_follows_weights_that_have_moved(on_cpu):
    values, weights = normal((4, 6), 5), normal((4, 6), 5, seed=2)
    eager, kernel = (Averaged(None, values) for _ in range(2))
    kernel.kernel(weights, 0.5, 1)
    weights[0].data = normal((6, 4), seed=3)[0].t()  # other strides: eager now
    assert not kernel.plan.aim(weights, 0.5)
    weights[0].data = normal((4, 6), seed=4)[0]
    moved = [normal((4, 6), seed=4)[0], weights[1]]
    first = normal((4, 6), 5, seed=2)
    assert kernel.kernel(weights, 0.5, 2).same(eager.eager(first, 0.5, 1).eager(moved, 0.5, 2))
    left, kernel.mains[1].data = kernel.mains[1].data, kernel.mains[1].clone()
    assert kernel.kernel(weights, 0.5, 3).same(eager.eager(moved, 0.5, 3))
    assert not torch.equal(left, kernel.mains[1])


UNKNOWN = {
    "cut": lambda: torch.zeros(4, 6)[:, ::2],
    "expanded": lambda: torch.zeros(4, 1).expand(4, 3),
    "negated": lambda: torch._neg_view(torch.zeros(4, 3)),
    "double": lambda: torch.zeros(4, 3, dtype=torch.float64),
    "sparse": lambda: torch.zeros(4, 3).to_sparse(),
    "elsewhere": lambda: torch.zeros(4, 3, device="meta"),
    "transposed": lambda: torch.zeros(3, 4).t(),
}


@pytest.mark.parametrize("made", UNKNOWN.values(), ids=UNKNOWN)
def test_what_the_kernel_does_not_know_stays_eager(on_cpu, made):
    kernel = Averaged(None, normal((4, 3), 2))
    assert not kernel.plan.aim([made(), torch.zeros(2)], 0.5)
    assert kernel.plan.aim([torch.zeros(4, 3), torch.zeros(2)], 0.5)


@pytest.mark.parametrize("fault", [RuntimeError("no compiler\nmore"), None], ids=["fails", "wrong"])
def test_a_kernel_that_is_not_right_is_told_of_once_and_not_used(on_cpu, monkeypatch, fault):
    def launch(*args):
        if fault:
            raise fault

    monkeypatch.setattr(on_cpu, "launch", launch)
    model = torch.nn.Linear(2, 2)
    optimizer = EMAOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), decay=0.5)
    model(torch.ones(1, 2)).sum().backward()
    said = r"failed \(RuntimeError: no compiler\)" if fault else "gave other numbers"
    with pytest.warns(EMAWarning, match=said):
        optimizer.step()
    before, after = torch.zeros(2), model.bias.detach()
    optimizer.step()
    assert not torch.equal(optimizer.state[model.bias]["ema"], before)
    assert torch.isfinite(after).all()


def test_an_ema_tensor_saved_for_backward_is_known_to_have_changed(on_cpu):
    kernel, leaf = Averaged(None, normal(5)), torch.ones(5, requires_grad=True)
    loss = (kernel.mains[0] * leaf).sum()
    kernel.kernel(normal(5, seed=2), 0.5, 1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_an_optimizer_skips_by_the_kernel_what_is_not_finite(on_cpu):
    model = torch.nn.Linear(3, 2)
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = EMAOptimizer(inner, decay=0.5, skip_non_finite=True)
    optimizer._ema.warned.add("export")
    expected = torch.ones(2)  # before the first step
    for bias in (1.0, torch.nan, 3.0):
        model(torch.ones(1, 3)).sum().backward()
        model.bias.data.fill_(bias)
        optimizer.step()
        expected.lerp_(model.bias.detach() if bias == bias else expected, 0.5)
    with pytest.warns(EMAWarning, match=r"NaN or infinite at some update.*: parameter 1"):
        assert torch.equal(optimizer.get_ema_state(model)["bias"], expected)


def trained(name, steps=4):
    torch.manual_seed(0)
    model = torch.nn.Linear(5, 3)
    optimizer = EMAOptimizer(torch.optim.AdamW(model.parameters()), decay=0.9, dtype=name)
    optimizer._ema.warned.add("bfloat16")
    for step in range(steps):
        model(torch.ones(2, 5) * step).square().sum().backward()
        optimizer.step()
    return optimizer.state_dict()["state"]


@each_format
def test_an_optimizer_averages_by_the_kernel(on_cpu, monkeypatch, name):
    launches, launch = [], on_cpu.launch
    monkeypatch.setattr(on_cpu, "launch", lambda *args: launches.append(launch(*args)))
    ours = trained(name)
    made = len(launches)
    monkeypatch.setattr(fused, "_DEVICES", set())
    eager = trained(name)
    assert made == len(launches) >= 4
    for key, entries in eager.items():
        for entry in entries.keys() - {"ema_low"} if name == "float32_compensated" else entries:
            assert torch.equal(ours[key][entry], entries[entry])


@pytest.mark.parametrize(("form", "weights"), [(0, "bf16"), (1, "fp16"), (2, "fp32"), (3, "bf16")])
def test_the_kernel_compiles_for_a_gpu_to_wide_accesses(monkeypatch, tmp_path, form, weights):
    triton = pytest.importorskip("triton", reason="the kernel is Triton's: pip install triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    module = importlib.import_module("ema_optim._arithmetic.kernel")
    kind = triton.language.dtype(weights), True, bool(form % 2), module.ROW, module._STEP
    types = dict(zip(module.update.arg_names, ["*i64", "*fp64", "*i64", "*fp32"], strict=False))
    constants = dict(zip(module.update.arg_names[4:], (form, *kind), strict=True))
    source = ASTSource(module.update, types | dict.fromkeys(constants, "constexpr"), constants)
    options = {"num_warps": module._WARPS, "enable_fp_fusion": False}
    text = triton.compile(source, GPUTarget("cuda", 90, 32), options).asm["ptx"]
    assert all(part in text for part in ("ld.global.v4", "st.global.v4", "fma.rn.f32"))


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("skips", [False, True])
@pytest.mark.parametrize("dtype", WEIGHT_ROWS, ids=str)
@each_format
def test_the_kernel_is_right_on_a_gpu(name, dtype, skips):
    assert fused._is_right(torch.device("cuda", 0), format_by(name), dtype, skips)


@pytest.mark.gpu
@on_gpu
@each_format
def test_a_run_may_move_between_gpu_and_cpu(name):
    values, weights = normal((70, 300), 9), normal((70, 300), 9, seed=2)
    host, device = Averaged(name, values), Averaged(name, [value.cuda() for value in values])
    for number in range(3):
        host.eager(weights, 0.9, number)
        device.kernel([weight.cuda() for weight in weights], 0.9, number)
    rtol = 2.0**-23 if host.mains[0].dtype == torch.float32 else 0.0
    pairs = zip(host.decoded(), device.decoded(), strict=True)
    assert all(torch.allclose(x, y.cpu(), rtol=rtol, atol=0.0) for x, y in pairs)
