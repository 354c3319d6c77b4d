"""Models that are spread over ranks, and what they are compared with."""

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from ema_optim import EMAOptimizer

DECAY = 0.9
MIXED = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
# What fully_shard is given. On two and four ranks the layers below have uneven and empty shards.
WAYS = {
    "default": {},
    "stays_gathered": {"reshard_after_forward": False},
    "mixed_precision": {"mp_policy": MIXED},
    "offloaded": {"offload_policy": CPUOffloadPolicy(pin_memory=False)},
    "hsdp": {},
}


def plain_model(dtype=torch.float32):
    torch.manual_seed(0)
    sizes = [(5, 7), (7, 3), (3, 1)]
    return nn.Sequential(*(nn.Sequential(nn.Linear(*size), nn.Tanh()) for size in sizes)).to(dtype)


def mesh_of(way, world):
    if way == "hsdp":
        return init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("copies", "shards"))
    return init_device_mesh("cpu", (world,))


def sharded_model(world, way="default", dtype=torch.float32):
    """The same model with its first two layers sharded apart; the root has the third."""
    model, mesh = plain_model(dtype), mesh_of(way, world)
    for module in (model[0], model[1], model):
        fully_shard(module, mesh=mesh, **WAYS[way])
    return model


def optimizer_of(model, decay=DECAY, **options):
    adam = torch.optim.AdamW(model.parameters(), lr=0.1, foreach=False)
    return EMAOptimizer(adam, decay, **options)


def batch(step, dtype=torch.float32):
    return torch.randn(8, 5, generator=torch.Generator().manual_seed(step)).to(dtype)


def train(model, optimizer, steps):
    """One step for each number, the same batch on every rank: the mean gradient is exactly it."""
    for step in steps:
        optimizer.zero_grad()
        output = model(batch(step, next(model.parameters()).dtype))
        output.float().square().mean().backward()
        optimizer.step()


def outputs(model):
    with torch.no_grad():
        return model(batch(99, next(model.parameters()).dtype))


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_weights(model):
    return {name: whole(param.detach()).clone() for name, param in model.named_parameters()}


def whole_ema(optimizer, model):
    return {name: whole(ema) for name, ema in optimizer.get_ema_state(model).items()}


def equal(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def lerp_of(model, optimizer, steps, dtype=torch.float32):
    """The EMA of the whole weights, averaged one tensor at a time beside the run."""
    emas = {name: weights.to(dtype) for name, weights in whole_weights(model).items()}
    for step in steps:
        train(model, optimizer, [step])
        weights = whole_weights(model)
        emas = {n: torch.lerp(e, weights[n].to(dtype), 1 - DECAY) for n, e in emas.items()}
    return emas
