"""A live teacher: ``ema(x)``, and the EMA tensors themselves from ``get_ema_state(copy=False)``."""

import copy

import pytest
import torch
from measured import peak_allocation
from ranks import on_ranks
from reference import same
from sharded import batch as sharded_batch
from sharded import sharded_model
from torch import nn
from torch.func import functional_call
from torch.optim import SGD
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ema_optim import EMAModel, EMAOptimizer

pytestmark = pytest.mark.filterwarnings("ignore:the EMA still holds")
DECAY = 0.9
BATCH = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    """A tied weight, a frozen one, running statistics and dropout; keywords in the forward."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.drop = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.1)
        self.tied, self.frozen = nn.Linear(4, 4, bias=False), nn.Linear(4, 2).requires_grad_(False)
        self.tied.weight = self.first.weight

    def forward(self, batch, *, scale=1.0):
        return scale * self.frozen(self.tied(self.drop(self.norm(self.first(batch)))))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.cells, self.head = nn.LSTM(4, 5, num_layers=2), nn.Linear(5, 2)

    def forward(self, batch):
        return self.head(self.cells(batch)[0])


def attention():
    return nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0)


def spectral():
    layer = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4))
    return nn.Sequential(layer, nn.utils.spectral_norm(nn.Linear(4, 2)))


def compiled_in_place():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    model.compile(backend="eager")
    return model


def compiled():
    return torch.compile(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), backend="eager")


def wrapped():
    return nn.DataParallel(nn.Sequential(nn.Linear(4, 4), nn.ReLU()))


def compiled_wrapped():
    return torch.compile(nn.DataParallel(nn.Linear(4, 2)), backend="eager")


def checkpointed():
    class Checkpointed(nn.Linear):
        def forward(self, batch):
            run = torch.utils.checkpoint.checkpoint
            return run(super().forward, batch, use_reentrant=False)

    return nn.Sequential(Checkpointed(4, 4), nn.ReLU())


MODELS = [
    *(Net, Recurrent, attention, spectral, compiled, compiled_in_place, wrapped, checkpointed),
    compiled_wrapped,
]
each_model = pytest.mark.parametrize("build", MODELS)


def trained(build, steps=3, weights=torch.float32, **options):
    """A model away from its EMA."""
    torch.manual_seed(0)
    model = build().to(weights)
    ema = EMAModel(model, DECAY, **options)
    for _ in range(steps):
        move(model)
        ema.update()
    return model, ema


@torch.no_grad()
def move(model):
    for param in model.parameters():
        param += 0.3 * torch.randn_like(param)


def seeded(function, *args, **kwargs):
    """With the same dropout."""
    torch.manual_seed(7)
    return function(*args, **kwargs)


def swapped(ema, model, *args, **kwargs):
    with torch.no_grad(), ema.use_ema():
        return seeded(model, *args, **kwargs)


def everything(model):
    """What a student is: its tensors, their versions and who they are."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    values = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    known = {name: (id(tensor), tensor._version) for name, tensor in tensors.items()}
    return values, known


@each_model
@pytest.mark.parametrize("training", [True, False])
def test_the_teacher_is_the_forward_inside_a_swap(build, training):
    model, ema = trained(build)
    model.train(training)
    for _ in range(2):
        expected = swapped(ema, model, BATCH)
        with torch.no_grad():  # a recurrent forward rounds otherwise under it
            got, student = seeded(ema, BATCH), seeded(model, BATCH)
        assert torch.equal(got, expected)
        assert not torch.equal(got, student)
        assert not ema(BATCH).requires_grad
        move(model)
        ema.update()


def test_the_teacher_is_torchs_averaged_model_at_every_step():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(DECAY))
    ema = EMAModel(model, DECAY, update_after_step=1)
    for _ in range(4):
        move(model)
        ema.update()
        averaged.update_parameters(model)
        assert torch.equal(ema(BATCH), averaged(BATCH))


