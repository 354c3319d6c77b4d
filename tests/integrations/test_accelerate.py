"""Accelerate: ``accelerator.prepare(model, EMAOptimizer(...), loader)`` and nothing else."""

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from reference import Reference, same, wide
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import ExponentialLR
from torch.utils.data import DataLoader, TensorDataset

from ema_optim import EMAOptimizer

DECAY = 0.2
STEPS = 8
RUNS = {
    "plain": {},
    "accumulation": {"gradient_accumulation_steps": 2},
    "bf16": {"mixed_precision": "bf16"},
    "fp16": {"fp16": True},
}


@pytest.fixture(autouse=True)
def _one_accelerator_at_a_time():
    AcceleratorState._reset_state(reset_partial_state=True)  # its precision is process-wide
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def accelerate(fp16=False, **kwargs):
    accelerator = Accelerator(cpu=True, **kwargs)
    if fp16:  # Accelerate makes no scaler on a CPU
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**15, growth_interval=3)
    return accelerator


class Run:
    """A training loop as Accelerate's users write it."""

    def __init__(self, wrap=True, inner=AdamW, seed=0, dtype=None, **kwargs):
        torch.manual_seed(seed)
        self.accelerator = accelerate(**kwargs)
        model = torch.nn.Sequential(
            torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)
        ).to(dtype)
        self.own = inner(model.parameters(), lr=0.1)
        if wrap:
            self.own = EMAOptimizer(self.own, DECAY)
        rows = torch.linspace(-1, 1, 4 * 4 * STEPS, dtype=dtype).reshape(-1, 4)
        loader = DataLoader(TensorDataset(rows), batch_size=4)
        prepared = self.accelerator.prepare(model, self.own, loader, ExponentialLR(self.own, 0.9))
        self.model, self.optimizer, self.loader, self.scheduler = prepared
        self.reference = Reference(model.parameters(), DECAY)

    def train(self, first=0, last=STEPS, overflow_at=None):
        for number, (rows,) in enumerate(self.loader):
            if not first <= number < last:
                continue
            with self.accelerator.accumulate(self.model):
                loss = (self.model(rows) - rows.sum(1, keepdim=True)).square().mean()
                loss = loss * (float("inf") if number == overflow_at else 1.0)
                self.accelerator.backward(loss)
                self.optimizer.step()
                if self.accelerator.sync_gradients and not self.optimizer.step_was_skipped:
                    self.reference.update()
                self.scheduler.step()
                self.optimizer.zero_grad()
        return self

    def weights(self):
        return {name: value.clone() for name, value in self.model.state_dict().items()}

    def ema(self):
        return self.own.get_ema_state(self.model)

    def counter(self):
        return self.own.ema_metrics()["ema_updates"]


@pytest.mark.parametrize("inner", [AdamW, SGD])
@pytest.mark.parametrize("kwargs", RUNS.values(), ids=RUNS)
def test_trajectory_equals_that_of_the_bare_optimizer(kwargs, inner):
    weights = [Run(wrap, inner, **kwargs).train().weights() for wrap in (False, True)]
    assert same(*weights)


@pytest.mark.parametrize("kwargs", RUNS.values(), ids=RUNS)
def test_ema_equals_the_float64_reference(kwargs):
    run = Run(**kwargs).train()
    emas = map(wide, run.ema().values())
    torch.testing.assert_close(list(emas), run.reference.emas, rtol=1e-6, atol=1e-7)


def test_ema_of_bf16_weights_is_fp32_and_equals_the_float64_reference():
    run = Run(dtype=torch.bfloat16).train()
    assert {ema.dtype for ema in run.ema().values()} == {torch.float32}
    emas = map(wide, run.ema().values())
    torch.testing.assert_close(list(emas), run.reference.emas, rtol=1e-6, atol=1e-7)


def test_counter_counts_optimizer_steps_under_accumulation():
    assert Run(gradient_accumulation_steps=4).train().counter() == STEPS / 4


