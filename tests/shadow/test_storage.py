"""Storage formats through everything an EMA goes through."""

import copy

import pytest
import runs
import torch
from reference import Reference, same, through_file, wide
from torch import nn

from ema_optim import EMAModel, EMAOptimizer, strip_ema_state_dict
from ema_optim._arithmetic.formats import Update, format_of
from ema_optim._shadow.options import ema_format
from ema_optim._shadow.slots import stored

DECAY = 0.9
FORMATS = ["float32_compensated", "float24", torch.bfloat16]
# What one stored value may be off from the exact average, relative to the weights.
NEAR = {"float32_compensated": 1e-6, "float24": 2e-4, torch.bfloat16: 3e-2}
formats = pytest.mark.parametrize("format", FORMATS, ids=str)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
pytestmark = [
    pytest.mark.filterwarnings("ignore:an EMA in bfloat16"),
    pytest.mark.filterwarnings("ignore:the EMA still holds"),  # the runs are short
]


class Run(runs.Run):
    def __init__(self, format=None, dtype=torch.float32, seed=0, wrap=True, **options):
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).to(dtype)
        inner = torch.optim.AdamW(self.model.parameters(), lr=0.02)
        options = {"decay": DECAY, "dtype": format, **options}
        self.optimizer = EMAOptimizer(inner, **options) if wrap else inner
        self.dtype = dtype

    def train(self, steps, on_step=lambda: None):
        for step in steps:
            random = torch.Generator().manual_seed(step)
            self.optimizer.zero_grad()
            batch = torch.randn(8, 5, generator=random).to(self.dtype)
            self.model(batch).float().square().mean().backward()
            self.optimizer.step()
            on_step()
        return self

    def kept(self):
        """Every bit of the EMA."""
        return self.optimizer.state_dict()["state"]


@formats
@dtypes
def test_every_format_averages(format, dtype):
    run = Run(format, dtype)
    reference = Reference(run.model.parameters(), DECAY)
    run.train(range(50), reference.update)
    for ema, exact in zip(run.ema().values(), reference.emas, strict=True):
        assert ema.dtype == torch.float32
        assert (wide(ema) - exact).norm() <= NEAR[format] * exact.norm()


@formats
def test_state_is_of_the_formats_own_bytes(format):
    entry = Run(format).train(range(2)).kept()[0]
    stored = ema_format(torch.float32, format)
    assert entry["ema"].dtype == stored.main
    assert ("ema_low" in entry) == (stored.low is not None)
    assert stored.low is None or entry["ema_low"].dtype == stored.low


@formats
@dtypes
def test_training_and_its_random_numbers_are_those_of_the_bare_optimizer(format, dtype):
    runs = []
    for wrap in (False, True):
        run = Run(format, dtype, wrap=wrap).train(range(6))
        runs.append([run.weights(), torch.rand(3)])
    assert same(*runs)


@formats
@dtypes
@pytest.mark.parametrize("swapped", [False, True])
def test_a_resume_goes_on_with_the_very_same_bits(format, dtype, swapped):
    run = Run(format, dtype).train(range(5))
    if swapped:
        run.optimizer.eval()
    saved = through_file([run.model.state_dict(), run.optimizer.state_dict()])
    run.optimizer.train()
    again = Run(format, dtype, seed=9).train(range(2))
    again.model.load_state_dict(saved[0])
    again.optimizer.load_state_dict(saved[1])
    again.optimizer.train()
    for each in (run, again):
        each.train(range(5, 9))
    assert same(again.weights(), run.weights())
    assert same(again.kept(), run.kept())


@formats
@dtypes
def test_a_swap_shows_the_ema_and_gives_every_bit_back(format, dtype):
    run = Run(format, dtype).train(range(5))
    weights, kept, ema = run.weights(), copy.deepcopy(run.kept()), run.ema()
    with run.optimizer.swap_ema_weights():
        for name, value in run.weights().items():
            # Of float24 bf16 shows the main tensor, where a tie is rounded away from zero.
            tie = dtype == torch.bfloat16 and format == "float24"
            shown = ema[name].to(dtype)
            assert torch.allclose(value, shown, rtol=2**-7 if tie else 0.0, atol=0.0)
        assert same(run.ema(), ema)
    assert same(run.weights(), weights)
    assert same(run.kept(), kept)


