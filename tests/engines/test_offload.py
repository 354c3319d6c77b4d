"""The EMA in host memory: its five waits in every order, and the whole of it on a late CPU."""

import contextlib
import copy

import pytest
import torch
from interrupts import Interrupt, Run, Tracer
from offloads import Cell, Early, Late, Threaded, World, every_order, on_host
from reference import same, through_file
from torch import nn
from torch.optim import SGD, AdamW

from ema_optim import EMAModel, EMAOptimizer
from ema_optim._arithmetic.formats import FORMATS, format_of
from ema_optim._engines.offload import Offload, decode_across_
from ema_optim.integrations._options import EMAOptions

pytestmark = [
    pytest.mark.filterwarnings("ignore:the EMA still holds"),  # runs of a few steps
    pytest.mark.filterwarnings("ignore:an EMA in bfloat16"),
]


def average(ema, weights):
    ema.value = 0.5 * ema.value + 0.5 * weights[0].value


def host_run(choose, every):
    """What is read of the EMA: in a swap between two updates, and at the end."""
    world = World(choose)
    offload, weight, ema, seen = Offload(world), Cell(), Cell(), []
    staging = offload.staging()
    staging.tensors.append(Cell())
    for step in range(1, 2 * every + 1):
        offload.before_write()
        world.write(weight, float(step * step))
        if step % every == 0:
            staging.average([weight], lambda now: average(ema, now))
        if every == 1:
            offload.hold_writes()
        if step == every == 1:
            offload.settle()
            seen.append(ema.value)
            world.write(weight, ema.value)
            world.write(weight, float(step * step))
    offload.settle()
    return [*seen, ema.value]


def expected(every):
    ema, seen = Cell(), []
    for step in range(1, 2 * every + 1):
        if step % every == 0:
            average(ema, [Cell(float(step * step))])
        if step == every == 1:
            seen.append(ema.value)
    return [*seen, ema.value]


def outcomes(every):
    return every_order(lambda choose: host_run(choose, every))


@pytest.mark.parametrize("every", [1, 2])
def test_in_every_order_that_the_waits_allow_the_average_is_the_synchronous_one(every):
    results = list(outcomes(every))
    assert len(results) > 100
    assert all(result == expected(every) for result in results)


WAITS = [name for name in vars(Offload) if "_waits_for_" in name]


def test_there_are_five_waits():
    assert len(WAITS) == 5


@pytest.mark.parametrize("name", WAITS)
def test_every_wait_is_needed(name, monkeypatch):
    monkeypatch.setattr(Offload, name, lambda *args: None)
    wrong = (result != expected(every) for every in (1, 2) for result in outcomes(every))
    assert any(wrong)


def hand_run(choose):
    """What comes of a write by hand while a copy may be under way."""
    world = World(choose)
    offload, weight, ema = Offload(world), Cell(), Cell()
    staging = offload.staging()
    staging.tensors.append(Cell())
    world.write(weight, 1.0)
    staging.average([weight], lambda now: average(ema, now))
    world.write(weight, 7.0)  # nobody has waited
    try:
        offload.settle()
    except RuntimeError:
        return "refused"
    return ema.value


def test_a_write_by_hand_during_a_copy_is_refused_or_harmless_in_every_order():
    assert set(every_order(hand_run)) == {"refused", 0.5}


FORMATS_AND_STRIDES = [(None, 1), (None, 3), *((format, 2) for format in FORMATS)]
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
each_worker = pytest.mark.parametrize("accelerator", [Late, Early, Threaded])


def net(dtype=torch.float32):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 4), nn.Linear(4, 2))
    model[1].weight.data = model[1].weight.data.t().contiguous().t()
    return model.to(dtype)


def move(model, optimizer, steps):
    for step in range(steps):
        optimizer.zero_grad()
        batch = torch.linspace(-1, step + 1, 6).view(2, 3).to(model[0].weight.dtype)
        model(batch).square().sum().backward()
        optimizer.step()


def pair(weights=torch.float32, accelerator=Late, **options):
    """A model on the accelerator with its EMA in host memory, and an ordinary one."""
    models = net(weights), net(weights)
    inner = [AdamW(model.parameters(), lr=0.1) for model in models]
    options = {"decay": 0.5, **options}
    ours = on_host(EMAOptimizer, inner[0], accelerator=accelerator, **options)
    return (models[0], ours), (models[1], EMAOptimizer(inner[1], **options))


