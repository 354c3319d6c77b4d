"""Several windows in checkpoints: saved, resumed, left out, added, changed."""

import copy

import pytest
import torch
import torch.distributed.checkpoint as dcp
from models import move, net
from reference import same, through_file
from runs import Run, swapped_save
from saved_shards import OPTIONS, load, state_of
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.optim import AdamW

from ema_optim import (
    EMAModel,
    EMAOptimizer,
    EMAWarning,
    equal_average,
    power_decay,
    strip_ema_state_dict,
)
from ema_optim._arithmetic.formats import FORMATS
from ema_optim._checkpoint.carry import carry
from ema_optim._checkpoint.nested import nest

TWO = {"short": 0.25, "long": 0.5}
pytestmark = pytest.mark.filterwarnings("ignore:an EMA in bfloat16")


def windows(run):
    names = run.optimizer._ema.windows
    return {name: run.optimizer.get_ema_state(run.model, decay=name) for name in names}


def nested(run):
    state = run.optimizer.inner.state_dict()
    return {"model": run.model.state_dict(), "o": nest(state, run.optimizer._ema)}


def carried(run):
    saved = run.save()
    return {**saved, "o": carry(saved["o"], {"note": 1})}


SAVES = {
    "plain": Run.save,
    "eval": swapped_save,
    "block": lambda run: swapped_save(run, "block"),
    "nested": nested,
    "carried": carried,
}
KINDS = [(torch.float32, None), (torch.bfloat16, None), *((torch.float32, f) for f in FORMATS)]


@pytest.mark.parametrize("save", SAVES)
@pytest.mark.parametrize("model_first", [True, False])
@pytest.mark.parametrize(("dtype", "format"), KINDS, ids=str)
def test_a_resumed_run_has_every_window_of_an_uninterrupted_one(save, model_first, dtype, format):
    options = {"dtype": dtype, "ema_dtype": format, "update_every": 2, "decay": TWO}
    run = Run(**options).train(9)
    saved = through_file(SAVES[save](run))
    other = Run(seed=7, **options)
    if save == "nested":
        other.model.load_state_dict(saved["model"])
        other.optimizer.load_state_dict(saved["o"])
    else:
        other.load(saved, model_first)
    other.optimizer.train()
    assert same(windows(other.train(3, seed=1)), windows(run.train(3, seed=1)))
    assert same(other.optimizer.ema_metrics(), run.optimizer.ema_metrics())


@pytest.mark.parametrize("dtype", [None, *FORMATS], ids=str)
def test_a_resumed_model_has_every_window(dtype):
    made = []
    for _ in range(2):
        model = net()
        ema = EMAModel(model, TWO, use_buffers=True, dtype=dtype)
        move(model, 5, ema)
        made.append((model, ema))
    saved = through_file(made[0][1].state_dict())
    move(made[1][0], 2, made[1][1], seed=5)
    made[1][0].load_state_dict(made[0][0].state_dict())
    made[1][1].load_state_dict(saved)
    for model, ema in made:
        move(model, 2, ema, seed=3)
    for name in TWO:
        assert same(*(ema.get_ema_state(decay=name) for _, ema in made))


def test_the_keys_are_the_same_at_any_time():
    run = Run(torch.bfloat16, decay=TWO)
    run.train(1)
    found = []
    for steps in (0, 3):
        saved = run.train(steps).optimizer.state_dict()["state"]
        found += [{k: sorted(v) for k, v in saved.items()}]
    found += [{k: sorted(v) for k, v in swapped_save(run)["o"]["state"].items()}]
    assert found[0] == found[1] == found[2]
    assert "ema:long" in found[0][0]


def test_every_window_is_born_at_a_dry_first_step():
    model = torch.nn.Linear(2, 2)
    optimizer = EMAOptimizer(AdamW(model.parameters(), lr=0.0), TWO)
    # As torch.distributed.checkpoint.state_dict initialises an optimizer before it loads.
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
    optimizer.step()
    entries = optimizer.state_dict()["state"].values()
    assert all("ema:long" in entry and entry["ema_step"] == 0 for entry in entries)


