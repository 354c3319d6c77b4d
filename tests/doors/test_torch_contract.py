"""What torch's own suites ask of an optimizer, of the wrapper: rows of theirs, bare beside wrapped.

The optimizers and their options are torch's rows; every scheduler is made over both.
"""

import copy
import gc
import inspect
import pickle
import warnings
import weakref

import pytest
import torch
from cases import OPTIMIZERS, Problem, optim_db
from reference import same, through_file
from steps import train_alike
from torch.optim import SGD, Adam, AdamW, lr_scheduler
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.optim.swa_utils import SWALR

from ema_optim import EMAOptimizer, strip_ema_state_dict

# SequentialLR of torch 2.6 warns of what it does itself.
pytestmark = pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step")

LEAVES = [case for case in OPTIMIZERS if not case.kwargs.get("differentiable")]
TORCHS = [case for case in LEAVES if case.cls.__module__.startswith("torch.")]
# No copy of torch's LBFGS has its list of parameters; its Adafactor reads "maximize" anyway.
COPYABLE = [case for case in TORCHS if case.cls is not torch.optim.LBFGS]
OLDER = [case for case in TORCHS if case.cls is not torch.optim.Adafactor]
PLAIN_GRADS = [case for case in TORCHS if not (case.closure or case.sparse)]


def wrap(optimizer):
    return EMAOptimizer(optimizer, decay=0.5)


def pair(build):
    """The same optimizer twice, bare and wrapped, over parameters of its own."""
    made = []
    for around in (lambda optimizer: optimizer, wrap):
        torch.manual_seed(0)
        params = [torch.randn(3, 2).requires_grad_(), torch.randn(4).requires_grad_()]
        made.append((params, around(build(params))))
    return made


def numbers(optimizer):
    """What schedulers write into the groups."""
    keys = ("lr", "momentum", "betas", "initial_lr", "max_lr", "min_lr", "weight_decay")
    groups = [{k: g[k] for k in keys if k in g} for g in optimizer.param_groups]
    return copy.deepcopy(groups)


