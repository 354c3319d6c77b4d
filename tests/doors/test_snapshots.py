"""Snapshots of averages: files, what is made of them, resumes, ranks, and what is refused."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import pytest
import torch
from models import move, net
from ranks import on_ranks
from runs import Run
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from sharded import optimizer_of, plain_model, sharded_model, whole_ema
from sharded import train as train_sharded

from ema_optim import EMAModel, EMAOptimizer, EMASnapshots, power_decay, warmup_decay
from ema_optim._checkpoint import writer

pytestmark = pytest.mark.filterwarnings("ignore:the EMA still holds")  # short runs

STEPS = (10, 20, 30, 40)


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def saved_run(folder, steps=STEPS, decay=0.9, **options):
    run, snapshots = Run(decay=decay, **options), EMASnapshots(folder)
    batches = iter(range(max(steps)))
    for step in range(1, max(steps) + 1):
        run.train(1, seed=next(batches))
        if step in steps:
            snapshots.save(run.optimizer, run.model)
    return run, snapshots


def ema_after(steps, decay, **options):
    """The true average: the same training with another decay, which moves no weight."""
    run = Run(decay=decay, **options)
    for step in range(steps):
        run.train(1, seed=step)
    return run.ema(), run.weights()


def distance(left, right):
    return sum(float((left[k] - right[k]).square().sum()) for k in left) ** 0.5


def names_in(folder):
    return sorted(os.listdir(folder))


def test_a_file_is_the_ema_by_name_with_its_law_in_the_header(tmp_path):
    run, _ = saved_run(tmp_path / "new" / "folder", (7,), power_decay(0.1), update_every=2)
    path = tmp_path / "new" / "folder" / "ema-00000007.safetensors"
    assert same(load_file(path), run.ema())
    run.model.load_state_dict(load_file(path))
    with safe_open(path, framework="pt") as file:
        told = json.loads(file.metadata()["ema_optim"])
    law = {"schedule": "power", "exponent": pytest.approx(7.93720393760181)}
    assert told == {"format": 1, "name": "ema", "step": 7, "decay": law} | {
        "update_every": 2,
        "update_after_step": 0,
    }


KEPT = [
    (0.9, {}),
    (power_decay(0.1), {}),
    (0.9, {"dtype": torch.bfloat16}),
    (warmup_decay(0.9), {"update_every": 3, "update_after_step": 4}),
    (0.9, {"dtype": torch.float64}),
    (0.9, {"ema_dtype": "float24"}),
    (0.9, {"ema_dtype": "float32_compensated"}),
]


@pytest.mark.parametrize("step", [10, 20])
@pytest.mark.parametrize(("decay", "options"), KEPT)
def test_a_kept_window_comes_back_bit_for_bit(decay, options, step, tmp_path):
    _, snapshots = saved_run(tmp_path, (10, 20), decay, **options)
    true, _ = ema_after(step, decay, **options)
    assert snapshots.error(decay, step) == 0.0
    made = snapshots.synthesize(decay, step, max_error=0.0)
    assert same(made, true)
    assert {value.dtype for value in made.values()} == {value.dtype for value in true.values()}


@pytest.mark.parametrize("wanted", [0.95, 0.97, power_decay(0.15)], ids=str)
@pytest.mark.parametrize("step", [None, 28])
def test_another_window_is_as_far_off_as_told(wanted, step, tmp_path):
    _, snapshots = saved_run(tmp_path, range(4, 41, 4))
    told = snapshots.error(wanted, step)
    true, weights = ema_after(step or 40, wanted)
    made = snapshots.synthesize(wanted, step)
    assert distance(made, true) / distance(weights, true) < 4 * told
    assert 0 < told < 0.05


def test_files_of_half_precision_are_summed_in_fp32(tmp_path):
    run = Run(decay=0.9)
    for step in range(1, 41):
        run.train(1, seed=step - 1)
        if step % 4 == 0:
            EMASnapshots(tmp_path / "half").save(run.optimizer, run.model, dtype=torch.float16)
            EMASnapshots(tmp_path / "full").save(run.optimizer, run.model)
    half, full = (EMASnapshots(tmp_path / name).synthesize(0.97) for name in ("half", "full"))
    assert {value.dtype for value in half.values()} == {torch.float32}
    assert 0 < distance(half, full) < 1e-3 * distance(full, {k: 0 * v for k, v in full.items()})


def test_later_files_are_not_used(tmp_path):
    _, snapshots = saved_run(tmp_path)
    before = snapshots.synthesize(0.95, 30, max_error=1)
    (tmp_path / "ema-00000040.safetensors").unlink()
    assert same(snapshots.synthesize(0.95, max_error=1), before)


def test_a_new_file_is_seen(tmp_path):
    run, snapshots = saved_run(tmp_path)
    told = snapshots.error(0.95)
    snapshots.save(run.train(1).optimizer, run.model)
    assert snapshots.error(0.95) != told
    assert snapshots.error(0.95, step=40) == told


@pytest.mark.parametrize("buffers", [False, True])
def test_an_ema_model_is_saved_with_what_it_averages(buffers, tmp_path):
    model = net()
    ema = EMAModel(model, 0.8, use_buffers=buffers)
    move(model, 5, ema)
    EMASnapshots(tmp_path).save(ema)
    made = EMASnapshots(tmp_path).synthesize(0.8)
    assert same(made, ema.get_ema_state())
    model.load_state_dict(made, strict=False)


def test_a_save_inside_a_swap_is_of_the_ema(tmp_path):
    run = Run(decay=0.9).train(5)
    true, weights = run.ema(), run.weights()
    with run.optimizer.swap_ema_weights():
        EMASnapshots(tmp_path).save(run.optimizer, run.model)
    assert same(EMASnapshots(tmp_path).synthesize(0.9), true)
    assert same(run.weights(), weights)


def test_what_is_no_float_is_the_last_files(tmp_path):
    for step in (1, 2):
        told = {"format": 1, "name": "ema", "step": step, "decay": 0.5}
        header = {"ema_optim": json.dumps(told)}
        state = {"a": torch.ones(2) * step, "n": torch.tensor(step), "c": torch.ones(1) * 1j}
        save_file(state, tmp_path / f"ema-0000000{step}.safetensors", header)
    made = EMASnapshots(tmp_path).synthesize(0.7, max_error=9)
    assert made["n"] == 2
    assert made["c"] == pytest.approx(1j)


# Resumes.


def resumed(saved, seed=1):
    return Run(seed=seed).load(saved)


def test_a_resumed_run_removes_the_snapshots_of_the_other_course(tmp_path):
    run, snapshots = Run(), EMASnapshots(tmp_path)
    saves = {}
    for step in (5, 10, 15, 20):
        snapshots.save(run.train(5, seed=step).optimizer, run.model)
        saves[step] = run.save()
    again = resumed(saves[10]).train(3)
    snapshots.save(again.optimizer, again.model)
    assert names_in(tmp_path) == [f"ema-000000{step}.safetensors" for step in ("05", "10", "13")]
    snapshots.save(again.train(2).optimizer, again.model)  # not "later than the loaded one" again
    EMASnapshots(tmp_path).save(again.train(1).optimizer, again.model)
    assert [int(name[4:12]) for name in names_in(tmp_path)] == [5, 10, 13, 15, 16]


def test_a_run_that_was_pickled_whole_goes_on(tmp_path):
    run, snapshots = saved_run(tmp_path, (3, 6))
    torch.save((run.optimizer, run.model), tmp_path / "run.pt")
    snapshots.save(run.train(1).optimizer, run.model)
    optimizer, model = torch.load(tmp_path / "run.pt", weights_only=False)
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    EMASnapshots(tmp_path).save(optimizer, model)
    assert same(EMASnapshots(tmp_path).synthesize(0.9), optimizer.get_ema_state(model))


ANOTHER = "must be empty or this run's, got ema-.*safetensors with decay .*own folder|decay was cha"


@pytest.mark.parametrize("steps", [3, 10, 30])
def test_another_runs_folder_is_refused_and_kept(steps, tmp_path):
    saved_run(tmp_path, (10, 20))
    before = names_in(tmp_path)
    run = Run(decay=0.9).train(steps)
    with pytest.raises(ValueError, match=ANOTHER):
        EMASnapshots(tmp_path).save(run.optimizer, run.model)
    assert names_in(tmp_path) == before


@pytest.mark.parametrize("options", [{"decay": 0.8}, {"decay": 0.25, "update_every": 2}])
def test_another_law_of_the_same_name_is_refused(options, tmp_path):
    run = Run().train(5)
    EMASnapshots(tmp_path).save(run.optimizer, run.model)
    changed = Run(**options).load(run.save()).train(2)
    with pytest.raises(ValueError, match=ANOTHER):
        EMASnapshots(tmp_path).save(changed.optimizer, changed.model)


@pytest.mark.parametrize("begin", ["reset", "empty"])
def test_an_average_that_began_anew_is_another_run(begin, tmp_path):
    run, snapshots = saved_run(tmp_path, (5,))
    run.optimizer.reset()
    if begin == "empty":  # Accelerate loads an empty state at once
        run.optimizer.load_state_dict(
            {"state": {}, "param_groups": run.save()["o"]["param_groups"]}
        )
    run.train(8)
    with pytest.raises(ValueError, match=ANOTHER):
        snapshots.save(run.optimizer, run.model)


# What is not there, or not right.


def test_a_told_error_above_the_limit_names_three_remedies(tmp_path):
    _, snapshots = saved_run(tmp_path, (40,))
    said = r"at least [\d.]+ for 0.5 at step 40, .*got 0.05: .*longer.*more often.*"
    with pytest.raises(ValueError, match=said + "larger max_error"):
        snapshots.synthesize(0.5)
    assert (
        snapshots.synthesize(0.5, max_error=3).keys() == load_file(next(tmp_path.iterdir())).keys()
    )


def function(step):
    return 0.9


BAD = [
    (lambda s, r: s.error(1.5), ValueError, r"decay must be in \[0, 1\], got 1.5"),
    (lambda s, r: s.error("0.9"), TypeError, "decay must be a float or a callable"),
    (lambda s, r: s.error(0.5, step=11), ValueError, r"one of \[10, 20\], got 11"),
    (lambda s, r: s.synthesize(0.5, max_error=-1), ValueError, "max_error must be at least 0"),
    (lambda s, r: s.synthesize(0.9, max_error=float("nan")), ValueError, "max_error must be at l"),
    (lambda s, r: EMASnapshots(s.folder / "none").error(0.5), ValueError, "must hold snapshots"),
    (lambda s, r: s.save(r.optimizer), TypeError, r"model must be given.*save\(optimizer, model\)"),
    (lambda s, r: s.save(r.model), TypeError, "ema must be an EMAOptimizer with its model, or an"),
    (lambda s, r: s.save(r.optimizer, r.optimizer), TypeError, "ema must be an EMAOptimizer with"),
    (lambda s, r: s.save(r.optimizer, r.model, torch.int8), ValueError, "dtype must be one of"),
    (lambda s, r: s.save(r.optimizer, torch.nn.Linear(1, 1)), ValueError, "must own parameters"),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD)
def test_bad_calls_say_what_is_wrong_and_change_nothing(call, error, message, tmp_path):
    run, snapshots = saved_run(tmp_path, (10, 20))
    before = names_in(tmp_path)
    with pytest.raises(error, match=message):
        call(snapshots, run)
    assert names_in(tmp_path) == before


UNSAVEABLE = [
    ({"decay": function}, 3, TypeError, "ema_optim's schedules, got .*cannot hold a function"),
    ({}, 0, RuntimeError, r"save\(\) before the first step"),
]


@pytest.mark.parametrize(("options", "steps", "error", "message"), UNSAVEABLE)
def test_what_no_file_can_say_is_not_saved(options, steps, error, message, tmp_path):
    run = Run(**options).train(steps)
    with pytest.raises(error, match=message):
        EMASnapshots(tmp_path / "x").save(run.optimizer, run.model)
    assert not (tmp_path / "x").exists()


def test_a_group_with_its_own_decay_is_not_saved(tmp_path):
    run = Run().train(2)
    run.optimizer.param_groups[0]["ema_decay"] = 0.5
    with pytest.raises(ValueError, match="ema_decay"):
        EMASnapshots(tmp_path).save(run.optimizer, run.model)


def test_other_files_are_ignored(tmp_path):
    run, snapshots = saved_run(tmp_path, (10, 20))
    told = snapshots.error(0.95)
    state = run.ema()
    save_file(state, tmp_path / "model.safetensors")
    save_file(state, tmp_path / "model-00000001.safetensors", {"format": "pt"})
    save_file(state, tmp_path / "ema-00000001.safetensors", {"ema_optim": "0.4.0"})  # exported
    (tmp_path / ".ema-00000030.safetensors.77.part").write_bytes(b"half")
    (tmp_path / "ema-1.safetensors").write_bytes(b"none")
    assert snapshots.error(0.95) == told
    snapshots.save(run.train(10).optimizer, run.model)
    assert not list(tmp_path.glob("*.part"))


def cut(path):
    path.write_bytes(path.read_bytes()[:-9])


def emptied(path):
    path.write_bytes(b"")


def of_tomorrow(path):
    told = {"format": 2, "name": "ema", "step": 10, "decay": 0.9}
    save_file(load_file(path), path, {"ema_optim": json.dumps(told)})


def of_no_law(path):
    told = {"format": 1, "name": "ema", "step": 10, "decay": {"schedule": "cosine"}}
    save_file(load_file(path), path, {"ema_optim": json.dumps(told)})


def of_no_step(path):
    told = {"format": 1, "name": "ema", "step": 0, "decay": 0.9}
    save_file(load_file(path), path, {"ema_optim": json.dumps(told)})


@pytest.mark.parametrize("damage", [cut, emptied, of_tomorrow, of_no_law, of_no_step])
def test_a_damaged_file_names_itself(damage, tmp_path):
    _, snapshots = saved_run(tmp_path, (10, 20))
    damage(tmp_path / "ema-00000010.safetensors")
    for call in (snapshots.error, snapshots.synthesize):
        with pytest.raises(ValueError, match=r"ema-00000010.safetensors (is damaged|says of its)"):
            call(0.95)


def without_bias(state):
    state.pop("2.bias")


def another_shape(state):
    state["2.bias"] = torch.ones(3)


def another_kind(state):
    state["2.bias"] = state["2.bias"].to(torch.float64)


@pytest.mark.parametrize("change", [without_bias, another_shape, another_kind])
def test_another_models_file_is_named_with_the_tensor(change, tmp_path):
    _, snapshots = saved_run(tmp_path, (10, 20))
    path = tmp_path / "ema-00000010.safetensors"
    state = load_file(path)
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
    change(state)
    save_file(state, path, header)
    with pytest.raises(ValueError, match=r"2\.bias.*of different models") as told:
        snapshots.synthesize(0.95, max_error=9)
    assert "ema-00000010" in str(told.value)


def test_what_is_not_finite_is_told(tmp_path):
    run = Run().train(2)
    with torch.no_grad():
        run.model[0].weight.mul_(1e9)
    run.train(1)
    with pytest.warns(UserWarning, match=r"EMA of 0.weight is not finite in torch.float16"):
        EMASnapshots(tmp_path).save(run.optimizer, run.model, dtype=torch.float16)


# A writer that is killed.

WRITER = """
import sys, torch
from ema_optim import EMAModel, EMASnapshots

