"""EMAOptimizer: the average itself, first steps, closures, hooks and copies."""

import copy
import pickle

import pytest
import torch
from reference import Reference, same
from steps import ema_of, param, train
from torch.optim import SGD, AdamW
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from ema_optim import (
    EMAOptimizer,
    equal_average,
    inverse_gamma_decay,
    power_decay,
    strip_ema_state_dict,
    warmup_decay,
)


class Path(torch.optim.Optimizer):
    """Moves its parameter along a path that is given: weights_t = path(t)."""

    def __init__(self, params, path):
        super().__init__(params, {"lr": 1.0})
        self.path, self.t = path, 0

    def step(self, closure=None):
        self.t += 1
        with torch.no_grad():
            self.param_groups[0]["params"][0].fill_(self.path(self.t))


PATHS = {
    "step": (0.0, lambda t: 1.0),
    "linear": (0.0, lambda t: t / 1000),
    "exponential": (1.0, lambda t: 0.995**t),
    "alternating": (1.0, lambda t: (-1.0) ** t),
}


@pytest.mark.parametrize(
    ("decay", "values"),
    [
        (0.9, (1.000000000000, 0.991000000000, 0.006969156564, 0.052631578947)),
        (0.99, (0.999956828753, 0.901004273953, 0.013198657937, 0.005068079935)),
        (0.999, (0.632304575229, 0.368327729346, 0.457504486999, 0.368011735214)),
        (0.9999, (0.095167106441, 0.048424102692, 0.923071424790, 0.904837652152)),
    ],
)
@pytest.mark.parametrize("path", PATHS)
def test_ema_of_a_path_equals_its_closed_form(decay, values, path):
    start, function = PATHS[path]
    weight = torch.nn.Parameter(torch.tensor(start, dtype=torch.float64))
    optimizer = EMAOptimizer(Path([weight], function), decay)
    for _ in range(1000):
        optimizer.step()
    expected = dict(zip(PATHS, values, strict=True))[path]
    assert ema_of(optimizer, weight).item() == pytest.approx(expected, abs=1e-11)


@pytest.mark.parametrize(
    ("sigma_rel", "every", "expected"),
    [
        (0.05, 1, 0.947789798342),
        (0.10, 1, 0.888607520166),
        (0.05, 10, 0.952141595330),
        (0.10, 10, 0.893042042773),
        (0.05, 100, 0.982958695192),
        (0.10, 100, 0.931539039906),
    ],
)
def test_power_ema_of_a_linear_path_equals_its_closed_form(sigma_rel, every, expected):
    weight = torch.nn.Parameter(torch.tensor(5.0, dtype=torch.float64))
    inner = Path([weight], lambda t: t / 1000)
    optimizer = EMAOptimizer(inner, power_decay(sigma_rel), update_every=every)
    for _ in range(1000):
        optimizer.step()
    assert ema_of(optimizer, weight).item() == pytest.approx(expected, abs=1e-11)


@pytest.mark.parametrize("decay", [0.0, 0.9, 1.0, warmup_decay(0.99), equal_average()], ids=repr)
@pytest.mark.parametrize(("every", "after"), [(1, 0), (3, 0), (1, 4), (4, 5)])
def test_ema_equals_reference_for_strides_starts_and_schedules(decay, every, after):
    params = [param(3, 2, dtype=torch.float64), param(5, dtype=torch.float64)]
    optimizer = EMAOptimizer(
        SGD(params, lr=0.1), decay, update_every=every, update_after_step=after
    )
    reference = Reference(params, decay, every, after)
    for _ in range(15):
        train(optimizer)
        reference.update()
        for i, expected in enumerate(reference.emas):
            ema = optimizer.state_dict()["state"][i]["ema"]
            torch.testing.assert_close(ema, expected, rtol=1e-12, atol=1e-12)


