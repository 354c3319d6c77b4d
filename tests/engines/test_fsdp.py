"""Sharded training on real process groups: averages, swap, export."""

import sys
import types

import pytest
import torch
import torch.distributed as dist
from measured import peak_allocation
from ranks import on_ranks
from sharded import (
    DECAY,
    WAYS,
    batch,
    equal,
    lerp_of,
    mesh_of,
    optimizer_of,
    outputs,
    plain_model,
    sharded_model,
    train,
    whole,
    whole_ema,
    whole_weights,
)
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from ema_optim import EMAModel, EMAOptimizer
from ema_optim._engines.sharding import whole_on_first_rank

ways = pytest.mark.parametrize("way", WAYS)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def loaded(weights):
    model = plain_model()
    model.load_state_dict(weights)
    return model


@ways
@dtypes
@on_ranks(2, 4)
def test_every_rank_averages_its_part(world, way, dtype):
    model = sharded_model(world, way, dtype)
    optimizer = optimizer_of(model)
    emas = lerp_of(model, optimizer, range(4))
    assert equal(whole_ema(optimizer, model), emas)
    for param in model.parameters():
        ema = optimizer.state[param]["ema"]
        assert isinstance(ema, DTensor)
        assert ema.dtype == torch.float32
        assert (ema.device_mesh, ema.placements) == (param.device_mesh, param.placements)


@pytest.mark.parametrize("way", ["default", "stays_gathered", "offloaded", "hsdp"])
@on_ranks(2, 4)
def test_a_sharded_run_is_that_of_one_process(world, way):
    runs = []
    for model in (plain_model(), sharded_model(world, way)):
        optimizer = optimizer_of(model, update_every=2, update_after_step=1)
        train(model, optimizer, range(6))
        runs.append((whole_weights(model), whole_ema(optimizer, model)))
    assert equal(runs[0][0], runs[1][0])
    assert equal(runs[0][1], runs[1][1])


@pytest.mark.parametrize("way", ["default", "stays_gathered", "offloaded", "hsdp"])
@pytest.mark.parametrize("evaluations", [0, 1])
@on_ranks(2, 4)
def test_the_forward_sees_every_swap(world, way, evaluations):
    model = sharded_model(world, way)
    optimizer = optimizer_of(model)
    train(model, optimizer, range(3))
    weights, emas = whole_weights(model), whole_ema(optimizer, model)
    for _ in range(2):
        for _ in range(evaluations):  # leaves weights gathered
            assert torch.equal(outputs(model), outputs(loaded(weights)))
        with optimizer.swap_ema_weights():
            assert torch.equal(outputs(model), outputs(loaded(emas)))
    assert torch.equal(outputs(model), outputs(loaded(weights)))
    assert equal(whole_ema(optimizer, model), emas)


@on_ranks(2)
def test_apply_ema_is_seen_by_the_forward(world):
    model = sharded_model(world, "stays_gathered")
    optimizer = optimizer_of(model)
    train(model, optimizer, range(3))
    emas = whole_ema(optimizer, model)
    outputs(model)
    optimizer.apply_ema()
    assert torch.equal(outputs(model), outputs(loaded(emas)))


@on_ranks(2)
def test_a_gather_under_way_does_not_hide_a_swap(world):
    # The weights that unshard(async_op=True) or a prefetch has sent off are those of before.
    model = sharded_model(world)
    optimizer = optimizer_of(model)
    train(model, optimizer, range(3))
    emas = whole_ema(optimizer, model)
    model[1].unshard(async_op=True)
    with optimizer.swap_ema_weights():
        assert torch.equal(outputs(model), outputs(loaded(emas)))


@on_ranks(2)
def test_a_swap_in_training_changes_no_later_step(world):
    runs = []
    for evaluates in (False, True):
        model = sharded_model(world)
        optimizer = optimizer_of(model)
        for step in range(4):
            train(model, optimizer, [step])
            outputs(model)
            with optimizer.swap_ema_weights(evaluates):
                outputs(model)
        runs.append(whole_weights(model))
    assert equal(*runs)