model = torch.nn.Linear(1024, 1024)
torch.nn.init.zeros_(model.weight)
ema, snapshots = EMAModel(model, 0.5), EMASnapshots(sys.argv[1])
for step in range(10_000):
    with torch.no_grad():
        model.weight.fill_(step + 1.0)
    ema.update()
    snapshots.save(ema)
    print(step, flush=True)
"""


def test_a_killed_writer_leaves_only_whole_files(tmp_path):
    for attempt in range(3):
        folder = tmp_path / str(attempt)
        command = [sys.executable, "-c", WRITER, str(folder)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        for _ in range(3):
            process.stdout.readline()
        time.sleep(0.007 * attempt)  # nearly all of the loop is writing
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        for path in folder.glob("*.safetensors"):
            weight = load_file(path)["weight"]
            assert weight.eq(weight[0, 0]).all()
        assert EMASnapshots(folder).synthesize(0.5)["weight"].shape == (1024, 1024)


# Several ranks.


def shared_folder():
    """One folder for all ranks."""
    told = [tempfile.mkdtemp() if torch.distributed.get_rank() == 0 else None]
    torch.distributed.broadcast_object_list(told, src=0)
    return Path(told[0])


@on_ranks(2)
def test_sharded_weights_are_gathered_into_whole_files(world):
    folder, model = shared_folder(), sharded_model(world)
    optimizer = optimizer_of(model)
    for part in range(4):
        train_sharded(model, optimizer, range(part * 5, part * 5 + 5))
        EMASnapshots(folder).save(optimizer, model)
    whole = whole_ema(optimizer, model)
    torch.distributed.barrier()
    made = EMASnapshots(folder).synthesize(0.9)
    assert same(made, whole)
    assert EMASnapshots(folder).synthesize(0.95, max_error=1).keys() == whole.keys()
    plain_model().load_state_dict(made)


@on_ranks(2)
def test_what_fails_on_the_first_rank_fails_on_all(world):
    folder, model = shared_folder(), sharded_model(world)
    optimizer = optimizer_of(model)
    train_sharded(model, optimizer, range(3))
    EMASnapshots(folder).save(optimizer, model)
    optimizer.reset()
    train_sharded(model, optimizer, range(3))
    first = torch.distributed.get_rank() == 0
    message = (
        "must be empty" if first else "first rank could not write: ValueError: .*must be empty"
    )
    with pytest.raises(ValueError if first else RuntimeError, match=message):
        EMASnapshots(folder).save(optimizer, model)


def full_disk(file, part):
    part.load()
    raise OSError("disk is full")


@on_ranks(2)
def test_a_write_that_fails_half_way_leaves_no_rank_waiting(world):
    folder, model = shared_folder(), sharded_model(world)
    optimizer = optimizer_of(model)
    train_sharded(model, optimizer, range(3))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer, "_put", full_disk)
        with pytest.raises((OSError, RuntimeError), match="disk is full"):
            EMASnapshots(folder).save(optimizer, model)
    torch.distributed.barrier()
    assert names_in(folder) == []


@on_ranks(2)
def test_of_copies_on_every_rank_the_first_writes(world):
    folder, model = shared_folder(), plain_model()
    optimizer = EMAOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), 0.9)
    train_sharded(model, optimizer, range(3))
    EMASnapshots(folder).save(optimizer, model)
    torch.distributed.barrier()
    assert names_in(folder) == ["ema-00000003.safetensors"]


def test_every_window_has_a_file_and_all_of_them_are_combined(tmp_path):
    windows = {"short": power_decay(0.05), "long": power_decay(0.10)}
    run, snapshots = saved_run(tmp_path, decay=windows)
    assert len(names_in(tmp_path)) == len(windows) * len(STEPS)
    for name, decay in windows.items():
        kept = run.optimizer.get_ema_state(run.model, decay=name)
        assert same(load_file(tmp_path / f"{name}-00000040.safetensors"), kept)
        assert same(snapshots.synthesize(decay), kept)
    _, alone = saved_run(tmp_path / "alone", decay=power_decay(0.05))
    target = power_decay(0.15)
    assert snapshots.error(target) < alone.error(target)
    last = {"decay": target, "max_error": 9.0}
    live = EMASnapshots(tmp_path / "live")
    live.save(run.optimizer, run.model)
    made, combined = live.synthesize(**last), run.optimizer.get_ema_state(run.model, **last)
    assert distance(made, combined) < 1e-5 * distance(made, run.weights())


def test_averages_of_a_changed_law_are_not_saved(tmp_path):
    with pytest.warns(UserWarning, match="another decay"):
        run = Run(decay={"a": 0.3, "b": 0.4}).load(Run(decay={"a": 0.3, "b": 0.5}).train(4).save())
    with pytest.raises(ValueError, match=r"EMASnapshots\.save\(\) needs averages that one decay"):
        EMASnapshots(tmp_path).save(run.optimizer, run.model)
    assert names_in(tmp_path) == []


@pytest.mark.parametrize("decay", [0.9, power_decay(0.1)])
def test_a_parameter_that_came_later_is_told_where_a_schedule_counts_its_steps(decay, tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    optimizer = EMAOptimizer(torch.optim.SGD(model[0].parameters(), lr=0.1), decay)
    for step in range(8):
        if step == 4:
            optimizer.add_param_group({"params": list(model[1].parameters())})
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        EMASnapshots(tmp_path).save(optimizer, model)
    told = [str(one.message) for one in caught if "fewer steps" in str(one.message)]
    assert len(told) == callable(decay)
    assert all("1.weight, 1.bias has counted" in text for text in told)