@each_model
def test_a_forward_of_the_teacher_leaves_the_student_as_it_is(build):
    model, ema = trained(build)
    before, averages = everything(model), ema.get_ema_state()
    ema(BATCH)
    after = everything(model)
    assert same(before[0], after[0])
    assert before[1] == after[1]
    assert same(ema.get_ema_state(), averages)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("order", ["teacher, student", "student, teacher"])
def test_the_students_gradients_know_nothing_of_the_teacher(dtype, order):
    def gradients(with_teacher):
        model, ema = trained(Net, weights=dtype)
        loss = 0.0
        for who in order.split(", "):
            if who == "student":
                loss = loss + seeded(model, BATCH.to(dtype)).square().sum()
            elif with_teacher:
                seeded(ema, BATCH.to(dtype))
        loss.backward()
        return [param.grad for param in model.parameters() if param.requires_grad]

    assert same(gradients(True), gradients(False))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("options", [{}, {"dtype": torch.float64}, {"use_buffers": True}])
def test_the_teacher_of_each_dtype_is_the_forward_inside_a_swap(dtype, options):
    model, ema = trained(Net, weights=dtype, **options)
    model.eval()
    got = ema(BATCH.to(dtype), scale=2.0)
    assert torch.equal(got, swapped(ema, model, BATCH.to(dtype), scale=2.0))


# Autocast remembers the casts of leaves that require a gradient, by their tensor.
@pytest.mark.parametrize("who_first", ["student", "teacher"])
def test_under_autocast_neither_sees_the_casts_of_the_other(who_first):
    model, ema = trained(lambda: nn.Linear(4, 2))
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = copy.deepcopy(model)(BATCH), swapped(ema, model, BATCH)
    with torch.autocast("cpu", torch.bfloat16):
        calls = [model, ema] if who_first == "student" else [ema, model]
        first, second = calls[0](BATCH), calls[1](BATCH)
    student, teacher = (first, second) if who_first == "student" else (second, first)
    assert torch.equal(student, ours)
    assert torch.equal(teacher, theirs)


def test_no_weight_is_copied_where_the_dtypes_are_one():
    _model, ema = trained(lambda: nn.Linear(512, 512))
    with torch.no_grad():
        ema(torch.randn(1, 512))
        peak = peak_allocation(lambda: ema(torch.randn(1, 512)))
    assert peak < 512 * 512 * 4 / 8


def test_a_gradient_reaches_the_input_and_no_weight():
    model, ema = trained(Net)
    batch = BATCH.clone().requires_grad_()
    ema(batch).sum().backward()
    assert batch.grad.abs().sum() > 0
    assert all(param.grad is None for param in model.parameters())


@pytest.mark.parametrize("after", [0, 2])
def test_before_averaging_the_teacher_is_the_student(after):
    model, ema = trained(Net, steps=after, update_after_step=after)
    assert torch.equal(seeded(ema, BATCH), seeded(model, BATCH))


def test_inside_a_swap_the_teacher_is_the_models_own_forward():
    model, ema = trained(Net)
    expected = seeded(ema, BATCH)
    with ema.use_ema():
        assert torch.equal(seeded(ema, BATCH), expected)
        model.eval()
        got = ema(BATCH.clone().requires_grad_())
        assert got.requires_grad
        assert torch.equal(got, model(BATCH))


def test_averaged_statistics_are_the_teachers_and_its_forward_moves_none():
    model, ema = trained(Net, use_buffers=True)
    for _ in range(3):
        move(model)
        model(BATCH + 5)
        ema.update()
    kept = ema.get_ema_state()
    ema(BATCH)  # in train mode
    assert same(ema.get_ema_state(), kept)
    model.eval()
    assert torch.equal(ema(BATCH), swapped(ema, model, BATCH))


class Caching(nn.Linear):
    def __init__(self):
        super().__init__(4, 2)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("last", torch.zeros(1))

    def forward(self, batch):
        self.calls += 1
        self.last = batch.detach().clone()
        return super().forward(batch)