# --- optimizers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("case", COPYABLE, ids=repr)
@pytest.mark.parametrize("clone", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_a_copy_steps_on_as_the_bare_optimizer_does(case, clone):
    problem, bare = Problem(case), Problem(case)
    wrapped, plain = wrap(case.build(problem.params)), case.build(bare.params)
    for _ in range(2):
        problem.step(wrapped)
        bare.step(plain)
    params, other = clone((problem.params, wrapped))
    problem.params = params
    for _ in range(2):
        problem.step(other)
        bare.step(plain)
    assert same([p.detach() for p in params], [p.detach() for p in bare.params])
    assert other.__dict__.keys() == wrapped.__dict__.keys()


@pytest.mark.parametrize("case", OLDER, ids=repr)
def test_a_checkpoint_of_an_older_torch_loads(case):
    problem = Problem(case)
    optimizer = wrap(case.build(problem.params))
    problem.step(optimizer)
    saved = optimizer.state_dict()
    for group in saved["param_groups"]:
        for option in ("maximize", "foreach", "fused", "differentiable", "capturable"):
            group.pop(option, None)
    for entry in saved["state"].values():
        if isinstance(entry.get("step"), torch.Tensor):
            entry["step"] = entry["step"].item()
    optimizer.load_state_dict(saved)
    problem.step(optimizer)
    assert all(int(entry["ema_step"]) == 2 for entry in optimizer.state_dict()["state"].values())


@pytest.mark.parametrize("case", PLAIN_GRADS, ids=repr)
def test_a_step_without_gradients_moves_nothing(case):
    problem = Problem(case)
    optimizer = wrap(case.build(problem.params))
    before = copy.deepcopy(problem.params)
    optimizer.step()
    assert same(problem.params, before)
    assert same([optimizer.state[p]["ema"] for p in problem.params], before)


@pytest.mark.parametrize("case", TORCHS, ids=repr)
def test_groups_defaults_and_signature_are_those_of_the_bare_optimizer(case):
    bare, wrapped = (Problem(case).params for _ in range(2))
    plain = case.cls(bare, **case.kwargs)
    optimizer = EMAOptimizer.for_class(case.cls, decay=0.5)(wrapped, **case.kwargs)
    assert same(optimizer.defaults, plain.defaults)
    own = ("ema_step", "ema_swapped", "ema_format")
    groups = [{k: v for k, v in g.items() if k not in own} for g in optimizer.param_groups]
    assert same([g.keys() for g in groups], [g.keys() for g in plain.param_groups])
    for group, expected in zip(groups, plain.param_groups, strict=True):
        assert all(same(group[k], expected[k]) for k in expected if k != "params")
    assert same(strip_ema_state_dict(optimizer.state_dict()), plain.state_dict())


def wrong_rows():
    for info in optim_db:
        for row in info.optim_error_inputs_func(device="cpu", dtype=torch.float32):
            if row.error_on.name == "CONSTRUCTION_ERROR":
                params = row.optimizer_error_input.params
                if params is None:
                    params = [torch.zeros(2, requires_grad=True)]
                name = f"{info.optim_cls.__name__}-{row.optimizer_error_input.desc}"
                yield pytest.param(
                    info.optim_cls, params, row.optimizer_error_input.kwargs, row, id=name
                )


@pytest.mark.parametrize(("cls", "params", "kwargs", "row"), list(wrong_rows()))
def test_wrong_arguments_raise_what_torch_raises(cls, params, kwargs, row):
    warns = issubclass(row.error_type, Warning)
    expected = pytest.warns if warns else pytest.raises
    with expected(row.error_type, match=row.error_regex):
        EMAOptimizer.for_class(cls)(params, **kwargs)


@pytest.mark.parametrize(
    ("cls", "args"),
    [(SGD, (0.1,)), (SGD, (0.1, 0.9)), (Adam, (0.01, (0.5, 0.9))), (AdamW, (0.01,))],
)
def test_for_class_takes_positional_arguments(cls, args):
    (bare, plain), (wrapped, _) = pair(lambda params: cls(params, *args))
    optimizer = EMAOptimizer.for_class(cls, decay=0.5)(wrapped, *args)
    train_alike(plain, 3)
    train_alike(optimizer, 3)
    assert same([p.detach() for p in wrapped], [p.detach() for p in bare])


@pytest.mark.parametrize("cls", [SGD, Adam, torch.optim.RMSprop, torch.optim.Adagrad])
def test_a_complex_parameter_is_its_two_real_ones(cls):
    whole = torch.randn(4, 3, dtype=torch.complex64, requires_grad=True)
    parts = torch.view_as_real(whole).detach().clone().requires_grad_()
    optimizers = wrap(cls([whole], lr=0.01)), wrap(cls([parts], lr=0.01))
    for _ in range(4):
        whole.grad = torch.randn_like(whole)
        parts.grad = torch.view_as_real(whole.grad).clone()
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(torch.view_as_real(whole.detach()), parts.detach())
    ema, expected = optimizers[0].state[whole]["ema"], optimizers[1].state[parts]["ema"]
    torch.testing.assert_close(torch.view_as_real(ema), expected)


# --- param groups --------------------------------------------------------------------------------


def leaf():
    return torch.ones(2).requires_grad_()


@pytest.mark.parametrize(
    "group",
    [
        lambda: {"params": []},
        lambda: {"params": iter(())},
        lambda: {"params": leaf(), "lr": 0.5},
        lambda: {"params": (p for p in [leaf(), leaf()])},
        lambda: {"params": [leaf()], "momentum": 0.5, "own": "note"},
    ],
)
def test_a_group_that_torch_accepts_is_accepted(group):
    ends = []
    for params, optimizer in pair(lambda params: SGD(params, lr=0.1, momentum=0.9)):
        train_alike(optimizer, 2)
        optimizer.add_param_group(group())
        assert len(optimizer.param_groups) == 2
        members = [*params, *optimizer.param_groups[1]["params"]]
        train_alike(optimizer, 2)
        if isinstance(optimizer, EMAOptimizer):
            optimizer.load_state_dict(through_file(optimizer.state_dict()))
            train_alike(optimizer, 2)
            with optimizer.swap_ema_weights(), optimizer.swap_ema_weights(enabled=False):
                assert optimizer.swapped
        else:
            train_alike(optimizer, 2)
        ends.append([p.detach().clone() for p in members])
    assert same(*ends)


# A rank of ZeRO may hold no parameter: where it raised, the other ranks waited for it.
def test_an_optimizer_without_parameters_does_nothing_until_it_is_given_some():
    optimizer, param = wrap(SGD([{"params": []}], lr=0.1)), leaf()
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    with optimizer.swap_ema_weights():
        assert not optimizer.swapped
    assert optimizer.ema_metrics()["ema_updates"] == 0.0
    optimizer.add_param_group({"params": [param]})
    train_alike(optimizer, 2)
    assert int(optimizer.state[param]["ema_step"]) == 2


@pytest.mark.parametrize(
    "group",
    [
        lambda params: {"params": {leaf()}},
        lambda params: {"params": [params[0]]},
        lambda params: {"params": [leaf() * 2]},
        lambda params: {"params": ["weight"]},
        lambda params: {"params": [("name", leaf())]},
        lambda params: {"params": [("name", leaf()), leaf()]},
        lambda params: [leaf()],
    ],
)
def test_a_group_that_torch_refuses_is_refused_and_changes_nothing(group):
    (bare, plain), (params, optimizer) = pair(lambda params: SGD(params, lr=0.1))
    with pytest.raises((TypeError, ValueError)) as expected:
        plain.add_param_group(group(bare))
    with pytest.raises(type(expected.value)):
        optimizer.add_param_group(group(params))
    assert len(optimizer.param_groups) == 1
    train_alike(optimizer)


def test_named_parameters_keep_their_names_through_groups_and_files():
    model = torch.nn.Linear(2, 2)
    optimizer = wrap(SGD(model.named_parameters(), lr=0.1))
    optimizer.add_param_group({"params": [("late", leaf())]})
    train_alike(optimizer)
    saved = through_file(optimizer.state_dict())
    assert [g["param_names"] for g in saved["param_groups"]] == [["weight", "bias"], ["late"]]
    optimizer.load_state_dict(saved)
    assert [g["param_names"] for g in optimizer.param_groups] == [["weight", "bias"], ["late"]]


# --- schedulers ----------------------------------------------------------------------------------


def sequential(optimizer):
    first = lr_scheduler.ConstantLR(optimizer, factor=0.1, total_iters=3)
    parts = [first, lr_scheduler.ExponentialLR(optimizer, gamma=0.9)]
    return lr_scheduler.SequentialLR(optimizer, parts, milestones=[4])


def chained(optimizer):
    first = lr_scheduler.LinearLR(optimizer, total_iters=4)
    return lr_scheduler.ChainedScheduler([first, lr_scheduler.StepLR(optimizer, 3)], optimizer)


def of(cls, *args, **kwargs):
    return lambda optimizer: cls(optimizer, *args, **kwargs)


SCHEDULERS = {
    "LambdaLR": of(lr_scheduler.LambdaLR, lambda step: 0.95**step),
    "MultiplicativeLR": of(lr_scheduler.MultiplicativeLR, lambda step: 0.95),
    "StepLR": of(lr_scheduler.StepLR, 3),
    "MultiStepLR": of(lr_scheduler.MultiStepLR, [2, 7], gamma=0.5),
    "ConstantLR": of(lr_scheduler.ConstantLR, total_iters=4),
    "LinearLR": of(lr_scheduler.LinearLR, total_iters=4),
    "ExponentialLR": of(lr_scheduler.ExponentialLR, 0.9),
    "SequentialLR": sequential,
    "PolynomialLR": of(lr_scheduler.PolynomialLR, 8, power=0.9),
    "CosineAnnealingLR": of(lr_scheduler.CosineAnnealingLR, 6),
    "ChainedScheduler": chained,
    "ReduceLROnPlateau": of(lr_scheduler.ReduceLROnPlateau, patience=1),
    "CyclicLR": of(lr_scheduler.CyclicLR, 0.01, 0.1, step_size_up=3, mode="triangular2"),
    "CosineAnnealingWarmRestarts": of(lr_scheduler.CosineAnnealingWarmRestarts, 3, T_mult=2),
    "OneCycleLR": of(lr_scheduler.OneCycleLR, 0.1, total_steps=13),
    "SWALR": of(SWALR, 0.02, anneal_epochs=5),
}
each_scheduler = pytest.mark.parametrize("make", SCHEDULERS.values(), ids=SCHEDULERS)
BUILDS = {
    "SGD": lambda params: SGD(params, lr=0.05, momentum=0.9),
    "Adam": lambda params: Adam(
        [{"params": [p], "lr": 0.01 * (i + 1)} for i, p in enumerate(params)]
    ),
    "tensor lr": lambda params: AdamW(params, lr=torch.tensor(0.05), foreach=False),
}
each_build = pytest.mark.parametrize("build", BUILDS.values(), ids=BUILDS)


def test_every_scheduler_of_torch_has_a_row():
    found = inspect.getmembers(lr_scheduler, inspect.isclass)
    names = {n for n, cls in found if issubclass(cls, lr_scheduler.LRScheduler) and n[0] != "_"}
    assert names - SCHEDULERS.keys() == {"LRScheduler"}


def advance(scheduler, step):
    plateau = isinstance(scheduler, lr_scheduler.ReduceLROnPlateau)
    scheduler.step(*([1.0] if plateau else []))


def schedule(params, optimizer, scheduler, steps, start=0):
    seen = []
    for step in range(start, start + steps):
        train_alike(optimizer)
        advance(scheduler, step)
        seen.append((numbers(optimizer), [p.detach().clone() for p in params]))
    return seen


@each_scheduler
@each_build
def test_a_scheduler_over_the_wrapper_does_what_it_does_over_the_bare_optimizer(make, build):
    seen = [schedule(params, o, make(o), 12) for params, o in pair(build)]
    assert same(*seen)


@each_scheduler
def test_a_scheduler_made_before_wrapping_goes_on(make):
    ends = []
    for around in (lambda optimizer: optimizer, wrap):
        (params, inner), _ = pair(BUILDS["SGD"])
        scheduler = make(inner)
        with warnings.catch_warnings():
            # Torch looks at the step of the optimizer it was made over, which the wrapper calls.
            warnings.simplefilter("error")
            warnings.filterwarnings("ignore", "The epoch parameter")  # SequentialLR of torch 2.6
            ends.append(schedule(params, around(inner), scheduler, 12))
    assert same(*ends)


@each_scheduler
@each_build
def test_a_resumed_scheduler_goes_on_as_the_uninterrupted_one(make, build):
    _, (params, optimizer) = pair(build)
    scheduler = make(optimizer)
    schedule(params, optimizer, scheduler, 5)
    weights = [p.detach() for p in params]
    saved = through_file([weights, optimizer.state_dict()]), scheduler.state_dict()
    _, (others, resumed) = pair(build)
    again = make(resumed)
    with torch.no_grad():
        for param, value in zip(others, saved[0][0], strict=True):
            param.copy_(value)
    resumed.load_state_dict(saved[0][1])
    again.load_state_dict(copy.deepcopy(saved[1]))
    expected = schedule(params, optimizer, scheduler, 7, start=5)
    assert same(schedule(others, resumed, again, 7, start=5), expected)
    assert same(resumed.state_dict(), optimizer.state_dict())


def test_a_scheduler_before_the_first_step_is_warned_of_as_torch_does():
    _, (_, optimizer) = pair(BUILDS["SGD"])
    scheduler = lr_scheduler.StepLR(optimizer, 3)
    with pytest.warns(UserWarning, match="how-to-adjust-learning-rate"):
        scheduler.step()
    train_alike(optimizer)
    scheduler.step()  # warnings are errors


def test_a_scheduler_notices_a_step_that_was_overridden():
    _, (_, optimizer) = pair(BUILDS["SGD"])
    scheduler = lr_scheduler.StepLR(optimizer, 3)
    step = optimizer.step
    optimizer.step = lambda *args: step(*args)
    train_alike(optimizer)
    with pytest.warns(UserWarning, match="has been overridden"):
        scheduler.step()


def test_a_scheduler_resumed_without_its_initial_rate_raises_torchs_error():
    _, (_, optimizer) = pair(BUILDS["SGD"])
    with pytest.raises(KeyError, match="'initial_lr' is not specified in param_groups"):
        lr_scheduler.StepLR(optimizer, 3, last_epoch=1)


def test_optimizer_and_scheduler_go_without_the_garbage_collector():
    gc.disable()
    try:
        _, (_, optimizer) = pair(BUILDS["SGD"])
        scheduler = lr_scheduler.LambdaLR(optimizer, float)
        train_alike(optimizer)
        scheduler.step()
        gone = [weakref.ref(o) for o in (optimizer, optimizer.inner, scheduler, optimizer._ema)]
        del optimizer, scheduler
        assert [ref() for ref in gone] == [None] * 4
    finally:
        gc.enable()


# --- gradient scaling ----------------------------------------------------------------------------

IMPLS = [{}, {"foreach": True}, {"fused": True}]


@pytest.mark.parametrize("cls", [SGD, Adam, AdamW, torch.optim.Adagrad])
@pytest.mark.parametrize("impl", IMPLS, ids=str)
@pytest.mark.parametrize("unscale", [False, True])
def test_a_grad_scaler_scales_skips_and_resumes_as_over_the_bare_optimizer(cls, impl, unscale):
    seen = []
    for params, optimizer in pair(lambda params: cls(params, lr=0.01, **impl)):
        scaler = torch.amp.GradScaler("cpu", init_scale=128.0, growth_interval=2)
        for step in range(8):
            optimizer.zero_grad()
            loss = sum((p * (torch.inf if step in (2, 5) else 1.5)).sum() for p in params)
            scaler.scale(loss).backward()
            if unscale:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
            scaler.load_state_dict(scaler.state_dict())
            seen.append((scaler.state_dict(), [p.detach().clone() for p in params]))
    assert same(seen[:8], seen[8:])
    assert {int(optimizer.state[p]["ema_step"]) for p in params} == {6}
    assert not hasattr(optimizer, "grad_scale")
    assert not hasattr(optimizer, "found_inf")


# --- step, hooks and what the profiler sees ------------------------------------------------------


class Recording(SGD):
    """An optimizer whose step takes more than a closure, as apex's and fairscale's do."""

    def step(self, *args, **kwargs):
        self.given = args, kwargs
        super().step()


@pytest.mark.parametrize(
    ("args", "kwargs", "given"),
    [
        ((), {}, ((), {})),
        ((None,), {}, ((), {})),
        ((), {"closure": None}, ((), {})),
        ((abs,), {}, ((abs,), {})),
        ((), {"closure": abs}, ((abs,), {})),
        ((), {"grads": [1], "scale": 2.0}, ((), {"grads": [1], "scale": 2.0})),
        ((None, 3), {"scale": 2.0}, ((None, 3), {"scale": 2.0})),
        ((abs, 3), {}, ((abs, 3), {})),
    ],
)
def test_step_hands_on_what_it_was_given(args, kwargs, given):
    optimizer, seen = wrap(Recording([leaf()], lr=0.1)), []
    optimizer.register_step_pre_hook(lambda o, args, kwargs: seen.append((args, kwargs)))
    optimizer.step(*args, **kwargs)
    assert optimizer.inner.given == given
    assert seen == [((optimizer, *given[0]), given[1])]
    assert optimizer.param_groups[0]["ema_step"] == 1


def test_a_hook_may_replace_the_arguments_of_the_step():
    optimizer = wrap(Recording([leaf()], lr=0.1))
    optimizer.register_step_pre_hook(lambda o, args, kwargs: ((*args, None, 5), {"scale": 1}))
    optimizer.step()
    assert optimizer.inner.given == ((None, 5), {"scale": 1})


def test_a_hook_that_returns_something_else_is_an_error_before_anything_moves():
    _, (params, optimizer) = pair(BUILDS["SGD"])
    optimizer.register_step_pre_hook(lambda o, args, kwargs: args)
    before = copy.deepcopy(params)
    with pytest.raises(RuntimeError, match="must return None or"):
        train_alike(optimizer)
    assert same(params, before)


@pytest.mark.parametrize("compiled", [False, True])
def test_arguments_of_the_step_reach_the_inner_optimizer_of_a_compiled_one_too(compiled):
    optimizer = wrap(Recording([leaf()], lr=0.1))
    if compiled:
        optimizer.compile(backend="eager")
        with pytest.warns(UserWarning, match="more than a closure"):
            optimizer.step(scale=1)
    optimizer.step(scale=2)
    assert optimizer.inner.given == ((), {"scale": 2})


HOOKS = {  # in the documented order, with whom they are handed and what is averaged by then
    "own pre": (lambda o: o.register_step_pre_hook, "EMAOptimizer", 0),
    "global pre": (lambda o: register_optimizer_step_pre_hook, "SGD", 0),
    "inner pre": (lambda o: o.inner.register_step_pre_hook, "SGD", 0),
    "inner post": (lambda o: o.inner.register_step_post_hook, "SGD", 0),
    "global post": (lambda o: register_optimizer_step_post_hook, "SGD", 0),
    "own post": (lambda o: o.register_step_post_hook, "EMAOptimizer", 1),
}


def test_hooks_run_in_the_documented_order():
    order, (_, (_, optimizer)) = [], pair(BUILDS["SGD"])

    def note(name):
        steps = optimizer.param_groups[0]
        return lambda *args: order.append((name, type(args[0]).__name__, steps["ema_step"]))

    handles = [register(optimizer)(note(name)) for name, (register, *_) in HOOKS.items()]
    train_alike(optimizer)
    [handle.remove() for handle in handles]
    assert order == [(name, *expected) for name, (_, *expected) in HOOKS.items()]


def test_hooks_of_the_state_dict_run_around_those_of_the_inner_optimizer():
    order, (_, (_, optimizer)) = [], pair(BUILDS["SGD"])
    train_alike(optimizer)
    for name, owner in (("own", optimizer), ("inner", optimizer.inner)):
        for kind in ("state_dict_pre", "state_dict_post"):
            register = getattr(owner, f"register_{kind}_hook")
            for prepend in (False, True):
                note = f"{name} {kind}{' first' * prepend}"
                register(lambda *args, note=note: order.append(note), prepend=prepend)
    optimizer.state_dict()
    assert order == [
        *("own state_dict_pre first", "own state_dict_pre"),
        *("inner state_dict_pre first", "inner state_dict_pre"),
        *("inner state_dict_post first", "inner state_dict_post"),
        *("own state_dict_post first", "own state_dict_post"),
    ]


def test_the_profiler_sees_what_it_sees_of_the_bare_optimizer():
    seen = []
    for _, optimizer in pair(BUILDS["SGD"]):
        with torch.profiler.profile() as profile:
            train_alike(optimizer, 2)
            optimizer.zero_grad()
        seen.append([e.name for e in profile.events() if e.name.startswith("Optimizer.")])
    assert seen[0] == seen[1]
    assert seen[0].count("Optimizer.step#SGD.step") == 2


# --- what the inner optimizer alone has ----------------------------------------------------------


class Searching(SGD):
    scale = 3.0

    def first_step(self):
        return "searched"


def test_what_the_inner_optimizer_alone_has_is_named_and_not_reached():
    optimizer = wrap(Searching([leaf()], lr=0.1))
    with pytest.raises(AttributeError, match=r"has no attribute 'first_step'.*use \.inner\.first_"):
        optimizer.first_step()
    with pytest.raises(AttributeError, match=r"'nothing'$"):
        optimizer.nothing  # noqa: B018
    assert not hasattr(optimizer, "scale")
    assert getattr(optimizer, "scale", None) is None
    assert optimizer.inner.first_step() == "searched"


@pytest.mark.parametrize("name", ["scale", "first_step", "_opt_called", "__len__", "grad_scale"])
@pytest.mark.parametrize(
    "clone", [lambda o: o, copy.copy, copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))]
)
def test_a_missing_attribute_is_missing_in_copies_too(clone, name):
    optimizer = clone(wrap(Searching([leaf()], lr=0.1)))
    assert not hasattr(optimizer, name)
    assert not hasattr(EMAOptimizer.__new__(EMAOptimizer), name)
