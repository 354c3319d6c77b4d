"""The EMA of sharded weights in host memory: averages, swaps, distributed checkpoints."""

import torch
import torch.distributed.checkpoint as dcp
from offloads import Threaded, taken_for
from ranks import on_ranks
from saved_shards import load, state_of, uninterrupted
from sharded import (
    equal,
    lerp_of,
    optimizer_of,
    outputs,
    sharded_model,
    train,
    whole_ema,
    whole_weights,
)
from torch.distributed.tensor import DTensor

from ema_optim._engines.offload import host_like

BF16 = torch.bfloat16


def offloaded(world, way="default"):
    model = sharded_model(world, way, BF16)
    with taken_for(Threaded):
        return model, optimizer_of(model, device="cpu", update_every=1)


@on_ranks(2)
def test_every_rank_averages_its_part_in_host_memory(world):
    model, optimizer = offloaded(world)
    emas = lerp_of(model, optimizer, range(4))
    assert equal(whole_ema(optimizer, model), emas)
    assert all(slot.host for slot in optimizer._ema.slots.values())
    assert optimizer.ema_metrics()["ema_distance"] > 0
    for param in model.parameters():
        ema = optimizer.state[param]["ema"]
        assert isinstance(ema, DTensor)
        assert (ema.device_mesh, ema.placements) == (param.device_mesh, param.placements)


@on_ranks(2)
def test_a_swap_of_sharded_weights_gives_them_back(world):
    model, optimizer = offloaded(world)
    train(model, optimizer, range(3))
    before, emas = whole_weights(model), whole_ema(optimizer, model)
    with optimizer.swap_ema_weights():
        outputs(model)
        swapped = whole_weights(model)
    assert equal(swapped, {name: ema.to(BF16) for name, ema in emas.items()})
    assert equal(whole_weights(model), before)


@on_ranks(2)
def test_a_sharded_checkpoint_goes_on_bit_for_bit(world, tmp_path):
    for swapped in (False, True):
        folder = tmp_path / str(swapped)
        model, optimizer = offloaded(world)
        train(model, optimizer, range(3))
        if swapped:
            optimizer.eval()
        dcp.save(state_of(model, optimizer, "nested"), checkpoint_id=folder)
        model, optimizer = offloaded(world)
        load(model, optimizer, folder, "nested")
        train(model, optimizer, range(3, 6))
        weights, emas = uninterrupted(6, BF16)
        assert equal(whole_weights(model), weights)
        assert equal(whole_ema(optimizer, model), emas)


@on_ranks(2)
def test_host_memory_keeps_the_mesh_of_a_parameter_around_a_local_part_of_its_own(world):
    for param in sharded_model(world).parameters():
        param._local_tensor = param._local_tensor.to("meta")  # a device that is not the mesh's
        made = host_like(param, torch.float64)
        assert (made.device_mesh, made.placements) == (param.device_mesh, param.placements)
        assert (made.shape, made.dtype) == (param.shape, torch.float64)
        assert made._local_tensor.device.type == made.device.type == "cpu"
        assert made._local_tensor.shape == param._local_tensor.shape
