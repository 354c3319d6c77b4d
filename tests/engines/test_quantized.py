"""torchao's int8 training: parameters of codes and scales, an EMA of plain tensors."""

import copy
import warnings

import pytest
import torch
from ranks import on_ranks
from reference import Reference, same, through_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from ema_optim import EMAModel, EMAOptimizer, strip_ema_state_dict
from ema_optim._shadow.slots import read_

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torchao warns at import of the kernels it lacks
    training = pytest.importorskip("torchao.prototype.quantized_training")
    from torchao.quantization import quantize_

Int8 = training.Int8QuantizedTrainingLinearWeight
DTYPES = [torch.float32, torch.bfloat16]
OPTIMIZERS = {
    "SGD": lambda params: torch.optim.SGD(params, lr=0.05),
    "Adam": lambda params: torch.optim.Adam(params, lr=0.01),
}
STEPS, AT, DECAY = 8, 4, 0.25


def quantized_model(dtype=torch.float32):
    layers = torch.nn.Linear(16, 12), torch.nn.Tanh(), torch.nn.Linear(12, 4)
    model = torch.nn.Sequential(*layers).to(dtype)
    quantize_(model, training.int8_weight_only_quantized_training())
    return model


class Run:
    """A small quantized model in training; its updates are rounded by the global generator."""

    def __init__(self, dtype=torch.float32, optimizer="SGD", seed=0, wrap=True, **options):
        torch.manual_seed(seed)
        self.model = quantized_model(dtype)
        self.random = torch.Generator().manual_seed(1)
        inner = OPTIMIZERS[optimizer](self.model.parameters())
        options = {"decay": DECAY, **options}
        self.optimizer = EMAOptimizer(inner, **options) if wrap else inner
        self.trajectory = []

    @property
    def weight(self):
        return self.model[0].weight

    def train(self, steps, after_step=lambda: None):
        for _ in range(steps):
            batch = torch.randn(8, 16, generator=self.random).to(self.weight.dtype)
            self.optimizer.zero_grad()
            self.model(batch).square().sum().backward()
            self.optimizer.step()
            after_step()
            self.trajectory.append(plain(self.model.state_dict()))
        return self

    def save(self):
        generators = self.random.get_state(), torch.get_rng_state()
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        return through_file(state, Int8), generators

    def load(self, state, generators):
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.random.set_state(generators[0])
        torch.set_rng_state(generators[1])
        return self


def plain(value):
    """The same with codes and scales in place of quantized tensors, copied."""
    if isinstance(value, Int8):
        return value.int_data.clone(), value.scale.clone()
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: plain(entry) for key, entry in value.items()}
    return [plain(entry) for entry in value] if isinstance(value, (list, tuple)) else value


def dense(params):
    return [p.detach().dequantize() if isinstance(p, Int8) else p.detach() for p in params]


class Dense:
    """Parameters to the reference: dequantized whenever they are looked at."""

    def __init__(self, params):
        self.params = list(params)

    def __iter__(self):
        return iter(dense(self.params))

    def __len__(self):
        return len(self.params)


def reference_of(run):
    reference = Reference(dense(run.model.parameters()), run.optimizer._ema.decay)
    reference.params = Dense(run.model.parameters())
    return reference


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_trajectory_equals_the_bare_one_with_a_swap_after_every_step(optimizer, dtype):
    run = Run(dtype, optimizer, decay=0.0625)
    batch = torch.ones(2, 16, dtype=dtype)

    def evaluate():
        with torch.no_grad(), run.optimizer.swap_ema_weights():
            run.model(batch)

    run.train(STEPS, evaluate)
    drawn = torch.get_rng_state()
    bare = Run(dtype, optimizer, wrap=False).train(STEPS)
    assert same(run.trajectory, bare.trajectory)
    assert torch.equal(drawn, torch.get_rng_state())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("every", [1, 2])
def test_ema_equals_float64_reference_of_the_dequantized_weights(dtype, every):
    run = Run(dtype, update_every=every)
    reference = reference_of(run)
    reference.every = every
    run.train(STEPS, reference.update)
    state = run.optimizer.get_ema_state(run.model)
    for ema, expected in zip(state.values(), reference.emas, strict=True):
        assert type(ema) is torch.Tensor
        assert ema.dtype == torch.float32
        torch.testing.assert_close(ema.double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("dtype", "bound"),
    [("float32_compensated", 1e-6), ("float24", 1e-4), (torch.float64, 1e-12)],
    ids=str,
)
def test_ema_of_a_storage_format_equals_the_reference(dtype, bound):
    run = Run()
    run.optimizer = EMAOptimizer(run.optimizer.inner, DECAY, dtype=dtype)
    reference = reference_of(run)
    run.train(STEPS, reference.update)
    state = run.optimizer.get_ema_state(run.model)
    for ema, expected in zip(state.values(), reference.emas, strict=True):
        torch.testing.assert_close(ema.double(), expected, rtol=bound, atol=bound)


