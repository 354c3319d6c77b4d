"""Several windows in one object: each is the EMA of a run of its own, read by name or by law."""

import contextlib
import copy
import math
import pickle

import pytest
import torch
from interrupts import Interrupt, Run, Tracer
from models import move, net
from reference import same
from runs import Run as Training
from steps import param, train, train_alike
from torch.optim import SGD, AdamW

from ema_optim import EMAModel, EMAOptimizer, power_decay, swap_ema_weights
from ema_optim._arithmetic.formats import FORMATS

pytestmark = pytest.mark.filterwarnings("ignore:an EMA in bfloat16")

SHORT, LONG = 0.25, 0.5
TWO = {"short": SHORT, "long": LONG}
OPTIONS = [
    {},
    {"decay": {"short": power_decay(0.1), "long": power_decay(0.2)}},
    {"update_every": 3, "update_after_step": 2},
    {"dtype": torch.bfloat16, "skip_non_finite": True},
    *({"ema_dtype": format} for format in FORMATS),
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_window_is_the_ema_of_a_run_of_its_own_bit_for_bit(options):
    options = {"decay": TWO, **options}
    run = Training(**options).train(14)
    for name, decay in options["decay"].items():
        alone = Training(**{**options, "decay": decay}).train(14)
        assert same(run.weights(), alone.weights())
        assert same(run.optimizer.get_ema_state(run.model, decay=name), alone.ema())


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_the_first_window_has_the_entries_of_an_ema_alone(format):
    run = Training(decay=TWO, ema_dtype=format).train(5)
    alone = Training(decay=SHORT, ema_dtype=format).train(5).optimizer.state_dict()
    saved = run.optimizer.state_dict()
    for group in (*saved["param_groups"], *alone["param_groups"]):
        assert group.pop("ema_format").startswith("default" if format is None else "")
    for entry in saved["state"].values():
        further = {key for key in entry if key.startswith("ema:")}
        lows = {"ema:long:low"} if FORMATS[format].low else set()
        assert further == {"ema:long"} | lows
        for key in further:
            del entry[key]
    assert same(saved, alone)


@pytest.mark.parametrize("use_buffers", [False, True])
def test_windows_of_a_model_are_those_of_models_of_their_own(use_buffers):
    found = {}
    for decay in (TWO, SHORT, LONG):
        model = net()
        move(model, 6, ema := EMAModel(model, decay, use_buffers=use_buffers))
        found[str(decay)] = ema
    for name, decay in TWO.items():
        both = found[str(TWO)].get_ema_state(decay=name)
        assert same(both, found[str(decay)].get_ema_state())


def test_metrics_of_every_window_are_those_of_a_run_of_its_own():
    run, told = Training(decay=TWO).train(5), {}
    for name, decay in TWO.items():
        own = Training(decay=decay).train(5).optimizer.ema_metrics()
        told |= own if name == "short" else {f"{k}/{name}": v for k, v in own.items()}
    del told["ema_updates/long"]
    assert run.optimizer.ema_metrics() == told
    with run.optimizer.swap_ema_weights():
        assert run.optimizer.ema_metrics() == told
    with run.optimizer.swap_ema_weights(decay="long"):
        assert run.optimizer.ema_metrics() == told


def walk(decay, steps=1000):
    """A random walk: updates of one size, uncorrelated."""
    torch.manual_seed(0)
    weights = torch.nn.Parameter(torch.zeros(400))
    optimizer = EMAOptimizer(SGD([weights], lr=1.0), decay)
    train(optimizer, steps)
    return weights, optimizer


def test_a_combination_has_the_coefficients_of_50_digits():
    weights, optimizer = walk({"a": power_decay(0.05), "b": power_decay(0.10)})
    model = torch.nn.ParameterList([weights])
    kept = [optimizer.get_ema_state(model, decay=name)["0"] for name in "ab"]
    # x and the told error of power .05 and .10 to .075 after 1,000 steps, computed with 50 digits
    wanted = 0.475159712827 * kept[0].double() + 0.524840287173 * kept[1].double()
    made = optimizer.get_ema_state(model, decay=power_decay(0.075))["0"]
    assert torch.allclose(made.double(), wanted, rtol=1e-6)
    for limit in (0.0441495, 0.0441494):
        refused = pytest.raises(ValueError, match=r"told error is 0\.044 .* larger max_error")
        with refused if limit < 0.04414945 else contextlib.nullcontext():
            optimizer.get_ema_state(model, decay=power_decay(0.075), max_error=limit)


def test_a_combination_is_off_by_what_is_told():
    target, found = power_decay(0.075), []
    for decay in ({"a": power_decay(0.05), "b": power_decay(0.10)}, target):
        weights, optimizer = walk(decay)
        found.append(optimizer.get_ema_state(torch.nn.ParameterList([weights]), decay=target)["0"])
    made, ema = found
    measured = (made - ema).norm() / (weights - ema).norm()
    assert measured.item() == pytest.approx(0.0441494577346, rel=0.15)


@pytest.mark.parametrize("decay", ["long", LONG, 0.4], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_swap_shows_what_is_read_and_puts_the_training_weights_back(decay, dtype):
    run, which = Training(dtype, decay=TWO).train(5), {"decay": decay, "max_error": 0.2}
    weights, emas = run.weights(), run.ema()
    shown = run.optimizer.get_ema_state(run.model, **which)
    assert not same(shown, emas)
    with contextlib.suppress(KeyError), run.optimizer.swap_ema_weights(**which):
        assert same(run.weights(), {name: ema.to(dtype) for name, ema in shown.items()})
        assert same(run.optimizer.get_ema_state(run.model, **which), shown)
        assert same(run.ema(), emas)
        raise KeyError
    assert same(run.weights(), weights)
    assert same(run.ema(), emas)


def test_the_first_window_by_name_or_law_is_exchanged_in_place():
    run = Training(decay=TWO).train(5)
    for decay in ("short", SHORT):
        with run.optimizer.swap_ema_weights(decay=decay):
            assert all(slot.parked is None for slot in run.optimizer._ema.swapped.values())
            run.optimizer.state_dict()


def test_parameters_that_share_memory_come_back_from_another_window():
    whole = torch.nn.Parameter(torch.randn(6))
    part = torch.nn.Parameter(whole.data[2:4])
    optimizer = EMAOptimizer(SGD([whole, part], lr=0.1), TWO)
    train(optimizer, 6)
    before = whole.detach().clone()
    with optimizer.swap_ema_weights(decay="long"):
        assert not torch.equal(whole, before)
    assert torch.equal(whole, before)


@pytest.mark.parametrize("inside", [None, "short", "long"])
@pytest.mark.parametrize("decay", [None, "long"])
def test_apply_makes_the_window_the_training_weights(inside, decay):
    run = Training(decay=TWO).train(5)
    emas = {name: run.optimizer.get_ema_state(run.model, decay=name) for name in TWO}
    with run.optimizer.swap_ema_weights(inside is not None, decay=inside):
        run.optimizer.apply_ema(decay=decay)
        assert not run.optimizer.swapped
    assert same(run.weights(), emas[decay or "short"])
    for name in TWO:
        assert same(run.optimizer.get_ema_state(run.model, decay=name), emas[name])
    run.train(1)


def test_a_state_dict_inside_a_block_of_another_window_is_refused():
    run = Training(decay=TWO).train(5)
    with run.optimizer.swap_ema_weights(decay="long"):
        for other in (run.optimizer, copy.deepcopy(run.optimizer)):
            with pytest.raises(RuntimeError, match="leave the block"):
                other.state_dict()
        with pytest.raises(RuntimeError, match="leave the block first"):
            run.optimizer.step()
    run.optimizer.state_dict()


def test_a_copy_made_inside_a_block_puts_its_own_training_weights_back():
    run = Training(decay=TWO).train(5)
    weights = run.weights()
    with run.optimizer.swap_ema_weights(decay="long"):
        model, optimizer = pickle.loads(pickle.dumps((run.model, run.optimizer)))
    optimizer.train()
    assert same(dict(model.named_parameters()), weights)
    assert same(
        optimizer.get_ema_state(model, decay="long"),
        run.optimizer.get_ema_state(run.model, decay="long"),
    )


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interrupt_at_any_line_of_a_swap_of_another_window_loses_nothing():
    class Windows(Run):
        def block(self):
            with self.ema.swap_ema_weights(decay="long"):
                pass

    def built():
        run = Windows(torch.bfloat16)
        run.ema = EMAOptimizer(run.inner, {"short": 0.1, "long": 0.2})
        for _ in range(3):
            run.step()
        run.expected = run.weights(), run.averages()
        return run

    tracer = Tracer()
    tracer.run(built().block)
    for at in range(1, tracer.lines + 1):
        run = built()
        with contextlib.suppress(Interrupt):
            Tracer(at).run(run.block)
        run.ema.state_dict()
        assert run.whole(), at


def test_a_parameter_that_was_added_later_is_combined_by_its_own_count():
    early, late = param(3), param(4)
    twin = torch.nn.Parameter(late.detach().clone())
    optimizer = EMAOptimizer(SGD([early], lr=0.1), {"a": power_decay(0.1), "b": power_decay(0.2)})
    train_alike(optimizer, 20)
    optimizer.add_param_group({"params": [late]})
    train_alike(optimizer, 9)
    alone = EMAOptimizer(SGD([twin], lr=0.1), {"a": power_decay(0.1), "b": power_decay(0.2)})
    train_alike(alone, 9)
    which = {"decay": power_decay(0.15), "max_error": 0.5}
    found = optimizer.get_ema_state(torch.nn.ParameterList([early, late]), **which)
    assert torch.equal(
        found["1"], alone.get_ema_state(torch.nn.ParameterList([twin]), **which)["0"]
    )


def test_reset_and_loaded_weights_begin_every_window():
    run = Training(decay=TWO).train(5)
    run.optimizer.reset()
    run.train(4, seed=1)
    fresh = Training(decay=TWO)
    state = {name: weights + 1 for name, weights in fresh.weights().items()}
    fresh.optimizer.load_ema_state(fresh.model, state)
    for name in TWO:
        assert same(fresh.optimizer.get_ema_state(fresh.model, decay=name), state)
    assert fresh.train(3).optimizer.ema_metrics()["ema_initial_share/long"] == 0.0
    with pytest.raises(ValueError, match=r"load_ema_state\(\)"):
        fresh.optimizer.get_ema_state(fresh.model, decay=0.4)


def test_windows_follow_a_parameter_that_is_replaced():
    old, inner = param(3), None
    inner = SGD([old], lr=0.1, momentum=0.9)
    optimizer = EMAOptimizer(inner, TWO)
    train_alike(optimizer, 4)
    kept = {key: optimizer.state[old][key].clone() for key in ("ema", "ema:long", "ema_step")}
    new, entry = torch.nn.Parameter(old.detach().clone()), optimizer.state.pop(old)
    assert entry.keys() > {"ema:long"}
    optimizer.param_groups[0]["params"][0] = new
    optimizer.state[new] = entry
    assert same({key: optimizer.state[new][key] for key in kept}, kept)


def test_a_live_teacher_may_be_another_window():
    run = Training(decay=TWO).train(5)
    live = run.optimizer.get_ema_state(run.model, decay="long", copy=False)
    assert same(live, run.optimizer.get_ema_state(run.model, decay="long"))
    entries = [entry["ema:long"] for entry in run.optimizer.state.values()]
    assert {t.data_ptr() for t in live.values()} == {t.data_ptr() for t in entries}
    with pytest.raises(ValueError, match="a combination is a copy"):
        run.optimizer.get_ema_state(run.model, decay=0.4, max_error=0.5, copy=False)


WRONG = [
    ({}, ValueError, "at least one window"),
    ({"a b": 0.5}, ValueError, "identifiers, got 'a b'"),
    ({1: 0.5}, ValueError, "identifiers, got 1"),
    ({"a": 1.5}, ValueError, "window a: decay must be in"),
    ({"a": 0.5, "b": {"c": 0.5}}, TypeError, "window b: decay must be a float or a callable"),
]


@pytest.mark.parametrize(("decay", "error", "message"), WRONG, ids=str)
@pytest.mark.parametrize("door", [EMAOptimizer, EMAModel])
def test_windows_that_cannot_be_are_refused(decay, error, message, door):
    model = torch.nn.Linear(2, 2)
    owner = AdamW(model.parameters()) if door is EMAOptimizer else model
    with pytest.raises(error, match=message):
        door(owner, decay)


CHOICES = [
    ({"decay": "later"}, ValueError, r"one of the windows \['short', 'long'\] or a decay"),
    ({"decay": 1.5}, ValueError, "decay must be in"),
    ({"decay": 0.9}, ValueError, "told error is"),
    ({"decay": {"a": 0.5}}, TypeError, "must be a float or a callable"),
    ({"decay": 0.4, "max_error": -1}, ValueError, "max_error must be at least 0, got -1"),
    ({"decay": 0.4, "max_error": math.nan}, ValueError, "max_error must be at least 0"),
    ({"decay": 0.4, "max_error": "5 %"}, TypeError, "max_error must be a real number"),
]


@pytest.mark.parametrize(("which", "error", "message"), CHOICES, ids=str)
def test_a_choice_that_cannot_be_is_refused_before_anything_moves(which, error, message):
    run = Training(decay=TWO).train(5)
    before = run.facts()
    with pytest.raises(error, match=message), run.optimizer.swap_ema_weights(**which):
        pass
    with pytest.raises(error, match=message):
        run.optimizer.apply_ema(**which)
    with pytest.raises(error, match=message):
        run.optimizer.get_ema_state(run.model, **which)
    assert same(run.facts(), before)


@pytest.mark.parametrize("given", ["long", LONG, power_decay(0.1)])
def test_an_average_without_its_keyword_is_refused_and_not_taken_for_true(given):
    run, model = Training(decay=TWO).train(5), torch.nn.Linear(2, 2)
    ema = EMAModel(model, TWO)
    pairs = [(swap_ema_weights, ([run.optimizer], given)), (ema.use_ema, (given,))]
    for swap, arguments in [*pairs, (run.optimizer.swap_ema_weights, (given,))]:
        with pytest.raises(TypeError, match="named by decay="), swap(*arguments):
            pass
    for door in (run.optimizer, ema):
        with pytest.raises(TypeError, match=r"apply_ema\(\) takes no model"):
            door.apply_ema(given)


def test_apply_ema_of_a_model_says_what_to_do():
    run = Training(decay=TWO).train(5)
    before = run.facts()
    with pytest.raises(TypeError, match=r"takes no model, got .*Sequential.*get_ema_state\(\)"):
        run.optimizer.apply_ema(run.model)
    assert same(run.facts(), before)


def test_a_decay_of_a_group_beside_several_windows_is_refused():
    first, second = param(2), param(3)
    with pytest.raises(ValueError, match="leave it out"):
        EMAOptimizer(SGD([{"params": [first], "ema_decay": 0.5}], lr=0.1), TWO)
    optimizer = EMAOptimizer(SGD([first], lr=0.1), TWO)
    with pytest.raises(ValueError, match="leave it out"):
        optimizer.add_param_group({"params": [second], "ema_decay": 0.5})
    assert len(optimizer.param_groups) == 1
    train_alike(optimizer)
    optimizer.param_groups[0]["ema_decay"], before = 0.5, first.detach().clone()
    with pytest.raises(ValueError, match="leave it out"):
        train_alike(optimizer)
    assert torch.equal(first, before)


def test_one_window_is_chosen_by_its_own_law_alone():
    run = Training(decay=SHORT).train(4)
    assert same(run.optimizer.get_ema_state(run.model, decay=SHORT), run.ema())
    assert same(run.optimizer.get_ema_state(run.model, decay="ema"), run.ema())
    with pytest.raises(ValueError, match="told error"):
        run.optimizer.get_ema_state(run.model, decay=LONG)
    run.optimizer.param_groups[0]["ema_decay"] = SHORT
    with pytest.raises(ValueError, match="their param group"):
        run.optimizer.get_ema_state(run.model, decay=LONG)