@pytest.mark.parametrize("fused", [False, True])
def test_step_skipped_by_the_scaler_neither_averages_nor_counts(fused):
    run = Run(inner=lambda params, lr: AdamW(params, lr, fused=fused), fp16=True).train(last=3)
    before = run.ema()
    run.train(3, 4, overflow_at=3)
    assert same(run.ema(), before)
    assert run.counter() == 3
    assert run.accelerator.scaler.get_scale() == 2.0**15  # grown at step 3, halved at step 4


def test_trajectory_through_an_overflow_equals_that_of_the_bare_optimizer():
    weights = [Run(wrap, fp16=True).train(overflow_at=4).weights() for wrap in (False, True)]
    assert same(*weights)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["fp32", "pure-bf16"])
@pytest.mark.parametrize("swapped", [False, True], ids=["training", "swapped"])
@pytest.mark.parametrize("kwargs", RUNS.values(), ids=RUNS)
def test_resumed_run_equals_the_uninterrupted_one(kwargs, swapped, dtype, tmp_path):
    whole = Run(dtype=dtype, **kwargs).train(last=4)
    if swapped:
        whole.optimizer.eval()
    whole.accelerator.save_state(tmp_path)
    whole.optimizer.train()
    whole.train(4)
    resumed = Run(seed=1, dtype=dtype, **kwargs)
    resumed.accelerator.load_state(tmp_path)
    resumed.optimizer.train()
    resumed.train(4)
    assert same(resumed.weights(), whole.weights())
    assert same(resumed.ema(), whole.ema())
    assert resumed.counter() == whole.counter()


def test_state_saved_while_swapped_holds_the_ema_weights_in_the_model_file(tmp_path):
    run = Run().train()
    run.optimizer.eval()
    run.accelerator.save_state(tmp_path, safe_serialization=False)
    saved = torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
    assert same(dict(saved), run.ema())


def test_resume_without_train_after_a_swapped_save_is_refused_at_the_step(tmp_path):
    run = Run().train(last=4)
    run.optimizer.eval()
    run.accelerator.save_state(tmp_path)
    resumed = Run(seed=1)
    resumed.accelerator.load_state(tmp_path)
    with pytest.raises(RuntimeError, match=r"optimizer\.train\(\)"):
        resumed.train(4)


def test_checkpoint_without_an_ema_starts_a_cold_one(tmp_path):
    bare = Run(wrap=False).train(last=4)
    bare.accelerator.save_state(tmp_path)
    resumed = Run(seed=1)
    with pytest.warns(UserWarning, match="the checkpoint holds no EMA"):
        resumed.accelerator.load_state(tmp_path)
    resumed.train(4)
    assert same(resumed.weights(), bare.train(4).weights())
    assert resumed.counter() == 4


def test_prepared_eval_and_train_swap_there_and_back():
    run = Run().train()
    training, ema = run.weights(), run.ema()
    run.optimizer.eval()
    assert run.own.swapped
    assert same(run.weights(), ema)
    run.optimizer.train()
    assert not run.own.swapped
    assert same(run.weights(), training)


def test_own_reference_is_the_prepared_optimizer_and_swaps():
    run = Run().train()
    training, ema = run.weights(), run.ema()
    assert run.optimizer.optimizer is run.own
    assert run.own.param_groups is run.optimizer.param_groups
    with run.own.swap_ema_weights():
        assert same(run.accelerator.get_state_dict(run.model), ema)
    assert same(run.weights(), training)


def test_prepare_takes_nothing_from_a_live_ema():
    run = Run().train(last=4)
    before = run.ema()
    run.optimizer = run.accelerator.prepare(run.own)
    assert same(run.ema(), before)
    assert run.counter() == 4


@pytest.mark.parametrize("kwargs", RUNS.values(), ids=RUNS)
def test_prepared_scheduler_moves_the_rate_of_the_own_reference(kwargs):
    bare, run = Run(wrap=False, **kwargs).train(), Run(**kwargs).train()
    assert run.own.param_groups[0]["lr"] == bare.own.param_groups[0]["lr"] < 0.1
