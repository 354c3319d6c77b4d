"""The doors speak one language, several swap as one, and a beginner's mistakes are told."""

import contextlib
import gc
import inspect
import warnings

import interrupts
import pytest
import torch
from interrupts import Interrupt, Tracer
from reference import same
from torch import nn
from torch.optim import SGD, AdamW

from ema_optim import EMAModel, EMAOptimizer, swap_ema_weights, warmup_decay

VERBS = ["swap_ema_weights", "use_ema", "apply_ema", "get_ema_state", "load_ema_state"]
OTHERS = ["reset", "ema_metrics", "state_dict", "load_state_dict", "swapped", "decay"]


def optimizer_of(model, decay=0.5, **options):
    return EMAOptimizer(SGD(model.parameters(), lr=0.1), decay, **options)


def train(owner, model, steps=5):
    for step in range(steps):
        for param in model.parameters():
            param.grad = torch.full_like(param, 1.0 + step)
        if isinstance(owner, EMAModel):
            SGD(model.parameters(), lr=0.1).step()
            owner.update()
        else:
            owner.step()


def trained(door=optimizer_of, dtype=torch.float32):
    model = nn.Linear(3, 2).to(dtype)
    owner = door(model, 0.5)
    train(owner, model)
    return owner, model


def state_of(owner, model):
    return owner.get_ema_state() if isinstance(owner, EMAModel) else owner.get_ema_state(model)


@pytest.mark.parametrize("door", [EMAOptimizer, EMAModel])
@pytest.mark.parametrize("verb", VERBS + OTHERS)
def test_each_verb_is_on_each_door(door, verb):
    assert inspect.getdoc(getattr(door, verb))


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_takes_the_same_on_each_door(verb):
    doors = [inspect.signature(getattr(door, verb)).parameters for door in (EMAOptimizer, EMAModel)]
    optimizers, models = ([p for p in door.values() if p.name != "model"] for door in doors)
    assert optimizers == models


@pytest.mark.parametrize("door", [optimizer_of, EMAModel])
def test_both_spellings_of_a_swap_are_one(door):
    owner, model = trained(door)
    for block in (owner.swap_ema_weights, owner.use_ema):
        with block():
            assert owner.swapped
            assert same(dict(model.named_parameters()), state_of(owner, model))
        with block(enabled=False):
            assert not owner.swapped


@pytest.mark.parametrize("decay", [0.9, warmup_decay(0.9)])
def test_the_decay_can_be_read(decay):
    model = nn.Linear(2, 2)
    assert EMAModel(model, decay).decay is decay
    assert optimizer_of(model, decay).decay is decay


def test_repr_of_an_ema_model_says_what_it_is():
    ema = EMAModel(nn.Linear(2, 2), 0.9, update_every=2, use_buffers=True)
    assert repr(ema) == (
        "EMAModel (decay=0.9, update_every=2, update_after_step=0, use_buffers=True, "
        "swapped=False) of Linear, 6 averaged numbers"
    )


@pytest.mark.parametrize("options", [{}, {"update_after_step": 3}, {"dtype": "float24"}])
def test_a_loaded_ema_is_averaged_into_by_an_ema_model(options):
    ema, model = trained(EMAModel)
    state, fresh = ema.get_ema_state(), EMAModel(model, 0.5, **options)
    fresh.load_ema_state(state)
    assert fresh.get_ema_state().keys() == state.keys()
    train(fresh, model, 1)
    for name, param in model.named_parameters():
        expected = torch.lerp(param.detach(), state[name], 0.5)
        torch.testing.assert_close(fresh.get_ema_state()[name], expected, rtol=2e-4, atol=1e-6)


def test_a_loaded_ema_holds_averaged_buffers_too():
    models = [nn.BatchNorm1d(2), nn.BatchNorm1d(2)]
    first, second = (EMAModel(model, 0.5, use_buffers=True) for model in models)
    models[0](torch.randn(8, 2))
    train(first, models[0])
    second.load_ema_state(first.get_ema_state())
    assert same(first.get_ema_state(), second.get_ema_state())


def test_names_of_a_loaded_ema_are_checked_and_nothing_changes():
    ema, _model = trained(EMAModel)
    before = ema.get_ema_state()
    with pytest.raises(KeyError, match=r"missing: \['bias'\], unknown: \['other'\]"):
        ema.load_ema_state({"weight": before["weight"], "other": torch.zeros(2)})
    with pytest.raises(ValueError, match="EMA of weight must have shape"):
        ema.load_ema_state({"weight": torch.zeros(1), "bias": before["bias"]})
    assert same(ema.get_ema_state(), before)
    ema.load_ema_state({"bias": torch.zeros(2), "other": torch.zeros(2)}, strict=False)
    assert not ema.get_ema_state()["bias"].any()
    with ema.use_ema(), pytest.raises(RuntimeError, match="leave the block first"):
        ema.load_ema_state(before)


