"""Saving and loading: resumes, checkpoints written while swapped, old and damaged ones."""

import copy

import pytest
import runs
import torch
import torch.distributed.checkpoint as dcp
from reference import same, through_file
from runs import Run, swapped_save
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import SGD, AdamW

from ema_optim import EMAOptimizer, strip_ema_state_dict

DTYPES = [torch.float32, torch.bfloat16, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("model_first", [True, False])
@pytest.mark.parametrize("entrance", [None, "eval", "block"])
def test_resume_equals_uninterrupted_whenever_it_was_saved(dtype, model_first, entrance):
    run = Run(dtype).train(4)
    saved = swapped_save(run, entrance) if entrance else run.save()
    again = Run(dtype, seed=9).load(saved, model_first)
    again.optimizer.train()
    again.train(3, seed=1)
    assert same(again.facts(), run.train(3, seed=1).facts())


RESOLVERS = {
    "train": lambda o: o.train(),
    "step with closure": lambda o: o.step(lambda: None),
    "step without gradients": lambda o: o.step(),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("resolver", RESOLVERS)
def test_pending_exchange_happens_at_the_next_call_that_may_train(dtype, resolver):
    run = Run(dtype, optimizer=SGD).train(4)
    weights = copy.deepcopy(run.model.state_dict())
    again = Run(dtype, seed=9, optimizer=SGD).load(swapped_save(run))
    assert again.optimizer.swapped
    RESOLVERS[resolver](again.optimizer)
    assert not again.optimizer.swapped
    assert same(again.model.state_dict(), weights)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reader", ["eval", "swap", "apply_ema", "get_ema_state"])
def test_ema_is_right_while_an_exchange_is_pending(dtype, reader):
    run = Run(dtype).train(4)
    expected = run.optimizer.get_ema_state(run.model)
    again = Run(dtype, seed=9).load(swapped_save(run))
    if reader == "get_ema_state":
        got = again.optimizer.get_ema_state(again.model)
        assert same(got, expected)
        return
    swap = again.optimizer.swap_ema_weights() if reader == "swap" else None
    if swap is not None:
        swap.__enter__()
    else:
        getattr(again.optimizer, reader)()
    got = {name: p.detach() for name, p in again.model.named_parameters()}
    assert same(got, {name: e.to(dtype) for name, e in expected.items()})


def test_step_with_gradients_taken_at_the_ema_weights_raises():
    run = Run().train(4)
    again = Run(seed=9).load(swapped_save(run))
    weights = copy.deepcopy(again.model.state_dict())
    again.model(torch.ones(1, 4)).sum().backward()
    with pytest.raises(RuntimeError, match=r"Call optimizer.train\(\) after loading"):
        again.optimizer.step()
    assert same(again.model.state_dict(), weights)


def test_model_and_optimizer_saved_in_different_modes_raise():
    run = Run().train(4)
    saved = {"model": run.save()["model"], "o": swapped_save(run)["o"]}
    again = Run(seed=9).load(saved)
    with pytest.raises(RuntimeError, match="load the model's state dict of the same moment"):
        again.optimizer.train()


@pytest.mark.parametrize("decay", [0.0, lambda u: 1 - 1 / u])
def test_ema_that_rightly_equals_the_weights_is_not_taken_for_a_lost_one(decay):
    run = Run(decay=decay).train(1)
    again = Run(seed=9, decay=decay).load(swapped_save(run))
    again.optimizer.train()
    again.train(2, seed=1)
    assert same(again.facts(), run.train(2, seed=1).facts())


def test_checkpoint_taken_while_an_exchange_is_pending_is_the_same_checkpoint():
    saved = swapped_save(Run().train(4))
    assert same(Run(seed=9).load(saved).save(), saved)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_keys_and_shapes_of_a_checkpoint_never_change(dtype):
    run = Run(dtype).train(4)
    plain, swapped = run.save()["o"], swapped_save(run)["o"]
    for a, b in zip(plain["state"].values(), swapped["state"].values(), strict=True):
        assert [(k, v.shape, v.dtype) for k, v in a.items()] == [
            (k, v.shape, v.dtype) for k, v in b.items()
        ]
    assert [g.keys() for g in plain["param_groups"]] == [g.keys() for g in swapped["param_groups"]]
    assert ("ema_weights" in plain["state"][0]) == (dtype is torch.bfloat16)


def test_swapped_checkpoint_holds_the_training_weights_and_the_unrounded_ema():
    run = Run(torch.bfloat16).train(4)
    ema = run.optimizer.get_ema_state(run.model)["0.weight"]
    weight = run.model[0].weight.detach().clone()
    entry = swapped_save(run)["o"]["state"][0]
    assert torch.equal(entry["ema"], ema)
    assert torch.equal(entry["ema_weights"], weight)
    assert ema.dtype == torch.float32


@pytest.mark.parametrize("entrance", ["eval", "block"])
def test_load_while_swapped_forgets_the_old_weights(entrance):
    run = Run().train(4)
    saved = run.save()
    other = Run(seed=9).train(2)
    if entrance == "eval":
        other.optimizer.eval()
        other.load(saved)
        other.optimizer.train()
    else:
        with other.optimizer.swap_ema_weights():
            other.load(saved)
    assert same(other.facts(), run.facts())


def test_configuration_is_not_overwritten_by_a_load():
    saved = Run(decay=0.5, update_every=1).train(4).save()
    again = Run(decay=0.25, update_every=2).load(saved)
    assert "decay=0.25, update_every=2" in repr(again.optimizer)


def test_own_decay_of_a_group_is_saved_and_loaded_like_any_option():
    run = Run()
    run.optimizer.param_groups[0]["ema_decay"] = 0.125
    saved = run.train(2).save()
    again = Run(seed=9).load(saved)
    assert again.optimizer.param_groups[0]["ema_decay"] == 0.125


def test_checkpoint_without_ema_starts_the_ema_at_the_loaded_weights():
    run = Run().train(4)
    saved = {**run.save(), "o": strip_ema_state_dict(run.save()["o"])}
    again = Run(seed=9)
    again.optimizer.param_groups[0]["ema_decay"] = 0.75
    with pytest.warns(UserWarning, match="holds no EMA") as record:
        again.load(saved)
    assert record[0].filename == runs.__file__
    again.load(saved)  # the warning comes once
    start = again.model[0].weight.detach().clone()
    again.train(1)
    expected = start.lerp(again.model[0].weight.detach(), 0.25)
    assert torch.equal(again.optimizer.state[again.model[0].weight]["ema"], expected)


def test_empty_round_trip_is_silent():
    # Accelerate loads state_dict() into the optimizer before the first step.
    run = Run()
    run.optimizer.load_state_dict(run.optimizer.state_dict())
    assert len(run.optimizer.state) == 0
    run.train(1)


def test_loading_an_ema_into_the_bare_optimizer_trains_on_alike():
    run = Run().train(4)
    bare = torch.nn.Sequential(*copy.deepcopy(list(run.model)))
    optimizer = AdamW(bare.parameters(), lr=0.05)
    optimizer.load_state_dict(strip_ema_state_dict(run.save()["o"]))
    run.train(1, seed=3)
    batch = torch.randn(8, 4, generator=torch.Generator().manual_seed(3))
    bare(batch).square().sum().backward()
    optimizer.step()
    assert same(bare.state_dict(), run.model.state_dict())


def test_loaded_tensors_are_copies():
    saved = Run().train(2).save()["o"]
    emas = {key: entry["ema"].clone() for key, entry in saved["state"].items()}
    run = Run(seed=9)
    run.optimizer.load_state_dict(saved)
    run.train(2)
    assert all(torch.equal(entry["ema"], emas[key]) for key, entry in saved["state"].items())


def edit(path, value):
    def damage(state):
        for key in path[:-1]:
            state = state[key]
        if value is KeyError:
            del state[path[-1]]
        else:
            state[path[-1]] = value

    return damage


def drop_ema(state):
    for key in ("ema", "ema_step"):
        del state["state"][1][key]


LABEL = r"param_groups\[0\]\['params'\]\[1\]"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (drop_ema, f"ema of {LABEL} must be in the checkpoint"),
        (edit(("state", 1, "ema"), KeyError), f"ema of {LABEL} must be in the checkpoint"),
        (edit(("state", 1, "ema_step"), KeyError), f"ema_step of {LABEL} must be in"),
        (edit(("state", 1, "ema"), torch.zeros(7)), rf"ema of {LABEL} must have shape \(5,\)"),
        (edit(("state", 1, "ema"), 3.0), f"ema of {LABEL} must be a tensor, got 3.0"),
        (edit(("state", 1, "ema"), torch.zeros(5) * 1j), f"ema of {LABEL} .*complex64"),
        (edit(("state", 1, "ema_step"), -1), f"ema_step of {LABEL} must be a count"),
        (edit(("state", 1, "ema_step"), 1.5), f"ema_step of {LABEL} must be a count"),
        (edit(("state", 1, "ema_step"), torch.tensor(2.0)), f"ema_step of {LABEL} .* count"),
        (edit(("state", 1, "ema_step"), 10**6), f"ema_step of {LABEL} must be at most .* 3"),
        (edit(("state", 1, "ema"), torch.zeros(5).long()), f"ema of {LABEL} .*int64"),
        (edit(("param_groups", 0, "ema_enabled"), "no"), "ema_enabled must be True or False"),
        (edit(("state", 1, "ema_step"), torch.zeros(2).long()), f"ema_step of {LABEL} .* count"),
        (edit(("state", 1, "ema_step"), "many"), f"ema_step of {LABEL} must be a count"),
        (
            edit(("param_groups", 0, "ema_step"), -3),
            r"ema_step of .*param_groups\[0\].* must be a count",
        ),
        (edit(("param_groups", 0, "ema_decay"), 7.0), "ema_decay .* got 7.0"),
        (lambda s: s["param_groups"].append(s["param_groups"][0]), "1 param groups .* got 2"),
        (lambda s: s["param_groups"][0]["params"].pop(), "4 parameters .* got 3"),
        (edit(("state", 1, "step"), KeyError), "step"),
    ],
)
def test_damaged_checkpoint_raises_and_changes_nothing(damage, message):
    saved = Run().train(3).save()["o"]
    damage(saved)
    run = Run(seed=9).train(2)
    facts, groups, state = run.facts(), run.optimizer.param_groups, run.optimizer.inner.state
    with pytest.raises((ValueError, TypeError, KeyError), match=message):
        run.optimizer.load_state_dict(saved)
    assert same(run.facts(), facts)
    assert run.optimizer.param_groups is groups
    assert run.optimizer.inner.state is state


