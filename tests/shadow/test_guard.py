"""``skip_non_finite``: an element whose weight is NaN or infinite keeps its EMA."""

import math
import warnings

import pytest
import torch

from ema_optim import EMAModel, EMAOptimizer, EMAWarning
from ema_optim._arithmetic import guard

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch's own compiler warns at import
    import torch._inductor.compile_fx

pytestmark = pytest.mark.filterwarnings("ignore:an EMA in bfloat16")

DECAY = 0.75
BAD = (math.nan, math.inf, -math.inf)
FORMATS = (None, torch.float64, "float32_compensated", "float24", torch.bfloat16)
OPTIONS = [(dtype, torch.float32) for dtype in FORMATS] + [(None, torch.bfloat16)]


@pytest.fixture(params=["looks", "never waits"], autouse=True)
def path(request, monkeypatch):
    """The way of a CPU and that of an accelerator, with several runs of tensors."""
    if request.param == "never waits":
        monkeypatch.setattr(guard, "is_read_at_once", lambda device: False)
        monkeypatch.setattr(guard, "scratch_size", lambda device, narrow: 8)


def params_of(dtype=torch.float32):
    torch.manual_seed(0)
    shapes = (3, 5), (2,), (4, 4), ()
    return [torch.nn.Parameter(torch.randn(shape).to(dtype)) for shape in shapes]


def follow(moves, dtype=None, of=torch.float32, **options):
    """The EMA after steps that write the given weights."""
    params = params_of(of)
    optimizer = EMAOptimizer(torch.optim.SGD(params, lr=0.0), DECAY, dtype=dtype, **options)
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(1))], "lr": 1.0})
    for weights in moves:
        with torch.no_grad():
            for param, new in zip(params, weights, strict=True):
                param.copy_(new)
        optimizer.step()
    return optimizer, params


def moves_of(count, seed=1):
    torch.manual_seed(seed)
    return [[torch.randn_like(p) for p in params_of()] for _ in range(count)]


def kept(optimizer, params):
    return [{**optimizer.state[p]} for p in params]


def same(ours, theirs):
    keys = ("ema", "ema_low", "ema_step")
    pairs = [(a[k], b[k]) for a, b in zip(ours, theirs, strict=True) for k in keys if k in a]
    return all(torch.equal(one, other) for one, other in pairs)


@pytest.mark.parametrize(("dtype", "of"), OPTIONS)
def test_finite_weights_are_averaged_as_ever(dtype, of):
    ours, theirs = (follow(moves_of(4), dtype, of, skip_non_finite=s) for s in (True, False))
    assert same(kept(*ours), kept(*theirs))


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize(("dtype", "of"), OPTIONS)
def test_an_element_with_a_bad_weight_keeps_its_ema_and_the_others_do_not(dtype, of, bad):
    moves = moves_of(3)
    before, all_good = follow(moves[:2], dtype, of), follow(moves, dtype, of)
    moves[2][0][1, 2] = moves[2][3][()] = bad
    after = follow(moves, dtype, of, skip_non_finite=True)
    expected = kept(*all_good)
    for index, place in ((0, (1, 2)), (3, ())):
        for key in ("ema", "ema_low"):
            if key in expected[index]:
                expected[index][key][place] = kept(*before)[index][key][place]
    assert same(kept(*after), expected)


def test_the_ema_is_right_after_a_nan_step_and_a_return_to_good_weights():
    moves = moves_of(6)
    bad = [torch.full_like(weights, math.nan) for weights in moves[0]]
    optimizer, params = follow([*moves[:3], bad, *moves[3:]], skip_non_finite=True)
    expected = [w.double() for w in moves[0]]  # written before the first step
    for weights in moves:
        pairs = zip(expected, weights, strict=True)
        expected = [DECAY * e + (1 - DECAY) * w.double() for e, w in pairs]
    for param, ema in zip(params, expected, strict=True):
        assert torch.allclose(optimizer.state[param]["ema"].double(), ema, rtol=1e-6, atol=1e-7)
        assert optimizer.state[param]["ema_step"] == 7


def spoiled():
    moves = moves_of(8)
    moves[2][1][0] = math.nan
    return follow(moves, skip_non_finite=True)[0]


def swap(optimizer):
    with optimizer.swap_ema_weights():
        pass


@pytest.mark.parametrize("read", [swap, EMAOptimizer.ema_metrics, EMAOptimizer.state_dict])
@pytest.mark.filterwarnings("ignore:the EMA still holds")
def test_whoever_reads_is_told_once_which_weights_were_bad(read):
    optimizer = spoiled()
    with pytest.warns(EMAWarning, match=r"skip_non_finite\): parameter 1\. "):
        read(optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.state_dict()


@pytest.mark.filterwarnings("ignore:the EMA still holds")
def test_nobody_is_told_of_weights_that_were_finite():
    swap(follow(moves_of(8), skip_non_finite=True)[0])


def test_what_was_met_outlives_new_buckets():
    optimizer = spoiled()
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(1))]})
    optimizer.step()
    with pytest.warns(EMAWarning, match="parameter 1"):
        optimizer.state_dict()


def test_a_model_skips_what_is_not_finite():
    model = torch.nn.Linear(2, 2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ema = EMAModel(model, DECAY, skip_non_finite=True)
    with torch.no_grad():
        model.weight.fill_(math.inf)
        model.bias[0] = math.nan
        model.bias[1] += 1.0
    ema.update()
    with pytest.warns(EMAWarning):
        state = ema.get_ema_state()
    assert torch.equal(state["weight"], before["weight"])
    assert state["bias"][0] == before["bias"][0]
    assert state["bias"][1] == torch.lerp(before["bias"][1], model.bias[1], 1 - DECAY)


def test_a_large_tensor_is_a_run_of_its_own(monkeypatch):
    monkeypatch.setattr(guard, "scratch_size", lambda device, narrow: 8)
    sizes = (3, 9, 4, 4, 1)
    runs = list(guard._runs([torch.empty(size) for size in sizes]))
    covered = [sizes[run] for run in runs]
    assert tuple(size for run in covered for size in run) == sizes
    assert all(sum(run) <= 8 or len(run) == 1 for run in covered)


def test_the_flag_is_a_flag():
    with pytest.raises(TypeError, match="skip_non_finite must be True or False, got 1"):
        EMAModel(torch.nn.Linear(1, 1), skip_non_finite=1)


def stepped(compiled):
    """After steps of which the third has a bad gradient and is taken back."""
    params = params_of()
    optimizer = EMAOptimizer(torch.optim.SGD(params, lr=0.1), DECAY, skip_non_finite=True)
    if compiled:
        optimizer.compile(backend="eager")
    for step, grads in enumerate(moves_of(6)):
        before = [p.detach().clone() for p in params]
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad
        params[0].grad[0, 0] = math.nan if step == 2 else 1.0
        optimizer.step()
        if step == 2:
            torch._foreach_copy_([p.detach() for p in params], before)
    return optimizer, params


def test_a_compiled_step_skips_what_is_not_finite():
    (ours, params), theirs = stepped(compiled=True), kept(*stepped(compiled=False))
    assert all(
        torch.allclose(a["ema"], b["ema"], rtol=1e-6, atol=1e-7)
        for a, b in zip(kept(ours, params), theirs, strict=True)
    )
    with pytest.warns(EMAWarning, match="parameter 0"):
        ours.state_dict()
