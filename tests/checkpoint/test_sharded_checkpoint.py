"""Distributed checkpoints of sharded runs: saved on four ranks, resumed on four, two and one."""

import contextlib
import os
import signal

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from ranks import Pool, on_ranks, run_on
from saved_shards import OPTIONS, fresh, load, state_of, uninterrupted
from sharded import (
    DECAY,
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
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import fully_shard

from ema_optim import strip_ema_state_dict

FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)
layouts = pytest.mark.parametrize("layout", OPTIONS)
# Ranks and way of the run that goes on: fewer, as many in another arrangement, one without FSDP.
targets = pytest.mark.parametrize("target", [(2, "default"), (4, "hsdp"), (1, None)])


def save(world, folder, layout, dtype, swapped):
    model = sharded_model(world, dtype=dtype)
    optimizer = optimizer_of(model)
    train(model, optimizer, range(3))
    if swapped:
        optimizer.eval()
        outputs(model)  # leaves the root gathered
    dcp.save(state_of(model, optimizer, layout), checkpoint_id=folder)


def goes_on(world, folder, way, layout, dtype):
    model, optimizer = fresh(world, way, dtype)
    load(model, optimizer, folder, layout)
    train(model, optimizer, range(3, 6))
    weights, emas = uninterrupted(6, dtype)
    assert equal(whole_weights(model), weights)
    assert equal(whole_ema(optimizer, model), emas)
    assert optimizer.param_groups[0]["ema_step"] == 6


@targets
@layouts
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("swapped", [False, True])
def test_a_run_goes_on_bit_for_bit_on_other_ranks(tmp_path, target, layout, dtype, swapped):
    world, way = target
    run_on(4, save, folder=tmp_path, layout=layout, dtype=dtype, swapped=swapped)
    run_on(world, goes_on, folder=tmp_path, way=way, layout=layout, dtype=dtype)


WINDOWS = {"short": 0.25, "long": 0.5}


def save_windows(world, folder, layout, swapped):
    model = sharded_model(world, dtype=torch.bfloat16)
    optimizer = optimizer_of(model, WINDOWS)
    train(model, optimizer, range(4))
    if swapped:
        optimizer.eval()
    dcp.save(state_of(model, optimizer, layout), checkpoint_id=folder)


def windows_go_on(world, folder, way, layout):
    model, optimizer = fresh(world, way, torch.bfloat16, WINDOWS)
    load(model, optimizer, folder, layout)
    train(model, optimizer, range(4, 6))
    weights = whole_weights(model)
    for decay in (*WINDOWS, 0.4):
        which = {"decay": decay, "max_error": 0.2}
        found = optimizer.get_ema_state(model, **which)
        expected = windows_alone(which)
        assert equal({name: whole(ema) for name, ema in found.items()}, expected)
        with optimizer.swap_ema_weights(**which):
            shown = {name: ema.bfloat16() for name, ema in expected.items()}
            assert equal(whole_weights(model), shown)
            outputs(model)  # gathers
        assert equal(whole_weights(model), weights)


def windows_alone(which):
    model = plain_model(torch.bfloat16)
    optimizer = optimizer_of(model, WINDOWS)
    train(model, optimizer, range(6))
    return optimizer.get_ema_state(model, **which)


@layouts
@pytest.mark.parametrize(("way", "swapped"), [((2, "default"), False), ((1, None), True)])
def test_every_window_goes_on_bit_for_bit_on_other_ranks(tmp_path, way, layout, swapped):
    run_on(4, save_windows, folder=tmp_path, layout=layout, swapped=swapped)
    run_on(way[0], windows_go_on, folder=tmp_path, way=way[1], layout=layout)


def save_whole(world, file, dtype, swapped):
    model = sharded_model(world, dtype=dtype)
    optimizer = optimizer_of(model)
    train(model, optimizer, range(3))
    if swapped:
        optimizer.eval()
    weights = get_model_state_dict(model, options=FULL)
    state = get_optimizer_state_dict(model, optimizer, options=FULL)
    if dist.get_rank() == 0:
        torch.save([weights, state], file)


def goes_on_from_whole(world, file, way, dtype, broadcast):
    model, optimizer = fresh(world, way, dtype)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=broadcast)
    given = not broadcast or dist.get_rank() == 0
    weights, state = torch.load(file, weights_only=True) if given else ({}, {})
    set_model_state_dict(model, weights, options=options)
    set_optimizer_state_dict(model, optimizer, state, options=options)
    optimizer.train()
    train(model, optimizer, range(3, 6))
    expected = uninterrupted(6, dtype)
    assert equal(whole_weights(model), expected[0])
    assert equal(whole_ema(optimizer, model), expected[1])


@targets
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("swapped", "broadcast"), [(False, True), (True, False)])
def test_a_whole_checkpoint_goes_on_bit_for_bit(tmp_path, target, dtype, swapped, broadcast):
    file = tmp_path / "whole.pt"
    run_on(4, save_whole, file=file, dtype=dtype, swapped=swapped)
    world, way = target
    run_on(world, goes_on_from_whole, file=file, way=way, dtype=dtype, broadcast=broadcast)


def save_beside_training(world, folder):
    model = sharded_model(world)
    optimizer = optimizer_of(model)
    train(model, optimizer, range(3))
    state = state_of(model, optimizer, "nested")
    # A group of its own: the saving thread talks while the training does.
    saving = dcp.async_save(state, checkpoint_id=folder, process_group=dist.new_group())
    train(model, optimizer, range(3, 9))
    with optimizer.swap_ema_weights():
        outputs(model)
    saving.result()