@on_ranks(2)
def test_bf16_weights_come_back_from_a_swap_bit_for_bit(world):
    model = sharded_model(world, dtype=torch.bfloat16)
    optimizer = optimizer_of(model)
    train(model, optimizer, range(3))
    weights, emas = whole_weights(model), whole_ema(optimizer, model)
    with optimizer.swap_ema_weights():
        rounded = {name: ema.bfloat16() for name, ema in emas.items()}
        assert equal(whole_weights(model), rounded)
    assert equal(whole_weights(model), weights)
    assert equal(whole_ema(optimizer, model), emas)


def without_registry(patch):
    name = "torch.distributed._composable_state"
    patch.setitem(sys.modules, name, types.ModuleType(name))


@on_ranks(2)
def test_modules_that_torch_does_not_tell_of_are_named(world):
    with pytest.MonkeyPatch.context() as patch:
        model = sharded_model(world)
        optimizer = optimizer_of(model)
        named = EMAOptimizer(torch.optim.AdamW(model.parameters(), lr=0.1), DECAY, module=model)
        train(model, named, range(3))
        emas = whole_ema(named, model)
        train(model, optimizer, [3])
        without_registry(patch)
        with pytest.raises(RuntimeError, match="module=model"), optimizer.swap_ema_weights():
            pass
        outputs(model)
        with named.swap_ema_weights():
            assert torch.equal(outputs(model), outputs(loaded(emas)))


@ways
@on_ranks(4)
def test_names_are_complete_while_weights_are_gathered(world, way):
    model = sharded_model(world, way)
    optimizer = optimizer_of(model)
    train(model, optimizer, range(2))
    names = plain_model().state_dict().keys()
    outputs(model)
    state = optimizer.get_ema_state(model)
    assert state.keys() == names
    assert all(isinstance(ema, DTensor) for ema in state.values())
    outputs(model)
    optimizer.load_ema_state(model, state)
    assert equal(whole_ema(optimizer, model), {n: whole(e) for n, e in state.items()})


@on_ranks(2, 4)
def test_whole_tensors_load_as_the_ema_of_a_sharded_model(world):
    model = sharded_model(world)
    optimizer = optimizer_of(model)
    train(model, optimizer, [0])
    emas = {n: torch.randn_like(w) for n, w in plain_model().state_dict().items()}
    optimizer.load_ema_state(model, emas)
    assert equal(whole_ema(optimizer, model), emas)
    assert equal(optimizer_loads(model, emas), emas)


def optimizer_loads(model, emas):
    """Through ``state_dict``, with whole tensors in it."""
    optimizer = optimizer_of(model)
    train(model, optimizer, [0])
    state = optimizer.state_dict()
    for entry, ema in zip(state["state"].values(), emas.values(), strict=True):
        entry["ema"] = ema
    optimizer.load_state_dict(state)
    return whole_ema(optimizer, model)


def other_mesh(ema, world):
    return distribute_tensor(whole(ema), mesh_of("hsdp", world))


@on_ranks(4)
def test_a_foreign_layout_is_refused_by_name(world):
    model, plain = sharded_model(world), plain_model()
    optimizer, own = optimizer_of(model), optimizer_of(plain)
    train(model, optimizer, [0])
    train(plain, own, [0])
    state = optimizer.get_ema_state(model)
    before = whole_ema(optimizer, model)
    moved = {name: other_mesh(ema, world) for name, ema in state.items()}
    with pytest.raises(ValueError, match=r"EMA of 0\.0\.weight must lie on .*full_tensor"):
        optimizer.load_ema_state(model, moved)
    with pytest.raises(ValueError, match=r"plain tensor .*full_tensor"):
        own.load_ema_state(plain, state)
    assert equal(whole_ema(optimizer, model), before)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kept", [True, False])
@on_ranks(2)
def test_flat_parameters_of_fsdp1_are_refused(world, kept):
    model = plain_model()
    early = optimizer_of(model)
    flat = FullyShardedDataParallel(model, use_orig_params=kept, device_id=torch.device("cpu"))
    with pytest.raises(TypeError, match="fully_shard"):
        optimizer_of(flat)
    with pytest.raises(TypeError, match="fully_shard"):
        EMAModel(flat)
    early.param_groups[0]["params"] = list(flat.parameters())
    flat(batch(0)).sum().backward()
    with pytest.raises(TypeError, match="fully_shard"):
        early.step()