def test_damage_is_named_by_the_parameters_name_where_torch_knows_it():
    model = torch.nn.Linear(2, 3)
    optimizer = EMAOptimizer(AdamW(model.named_parameters()))
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    saved = optimizer.state_dict()
    saved["state"][1]["ema"] = torch.zeros(9)
    with pytest.raises(ValueError, match=r"ema of bias must have shape \(3,\)"):
        optimizer.load_state_dict(saved)


def test_swapped_checkpoint_without_parked_weights_is_refused_where_it_would_round():
    saved = swapped_save(Run().train(4))
    run = Run(torch.bfloat16, seed=9)
    with pytest.raises(ValueError, match=r"ema_weights of .* must be in a checkpoint"):
        run.optimizer.load_state_dict(saved["o"])


def test_ema_of_bf16_weights_survives_bit_for_bit():
    # Torch's own load casts every state tensor except "step" to the parameter's dtype.
    run = Run(torch.bfloat16).train(5)
    again = Run(torch.bfloat16, seed=9).load(run.save())
    ema = again.optimizer.state[again.model[0].weight]["ema"]
    assert ema.dtype == torch.float32
    assert torch.equal(ema, run.optimizer.state[run.model[0].weight]["ema"])
    assert not torch.equal(ema, ema.bfloat16().float())