def test_an_asynchronous_save_is_of_its_moment(tmp_path):
    run_on(4, save_beside_training, folder=tmp_path)
    run_on(2, goes_on, folder=tmp_path, way="default", layout="nested", dtype=torch.float32)


def save_without_ema(world, folder, layout):
    model = sharded_model(world)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, foreach=False)
    train(model, optimizer, range(3))
    dcp.save(state_of(model, optimizer, layout), checkpoint_id=folder)


def begins_at_the_loaded_weights(world, folder, layout):
    model, optimizer = fresh(world, "default", torch.float32)
    planner = dcp.DefaultLoadPlanner(allow_partial_load=True)
    told = pytest.warns(UserWarning, match="the checkpoint holds no EMA")
    with contextlib.nullcontext() if dist.get_rank() else told:  # the first rank alone warns
        load(model, optimizer, folder, layout, planner)
    start = uninterrupted(3)[0]
    assert equal(whole_weights(model), start)
    train(model, optimizer, [3])
    moved = uninterrupted(4)[0]
    assert equal(whole_weights(model), moved)
    expected = {name: torch.lerp(start[name], moved[name], 1 - DECAY) for name in start}
    assert equal(whole_ema(optimizer, model), expected)


@layouts
def test_a_checkpoint_from_before_the_ema_starts_it(tmp_path, layout):
    run_on(4, save_without_ema, folder=tmp_path, layout=layout)
    run_on(2, begins_at_the_loaded_weights, folder=tmp_path, layout=layout)


@layouts
@on_ranks(2)
def test_a_template_counts_nothing(world, layout):
    model, optimizer = fresh(world, "default", torch.float32)
    state_of(model, optimizer, layout)
    assert optimizer.param_groups[0]["ema_step"] == 0
    assert optimizer.ema_metrics()["ema_updates"] == 0
    with torch.no_grad():
        for param in model.parameters():
            param.mul_(2.0)  # the model is loaded after it
    emas = lerp_of(model, optimizer, range(3))
    assert equal(whole_ema(optimizer, model), emas)


def bare_goes_on(world, folder, layout):
    model = sharded_model(world)
    wrapper = optimizer_of(model)
    state = state_of(model, wrapper, layout)
    dcp.load(state, checkpoint_id=folder)
    bare = torch.optim.AdamW(model.parameters(), lr=0.1, foreach=False)
    set_state_dict(
        model,
        bare,
        model_state_dict=state["model"],
        optim_state_dict=strip_ema_state_dict(state["optimizer"]),
        options=OPTIONS[layout],
    )
    train(model, bare, range(3, 6))
    assert equal(whole_weights(model), uninterrupted(6)[0])


@layouts
def test_the_bare_optimizer_goes_on_after_stripping(tmp_path, layout):
    run_on(4, save, folder=tmp_path, layout=layout, dtype=torch.float32, swapped=False)
    run_on(2, bare_goes_on, folder=tmp_path, layout=layout)


class Dying(dcp.FileSystemWriter):
    """Writes its part on all ranks but the last, which is killed before it does."""

    def write_data(self, plan, planner):
        if dist.get_rank() == dist.get_world_size() - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().write_data(plan, planner)


def save_twice_and_die(world, folder):
    model = sharded_model(world)
    optimizer = optimizer_of(model)
    train(model, optimizer, range(3))
    dcp.save(state_of(model, optimizer, "nested"), checkpoint_id=folder / "3")
    train(model, optimizer, range(3, 5))
    state = state_of(model, optimizer, "nested")
    dcp.save(state, storage_writer=Dying(folder / "5"))


def test_a_rank_that_dies_in_a_save_leaves_the_previous_checkpoint(tmp_path):
    failures = Pool(4).attempt(save_twice_and_die, {"folder": tmp_path})
    assert any("died" in failure for failure in failures)
    assert any((tmp_path / "5").iterdir())
    assert not (tmp_path / "5" / ".metadata").exists()  # it is not taken for a checkpoint
    arguments = {"way": "default", "layout": "nested", "dtype": torch.float32}
    run_on(2, goes_on, folder=tmp_path / "3", **arguments)


def refuses_other_modes(world, folder):
    model, optimizer = fresh(world, "default", torch.float32)
    state = state_of(model, optimizer, "nested")
    dcp.load(state, checkpoint_id=folder)
    weights = uninterrupted(3)[0]
    set_model_state_dict(model, weights, options=StateDictOptions(full_state_dict=True))
    set_optimizer_state_dict(model, optimizer, state["optimizer"])
    with pytest.raises(RuntimeError, match="the EMA is in neither"):
        optimizer.train()


def test_files_of_two_modes_are_refused_on_every_rank(tmp_path):
    # Ranks without any part of the model find all of nothing equal.
    run_on(4, save, folder=tmp_path, layout="nested", dtype=torch.float32, swapped=True)
    run_on(4, refuses_other_modes, folder=tmp_path)


@on_ranks(4)
def test_a_rank_without_weights_resumes_a_swapped_checkpoint(world):
    # Its nothing equals any nothing, which must not be taken for files of two modes.
    runs = []
    for _ in range(2):
        model = fully_shard(torch.nn.Linear(5, 3, bias=False), mesh=mesh_of("default", world))
        runs.append((model, optimizer_of(model)))
    (model, optimizer), (again, resumed) = runs
    train(model, optimizer, range(3))
    optimizer.eval()
    set_model_state_dict(again, get_model_state_dict(model))
    resumed.load_state_dict(optimizer.state_dict())
    optimizer.train()
    resumed.train()
    assert equal(whole_weights(again), whole_weights(model))
    assert equal(whole_ema(resumed, again), whole_ema(optimizer, model))
