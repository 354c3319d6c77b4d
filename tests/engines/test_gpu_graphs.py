"""On a card: CUDA graphs, the compiled step, sharded weights and their distributed checkpoints."""

import pytest
import torch
import torch.distributed as dist
from cards import (
    DEVICE,
    ON_CARD,
    backward,
    batch,
    captured,
    gpu,
    net,
    no_synchronisation,
    side_stream,
    train,
    weights_of,
)
from reference import Reference, same
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from ema_optim import EMAModel, EMAOptimizer, warmup_decay

pytestmark = gpu
WARM_UP, REPLAYS = 3, 9
OPTIONS = [
    {"decay": 0.9},
    {"decay": warmup_decay(0.99)},
    {"decay": 0.9, "update_every": 4},
    {"decay": 0.9, "update_every": 2, "update_after_step": 4},
    {"decay": 0.9, "dtype": "float24"},
    {"decay": 0.9, "dtype": torch.bfloat16},
    {"decay": warmup_decay(0.9), "dtype": "float32_compensated"},
]


def capturable(model):
    rate = torch.tensor(1e-3, device=DEVICE) if ON_CARD else 1e-3
    return torch.optim.AdamW(model.parameters(), lr=rate, capturable=ON_CARD)


def gradients(model, scale):
    """Gradients that need no matrix product: those may have other bits in a capture."""
    for param in model.parameters():
        param.grad.copy_(torch.sin(param.detach()) * scale)


def replays(model, inner_step, first_step, after):
    """A few eager steps, a capture, and replays at which the gradients are others."""
    scale = torch.zeros((), device=DEVICE)
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
    with side_stream():
        for number in range(WARM_UP):
            gradients(model, scale.fill_(number + 1.0))
            first_step()

    def whole():
        gradients(model, scale)
        inner_step()

    replay = captured(whole)
    for number in range(WARM_UP, WARM_UP + REPLAYS):
        scale.fill_(number + 1.0)
        replay()
        after()


def eager_run(**options):
    model = net()
    optimizer = EMAOptimizer(capturable(model), **options)
    for number in range(WARM_UP + REPLAYS):
        for param in model.parameters():
            param.grad = torch.zeros_like(param)
        gradients(model, torch.tensor(number + 1.0, device=DEVICE))
        with side_stream():
            optimizer.step()
    return model, optimizer


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_replayed_step_and_update_are_a_step(options):
    (other, eager), model = eager_run(**options), net()
    optimizer = EMAOptimizer(capturable(model), **options)
    replays(model, optimizer.inner.step, optimizer.step, optimizer.update)
    assert same(dict(model.state_dict()), dict(other.state_dict()))
    assert same(optimizer.get_ema_state(model), eager.get_ema_state(other))
    assert optimizer.ema_metrics()["ema_updates"] == eager.ema_metrics()["ema_updates"]


def test_a_replayed_step_and_the_update_of_a_model_are_a_step():
    (other, eager), model = eager_run(decay=warmup_decay(0.9)), net()
    inner, ema = capturable(model), EMAModel(model, warmup_decay(0.9))

    def first_step():
        inner.step()
        ema.update()

    replays(model, inner.step, first_step, ema.update)
    assert same(ema.get_ema_state(), eager.get_ema_state(other))


def test_a_graph_is_valid_after_a_swap():
    (other, eager), model = eager_run(decay=0.9), net()
    optimizer = EMAOptimizer(capturable(model), 0.9)

    def update():
        optimizer.update()
        with optimizer.swap_ema_weights():
            model(batch(0))

    replays(model, optimizer.inner.step, optimizer.step, update)
    assert same(optimizer.get_ema_state(model), eager.get_ema_state(other))


@pytest.mark.skipif(not ON_CARD, reason="a CPU captures nothing")
def test_a_captured_step_raises_and_changes_nothing():
    model = net()
    optimizer = EMAOptimizer(capturable(model), 0.9)
    train(model, optimizer, range(WARM_UP))
    before, emas = weights_of(model), optimizer.get_ema_state(model)
    static = batch(0)

    def whole():
        static.add_(1)  # an empty graph is warned of
        optimizer.step()

    with pytest.raises(RuntimeError, match=r"capture optimizer.inner.step\(\)"):
        captured(whole)
    assert all(map(torch.equal, before, model.parameters()))
    assert same(emas, optimizer.get_ema_state(model))
    train(model, optimizer, [WARM_UP])
    assert optimizer.ema_metrics()["ema_updates"] == WARM_UP + 1


def test_update_never_waits_for_the_card():
    model = net()
    optimizer = EMAOptimizer(capturable(model), warmup_decay(0.9))
    train(model, optimizer, range(2))
    backward(model, batch(2))
    with no_synchronisation():
        optimizer.inner.step()
        optimizer.update()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_the_compiled_step_is_the_eager_one_up_to_rounding(mode):
    pytest.importorskip("triton", reason="Inductor needs Triton on a card")
    counters = pytest.importorskip("torch._dynamo.utils").counters
    results = []
    for compiled in (True, False):
        model = net()
        optimizer = EMAOptimizer(capturable(model), 0.9)
        if compiled:
            optimizer.compile(mode=mode)
        train(model, optimizer, range(6))
        results.append([*optimizer.get_ema_state(model).values(), *model.parameters()])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
    assert not (ON_CARD and counters["inductor"]["cudagraph_skips"])


@pytest.fixture
def mesh():
    backend = "cpu:gloo,cuda:nccl" if ON_CARD else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh(DEVICE, (1,))
    dist.destroy_process_group()


def whole(tensors):
    return [tensor.detach().full_tensor() for tensor in tensors]


MIXED = MixedPrecisionPolicy(param_dtype=torch.bfloat16)


def sharded(mesh, policy):
    model = net()
    for module in [*(m for m in model if isinstance(m, torch.nn.Linear)), model]:
        fully_shard(module, mesh=mesh, **policy)
    return model, EMAOptimizer(torch.optim.AdamW(model.parameters(), lr=1e-3), 0.9)


policies = pytest.mark.parametrize("policy", [{}, {"mp_policy": MIXED}], ids=["fp32", "mixed"])


@policies
def test_sharded_weights_are_averaged(mesh, policy):
    model, optimizer = sharded(mesh, policy)
    reference = Reference(whole(model.parameters()), 0.9)

    def each():
        reference.params = whole(model.parameters())
        reference.update()

    train(model, optimizer, range(8), each)
    emas = whole(optimizer.get_ema_state(model).values())
    for ema, expected in zip(emas, reference.emas, strict=True):
        torch.testing.assert_close(ema.double(), expected, rtol=1e-5, atol=1e-6)


@policies
@pytest.mark.parametrize("full", [False, True], ids=["sharded", "full"])
def test_sharded_weights_are_saved_and_loaded(mesh, policy, full):
    model, optimizer = sharded(mesh, policy)
    train(model, optimizer, range(4))
    options = StateDictOptions(full_state_dict=full, cpu_offload=full)
    state = get_optimizer_state_dict(model, optimizer, options=options)
    other, loaded = sharded(mesh, policy)
    options = StateDictOptions(full_state_dict=full)
    set_optimizer_state_dict(other, loaded, state, options=options)
    emas = (whole(o.get_ema_state(m).values()) for o, m in ((optimizer, model), (loaded, other)))
    assert same(*emas)