# Several as one

_MADE = "ema_optim._shadow.blocks._Block"


class Pair:
    """Three owners of both doors and dtypes, as ``interrupts`` drives them."""

    def __init__(self):
        torch.manual_seed(0)
        kinds = [(optimizer_of, torch.float32), (EMAModel, torch.bfloat16), (optimizer_of,)]
        self.owned = [trained(*kind) for kind in kinds]
        self.owners = [owner for owner, _ in self.owned]
        self.weights, self.emas = self.now()

    def now(self):
        weights = [[p.detach().clone() for p in model.parameters()] for _, model in self.owned]
        return weights, [state_of(*owned) for owned in self.owned]

    def block(self):
        with swap_ema_weights(self.owners):
            pass

    def whole(self):
        for owner in self.owners:  # whoever comes next
            owner.ema_metrics()
        weights, emas = self.now()
        kept = same(weights, self.weights) and same(emas, self.emas)
        return kept and not any(owner.swapped for owner in self.owners)


def test_several_are_swapped_as_one():
    pair = Pair()
    with swap_ema_weights(pair.owners):
        assert all(owner.swapped for owner in pair.owners)
        for (_, model), ema in zip(pair.owned, pair.emas, strict=True):
            shown = {name: value.to(model.weight.dtype) for name, value in ema.items()}
            assert same(dict(model.named_parameters()), shown)
    assert pair.whole()


def test_several_are_put_back_when_the_block_raises():
    pair = Pair()
    with pytest.raises(KeyError), swap_ema_weights(pair.owners):
        raise KeyError
    assert pair.whole()


@pytest.mark.parametrize("which", range(3))
def test_when_one_cannot_be_swapped_none_is(which):
    pair = Pair()
    with pair.owners[which].swap_ema_weights():
        with pytest.raises(RuntimeError, match="leave the block first"):
            pair.block()
        assert [owner.swapped for owner in pair.owners] == [i == which for i in range(3)]
    assert pair.whole()


def test_more_than_a_thousand_are_swapped_as_one():
    # An optimizer for every parameter, as in-backward optimizers are: GPT-2 XL has 580.
    params = [nn.Parameter(torch.zeros(1)) for _ in range(1100)]
    optimizers = [EMAOptimizer(SGD([p], lr=0.1), decay=0.1) for p in params]
    for p, optimizer in zip(params, optimizers, strict=True):
        p.grad = torch.ones(1)
        optimizer.step()
    with swap_ema_weights(optimizers):
        assert {p.item() for p in params} == {params[0].item()}
        assert all(optimizer.swapped for optimizer in optimizers)
    assert not any(optimizer.swapped for optimizer in optimizers)


def test_disabled_nothing_is_swapped():
    pair = Pair()
    with swap_ema_weights(pair.owners, enabled=False):
        assert pair.whole()


def test_an_interrupt_at_any_line_of_a_swap_of_several_loses_nothing(monkeypatch):
    files = (*interrupts.FILES, "blocks.py", "buffers.py")
    monkeypatch.setattr(interrupts, "FILES", files)
    monkeypatch.delattr(f"{_MADE}.__del__")  # interrupted before it is entered, a block warns
    (whole := Tracer()).run(Pair().block)
    assert whole.lines > 100
    for at in range(1, whole.lines + 1, 3):
        pair = Pair()
        with contextlib.suppress(Interrupt):
            Tracer(at).run(pair.block)
        assert pair.whole(), at
    gc.collect()  # a tracer and its frames hold each other


def test_an_interrupt_whose_traceback_is_kept_loses_nothing(monkeypatch):
    files = (*interrupts.FILES, "blocks.py")
    monkeypatch.setattr(interrupts, "FILES", files)
    monkeypatch.delattr(f"{_MADE}.__del__")  # interrupted before it is entered, a block warns
    kept = []
    for at in range(1, 400, 7):
        pair = Pair()
        try:
            Tracer(at).run(pair.block)
        except Interrupt as error:
            kept.append(error)
        assert pair.whole(), at
    assert kept
    kept.clear()
    gc.collect()


@pytest.mark.parametrize(
    ("owners", "error", "message"),
    [
        (lambda: trained()[0], TypeError, "for one, call its own swap_ema_weights()"),
        (lambda: [SGD([nn.Parameter(torch.ones(1))], 0.1)], TypeError, "pass the EMAOptimizer its"),
        (lambda: [trained()[0]] * 2, ValueError, "each optimizer once"),
    ],
)
def test_what_is_not_several_averages_is_refused(owners, error, message):
    with pytest.raises(error, match=message), swap_ema_weights(owners()):
        pass