@formats
@dtypes
def test_apply_makes_the_ema_the_weights(format, dtype):
    run = Run(format, dtype).train(range(5))
    ema = run.ema()
    run.optimizer.apply_ema()
    assert same(run.weights(), {name: value.to(dtype) for name, value in ema.items()})
    assert same(run.ema(), ema)


def exact(entry):
    value = torch.empty_like(entry["ema"], dtype=torch.float64)
    lows = [entry["ema_low"]] if "ema_low" in entry else []
    form = format_of(entry["ema"].dtype, lows[0].dtype if lows else None)
    form.decode_([value], [entry["ema"]], lows)
    return value


ALL = [None, torch.float64, *FORMATS]


@pytest.mark.parametrize("saved", ALL, ids=str)
@pytest.mark.parametrize("loaded", ALL, ids=str)
def test_a_checkpoint_of_one_format_loads_into_another(saved, loaded):
    run, again = Run(saved).train(range(5)), Run(loaded, seed=9)
    again.optimizer.load_state_dict(through_file(run.optimizer.state_dict()))
    again.model.load_state_dict(run.model.state_dict())
    for entry, kept in zip(run.kept().values(), again.kept().values(), strict=True):
        narrow = {torch.bfloat16: 2**-8, "float24": 2**-16, "float32_compensated": 2**-32}
        rtol = narrow.get(loaded, 2**-24)
        assert torch.allclose(exact(kept), exact(entry), rtol=rtol, atol=0)
    again.train(range(5, 7))
    assert again.optimizer.param_groups[0]["ema_step"] == 7


@formats
def test_a_group_may_have_a_format_of_its_own(format):
    run = Run()
    run.optimizer.param_groups[0]["ema_dtype"] = format
    run.train(range(4))
    again = Run(seed=9)
    again.optimizer.load_state_dict(through_file(run.optimizer.state_dict()))
    again.model.load_state_dict(run.model.state_dict())
    for each in (run, again):
        each.train(range(4, 7))
    assert run.kept()[0]["ema"].dtype == ema_format(torch.float32, format).main
    assert same(again.kept(), run.kept())


@formats
def test_a_format_that_is_changed_in_mid_run_takes_the_average_along(format):
    run = Run().train(range(5))
    ema = run.ema()
    run.optimizer.param_groups[0]["ema_dtype"] = format
    run.optimizer.param_groups[0]["ema_decay"] = 1.0  # the step converts, and no more
    run.train([5])
    for name, value in run.ema().items():
        assert torch.allclose(value, ema[name], rtol=NEAR[format], atol=1e-8)
    assert run.kept()[0]["ema"].dtype == ema_format(torch.float32, format).main


def cast(state, change):
    """A checkpoint after a distributed load has cast it to a template of another format."""
    for entry in state["state"].values():
        change(entry)
    return state


def to_plain(entry):
    entry["ema"] = entry["ema"].float()
    entry.pop("ema_low", None)


def to_bfloat16(entry):
    entry["ema"] = entry["ema"].bfloat16()
    entry.pop("ema_low", None)


def to_float24(entry):
    entry["ema"] = entry["ema"].bfloat16()
    entry["ema_low"] = torch.zeros(entry["ema"].shape, dtype=torch.int8)


@pytest.mark.parametrize(
    ("format", "change"),
    [
        ("float24", to_plain),
        ("float24", to_bfloat16),
        ("float32_compensated", to_plain),
        (torch.bfloat16, to_plain),
        (None, to_bfloat16),
        (None, to_float24),
    ],
)
def test_an_ema_cast_by_a_distributed_load_is_refused(format, change):
    run, again = Run(format).train(range(3)), Run(format, seed=9).train(range(2))
    before = copy.deepcopy(again.kept())
    with pytest.raises(ValueError, match=r"ema of .* must be as it was saved"):
        again.optimizer.load_state_dict(cast(copy.deepcopy(run.optimizer.state_dict()), change))
    assert same(again.kept(), before)


