"""torchao's low-bit optimizers as the inner one: bit-equal to bare, resumed bit for bit."""

import warnings
from functools import cache

import pytest
import torch
from reference import Reference, same, through_file

from ema_optim import EMAOptimizer, strip_ema_state_dict

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # at import torchao warns of kernels, torch of its own use
    import torch._inductor.compile_fx
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except Exception as error:  # whatever this torch raises where there is none
        pytest.skip(f"no C++ compiler, and torchao compiles: {error}", allow_module_level=True)
    torchao = pytest.importorskip("torchao.optim")
    from torchao.optim.subclass_4bit import OptimState4bit
    from torchao.optim.subclass_8bit import OptimState8bit
    from torchao.optim.subclass_fp8 import OptimStateFp8
    from torchao.prototype.quantized_training import Int8QuantizedTrainingLinearWeight as Int8

STEPS, AT, DECAY = 6, 3, 0.5
SHAPE = (64, 64)  # of 4096 elements: smaller ones have a state of full precision

# Class, options, dtype of the weights, class of the state.
ROWS = {
    "AdamW8bit": (torchao.AdamW8bit, {}, torch.float32, OptimState8bit),
    "AdamW4bit": (torchao.AdamW4bit, {}, torch.float32, OptimState4bit),
    "AdamWFp8": (torchao.AdamWFp8, {}, torch.float32, OptimStateFp8),
    "_AdamW-stochastic": (
        torchao._AdamW,
        {"bf16_stochastic_round": True},
        torch.bfloat16,
        torch.Tensor,
    ),
}


class Run:
    """Two weights in training. The gradients come from a generator of their own."""

    def __init__(self, row, wrap=True, **options):
        cls, kwargs, dtype, _ = ROWS[row]
        torch.manual_seed(0)  # stochastic rounding draws from the global generator
        self.random = torch.Generator().manual_seed(1)
        start = [torch.randn(SHAPE, generator=self.random) for _ in range(2)]
        self.params = [torch.nn.Parameter(value.to(dtype)) for value in start]
        inner = cls(self.params, lr=0.01, **kwargs)
        self.optimizer = EMAOptimizer(inner, DECAY, **options) if wrap else inner
        self.trajectory = []

    def train(self, steps, after_step=lambda: None):
        for _ in range(steps):
            for param in self.params:
                noise = torch.randn(SHAPE, generator=self.random)
                param.grad = param.detach() + noise.to(param.dtype)
            self.optimizer.step()
            after_step()
            self.trajectory.append([param.detach().clone() for param in self.params])
        return self

    def save(self):
        weights = [param.detach() for param in self.params]
        generators = self.random.get_state(), torch.get_rng_state()
        return *through_file([weights, self.optimizer.state_dict()]), generators

    def load(self, weights, state, generators):
        with torch.no_grad():
            torch._foreach_copy_(self.params, weights)
        self.optimizer.load_state_dict(state)
        self.random.set_state(generators[0])
        torch.set_rng_state(generators[1])
        return self


@cache
def bare(row):
    return Run(row, wrap=False).train(STEPS)


@cache
def interrupted(row, dtype=None):
    """A whole run, and what was saved in its middle."""
    run = Run(row, dtype=dtype).train(AT)
    saved = run.save()
    return run.train(STEPS - AT), saved


@pytest.mark.parametrize("row", ROWS)
def test_wrapped_trajectory_equals_bare_trajectory(row):
    wrapped, _ = interrupted(row)
    assert same(wrapped.trajectory, bare(row).trajectory)
    for ours, theirs in zip(wrapped.params, bare(row).params, strict=True):
        state, expected = wrapped.optimizer.inner.state[ours], bare(row).optimizer.state[theirs]
        assert type(expected["exp_avg"]) is ROWS[row][3]
        assert same(plain(state), plain(expected))


def plain(state):
    """The tensors of low-bit state are of subclasses that cannot be compared."""
    return {k: v if type(v) is torch.Tensor else v.dequantize() for k, v in state.items()}


@pytest.mark.parametrize("row", ROWS)
def test_ema_equals_float64_reference(row):
    run = Run(row)
    reference = Reference(run.params, DECAY)
    run.train(STEPS, reference.update)
    for param, expected in zip(run.params, reference.emas, strict=True):
        ema = run.optimizer.state[param]["ema"]
        torch.testing.assert_close(ema.double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [None, "float24"])
@pytest.mark.parametrize("row", ROWS)
def test_resumed_run_equals_uninterrupted_run(row, dtype):
    run, saved = interrupted(row, dtype)
    again = Run(row, dtype=dtype).load(*saved).train(STEPS - AT)
    assert same(again.trajectory, run.trajectory[AT:])
    for ours, theirs in zip(again.params, run.params, strict=True):
        state, expected = again.optimizer.state[ours], run.optimizer.state[theirs]
        assert "ema" in state
        assert same(plain(state), plain(expected))


def test_stochastic_rounding_draws_from_the_global_generator():
    run = Run("_AdamW-stochastic")
    torch.manual_seed(1)
    assert not same(run.train(STEPS).trajectory, bare("_AdamW-stochastic").trajectory)


@pytest.mark.filterwarnings("ignore:the EMA still holds")  # after one step it does
@pytest.mark.parametrize("row", ROWS)
def test_swaps_between_the_steps_change_nothing(row):
    run = Run(row)

    def evaluate():
        before = [param.detach().clone() for param in run.params]
        with run.optimizer.swap_ema_weights():
            assert not same([param.detach() for param in run.params], before)

    run.train(STEPS, evaluate)
    assert same(run.trajectory, bare(row).trajectory)


@pytest.mark.parametrize("row", ROWS)
def test_stripped_checkpoint_trains_on_in_the_bare_optimizer(row):
    run, (weights, state, generators) = interrupted(row)
    again = Run(row, wrap=False).load(weights, strip_ema_state_dict(state), generators)
    assert same(again.train(STEPS - AT).trajectory, run.trajectory[AT:])


def quantized_run(inner, wrap):
    """Int8 weights under an optimizer of torchao's, evaluated after every step where wrapped."""
    torch.manual_seed(0)
    param = torch.nn.Parameter(Int8.from_float(torch.randn(SHAPE)))
    optimizer = inner([param], lr=0.01)
    if wrap:
        optimizer = EMAOptimizer(optimizer, decay=0.0625)
    trajectory = []
    for _ in range(STEPS):
        param.grad = param.dequantize() + torch.randn(SHAPE)
        optimizer.step()
        if wrap:
            with optimizer.swap_ema_weights():
                assert not torch.equal(param.dequantize(), param.grad)
        trajectory.append([param.int_data.clone(), param.scale.clone()])
    return trajectory


@pytest.mark.parametrize("inner", [torchao._AdamW, torchao.AdamW8bit])
def test_quantized_weights_train_as_without_the_wrapper(inner):
    assert same(quantized_run(inner, wrap=True), quantized_run(inner, wrap=False))