def told(model, optimizer):
    """All that a user can read."""
    seen = [optimizer.get_ema_state(model), optimizer.ema_metrics()]
    with optimizer.swap_ema_weights():
        seen += [p.detach().clone() for p in model.parameters()]
        seen.append(optimizer.get_ema_state(model))
    state = optimizer.state_dict()["state"].values()
    return [*seen, [entry["ema"] for entry in state], list(model.state_dict().values())]


@each_worker
@each_dtype
@pytest.mark.parametrize(("format", "every"), FORMATS_AND_STRIDES)
def test_the_ema_in_host_memory_is_the_ordinary_one(dtype, format, every, accelerator):
    runs = pair(dtype, accelerator, dtype=format, update_every=every)
    for steps in (1, 4, 3):
        for model, optimizer in runs:
            move(model, optimizer, steps)
        assert all(slot.host for slot in runs[0][1]._ema.slots.values())
        assert same(*(told(*run) for run in runs))


OPTIONS = [
    {"decay": lambda u: u / (u + 9)},
    {"update_after_step": 3},
    {"skip_non_finite": True},
]


@each_dtype
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: next(iter(options)))
def test_other_options_are_those_of_the_ordinary_one(dtype, options):
    runs = pair(dtype, **options)
    for model, optimizer in runs:
        move(model, optimizer, 7)
    assert same(*(told(*run) for run in runs))


@each_dtype
@pytest.mark.parametrize("swapped", [False, True])
def test_a_run_resumes_bit_for_bit_wherever_its_ema_lies(dtype, swapped):
    (model, ours), (reference, ordinary) = pair(dtype, update_every=2)
    for run in ((model, ours), (reference, ordinary)):
        move(*run, 3)
    if swapped:
        ours.eval()
    saved = through_file({"model": model.state_dict(), "optimizer": ours.state_dict()})
    (again, resumed), _ = pair(dtype, update_every=2)
    again.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    resumed.train()
    for run in ((again, resumed), (reference, ordinary)):
        move(*run, 4)
    assert same(told(again, resumed), told(reference, ordinary))


@each_dtype
def test_checkpoints_are_exchanged_with_runs_that_keep_the_ema_beside_the_weights(dtype):
    runs = pair(dtype)
    for run in runs:
        move(*run, 3)
    saved = [through_file(optimizer.state_dict()) for _, optimizer in runs]
    for (_, optimizer), state in zip(runs, reversed(saved), strict=True):
        optimizer.load_state_dict(state)
    for run in runs:
        move(*run, 3)
    assert same(*(told(*run) for run in runs))


def test_entries_that_an_engine_assigns_stay_in_host_memory():
    (model, ours), reference = pair()
    move(model, ours, 3)
    move(*reference, 3)
    for param in model.parameters():  # as Lightning moves an optimizer to a device
        for key, value in ours.state[param].items():
            ours.state[param][key] = value.clone() if isinstance(value, torch.Tensor) else value
    assert all(slot.host for slot in ours._ema.slots.values())
    move(model, ours, 3)
    move(*reference, 3)
    assert same(told(model, ours), told(*reference))


def test_an_average_of_a_model_is_the_ordinary_one():
    models = net(), net()
    emas = on_host(EMAModel, models[0], decay=0.5), EMAModel(models[1], decay=0.5)
    for model, ema in zip(models, emas, strict=True):
        move(model, SGD(model.parameters(), lr=0.1), 1)
        for _ in range(5):
            move(model, SGD(model.parameters(), lr=0.1), 1)
            ema.update()
    assert same(emas[0].get_ema_state(), emas[1].get_ema_state())
    assert same(emas[0].ema_metrics(), emas[1].ema_metrics())


LOOKS = {
    "find": lambda shadow, param: shadow.find(param),
    "slots": lambda shadow, param: shadow.slots[param],
    "all_slots": lambda shadow, param: shadow.all_slots()[param],
}


@pytest.mark.parametrize("look", LOOKS)
def test_whoever_looks_at_a_slot_finds_every_update_made(look):
    (model, ours), (plain, theirs) = pair(update_every=3)
    move(model, ours, 3)
    move(plain, theirs, 3)
    slot = LOOKS[look](ours._ema, model[2].bias)
    assert torch.equal(slot.ema, theirs.state[plain[2].bias]["ema"])