def test_load_keeps_the_strides_of_the_parameter():
    def make():
        p = torch.nn.Parameter(torch.randn(4, 3).t())
        return p, EMAOptimizer(SGD([p], lr=0.1))

    p, optimizer = make()
    p.grad = torch.ones_like(p)
    optimizer.step()
    q, again = make()
    again.load_state_dict(through_file(optimizer.state_dict()))
    assert again.state[q]["ema"].stride() == q.stride()


@pytest.mark.parametrize(
    "change",
    [
        lambda o: setattr(o._ema, "update_after_step", 100),
        lambda o: o.param_groups[0].update(ema_enabled=False),
    ],
    ids=["start", "disabled"],
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_training_weights_come_back_whatever_the_resuming_run_averages(dtype, change):
    # They are in the slots alone: a slot that the new run does not want still has to be exchanged.
    run = Run(dtype).train(4)
    weights = copy.deepcopy(run.model.state_dict())
    saved = swapped_save(run)
    again = Run(dtype, seed=9)
    change(again.optimizer)
    again.load(saved)
    again.optimizer.train()
    assert same(again.model.state_dict(), weights)
    again.train(1)


def test_checkpoint_of_a_group_disabled_in_training_gives_its_weights_back():
    run = Run().train(4)
    run.optimizer.param_groups[0]["ema_enabled"] = False
    weights = copy.deepcopy(run.model.state_dict())
    again = Run(seed=9).load(swapped_save(run))
    again.optimizer.train()
    assert same(again.model.state_dict(), weights)


def test_weight_that_never_moves_is_not_taken_for_a_lost_ema():
    run = Run(torch.bfloat16)
    still = torch.nn.Parameter(torch.zeros(3))
    run.optimizer.add_param_group({"params": [still]})
    run.train(4)
    again = Run(torch.bfloat16, seed=9)
    again.optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(3))]})
    again.load(swapped_save(run))
    again.optimizer.train()
    assert same(again.model.state_dict(), run.model.state_dict())


def bare_with_ema_entries():
    """An AdamW that has loaded a checkpoint with an EMA, as torch lets it."""
    saved = Run().train(4).save()
    model = Run(seed=9).model
    model.load_state_dict(saved["model"])
    inner = AdamW(model.parameters(), lr=0.05)
    inner.load_state_dict(saved["o"])
    return model, inner


