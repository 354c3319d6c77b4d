"""Steps that a scaler may skip are counted when somebody asks: as if each had been read."""

import copy
import io

import pytest
import torch
from reference import same
from torch.utils._python_dispatch import TorchDispatchMode

from ema_optim import EMAOptimizer, warmup_decay
from ema_optim._arithmetic import fused

SKIPPED = [False, True, False, False, True, False, False]
STEADY = {"decay": 0.25}
WINDOWS = {"decay": {"short": 0.25, "long": 0.5}}


class Reads(TorchDispatchMode):
    """Counts what the host reads of a device."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


class Run:
    """A fused inner optimizer under a scaler that skips steps."""

    def __init__(self, **options):
        torch.manual_seed(0)
        self.model = torch.nn.Linear(4, 3)
        params = [{"params": [p]} for p in self.model.parameters()]
        inner = torch.optim.SGD(params, lr=0.1, momentum=0.9, fused=True)
        self.optimizer = EMAOptimizer(inner, **options)
        self.inputs = torch.randn(len(SKIPPED), 2, 4)

    def step(self, number, skipped=None):
        self.optimizer.zero_grad()
        self.model(self.inputs[number]).square().sum().backward()
        self.optimizer.grad_scale = torch.tensor(1.0)
        found = SKIPPED[number] if skipped is None else skipped
        self.optimizer.found_inf = torch.tensor(float(found))
        with Reads() as reads:
            self.optimizer.step()
        del self.optimizer.found_inf, self.optimizer.grad_scale
        return reads.count

    def steps(self, *numbers):
        return [self.step(number) for number in numbers]


@pytest.fixture
def read_each(stood_in, monkeypatch):
    """The same run with a read at every step, in eager mode."""

    def run(*numbers, **options):
        with monkeypatch.context() as patch:
            patch.setattr(fused, "_DEVICES", set())
            made = Run(**options)
            assert all(made.steps(*numbers))
        return made

    return run


READERS = {
    "state_dict": lambda o: o.state_dict()["param_groups"][1]["ema_step"],
    "state": lambda o: int(o.state[o.param_groups[0]["params"][0]]["ema_step"]),
    "metrics": lambda o: {k: v for k, v in o.ema_metrics().items() if k != "ema_distance"},
    "share": lambda o: [s.share for s in o._ema.all_slots().values()],
    "deepcopy": lambda o: copy.deepcopy(o).ema_metrics()["ema_updates"],
    "step": lambda o: o._ema.step,
    "pickle": lambda o: torch.save(o, io.BytesIO()) or o.param_groups[1]["ema_step"],
    "decay": lambda o: o._ema.decay_in_force(),
}


@pytest.mark.parametrize("options", [STEADY, WINDOWS], ids=str)
@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_every_reader_sees_the_counts_of_a_run_that_read_each_step(
    stood_in, read_each, read, options
):
    run, reference = Run(**options), read_each(*range(7), **options)
    assert run.steps(*range(7))[1:] == [0] * 6  # the first one gives birth
    assert read(run.optimizer) == read(reference.optimizer)
    assert same(run.optimizer.state_dict(), reference.optimizer.state_dict())


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_a_read_in_between_changes_nothing(stood_in, read_each, read):
    run, reference = Run(**STEADY), read_each(*range(7), **STEADY)
    run.steps(*range(5))
    read(run.optimizer)
    assert run.steps(5, 6) == [0, 0]
    assert same(run.optimizer.state_dict(), reference.optimizer.state_dict())


@pytest.mark.parametrize(
    "options",
    [
        {"decay": warmup_decay(0.9)},
        {"decay": 0.75, "update_every": 2},
        {"decay": 0.75, "dtype": "float24"},
        {"decay": 0.75, "dtype": torch.float64},
        {"decay": 0.0},
        {"decay": 0.75, "update_after_step": 9},
    ],
    ids=str,
)
def test_where_the_count_matters_each_step_is_read(stood_in, read_each, options):
    run, reference = Run(**options), read_each(*range(5), **options)
    assert all(run.steps(*range(5)))
    assert same(run.optimizer.state_dict(), reference.optimizer.state_dict())


def test_the_kernel_itself_holds_back_what_is_skipped(on_cpu, monkeypatch):
    run = Run(**STEADY)
    assert run.steps(*range(7))[1:] == [0] * 6
    monkeypatch.setattr(fused, "_DEVICES", set())
    reference = Run(**STEADY)
    reference.steps(*range(7))
    assert same(run.optimizer.state_dict(), reference.optimizer.state_dict())


def test_a_compensated_average_is_not_waited_for(stood_in):
    run = Run(decay=0.75, dtype="float32_compensated", update_after_step=1)
    assert run.steps(*range(7))[3:] == [0] * 4
    assert run.optimizer.ema_metrics()["ema_updates"] == 4


def test_a_checkpoint_in_between_goes_on_alike(stood_in, read_each):
    first, second, reference = Run(**STEADY), Run(**STEADY), read_each(*range(7), **STEADY)
    first.steps(*range(5))
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    second.model.load_state_dict(first.model.state_dict())
    second.steps(5, 6)
    assert same(second.optimizer.state_dict(), reference.optimizer.state_dict())


def test_what_waits_is_forgotten_by_a_load(stood_in):
    run = Run(**STEADY)
    run.steps(*range(3))
    kept = copy.deepcopy(run.optimizer.state_dict())
    run.steps(3, 5)
    run.optimizer.load_state_dict(kept)
    assert same(run.optimizer.state_dict()["state"], kept["state"])
    assert run.optimizer.ema_metrics()["ema_updates"] == 2


def changed(optimizer):
    optimizer.param_groups[0]["ema_decay"] = 0.5


def swapped(optimizer):
    with optimizer.swap_ema_weights():
        pass


CHANGES = {
    "decay": changed,
    "swap": swapped,
    "eval": lambda o: (o.eval(), o.train()),
    "unscaled": lambda o: o.step(),
    "reset": lambda o: o.reset(),
    "group": lambda o: o.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))]}),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_steps_count_alike_about_what_changes_between_them(stood_in, monkeypatch, change):
    states = []
    for devices in ({"cpu"}, set()):
        monkeypatch.setattr(fused, "_DEVICES", devices)
        run = Run(**STEADY)
        run.steps(*range(5))
        change(run.optimizer)
        run.steps(5, 6)
        states.append(run.optimizer.state_dict())
    assert same(*states)
    assert int(states[0]["param_groups"][0]["ema_step"]) in (2, 5, 6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("overflow", [False, True])
def test_no_step_under_a_scaler_waits_for_a_gpu(overflow):
    model = torch.nn.Linear(8, 8, device="cuda")
    inner = torch.optim.AdamW(model.parameters(), fused=True)
    optimizer, scaler = EMAOptimizer(inner, **STEADY), torch.amp.GradScaler("cuda")
    for number in range(6):
        torch.cuda.set_sync_debug_mode("error" if number > 1 else "default")
        loss = model(torch.ones(4, 8, device="cuda")).sum()
        scaler.scale(loss * torch.inf if overflow and number == 4 else loss).backward()
        try:
            scaler.step(optimizer)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        scaler.update()
        optimizer.zero_grad()
    assert optimizer.ema_metrics()["ema_updates"] == 6 - overflow
