"""The update of DTensor parameters, relative to the same update of their local tensors.

One process that holds the only shard: there is nothing to communicate in an EMA update, so what
is measured is the cost of the DTensors themselves.
"""

import report
import torch.distributed as dist
from averages import BASE, OURS, Average, ema_optim, foreach_lerp
from harness import DECAY, race_updates
from shapes import describe
from table_update import ratio_cells
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

TEXT = (
    "Median [quartiles] of the time per update; 1 is `_foreach_lerp_` on the local tensors of one "
    "rank, each parameter sharded on its first dimension."
)


def run(bench):
    backend = "nccl" if bench.device == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh(bench.device, (1,))
        names = [name for name in bench.models if name in ("small", "resnet50")]
        columns = {describe(name, bench.quick): _column(bench, name, mesh) for name in names}
        yield report.table("Sharded update", TEXT, *report.by_row("update", columns))
    finally:
        dist.destroy_process_group()


def _column(bench, name, mesh):
    sharded = nn.ParameterList(_shard(param, mesh) for param in bench.model(name))
    # The same memory as plain tensors: what moves the ones moves the others.
    local = nn.ParameterList(nn.Parameter(param.detach().to_local()) for param in sharded)
    factories = {
        BASE: foreach_lerp,
        f"{OURS}, plain tensors": ema_optim,
        f"{OURS}, DTensors": _on(sharded, ema_optim),
        "`_foreach_lerp_`, DTensors": _on(sharded, foreach_lerp),
    }
    return ratio_cells(race_updates(bench, name, local, _working(bench, local, factories)))


def _shard(param, mesh):
    return nn.Parameter(distribute_tensor(param.detach(), mesh, [Shard(0)]))


def _on(sharded, factory):
    def make(_, decay):
        average = factory(sharded, decay)
        return Average(average.update, lambda: [_local(ema) for ema in average.emas()])

    return make


def _local(ema):
    return ema.to_local() if isinstance(ema, DTensor) else ema


def _working(bench, model, factories):
    """The factories whose update runs; the others are named in a note."""
    working = {}
    for name, factory in factories.items():
        try:
            factory(model, DECAY).update()
            working[name] = factory
        except Exception as error:
            reason = str(error).partition("\n")[0]
            bench.note(f"{name}: left out, {type(error).__name__}: {reason}")
    return working