def test_placeholders_of_every_window_follow_the_weights_until_the_first_step():
    run = Run(decay=TWO, update_after_step=3).train(2)
    with torch.no_grad():
        run.model[0].weight.add_(1)
    saved = run.optimizer.state_dict()["state"][0]
    assert torch.equal(saved["ema:long"], run.model[0].weight)


@pytest.mark.parametrize("save", SAVES)
def test_a_window_left_out_is_dropped_with_one_warning(save):
    run = Run(decay=TWO).train(6)
    kept, saved = run.ema(), through_file(SAVES[save](run))
    other = Run(seed=7, decay=TWO["short"])
    other.model.load_state_dict(saved["model"])
    with pytest.warns(UserWarning, match=r"windows \['long'\].*dropped") as told:
        other.optimizer.load_state_dict(saved["o"])
    other.optimizer.train()
    assert len(told) == 1
    assert same(other.ema(), kept)
    inner = other.optimizer.inner.state_dict()["state"].values()
    assert not any(key.startswith("ema") for entry in inner for key in entry)
    assert "long" not in str(other.optimizer.state_dict())


def test_a_window_that_is_not_in_the_checkpoint_is_refused():
    saved, run = Run(decay=0.25).train(6).save(), Run(decay=TWO).train(2)
    before = run.facts()
    with pytest.raises(ValueError, match=r"ema:long of .* load strip_ema_state_dict"):
        run.optimizer.load_state_dict(saved["o"])
    assert same(run.facts(), before)
    with pytest.warns(UserWarning, match="holds no EMA"):
        run.optimizer.load_state_dict(strip_ema_state_dict(saved["o"]))
    run.train(5)
    assert same(windows(run)["long"], run.optimizer.get_ema_state(run.model, decay=0.5))


def test_a_first_window_that_was_a_further_one_is_refused():
    saved = Run(decay=TWO).train(6).save()
    for decay in ({"long": 0.5}, {"long": 0.5, "short": 0.25}):
        with pytest.raises(ValueError, match="first window must be that of the checkpoint, short"):
            Run(decay=decay).load(saved)


def test_damage_of_a_window_is_refused_by_name():
    saved = Run(decay=TWO, ema_dtype="float24").train(6).save()
    damages = [("ema:long", torch.zeros(3)), ("ema:long:low", torch.zeros(3)), ("ema:long", 1)]
    for key, value in damages:
        damaged, run = copy.deepcopy(saved["o"]), Run(decay=TWO, ema_dtype="float24").train(1)
        damaged["state"][1][key], before = value, run.facts()
        with pytest.raises((ValueError, TypeError), match=r"\[1\] \(long\)"):
            run.optimizer.load_state_dict(damaged)
        assert same(run.facts(), before)


@pytest.mark.parametrize("text", ["law=[]", "law={", 'law={"windows": {}}', 'law={"windows": 1}'])
def test_a_damaged_law_is_refused(text):
    saved = Run(decay=TWO).train(6).save()
    saved["o"]["param_groups"][0]["ema_format"] = f"default; {text}"
    with pytest.raises(ValueError, match="law in ema_format must be JSON"):
        Run(decay=TWO).load(saved)


CHANGES = [
    {"decay": {**TWO, "long": 0.6}},
    {"decay": {**TWO, "short": power_decay(0.2)}},
    {"update_every": 2},
    {"update_after_step": 3},
]


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_a_changed_law_is_told_and_nothing_is_combined_for_good(change):
    run = Run(decay=TWO).train(6)
    other = Run(**{"decay": TWO, **change})
    with pytest.warns(UserWarning, match="have another decay than in the checkpoint"):
        other.load(run.save())
    saved = other.train(6).save()
    for later in (other, Run(**{"decay": TWO, **change}).load(saved)):
        later.optimizer.get_ema_state(later.model, decay="long")
        with pytest.raises(ValueError, match="decay was changed"):
            later.optimizer.get_ema_state(later.model, decay=0.25)
    other.optimizer.reset()
    assert other.train(9).optimizer.get_ema_state(other.model, decay=other.optimizer._ema.decay)