def test_stride_of_k_applies_decay_to_the_power_k():
    weight = torch.nn.Parameter(torch.zeros((), dtype=torch.float64))
    optimizer = EMAOptimizer(Path([weight], lambda t: 1.0), 0.9999, update_every=10)
    for _ in range(10):
        optimizer.step()
    assert 1 - ema_of(optimizer, weight).item() == pytest.approx(0.999000449880, abs=1e-12)


def test_sgd_with_fixed_gradients_has_the_ema_of_a_cooled_down_run():
    # theta_T = theta_0 - sum(lr * g_s), so ema_T = theta_0 - sum(lr * (1 - decay^(T-s+1)) * g_s).
    weight = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = EMAOptimizer(SGD([weight], lr=0.1), 0.9)
    grads = torch.randn(20, 3, dtype=torch.float64)
    for grad in grads:
        weight.grad = grad.clone()
        optimizer.step()
    rates = 0.1 * (1 - 0.9 ** torch.arange(20, 0, -1, dtype=torch.float64))
    torch.testing.assert_close(ema_of(optimizer, weight), 1 - rates @ grads, rtol=0, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_ema_of_narrow_weights_is_fp32_and_moves(dtype):
    # Rounded to nearest in bf16, an EMA at 1.0 never moves: its step 6e-4 is below half an ulp.
    weight = torch.nn.Parameter(torch.ones(8, dtype=dtype))
    optimizer = EMAOptimizer(Path([weight], lambda t: 1.0625), 0.99)
    for _ in range(1000):
        optimizer.step()
    assert ema_of(optimizer, weight).dtype == torch.float32
    assert (ema_of(optimizer, weight) - 1.0625).abs().max() < 1e-3


@pytest.mark.parametrize("decay", [0.999, 0.9999, 0.999999])
def test_constant_weights_are_a_bit_exact_fixed_point(decay):
    # ema * decay + weights * (1 - decay) drifts by 1.7e-4 at 0.9999: the factors miss one.
    weight = param(1000)
    optimizer = EMAOptimizer(SGD([weight], lr=0.0, momentum=0.9), decay)
    optimizer.param_groups[0]["lr"] = 1e-30
    weight.grad = torch.zeros_like(weight)
    for _ in range(500):
        optimizer.step()
    assert torch.equal(ema_of(optimizer, weight), weight)


def test_one_ema_tensor_per_parameter_and_nothing_else():
    params = [param(100, 7), param(11)]
    optimizer = EMAOptimizer(SGD(params, lr=0.1))
    train(optimizer, 3)
    state = optimizer.state_dict()["state"]
    assert [set(entry) for entry in state.values()] == [{"ema", "ema_step"}] * 2
    held = sum(entry["ema"].numel() * entry["ema"].element_size() for entry in state.values())
    assert held == 4 * (700 + 11)


@pytest.mark.parametrize("zero", [0.0, 0, torch.tensor(0.0)], ids=repr)
def test_first_step_with_every_lr_zero_does_not_count(zero):
    # Distributed checkpoints step once with lr 0 before the weights are loaded.
    p = param(3)
    optimizer = EMAOptimizer(SGD([p], lr=0.1, foreach=False), 0.9)
    optimizer.param_groups[0]["lr"] = zero
    train(optimizer)
    assert optimizer.state[p]["ema_step"] == 0
    with torch.no_grad():
        p.fill_(7.0)
    optimizer.param_groups[0]["lr"] = 1e-30
    train(optimizer)
    assert torch.equal(ema_of(optimizer, p), torch.full((3,), 7.0))


@pytest.mark.parametrize("rates", [(0.0, 0.1), (0.0, None)])
def test_first_step_counts_unless_every_lr_is_zero(rates):
    params = [param(3), param(3)]
    optimizer = EMAOptimizer(SGD([{"params": [p]} for p in params], lr=0.1), 0.9)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    optimizer.zero_grad()
    optimizer.step()
    assert optimizer.state[params[0]]["ema_step"] == 1


def test_first_step_in_inference_mode_leaves_ordinary_tensors():
    # An inference tensor refuses every later write outside of inference mode.
    p = param(3)
    optimizer = EMAOptimizer(SGD([p], lr=0.1), 0.5)
    with torch.inference_mode():
        optimizer.step()
    train(optimizer, 2)
    assert not ema_of(optimizer, p).is_inference()


def test_closure_passes_through_once_and_step_returns_its_loss():
    p, calls = param(3), []
    optimizer = EMAOptimizer(SGD([p], lr=0.1))

    def closure():
        calls.append(1)
        p.grad = torch.ones(3)
        return 4.25

    assert optimizer.step(closure) == 4.25
    assert len(calls) == 1


def test_lbfgs_calls_its_closure_as_often_as_bare():
    counts = []
    for wrap in (lambda o: o, EMAOptimizer):
        torch.manual_seed(1)
        p, calls = param(3), []
        optimizer = wrap(torch.optim.LBFGS([p], max_iter=5))

        def closure(p=p, calls=calls):
            calls.append(1)
            p.grad = 2 * p.detach()
            return p.detach().square().sum()

        optimizer.step(closure)
        counts.append(len(calls))
    assert counts[0] == counts[1] > 1


def test_lbfgs_without_a_closure_raises_torchs_own_error():
    with pytest.raises(TypeError, match="closure"):
        EMAOptimizer(torch.optim.LBFGS([param(3)])).step()


def test_every_hook_fires_once():
    p, fired = param(3), []
    optimizer = EMAOptimizer(SGD([p], lr=0.1))
    kinds = ("step_pre", "step_post", "state_dict_pre", "state_dict_post")
    kinds += ("load_state_dict_pre", "load_state_dict_post")
    for owner in (optimizer, optimizer.inner):
        for kind in kinds:
            name = f"{kind}-{'inner' if owner is optimizer.inner else 'outer'}"
            register = getattr(owner, f"register_{kind}_hook")
            register(lambda *args, name=name: fired.append(name))
    train(optimizer)
    optimizer.load_state_dict(optimizer.state_dict())
    assert sorted(fired) == sorted(
        f"{kind}-{side}" for kind in kinds for side in ("inner", "outer")
    )


def test_global_step_hooks_fire_once():
    fired = []
    handles = [
        register_optimizer_step_pre_hook(lambda *args: fired.append("pre")),
        register_optimizer_step_post_hook(lambda *args: fired.append("post")),
    ]
    train(EMAOptimizer(SGD([param(3)], lr=0.1)))
    [handle.remove() for handle in handles]
    assert fired == ["pre", "post"]


def test_hooks_may_replace_what_they_are_given():
    p = param(3)
    optimizer = EMAOptimizer(SGD([p], lr=0.1))
    optimizer.register_step_pre_hook(lambda o, args, kwargs: ((args[0], lambda: 7.0), {}))
    optimizer.register_state_dict_post_hook(lambda o, state: {**state, "note": 1})
    optimizer.register_load_state_dict_pre_hook(lambda o, state: {**state, "state": {}})
    assert optimizer.step() == 7.0
    state = optimizer.state_dict()
    assert state["note"] == 1
    optimizer.load_state_dict(state)
    assert len(optimizer.state) == 0


def test_profiler_shows_one_step():
    optimizer = EMAOptimizer(AdamW([param(3)]))
    with torch.profiler.profile() as profile:
        train(optimizer)
    steps = [e.name for e in profile.events() if e.name.startswith("Optimizer.step#")]
    assert steps == ["Optimizer.step#AdamW.step"]


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
@pytest.mark.parametrize("make", [EMAOptimizer, None])
def test_copy_trains_on_like_the_original(clone, make):
    model = torch.nn.Linear(3, 2)
    if make is None:
        optimizer = EMAOptimizer.for_class(AdamW, decay=warmup_decay(0.9))(model.parameters())
    else:
        optimizer = make(AdamW(model.parameters()), warmup_decay(0.9))
    train(optimizer, 3)
    model2, optimizer2 = clone((model, optimizer))
    for o in (optimizer, optimizer2):
        torch.manual_seed(5)
        train(o, 3)
    assert type(optimizer2).__name__ == type(optimizer).__name__
    assert same(optimizer.state_dict(), optimizer2.state_dict())
    assert optimizer2.param_groups[0]["params"][0] is model2.weight


def test_copy_made_inside_a_swap_gives_its_training_weights_back():
    model = torch.nn.Linear(3, 2)
    optimizer = EMAOptimizer(SGD(model.parameters(), lr=0.1), 0.1)
    train(optimizer, 3)
    weights = model.weight.detach().clone()
    with optimizer.swap_ema_weights():
        model2, optimizer2 = copy.deepcopy((model, optimizer))
    optimizer2.train()
    assert torch.equal(model2.weight, weights)


def test_for_class_is_a_class_that_apis_can_build():
    built = EMAOptimizer.for_class(AdamW, decay=0.5, update_every=2)
    p = param(3)
    optimizer = built([p], lr=0.25, weight_decay=0.0)
    assert issubclass(built, torch.optim.Optimizer)
    assert isinstance(optimizer, EMAOptimizer)
    assert isinstance(optimizer.inner, AdamW)
    assert optimizer.param_groups[0]["lr"] == 0.25
    assert built.__name__ == "EMAAdamW"


def test_external_assignment_of_groups_reaches_the_inner():
    params = [param(3), param(3)]
    optimizer = EMAOptimizer(SGD(params, lr=0.1))
    groups = [{**optimizer.param_groups[0], "params": params[:1]}]
    optimizer.param_groups = groups
    assert optimizer.inner.param_groups is groups
    optimizer.defaults = {"lr": 3.0}
    assert optimizer.inner.defaults == {"lr": 3.0}


def test_repr_shows_settings_and_whether_swapped():
    optimizer = EMAOptimizer(SGD([param(3)], lr=0.1), 0.25, update_every=2)
    train(optimizer, 30)
    with optimizer.swap_ema_weights():
        text = repr(optimizer)
    assert "decay=0.25" in text
    assert "update_every=2" in text
    assert "swapped=True" in text
    assert "swapped=False" in repr(optimizer)


def test_schedule_free_needs_only_its_own_train_and_eval():
    import schedulefree

    p = param(3)
    optimizer = EMAOptimizer(schedulefree.SGDScheduleFree([p], lr=0.1), 0.1)
    optimizer.train()
    train(optimizer, 5)
    training, ema = p.detach().clone(), ema_of(optimizer, p).clone()
    optimizer.eval()
    assert torch.equal(p, ema)
    optimizer.train()
    torch.testing.assert_close(p.detach(), training, rtol=1e-6, atol=1e-6)
    optimizer.inner.eval()
    assert not torch.equal(p, ema)
    optimizer.inner.train()
    torch.testing.assert_close(p.detach(), training, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"decay": 1.5}, ValueError, r"decay must be in \[0, 1\], got 1.5"),
        ({"decay": -0.1}, ValueError, r"decay must be in \[0, 1\], got -0.1"),
        ({"decay": float("nan")}, ValueError, "got nan"),
        ({"decay": "0.9"}, TypeError, "'0.9'"),
        ({"decay": None}, TypeError, "None"),
        ({"decay": True}, TypeError, "True"),
        ({"decay": lambda u: "x"}, TypeError, "'x'"),
        ({"decay": lambda u: 2.0}, ValueError, "2.0"),
        ({"decay": lambda u: None}, TypeError, "None"),
        ({"update_every": 0}, ValueError, "update_every must be at least 1 .* got 0"),
        ({"update_every": 1.5}, TypeError, "update_every must be an int .* got 1.5"),
        ({"update_every": True}, TypeError, "update_every must be an int"),
        ({"update_after_step": -1}, ValueError, "update_after_step must be at least 0 .* got -1"),
        ({"dtype": torch.float16}, ValueError, "stops moving"),
        ({"dtype": torch.int64}, ValueError, "dtype must be one of None, torch.float32"),
        ({"dtype": "fp8"}, ValueError, "dtype must be one of .*, got 'fp8'"),
        ({"dtype": 8}, TypeError, "dtype must be a torch.dtype, a format.s name or None, got 8"),
    ],
)
def test_bad_argument_raises_rule_and_value(kwargs, error, message):
    inner = SGD([param(3)], lr=0.1)
    before = dict(inner.param_groups[0])
    with pytest.raises(error, match=message):
        EMAOptimizer(inner, **kwargs)
    assert inner.param_groups[0] == before


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: SGD, TypeError, "got the class SGD: build it first"),
        (lambda: torch.nn.Linear(2, 2), TypeError, "must be a torch.optim.Optimizer, got"),
        (lambda: EMAOptimizer(SGD([param(2)])), TypeError, "must not be an EMAOptimizer already"),
        (lambda: SGD([{"params": [param(2)], "ema_decay": 2.0}]), ValueError, "got 2.0"),
        (lambda: SGD([{"params": [param(2)], "ema_decay": abs}]), TypeError, "as decay="),
        (lambda: SGD([{"params": [param(2)], "ema_enabled": 1}]), TypeError, "True or False"),
    ],
)
def test_what_cannot_be_wrapped_raises(make, error, message):
    with pytest.raises(error, match=message):
        EMAOptimizer(make())