def rounding(weight):
    """The distance between two values that the codes of a row can hold."""
    return weight.scale.float().view(-1, 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ema_is_swapped_in_within_one_rounding_and_codes_come_back_exactly(dtype):
    run = Run(dtype).train(STEPS)
    before, drawn = plain(run.model.state_dict()), torch.get_rng_state()
    ema = run.optimizer.get_ema_state(run.model)["0.weight"]
    with run.optimizer.swap_ema_weights():
        gap = (run.weight.dequantize().float() - ema).abs()
        # A scale in bf16 is itself off by 2**-9, of up to 127 steps.
        assert (gap <= rounding(run.weight) * (1.0 if dtype is torch.float32 else 1.5)).all()
        assert not same(plain(run.model.state_dict()), before)
        assert torch.equal(run.optimizer.get_ema_state(run.model)["0.weight"], ema)
    assert same(plain(run.model.state_dict()), before)
    assert torch.equal(torch.get_rng_state(), drawn)


def test_every_swap_rounds_alike():
    run = Run().train(STEPS)
    seen = []
    for seed in range(2):
        torch.manual_seed(seed)
        with run.optimizer.swap_ema_weights():
            seen.append(plain(run.model.state_dict()))
    assert same(*seen)


def test_addresses_stay_and_a_swap_before_backward_raises():
    run = Run().train(STEPS)
    parts = run.weight.int_data, run.weight.scale
    loss = run.model(torch.ones(2, 16)).sum()
    with run.optimizer.swap_ema_weights():
        assert parts[0] is run.weight.int_data
        assert parts[1] is run.weight.scale
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_error_half_way_into_a_swap_changes_nothing(monkeypatch):
    run = Run().train(STEPS)
    before = plain(run.model.state_dict())

    def fail(*arguments):
        read_(*arguments)
        assert not same(plain(run.model.state_dict()), before)
        raise KeyboardInterrupt

    monkeypatch.setattr("ema_optim._shadow.swap_state.read_", fail)
    with pytest.raises(KeyboardInterrupt):
        run.optimizer.eval()
    monkeypatch.undo()
    assert same(plain(run.model.state_dict()), before)
    assert not run.optimizer.swapped


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("entrance", ["plain", "eval", "block"])
def test_resumed_run_equals_uninterrupted_whenever_it_was_saved(dtype, entrance):
    run = Run(dtype, "Adam").train(AT)
    if entrance == "eval":
        run.optimizer.eval()
    with run.optimizer.swap_ema_weights(entrance == "block"):
        saved = run.save()
    run.optimizer.train()
    again = Run(dtype, "Adam", seed=9).load(*saved)
    again.optimizer.train()  # puts the training weights back where it was saved while swapped
    again.train(STEPS - AT)
    torch.set_rng_state(saved[1][1])
    run.train(STEPS - AT)
    assert same(again.trajectory, run.trajectory[AT:])
    assert same(plain(again.optimizer.state_dict()), plain(run.optimizer.state_dict()))


@pytest.mark.parametrize("swapped", [False, True])
def test_checkpoint_holds_a_plain_ema_and_the_training_weights_as_they_are(swapped):
    run = Run().train(AT)
    codes, ema = plain(run.weight.detach()), run.optimizer.get_ema_state(run.model)["0.weight"]
    with run.optimizer.swap_ema_weights(swapped):
        entry = run.save()[0]["optimizer"]["state"][0]
    assert same(plain(entry["ema_weights"]), codes)
    assert type(entry["ema"]) is torch.Tensor
    assert torch.equal(entry["ema"], ema)


def test_stripped_checkpoint_holds_nothing_of_ours():
    run, bare = Run(optimizer="Adam").train(AT), Run(optimizer="Adam", wrap=False).train(AT)
    stripped = strip_ema_state_dict(run.optimizer.state_dict())
    assert same(plain(stripped), plain(bare.optimizer.state_dict()))


def test_applied_ema_is_that_of_a_swap_and_stays():
    run = Run().train(STEPS)
    drawn = torch.get_rng_state()
    with run.optimizer.swap_ema_weights():
        swapped_in = plain(run.model.state_dict())
    run.optimizer.apply_ema()
    assert same(plain(run.model.state_dict()), swapped_in)
    assert torch.equal(torch.get_rng_state(), drawn)


def test_ema_state_round_trips_and_model_state_can_be_the_ema():
    run, other = Run().train(STEPS), Run(seed=9).train(1)
    state = run.optimizer.get_ema_state(run.model)
    other.optimizer.load_ema_state(other.model, state)
    assert same(other.optimizer.get_ema_state(other.model), state)
    weights = dict(run.model.named_parameters())
    other.optimizer.load_ema_state(other.model, weights)
    got = other.optimizer.get_ema_state(other.model)
    assert same(list(got.values()), dense(weights.values()))


def test_metrics_measure_the_dequantized_weights_also_inside_a_swap():
    run = Run().train(STEPS)
    emas = run.optimizer.get_ema_state(run.model).values()
    weights = dense(run.model.parameters())
    gap = sum((e - w).double().square().sum() for e, w in zip(emas, weights, strict=True))
    expected = (gap / sum(w.double().square().sum() for w in weights)).sqrt().item()
    assert run.optimizer.ema_metrics()["ema_distance"] == pytest.approx(expected, rel=1e-6)
    with run.optimizer.swap_ema_weights():
        assert run.optimizer.ema_metrics()["ema_distance"] == pytest.approx(expected, rel=1e-6)


def test_before_averaging_begins_the_ema_is_the_dequantized_weights():
    run = Run(update_after_step=STEPS).train(2)
    state = run.optimizer.get_ema_state(run.model)
    assert same(list(state.values()), dense(run.model.parameters()))
    assert run.optimizer.ema_metrics()["ema_distance"] == 0.0


def test_copied_optimizer_trains_on_alike():
    run = Run().train(AT)
    model, optimizer = copy.deepcopy((run.model, run.optimizer))
    again = Run(seed=9)
    again.model, again.optimizer = model, optimizer
    again.random.set_state(run.random.get_state())
    torch.manual_seed(5)
    again.train(STEPS - AT)
    torch.manual_seed(5)
    assert same(again.trajectory, run.train(STEPS - AT).trajectory[AT:])


def test_ema_model_averages_and_restores_them_too():
    run = Run(wrap=False)
    ema = EMAModel(run.model, decay=DECAY)
    run.optimizer = EMAOptimizer(run.optimizer, decay=DECAY)
    run.train(STEPS, ema.update)
    assert same(ema.get_ema_state(), run.optimizer.get_ema_state(run.model))
    before = plain(run.model.state_dict())
    with ema.use_ema():
        assert not same(plain(run.model.state_dict()), before)
    assert same(plain(run.model.state_dict()), before)


def without_copy(monkeypatch):
    monkeypatch.delitem(Int8._ATEN_OP_TABLE[Int8], torch.ops.aten.copy_.default)


def packed(monkeypatch):
    monkeypatch.setattr(Int8, "dequantize", lambda self: self.int_data[:, ::2] * 1.0)


def forgetful(monkeypatch):
    def copy_(func, types, args, kwargs):
        return args[0]

    monkeypatch.setitem(Int8._ATEN_OP_TABLE[Int8], torch.ops.aten.copy_.default, copy_)
    monkeypatch.setattr(Int8, "dequantize", lambda self: torch.rand(self.shape))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without_copy, "attempting to run unimplemented operator"),
        (packed, r"dequantize\(\) gives torch.float32 of shape \(12, 8\)"),
        (forgetful, r"copy_\(\) of a clone changes it"),
    ],
)
def test_quantized_weight_that_would_not_come_back_is_refused_at_birth(
    monkeypatch, damage, message
):
    run = Run()
    before = plain(run.model.state_dict())
    damage(monkeypatch)
    with pytest.raises(TypeError, match=f"{message}.*'ema_enabled': False"):
        run.optimizer.step()
    assert same(plain(run.model.state_dict()), before)


@on_ranks(1)
def test_quantized_weights_that_fsdp2_has_spread_are_refused(world):
    model = quantized_model()
    fully_shard(model, mesh=init_device_mesh("cpu", (world,)))
    optimizer = EMAOptimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(TypeError, match="got a DTensor of Int8QuantizedTrainingLinearWeight"):
        optimizer.step()


def test_quantized_weight_of_a_disabled_group_is_left_alone():
    run = Run()
    run.optimizer.param_groups[0]["ema_enabled"] = False
    run.train(STEPS)
    assert same(run.trajectory, Run(wrap=False).train(STEPS).trajectory)


def test_frozen_quantized_weight_has_no_ema():
    run = Run()
    run.weight.requires_grad_(False)
    run.train(1)
    assert "ema" not in run.optimizer.state[run.weight]