def test_a_changed_decay_of_one_window_is_marked_in_silence():
    run = Run(decay=0.5).load(Run(decay=0.25).train(4).save()).train(1)
    assert '"changed": true' in run.optimizer.state_dict()["param_groups"][0]["ema_format"]
    same_again = Run(decay=0.25).load(Run(decay=0.25).train(4).save())
    assert same_again.optimizer.get_ema_state(same_again.model, decay=0.25)


@pytest.mark.parametrize("decay", [equal_average(), lambda update: 0.5], ids=["package", "own"])
def test_a_law_of_the_package_or_of_the_users_own_is_the_same_after_a_file(decay):
    saved = Run(decay={"short": 0.25, "mean": decay}).train(4).save()
    run = Run(decay={"short": 0.25, "mean": decay}).load(saved)
    assert same(run.optimizer.get_ema_state(run.model, decay=decay), windows(run)["mean"])


def test_a_checkpoint_without_a_law_is_that_of_the_same_decay():
    saved = Run(decay=0.25).train(4).save()
    saved["o"]["param_groups"][0]["ema_format"] = "default; without=none"
    run = Run(decay=0.25).load(saved)
    assert same(run.optimizer.get_ema_state(run.model, decay=0.25), run.ema())


def flattened(run):
    return get_optimizer_state_dict(run.model, run.optimizer, options=OPTIONS["flattened"])


FORMS = {
    "torch": lambda run: run.optimizer.state_dict(),
    "names": lambda run: get_optimizer_state_dict(run.model, run.optimizer),
    "flattened": flattened,
    "carried": lambda run: carry(run.optimizer.state_dict()),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_stripped_checkpoint_has_nothing_of_any_window(form):
    state = FORMS[form](Run(decay=TWO).train(3))
    assert "ema:long" in str(state)
    assert "ema" not in str(strip_ema_state_dict(state))


@pytest.mark.parametrize("layout", OPTIONS)
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_distributed_load_into_fewer_windows_tells_of_the_others(tmp_path, layout):
    run, other = Run(decay=TWO).train(5), Run(seed=7, decay=TWO["short"])
    dcp.save(state_of(run.model, run.optimizer, layout), checkpoint_id=tmp_path)
    with pytest.warns(UserWarning, match=r"windows \['long'\].*dropped") as told:
        load(other.model, other.optimizer, tmp_path, layout)
    assert len([warning for warning in told if warning.category is EMAWarning]) == 1
    assert same(other.ema(), run.ema())


def test_an_optimizer_wrapped_after_its_load_forgets_every_window():
    saved, run = Run(decay=TWO).train(3).save(), Run(decay=TWO)
    inner = AdamW(run.model.parameters())
    inner.load_state_dict(saved["o"])
    with pytest.warns(UserWarning, match="Wrap first"):
        EMAOptimizer(inner, TWO)
    assert not any(key.startswith("ema") for entry in inner.state.values() for key in entry)


def test_an_entry_that_is_assigned_is_that_of_its_window():
    run = Run(decay=TWO, ema_dtype="float24").train(4)
    state = run.optimizer.state
    before = copy.deepcopy(run.optimizer.state_dict()["state"])
    for param in run.model.parameters():  # as Lightning moves a state, tensor by tensor
        for key, value in list(state[param].items()):
            state[param][key] = value.clone() if torch.is_tensor(value) else value
    assert same(run.optimizer.state_dict()["state"], before)
    state[run.model[0].weight]["ema:long"] = torch.zeros(5, 4)
    assert not windows(run)["long"]["0.weight"].abs().gt(1e-2).any()
    assert same(run.optimizer.state_dict()["state"][0]["ema"], before[0]["ema"])