# Mistakes of a first hour


def whole_checkpoint(optimizer, model):
    return {"epoch": 3, "model": model.state_dict(), "optimizer": optimizer.state_dict()}


MISTAKES = [
    (lambda o, e, m: EMAOptimizer(m.parameters()), r"AdamW\(model.parameters\(\), ...\)"),
    (lambda o, e, m: EMAOptimizer(list(m.parameters())), r"pass a built optimizer"),
    (lambda o, e, m: EMAOptimizer(m), r"or use EMAModel\(model\)"),
    (lambda o, e, m: EMAOptimizer(AdamW), "EMAOptimizer.for_class"),
    (lambda o, e, m: EMAOptimizer(o), "use that one"),
    (lambda o, e, m: EMAOptimizer(e), "use one of the two"),
    (lambda o, e, m: EMAModel(m.parameters()), "pass the model itself"),
    (lambda o, e, m: EMAModel(o), r"there is EMAOptimizer\(optimizer\)"),
    (lambda o, e, m: EMAModel(m, dtype=torch.float16), "narrow ones of these are rounded"),
    (lambda o, e, m: o.load_state_dict("a.pt"), r"the path 'a.pt': pass what torch.load\(\)"),
    (lambda o, e, m: e.load_state_dict("a.pt"), r"the path 'a.pt': pass what torch.load\(\)"),
    (lambda o, e, m: o.load_state_dict(None), "it is no checkpoint"),
    (
        lambda o, e, m: o.load_state_dict(whole_checkpoint(o, m)),
        r"pass .*checkpoint\['optimizer'\]",
    ),
    (lambda o, e, m: e.load_state_dict({"ema": e.state_dict()}), r"pass .*checkpoint\['ema'\]"),
    (lambda o, e, m: o.load_state_dict(m.state_dict()), r"pass it to model.load_state_dict\(\)"),
    (lambda o, e, m: e.load_state_dict(m.state_dict()), r"pass it to model.load_state_dict\(\)"),
    (lambda o, e, m: o.load_state_dict({"a": 1}), "it is no optimizer's checkpoint"),
    (
        lambda o, e, m: o.get_ema_state("model"),
        "model must be a torch.nn.Module, got <class 'str'>",
    ),
    (lambda o, e, m: o.load_ema_state(m, "ema.pt"), r"pass what torch.load\(\) returns"),
    (lambda o, e, m: o.load_ema_state(m, whole_checkpoint(o, m)), r"goes to load_state_dict\(\)"),
    (lambda o, e, m: e.load_ema_state(e.state_dict()), r"pass what get_ema_state\(\) returned"),
    (lambda o, e, m: o.load_ema_state(m.state_dict(), m), "state must hold tensors by parameter"),
    (lambda o, e, m: o.apply_ema(m), r"apply_ema\(\) takes no model"),
]


@pytest.mark.parametrize(("mistake", "remedy"), MISTAKES)
def test_a_mistake_is_an_error_that_names_the_remedy_and_changes_nothing(mistake, remedy):
    (optimizer, model), (ema, _other) = trained(), trained(EMAModel)
    before = state_of(optimizer, model), ema.get_ema_state()
    with pytest.raises((TypeError, ValueError), match=remedy):
        mistake(optimizer, ema, model)
    assert same((state_of(optimizer, model), ema.get_ema_state()), before)


@pytest.mark.parametrize("verb", ["swap_ema_weights", "use_ema"])
@pytest.mark.parametrize("door", [optimizer_of, EMAModel])
def test_a_swap_without_with_warns_at_the_users_line(door, verb):
    owner, _ = trained(door)
    with pytest.warns(UserWarning, match=r"\(\) without `with` swaps nothing") as caught:
        getattr(owner, verb)()
    assert caught[0].filename == __file__
    assert not owner.swapped


def test_several_without_with_warn():
    with pytest.warns(UserWarning, match="without `with`"):
        swap_ema_weights([trained()[0]])


def test_a_block_that_is_used_in_another_way_warns_of_nothing():
    owner, _ = trained()

    @owner.swap_ema_weights()
    def inside():
        return owner.swapped

    with warnings.catch_warnings(), contextlib.ExitStack() as stack:
        warnings.simplefilter("error")
        assert inside()
        assert inside()
        del inside
        stack.enter_context(owner.swap_ema_weights())
        assert owner.swapped


def test_steps_of_the_inner_optimizer_are_told_at_the_swap():
    model = nn.Linear(2, 2)
    optimizer = EMAOptimizer(SGD(model.parameters(), lr=0.1, momentum=0.9))
    model(torch.ones(1, 2)).sum().backward()
    optimizer.inner.step()
    with pytest.warns(UserWarning, match="not its inner"), optimizer.swap_ema_weights():
        pass