def test_what_a_forward_does_to_buffers_is_forgotten():
    model, ema = trained(Caching)
    calls, last = model.calls, model.last
    ema(BATCH)
    assert model.calls is calls
    assert calls == 0
    assert model.last is last
    assert last.shape == (1,)


def test_hooks_of_the_model_see_the_teachers_forward():
    model, ema = trained(lambda: nn.Linear(4, 2))
    seen = []
    handle = model.register_forward_hook(lambda module, args, output: seen.append(module.weight))
    ema(BATCH)
    handle.remove()
    assert torch.equal(seen[0], ema.get_ema_state()["weight"])


def test_a_forward_that_raises_gives_the_parameters_back():
    model, ema = trained(Net)
    before = everything(model)
    with pytest.raises(RuntimeError, match="shapes"):
        ema(torch.randn(2, 3))
    assert before[1] == everything(model)[1]


def test_a_graph_of_the_teacher_goes_stale_with_an_update():
    model, ema = trained(lambda: nn.Linear(4, 2))
    batch = BATCH.clone().requires_grad_()
    output = ema(batch)
    move(model)
    ema.update()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch's own, in tracing
def test_inside_a_compiled_function_the_teacher_follows_the_ema():
    model, ema = trained(lambda: nn.Linear(4, 2))

    @torch.compile(backend="eager")
    def distance(batch):
        return (model(batch) - ema(batch)).square().sum()

    for _ in range(3):
        assert torch.equal(distance(BATCH), (model(BATCH) - ema(BATCH)).square().sum())
        move(model)
        ema.update()


@pytest.mark.filterwarnings("ignore:an EMA in bfloat16")
@pytest.mark.parametrize("dtype", [torch.bfloat16, "float24", "float32_compensated"], ids=str)
def test_an_ema_in_a_narrow_format_is_refused_with_the_way(dtype):
    model, ema = trained(Net, dtype=dtype)
    with pytest.raises(RuntimeError, match=r"narrow storage format.*inside swap_ema_weights"):
        ema(BATCH)
    assert swapped(ema, model, BATCH).shape == (6, 2)


def test_an_ema_in_other_memory_than_the_weights_is_refused():
    _model, ema = trained(lambda: nn.Linear(4, 2))
    for slot in ema._ema.slots.values():
        slot.ema = slot.ema.to("meta")
    with pytest.raises(RuntimeError, match="on the device of the weights"):
        ema(BATCH)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")
def test_a_scripted_module_is_refused():
    ema = EMAModel(torch.jit.script(nn.Linear(4, 2)), DECAY)
    with pytest.raises(RuntimeError, match=r"got a torch.jit.ScriptModule.*get_ema_state\(\)"):
        ema(BATCH)


@on_ranks(2)
def test_sharded_weights_are_refused(world):
    model = sharded_model(world)
    ema, optimizer = EMAModel(model, DECAY), EMAOptimizer(SGD(model.parameters(), lr=0.1), DECAY)
    model(sharded_batch(0))  # the root stays gathered after it
    with pytest.raises(RuntimeError, match="sharded"):
        ema(sharded_batch(0))
    with pytest.raises(RuntimeError, match="sharded"):
        optimizer.get_ema_state(model, copy=False)


@on_ranks(2)
def test_beside_a_data_parallel_student_the_teacher_is_the_bare_forward(world):
    torch.manual_seed(0)
    bare = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    model = nn.parallel.DistributedDataParallel(bare)
    ema, sgd = EMAModel(model, DECAY), SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        student, teacher = model(BATCH), ema(BATCH)
        (student - teacher).square().sum().backward()
        (model(BATCH) - ema(BATCH)).sum().backward()
        sgd.step()
        ema.update()
    assert torch.equal(ema(BATCH), swapped(ema, bare, BATCH))