@formats
def test_stripped_of_every_format_the_bare_optimizer_loads(format):
    run, bare = Run(format).train(range(4)), Run(wrap=False, seed=9)
    bare.model.load_state_dict(run.model.state_dict())
    state = strip_ema_state_dict(through_file(run.optimizer.state_dict()))
    bare.optimizer.load_state_dict(state)
    assert not any("ema" in key for key in bare.optimizer.param_groups[0])
    for each in (run, bare):
        each.train(range(4, 6))
    assert same(bare.weights(), run.weights())


@formats
@pytest.mark.parametrize("after", [0, 2])
def test_ema_model_takes_every_format(format, after):
    run = Run(wrap=False)
    ema = EMAModel(run.model, DECAY, dtype=format, update_after_step=after)
    reference = Reference(run.model.parameters(), DECAY, update_after_step=after)
    run.train(range(8), lambda: (ema.update(), reference.update()))
    again = EMAModel(run.model, DECAY, dtype=format, update_after_step=after)
    again.load_state_dict(through_file(ema.state_dict()))
    assert same(again.state_dict(), ema.state_dict())
    for value, exact in zip(ema.get_ema_state().values(), reference.emas, strict=True):
        assert (wide(value) - exact).norm() <= NEAR[format] * exact.norm()


@formats
def test_loaded_ema_weights_are_kept_in_the_format(format):
    run = Run(format).train(range(2))
    given = {name: torch.randn_like(value) for name, value in run.weights().items()}
    run.optimizer.load_ema_state(run.model, given)
    for name, value in run.ema().items():
        assert torch.allclose(value, given[name], rtol=2**-8, atol=0)


@formats
def test_metrics_and_pickles_know_every_format(format):
    run = Run(format).train(range(5))
    exact = Run().train(range(5)).optimizer.ema_metrics()
    assert run.optimizer.ema_metrics() == pytest.approx(exact, rel=0.1)
    model, optimizer = copy.deepcopy((run.model, run.optimizer))
    assert same(optimizer.state_dict(), run.optimizer.state_dict())
    assert same(optimizer.get_ema_state(model), run.ema())


def test_a_complex_parameter_keeps_its_own_format():
    param = nn.Parameter(torch.randn(4, dtype=torch.complex64))
    optimizer = EMAOptimizer(torch.optim.SGD([param], lr=0.1), DECAY, dtype="float24")
    param.grad = torch.ones_like(param)
    optimizer.step()
    assert optimizer.state[param]["ema"].dtype == torch.complex64


@pytest.mark.filterwarnings("default:an EMA in bfloat16")
def test_bfloat16_warns_once_of_a_decayed_learning_rate():
    run = Run(torch.bfloat16)
    with pytest.warns(UserWarning, match="learning rate is decayed"):
        run.train([0])
    run.train(range(1, 3))  # a second warning would be an error


@formats
def test_a_weight_that_is_not_a_number_is_reported(format):
    run = Run(format).train(range(2))
    with torch.no_grad():
        run.model[0].weight.view(-1)[0] = float("nan")
    run.train([2])
    with pytest.warns(UserWarning, match="NaN"), run.optimizer.swap_ema_weights():
        pass


def parts(param, format):
    main, low = stored(param, param, ema_format(torch.float32, format))
    return [main], [] if low is None else [low]


@formats
def test_the_step_and_the_position_in_the_model_decide_on_every_bit(format):
    params = [nn.Parameter(torch.randn(shape)) for shape in [(5, 3), (4,), (2, 2)]]
    params[1].requires_grad_(False)  # a frozen one keeps its place in the numbering
    optimizer = EMAOptimizer(torch.optim.SGD(params, lr=0.1), DECAY, dtype=format)
    expected = {i: parts(params[i], format) for i in (0, 2)}
    for step in range(3):
        for i in expected:
            params[i].grad = torch.randn_like(params[i])
        optimizer.step()
        for i, (mains, lows) in expected.items():
            form = format_of(mains[0].dtype, lows[0].dtype if lows else None)
            update = Update(DECAY, step, [(0, 15, 19)[i]])
            form.update_(mains, lows, [params[i].detach()], update)
            kept = optimizer.state[params[i]]
            assert torch.equal(kept["ema"], mains[0])
            assert not lows or torch.equal(kept["ema_low"], lows[0])
