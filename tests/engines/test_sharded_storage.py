"""Storage formats of a sharded EMA: the bits of one process, whatever the ranks."""

import pytest
import torch
import torch.distributed.checkpoint as dcp
from ranks import on_ranks, run_on
from saved_shards import OPTIONS, fresh, load, state_of
from sharded import equal, optimizer_of, outputs, plain_model, sharded_model, train, whole
from sharded import whole_weights as weights_of

formats = pytest.mark.parametrize(
    "format", ["float32_compensated", "float24", torch.bfloat16], ids=str
)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
pytestmark = pytest.mark.filterwarnings("ignore:an EMA in bfloat16")


def kept(optimizer):
    """Every bit of the EMA, whole."""
    params = optimizer.param_groups[0]["params"]
    entries = [(i, optimizer.state[param]) for i, param in enumerate(params)]
    keys = ("ema", "ema_low", "ema_step")
    return {f"{i}.{k}": whole(entry[k]) for i, entry in entries for k in keys if k in entry}


def uninterrupted(steps, format, dtype):
    model = plain_model(dtype)
    optimizer = optimizer_of(model, dtype=format)
    train(model, optimizer, range(steps))
    return weights_of(model), kept(optimizer)


@formats
@dtypes
@pytest.mark.parametrize("way", ["default", "stays_gathered", "offloaded", "hsdp"])
@on_ranks(2, 4)
def test_a_sharded_ema_has_the_bits_of_one_process(world, format, dtype, way):
    model = sharded_model(world, way, dtype)
    optimizer = optimizer_of(model, dtype=format)
    train(model, optimizer, range(4))
    weights, bits = uninterrupted(4, format, dtype)
    assert equal(kept(optimizer), bits)
    with optimizer.swap_ema_weights():
        outputs(model)
    assert equal(weights_of(model), weights)
    assert equal(kept(optimizer), bits)


def save(world, folder, layout, format, dtype, swapped):
    model = sharded_model(world, dtype=dtype)
    optimizer = optimizer_of(model, dtype=format)
    train(model, optimizer, range(3))
    if swapped:
        optimizer.eval()
        outputs(model)
    dcp.save(state_of(model, optimizer, layout), checkpoint_id=folder)


def goes_on(world, folder, way, layout, format, dtype):
    model, _ = fresh(world, way, dtype)
    optimizer = optimizer_of(model, dtype=format)
    load(model, optimizer, folder, layout)
    train(model, optimizer, range(3, 6))
    weights, bits = uninterrupted(6, format, dtype)
    assert equal(weights_of(model), weights)
    assert equal(kept(optimizer), bits)


@formats
@dtypes
@pytest.mark.parametrize("layout", OPTIONS)
@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("target", [(2, "default"), (1, None)])
def test_a_run_goes_on_with_the_very_same_bits_on_other_ranks(
    tmp_path, format, dtype, layout, swapped, target
):
    options = {"folder": tmp_path, "layout": layout, "format": format, "dtype": dtype}
    run_on(4, save, swapped=swapped, **options)
    run_on(target[0], goes_on, way=target[1], **options)


def refuses(world, folder, saved, format, dtype):
    model, _ = fresh(world, "default", dtype)
    optimizer = optimizer_of(model, dtype=format)
    with pytest.raises(ValueError, match=f"must be as it was saved .{saved}.*dtype"):
        load(model, optimizer, folder, "nested")


@pytest.mark.parametrize(
    ("saved", "format", "dtype", "name"),
    [
        ("float24", None, torch.float32, "float24"),
        (torch.bfloat16, None, torch.float32, "bfloat16"),
        (None, torch.bfloat16, torch.bfloat16, "default"),
    ],
)
def test_a_distributed_load_that_casts_the_ema_is_refused(tmp_path, saved, format, dtype, name):
    options = {"layout": "nested", "dtype": dtype, "swapped": False}
    run_on(2, save, folder=tmp_path, format=saved, **options)
    run_on(2, refuses, folder=tmp_path, saved=name, format=format, dtype=dtype)