def test_stripped_state_loads_into_the_bare_optimizer_with_a_param_that_never_had_a_grad():
    params = [param(3), param(3)]
    optimizer = EMAOptimizer(AdamW(params))
    params[0].grad = torch.ones(3)
    optimizer.step()
    AdamW([param(3), param(3)]).load_state_dict(strip_ema_state_dict(optimizer.state_dict()))


@pytest.mark.parametrize(
    "decay", [inverse_gamma_decay(0.99), power_decay(0.1)], ids=["ig", "power"]
)
def test_counters_of_schedules_survive_a_resume(decay):
    def run(interrupt):
        torch.manual_seed(3)
        p = param(4)
        optimizer = EMAOptimizer(SGD([p], lr=0.1), decay, update_every=3, update_after_step=2)
        train(optimizer, 6)
        if interrupt:
            state = copy.deepcopy(optimizer.state_dict())
            optimizer = EMAOptimizer(SGD([p], lr=9.0), decay, update_every=3, update_after_step=2)
            optimizer.load_state_dict(state)
        train(optimizer, 6)
        return optimizer.state_dict()

    assert same(run(interrupt=True), run(interrupt=False))


def test_copy_of_a_for_class_optimizer_is_of_that_class():
    built = EMAOptimizer.for_class(AdamW, decay=0.5)
    assert isinstance(copy.deepcopy(built([param(3)])), built)


def test_step_hooks_get_the_optimizer_in_front_of_the_arguments():
    optimizer, seen = EMAOptimizer(SGD([param(3)], lr=0.1)), []
    optimizer.register_step_pre_hook(lambda o, args, kwargs: seen.append((o, args)))
    optimizer.register_step_post_hook(lambda o, args, kwargs: seen.append((o, args)))
    optimizer.step()
    assert seen == [(optimizer, (optimizer,))] * 2


class KeepsAnEma(SGD):
    def step(self, closure=None):
        super().step(closure)
        for p in self.param_groups[0]["params"]:
            self.state[p]["ema"] = torch.zeros_like(p)


@pytest.mark.parametrize("stepped", [False, True])
def test_inner_with_a_state_key_of_ours_is_refused_before_it_can_be_mixed_up(stepped):
    inner = KeepsAnEma([param(3)], lr=0.1)
    if stepped:
        inner.step()
    with pytest.raises(TypeError, match="KeepsAnEma: use EMAModel"):
        EMAOptimizer(inner).step()