def test_a_copy_has_every_update_in_it():
    (model, ours), reference = pair(update_every=3)
    move(model, ours, 3)
    move(*reference, 3)
    copied_model, copied = copy.deepcopy((model, ours))
    move(copied_model, copied, 4)
    move(*reference, 4)
    assert same(told(copied_model, copied), told(*reference))


@pytest.mark.parametrize("every", [1, 2])
def test_steps_that_were_made_elsewhere_are_averaged_as_ever(every):
    runs = pair(update_every=every)
    for model, optimizer in runs:
        move(model, optimizer, 1)
        for _ in range(5):
            move(model, optimizer.inner, 1)
            optimizer.update()
    assert same(*(told(*run) for run in runs))


def test_a_swap_parks_the_training_weights_in_the_staging():
    (model, ours), _ = pair()
    move(model, ours, 2)
    with ours.swap_ema_weights():
        assert all(slot.parked is slot.staging for slot in ours._ema.slots.values())


def interrupted_run(*at):
    run, tracer = on_host(Run, torch.bfloat16, accelerator=Early), Tracer(*at)
    with contextlib.suppress(Interrupt):
        tracer.run(run.block)
    return run, tracer.lines


def test_a_swap_that_is_interrupted_at_any_line_loses_nothing():
    lines = interrupted_run()[1]
    for at in range(1, lines + 1, 2):
        run, _ = interrupted_run(at)
        run.block()
        assert run.whole(), at


def test_apply_makes_the_ema_the_weights():
    runs = pair()
    for run in runs:
        move(*run, 3)
        run[1].apply_ema()
        move(*run, 2)
    assert same(*(told(*run) for run in runs))


def test_a_write_by_hand_raises_at_the_next_step_until_a_new_start():
    (model, ours), _ = pair(update_every=2)
    move(model, ours, 2)
    with torch.no_grad():
        model[0].weight.clamp_(-0.1, 0.1)
    for use in (lambda: move(model, ours, 1), ours.state_dict, ours.ema_metrics, ours.eval):
        with pytest.raises(RuntimeError, match="written to between two steps"):
            use()
    ours.reset()
    move(model, ours, 4)
    assert ours.ema_metrics()["ema_updates"] == 2


def test_a_write_by_hand_is_allowed_where_every_step_averages():
    runs = pair()
    for model, optimizer in runs:
        for _ in range(3):
            move(model, optimizer, 1)
            with torch.no_grad():
                model[0].weight.clamp_(-0.1, 0.1)
    assert same(*(told(*run) for run in runs))


class Failing(Threaded):
    def start(self, job):
        def fail():
            raise MemoryError("no room")

        return super().start(fail)


def test_an_error_of_the_worker_is_raised_at_every_later_use_until_a_new_start():
    (model, ours), _ = pair(accelerator=Failing, update_every=2)
    move(model, ours, 2)
    for use in (ours.state_dict, lambda: ours.get_ema_state(model), lambda: move(model, ours, 1)):
        with pytest.raises(RuntimeError, match="MemoryError: no room"):
            use()
    ours.reset()
    move(model, ours, 1)


@pytest.mark.parametrize("format", [format_of(torch.float32), *FORMATS.values()], ids=str)
def test_what_is_read_across_devices_is_what_is_decoded(format):
    shapes = [(3, 5), (600, 700), (0, 2), ()]
    values = [torch.randn(shape) for shape in shapes]
    values[1] = values[1].t()
    mains = [torch.empty_like(value, dtype=format.main) for value in values]
    lows = [torch.empty_like(value, dtype=format.low) for value in values] if format.low else []
    format.encode_(mains, lows, values)
    for dtype in (torch.float32, torch.bfloat16):
        read, decoded = ([torch.empty(v.shape, dtype=dtype) for v in values] for _ in range(2))
        decode_across_(format, read, mains, lows)
        format.decode_(decoded, mains, lows)
        assert same(read, decoded)