def test_ema_that_the_inner_has_loaded_is_dropped_with_a_warning():
    model, inner = bare_with_ema_entries()
    with pytest.warns(UserWarning, match="Wrap first, then load"):
        optimizer = EMAOptimizer(inner)
    assert not any("ema" in key for entry in inner.state.values() for key in entry)
    assert "ema" not in optimizer.state[model[0].weight]


def test_ema_that_a_bare_optimizer_has_carried_along_is_not_taken_for_a_live_one():
    _, inner = bare_with_ema_entries()
    run = Run(seed=9)
    with pytest.warns(UserWarning, match="holds no EMA"):
        run.optimizer.load_state_dict(through_file(inner.state_dict()))
    assert "ema" not in run.optimizer.state[run.model[0].weight]


def test_checkpoint_whose_ema_entries_were_removed_starts_cold():
    saved = Run().train(4).save()
    for entry in saved["o"]["state"].values():
        [entry.pop(key) for key in ("ema", "ema_step")]
    with pytest.warns(UserWarning, match="holds no EMA"):
        run = Run(seed=9).load(saved)
    run.train(1)
    assert run.optimizer.state[run.model[0].weight]["ema_step"] == 1


def test_swapped_checkpoint_without_its_ema_is_refused():
    saved = swapped_save(Run().train(4))
    for entry in saved["o"]["state"].values():
        [entry.pop(key) for key in ("ema", "ema_step")]
    with pytest.raises(ValueError, match="the checkpoint is damaged"):
        Run(seed=9).load(saved)


@pytest.mark.parametrize("wrong", [None, {}, {"state": []}, {"state": {}, "param_groups": [{}]}])
def test_what_is_no_checkpoint_is_refused(wrong):
    with pytest.raises(ValueError, match="no optimizer's checkpoint"):
        Run().optimizer._load_state_dict(wrong or {})


OPTIONS = [StateDictOptions(), StateDictOptions(flatten_optimizer_state_dict=True)]


def dcp_save(run, folder, options):
    state = {
        "model": run.model.state_dict(),
        "o": get_optimizer_state_dict(run.model, run.optimizer, options=options),
    }
    dcp.save(state, checkpoint_id=folder)


def dcp_load(run, folder, options):
    optimizer = get_optimizer_state_dict(run.model, run.optimizer, options=options)
    weights = copy.deepcopy(run.model.state_dict())
    state = {"o": optimizer}
    dcp.load(state, checkpoint_id=folder)
    assert same(run.model.state_dict(), weights)  # a load writes into the tensors of its template
    model = {"model": run.model.state_dict()}
    dcp.load(model, checkpoint_id=folder)
    set_optimizer_state_dict(run.model, run.optimizer, state["o"], options=options)


@pytest.mark.filterwarnings("ignore:torch.distributed is")  # one process suffices here
@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")  # torch 2.6 warns of its own use
@pytest.mark.parametrize("options", OPTIONS, ids=["nested", "flattened"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("swapped", [False, True])
def test_distributed_checkpoint_resumes_bit_for_bit(tmp_path, options, dtype, swapped):
    run = Run(dtype).train(4)
    if swapped:
        run.optimizer.eval()
    dcp_save(run, tmp_path, options)
    run.optimizer.train()
    again = Run(dtype, seed=9)
    dcp_load(again, tmp_path, options)
    again.optimizer.train()
    again.train(3, seed=1)
    assert same(again.facts(), run.train(3, seed=1).facts())


def test_dry_initialisation_of_distributed_checkpoints_does_not_count():
    run = Run()
    get_optimizer_state_dict(run.model, run.optimizer)
    weight = run.model[0].weight
    assert run.optimizer.state[weight]["ema_step"] == 0
    with torch.no_grad():
        weight.fill_(3.0)
    start = weight.detach().clone()
    run.train(1)
    expected = start.lerp(weight.detach(), 0.75)
    assert torch.equal(run.optimizer.state[weight]["ema"], expected)


@pytest.mark.parametrize("device", [None, "cpu"])
@pytest.mark.parametrize("swapped", [False, True])
def test_a_checkpoint_is_the_same_wherever_its_weights_are_copied_to(device, swapped):
    run = Run(torch.bfloat16).train(3)
    with run.optimizer.swap_ema_weights(swapped):
        expected = copy.deepcopy(run.optimizer.state_dict())
        run.optimizer.checkpoint_device = device
        assert same(run.optimizer.state_dict(), expected)
    assert run.optimizer.checkpoint_device == device


def test_weights_are_copied_to_the_host_or_stay():
    optimizer = Run().optimizer
    with pytest.raises(ValueError, match=r"checkpoint_device must be None .* or 'cpu'.*got 'cuda'"):
        optimizer.checkpoint_device = "cuda"
    assert optimizer.checkpoint_device is None