def tensor_parallel(world):
    model = plain_model()
    plan = {"0.0": ColwiseParallel(), "1.0": RowwiseParallel()}
    model[0][0] = nn.Linear(5, 8)
    model[1][0] = nn.Linear(8, 3)
    return parallelize_module(model, mesh_of("default", world), plan)


@on_ranks(2)
def test_tensor_parallel_and_plain_weights_share_a_group(world):
    model = tensor_parallel(world)
    optimizer = optimizer_of(model)
    emas = lerp_of(model, optimizer, range(3))
    assert {type(param) for param in optimizer.state} >= {nn.Parameter}
    assert equal(whole_ema(optimizer, model), emas)
    weights = whole_weights(model)
    with optimizer.swap_ema_weights():
        assert equal(whole_weights(model), emas)
    assert equal(whole_weights(model), weights)


@on_ranks(2)
def test_sharded_over_two_kinds_of_parallelism(world):
    model = tensor_parallel(world)
    model = fully_shard(model[2], mesh=mesh_of("default", world)) and model
    optimizer = optimizer_of(model)
    emas = lerp_of(model, optimizer, range(3))
    outputs(model)
    with optimizer.swap_ema_weights():
        assert equal(whole_weights(model), emas)


def distance_in_float64(weights, emas):
    flat = [torch.cat([v.double().flatten() for v in side.values()]) for side in (weights, emas)]
    return float((flat[1] - flat[0]).norm() / flat[0].norm())


@pytest.mark.parametrize("way", ["default", "hsdp", "tensor_parallel"])
@on_ranks(2, 4)
def test_metrics_are_those_of_the_whole_weights_on_every_rank(world, way):
    made = tensor_parallel(world) if way == "tensor_parallel" else sharded_model(world, way)
    optimizer = optimizer_of(made)
    train(made, optimizer, range(3))
    expected = distance_in_float64(whole_weights(made), whole_ema(optimizer, made))
    for enabled in (False, True):
        with optimizer.swap_ema_weights(enabled):
            assert optimizer.ema_metrics()["ema_distance"] == pytest.approx(expected, rel=1e-6)


def counted(function):
    with CommDebugMode() as mode:
        function()
    return mode.get_total_counts()


@ways
@on_ranks(4)
def test_the_ema_sends_nothing(world, way):
    model = sharded_model(world, way)
    optimizer = optimizer_of(model)
    train(model, optimizer, [0])
    assert counted(lambda: outputs(model)) > 0  # what is sent is seen
    for _ in range(2):
        outputs(model)
        assert counted(optimizer.step) == 0
    with optimizer.swap_ema_weights():
        outputs(model)
    assert counted(lambda: enter_and_leave(optimizer)) == 0
    assert counted(lambda: optimizer.get_ema_state(model)) == 0


def enter_and_leave(optimizer):
    with optimizer.swap_ema_weights():
        pass


@on_ranks(2)
def test_ema_model_keeps_its_average_while_weights_are_gathered(world):
    model = sharded_model(world, "stays_gathered")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    ema = EMAModel(model, DECAY)
    emas = whole_weights(model)
    for step in range(3):
        train(model, optimizer, [step])
        emas = {n: torch.lerp(emas[n], w, 1 - DECAY) for n, w in whole_weights(model).items()}
        outputs(model)  # now named_parameters() shows what was gathered
        ema.update()
    outputs(model)
    with ema.use_ema():
        assert torch.equal(outputs(model), outputs(loaded(emas)))
    assert equal({n: whole(e) for n, e in ema.get_ema_state().items()}, emas)


def large_sharded_model(world):
    model = nn.Sequential(*(nn.Linear(512, 512, bias=False) for _ in range(16)))
    for layer in model:
        fully_shard(layer, mesh=mesh_of("default", world))
    return model


@on_ranks(2)
def test_an_export_holds_one_whole_model_on_the_first_rank_alone(world):
    model = large_sharded_model(world)
    optimizer = optimizer_of(model)
    model(torch.randn(2, 512)).sum().backward()
    optimizer.step()
    size = 16 * 512 * 512 * 4
    peak = peak_allocation(lambda: whole_on_first_rank(optimizer.get_ema_state(model)))
    # A half in the parts, and a few tensors of a sixteenth on their way.
    assert peak < (2.0 if dist.get_rank() == 0 else 0.95) * size
    assert peak > 0.5 * size