def test_on_a_cpu_the_ema_in_host_memory_is_the_ordinary_one_itself():
    models = net(), net()
    for model, device in zip(models, ("cpu", None), strict=True):
        model.ema = EMAOptimizer(AdamW(model.parameters()), 0.5, device=device)
        move(model, model.ema, 3)
        assert not any(slot.host for slot in model.ema._ema.slots.values())
    assert same(*(model.ema.state_dict() for model in models))


class Pinned(Late):
    """An accelerator with one offloading optimizer."""

    def serves(self, tensor):
        return False

    def is_pinned(self, tensor):
        return True


def parameter(tensor):
    return SGD([nn.Parameter(tensor)], lr=0.1)


REFUSED = [
    (lambda: EMAOptimizer(parameter(torch.ones(1)), device="cuda:1"), ValueError, "None .* 'cpu'"),
    (lambda: EMAModel(net(), device=torch.device("meta")), ValueError, "None .* 'cpu'"),
    (lambda: EMAOptimizer(parameter(torch.ones(1)), device=1), TypeError, "got 1"),
    (
        lambda: on_host(EMAOptimizer, parameter(torch.ones(2, dtype=torch.complex64))),
        TypeError,
        "complex64.*leave device out",
    ),
    (
        lambda: on_host(EMAOptimizer, parameter(torch.eye(2).to_sparse())),
        TypeError,
        "sparse_coo.*leave device out",
    ),
    (
        lambda: on_host(EMAOptimizer, SGD([torch.ones(2)], lr=0.1), accelerator=Pinned),
        TypeError,
        "offloaded itself.*EMAModel",
    ),
]


@pytest.mark.parametrize(("build", "error", "message"), REFUSED)
def test_what_cannot_be_in_host_memory_is_refused(build, error, message):
    with pytest.raises(error, match=message):
        build()


def test_a_live_teacher_is_refused_with_the_remedy():
    ema = on_host(EMAModel, net())
    with pytest.raises(RuntimeError, match=r"leave device out.*swap_ema_weights"):
        ema(torch.ones(1, 3))
    with pytest.raises(RuntimeError, match=r"leave device out.*swap_ema_weights"):
        ema.get_ema_state(copy=False)


def test_the_callbacks_hand_the_device_on():
    options = EMAOptions(0.9, device=torch.device("cpu"))
    own = EMAOptimizer(parameter(torch.ones(1)), 0.9)
    assert options.resolved(10)["device"] == "cpu"
    with pytest.raises(ValueError, match="device must be that of the EMAOptimizer"):
        options.check_same(own, 10, "that was passed")
    with pytest.raises(ValueError, match="device must be None"):
        EMAOptions(device="cuda:1")


# Dynamo imports what torch has deprecated.
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method:DeprecationWarning")
def test_a_compiled_step_leaves_the_average_to_the_worker():
    (model, ours), reference = pair()
    compiled = ours._ema
    ours.compile(backend="eager")
    for run in ((model, ours), reference):
        move(*run, 4)
    assert compiled.compiled._traced
    for ema, expected in zip(
        *(o.get_ema_state(m).values() for m, o in ((model, ours), reference)), strict=True
    ):
        torch.testing.assert_close(ema, expected)


def test_a_group_without_an_ema_may_hold_what_cannot_be_in_host_memory():
    complex_ = {"params": [nn.Parameter(torch.ones(2, dtype=torch.complex64))]}
    groups = [{"params": [nn.Parameter(torch.ones(2))]}, {**complex_, "ema_enabled": False}]
    on_host(EMAOptimizer, SGD(groups, lr=0.1))


@each_worker
@each_dtype
@pytest.mark.parametrize("format", [None, *FORMATS])
def test_every_window_in_host_memory_is_the_ordinary_one(dtype, format, accelerator):
    runs = pair(dtype, accelerator, dtype=format, decay={"short": 0.25, "long": 0.5})
    found = []
    for model, optimizer in runs:
        move(model, optimizer, 6)
        for decay in ("long", 0.4):
            which = {"decay": decay, "max_error": 0.5}
            with optimizer.swap_ema_weights(**which):
                found.append([p.detach().clone() for p in model.parameters()])
            found.append(optimizer.get_ema_state(model, **which))
        move(model, optimizer, 3)
        found += [*told(model, optimizer), [e["ema:long"] for e in optimizer.state.values()]]
    half = len(found) // 2
    assert same(found[:half], found[half:])