def stepped(steps=3, build=Net, **options):
    torch.manual_seed(0)
    model = build()
    params = [param for param in model.parameters() if param.requires_grad]
    optimizer = EMAOptimizer(SGD(params, lr=0.1), DECAY, **options)
    for _ in range(steps):
        step(model, optimizer)
    return model, optimizer


def step(model, optimizer):
    optimizer.zero_grad()
    seeded(model, BATCH).square().sum().backward()
    optimizer.step()


def teacher(model, optimizer):
    live = optimizer.get_ema_state(model, copy=False)
    with torch.no_grad():
        return seeded(functional_call, model, live, (BATCH,))


@pytest.mark.parametrize("build", [Net, Recurrent, attention, spectral])
@pytest.mark.parametrize("steps", [0, 1, 3])
def test_the_optimizers_live_tensors_are_the_forward_inside_a_swap(build, steps):
    model, optimizer = stepped(steps, build)
    model.eval()
    expected = swapped(optimizer, model, BATCH)
    assert torch.equal(teacher(model, optimizer), expected)


@pytest.mark.parametrize("options", [{}, {"update_after_step": 2}, {"update_every": 2}])
@pytest.mark.parametrize("taken", [0, 1, 3])
def test_live_tensors_stay_the_ema_through_later_steps(taken, options):
    model, optimizer = stepped(taken, **options)
    live = optimizer.get_ema_state(model, copy=False)
    for _ in range(4):
        step(model, optimizer)
    assert same(live, optimizer.get_ema_state(model))
    assert {id(t) for t in live.values()} == {
        id(t) for t in optimizer.get_ema_state(model, copy=False).values()
    }


def test_live_tensors_of_an_ema_model_stay_the_ema_through_later_updates():
    model, ema = trained(Net, steps=0, use_buffers=True)
    live = ema.get_ema_state(copy=False)
    move(model)
    ema.update()
    assert same(live, ema.get_ema_state())


def test_taking_live_tensors_before_the_first_step_changes_no_run():
    runs = []
    for takes in (True, False):
        model, optimizer = stepped(0)
        if takes:
            optimizer.get_ema_state(model, copy=False)
        for _ in range(3):
            step(model, optimizer)
        runs.append((model.state_dict(), optimizer.get_ema_state(model)))
    assert same(runs[0][0], runs[1][0])
    assert same(runs[0][1], runs[1][1])


def test_inside_a_swap_live_tensors_are_refused():
    model, optimizer = stepped()
    with optimizer.swap_ema_weights(), pytest.raises(RuntimeError, match="leave the block first"):
        optimizer.get_ema_state(model, copy=False)
    optimizer.eval()
    with pytest.raises(RuntimeError, match=r"optimizer.train\(\)"):
        optimizer.get_ema_state(model, copy=False)
    ema = EMAModel(nn.Linear(2, 2))
    with ema.use_ema(), pytest.raises(RuntimeError, match="leave the block first"):
        ema.get_ema_state(copy=False)


def test_live_tensors_of_a_narrow_format_are_refused():
    model, optimizer = stepped(dtype="float24")
    with pytest.raises(RuntimeError, match="narrow storage format"):
        optimizer.get_ema_state(model, copy=False)


def test_live_tensors_on_another_device_are_a_contradiction():
    model, optimizer = stepped()
    with pytest.raises(ValueError, match="device must be None with copy=False, got 'cpu'"):
        optimizer.get_ema_state(model, copy=False, device="cpu")


def test_copies_are_moved_one_by_one_to_the_device():
    model, optimizer = stepped()
    state = optimizer.get_ema_state(model, device="meta")
    assert {tensor.device.type for tensor in state.values()} == {"meta"}
    copies = optimizer.get_ema_state(model, device="cpu")
    live = optimizer.get_ema_state(model, copy=False)
    assert same(copies, live)
    assert all(copies[n].data_ptr() != live[n].data_ptr() for n in live)
