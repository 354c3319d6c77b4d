"""``EMACallback(use_buffers=...)``: running statistics go wherever the EMA weights go."""

import copy
import re
import warnings

import pytest
import torch
from interrupts import Interrupt, Tracer
from reference import same
from safetensors.torch import load_file
from trainers import (
    DECAY,
    DOORS,
    FP16,
    Plain,
    Stops,
    best,
    facts,
    fit,
    llama,
    make,
    plain,
    saves,
    trainable,
    weights,
)
from transformers import PretrainedConfig, PreTrainedModel, TrainerCallback

from ema_optim import EMACallback, EMAModel, EMAWarning, _warnings, export_ema
from ema_optim.integrations import _buffers

MEAN, VAR = "norm.running_mean", "norm.running_var"


class Normed(PreTrainedModel):
    """BatchNorm in a model that ``from_pretrained`` knows."""

    config_class = PretrainedConfig

    def __init__(self, config):
        super().__init__(config)
        self.net = Plain()
        self.post_init()

    def _init_weights(self, module):
        pass

    def forward(self, input_ids, labels):
        return self.net(input_ids, labels)


def normed(seed=0):
    torch.manual_seed(seed)
    return Normed(PretrainedConfig())


def narrow(seed=0):
    return plain(seed).bfloat16()


class Twin(TrainerCallback):
    """An ``EMAModel`` beside, updated wherever the weights have moved; the averages by step."""

    def __init__(self, model, use_buffers=True, **options):
        self.model, self.given, self.states = model, {"use_buffers": use_buffers, **options}, {}

    def on_train_begin(self, args, state, control, **kwargs):
        self.ema, self.before = EMAModel(self.model, DECAY, **self.given), self.now()

    def now(self):
        return [p.detach().clone() for p in trainable(self.model)]

    def on_step_end(self, args, state, control, **kwargs):
        before, self.before = self.before, self.now()
        if not same(before, self.before):
            self.ema.update()
        if state.global_step > 2:  # until then some have averaged nothing
            self.states[state.global_step] = self.ema.get_ema_state()


OPTIONS = {
    "default": (plain, {}, {}),
    "of a PreTrainedModel": (normed, {}, {}),
    "every second": (plain, {"update_every": 2}, {}),
    "late": (plain, {"update_after_step": 2}, {}),
    "bf16": (narrow, {}, {}),
    "named": (plain, {"use_buffers": ["*.running_m*"]}, {}),
    "overflows": (plain, {}, FP16),
    "warm-up from 0": (plain, {}, {"warmup_steps": 3}),
}


# EMAModel is the oracle: its buffers are tested against float64 and against torch's own class.
@pytest.mark.parametrize(("build", "options", "arguments"), OPTIONS.values(), ids=OPTIONS)
def test_buffers_are_averaged_as_by_an_ema_model(tmp_path, build, options, arguments):
    model, wanted = build(), {"use_buffers": True, **options}
    callback, twin = EMACallback(DECAY, **wanted), Twin(model, **wanted)
    fit(model, tmp_path, callback, twin, **saves(4, evaluate=2), **arguments)
    state = callback.get_ema_state()
    assert same(state, twin.states[8])
    assert any(name.endswith(MEAN) for name in state)
    assert any(name.endswith(VAR) for name in state) == (wanted["use_buffers"] is True)


class Sees(TrainerCallback):
    """Averages one buffer by hand in float64."""

    def __init__(self, buffer):
        self.buffer, self.ema = buffer, buffer.double()

    def on_step_end(self, args, state, control, **kwargs):
        self.ema = DECAY * self.ema + (1 - DECAY) * self.buffer.double()


def test_average_of_a_buffer_is_that_of_the_formula(tmp_path):
    model, callback = plain(), EMACallback(DECAY, use_buffers=True)
    sees = Sees(model.norm.running_var)
    fit(model, tmp_path, callback, sees)
    torch.testing.assert_close(callback.get_ema_state()[VAR].double(), sees.ema, rtol=1e-6, atol=0)


@pytest.mark.parametrize("build", [plain, narrow, normed])
def test_training_with_buffers_is_bit_equal_to_one_without_the_callback(tmp_path, build):
    bare = fit(build(), tmp_path / "bare", **saves(4, evaluate=2))
    callback = EMACallback(DECAY, use_buffers=True)
    trainer = fit(build(), tmp_path / "ema", callback, **saves(4, evaluate=2))
    assert same(weights(trainer.model), weights(bare.model))
    assert not same(callback.get_ema_state(), weights(bare.model))


@pytest.mark.parametrize("build", [plain, narrow])
def test_evaluation_is_that_of_the_ema_weights_with_averaged_statistics(tmp_path, build):
    model, other = build(), build(1)
    twin = Twin(model)
    trainer = fit(
        model, tmp_path, EMACallback(DECAY, use_buffers=True), twin, **saves(8, evaluate=4)
    )
    other.load_state_dict(weights(model))
    other.load_state_dict(twin.states[8], strict=False)
    expected = make(other, tmp_path / "other").evaluate()["eval_loss"]
    assert [e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e][-1] == expected
    assert trainer.evaluate()["eval_loss"] == expected


@pytest.mark.parametrize("again", [False, True], ids=["new Trainer", "same Trainer"])
@pytest.mark.parametrize("build", [plain, narrow])
def test_resume_with_buffers_is_bit_equal_to_one_run(tmp_path, build, again):
    whole = EMACallback(DECAY, use_buffers=True)
    trainer = fit(build(), tmp_path, whole, **saves(4, evaluate=2))
    expected = copy.deepcopy(facts(trainer, whole))
    callback = whole if again else EMACallback(DECAY, use_buffers=True)
    if not again:
        trainer = make(build(1), tmp_path, callback, **saves(4, evaluate=2))
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    model, ema, state = facts(trainer, callback)
    assert same(model, expected[0])
    assert same(ema, expected[1])
    entries = [s["param_groups"][0]["ema_entries"]["buffers"] for s in (state, expected[2])]
    assert same(*([e["state"][VAR]["ema"]] for e in entries))


def test_second_training_goes_on_averaging(tmp_path):
    model, callback = plain(), EMACallback(DECAY, use_buffers=True)
    twin = Twin(model)
    trainer = make(model, tmp_path, callback, twin)
    trainer.train()
    twin.on_train_begin = lambda *args, **kwargs: None
    trainer.train()
    assert same(callback.get_ema_state(), twin.ema.get_ema_state())


def test_checkpoint_without_averaged_buffers_resumes_with_a_warning(tmp_path):
    fit(plain(), tmp_path, EMACallback(DECAY, use_buffers=False), **saves(4))
    callback = EMACallback(DECAY, use_buffers=True)
    with pytest.warns(EMAWarning, match="no averaged buffers"):
        fit(plain(1), tmp_path, callback, resume=tmp_path / "checkpoint-4")
    assert MEAN in callback.get_ema_state()


def test_checkpoint_with_averaged_buffers_resumes_without_use_buffers(tmp_path):
    fit(plain(), tmp_path, EMACallback(DECAY, use_buffers=True), **saves(4))
    whole = fit(plain(), tmp_path / "whole")
    for callbacks in ([], [EMACallback(DECAY, use_buffers=False)]):
        resumed = fit(plain(1), tmp_path / "2", *callbacks, resume=tmp_path / "checkpoint-4")
        assert same(weights(resumed.model), weights(whole.model))


def test_folder_and_export_of_the_ema_deploy_the_averaged_statistics(tmp_path):
    model = normed()
    twin = Twin(model)
    fit(model, tmp_path, EMACallback(DECAY, use_buffers=True), twin, **saves(4))
    found = weights(Normed.from_pretrained(tmp_path / "checkpoint-4" / "ema"))
    assert same({name: found[name] for name in twin.states[4]}, twin.states[4])
    assert not same([found["net." + VAR]], [weights(model)["net." + VAR]])
    export_ema(tmp_path / "checkpoint-4", tmp_path / "ema.safetensors")
    assert same(load_file(tmp_path / "ema.safetensors"), twin.states[4])


@pytest.mark.parametrize("files", [{}, {"save_only_model": True}], ids=["whole", "model only"])
def test_best_model_at_the_end_has_the_averaged_statistics(tmp_path, files):
    model = normed()
    twin = Twin(model)
    trainer = fit(model, tmp_path, EMACallback(DECAY, use_buffers=True), twin, **best(**files))
    held = weights(model)
    assert same({name: held[name] for name in twin.states[4]}, twin.states[4])
    trainer.evaluate()
    assert same(weights(model), held)


def test_apply_and_restore_move_the_statistics_as_well(tmp_path):
    model, callback = plain(), EMACallback(DECAY, use_buffers=True)
    fit(model, tmp_path, callback)
    held, ema, fresh = weights(model), callback.get_ema_state(), plain(1)
    callback.apply_ema(model)
    assert same({name: weights(model)[name] for name in ema}, ema)
    callback.restore_original(model)
    assert same(weights(model), held)
    loaded = EMACallback(DECAY)
    loaded.load_ema_state(ema)
    loaded.apply_ema(fresh)
    assert same({name: weights(fresh)[name] for name in ema}, ema)


def test_load_ema_state_takes_weights_and_buffers_or_none(tmp_path):
    model, callback = plain(), EMACallback(DECAY, use_buffers=True)
    fit(model, tmp_path, callback)
    before = callback.get_ema_state()
    other = {name: value + 1 for name, value in before.items()}
    for wrong in ({k: v for k, v in other.items() if k != VAR}, {**other, "no": torch.ones(1)}):
        with pytest.raises(KeyError):
            callback.load_ema_state(wrong)
        assert same(callback.get_ema_state(), before)
    callback.load_ema_state(other)
    assert same(callback.get_ema_state(), other)


def told(model, folder, use_buffers, **arguments):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(model, folder, EMACallback(DECAY, use_buffers=use_buffers), **arguments)
    found = [w for w in caught if "running statistics" in str(w.message)]
    assert all(w.category is EMAWarning for w in found)
    return len(found)


def frozen():
    model = plain()
    model.norm.train = lambda mode=True: model.norm
    model.norm.training = False
    return model


EVALUATED, SAVED = saves(8, evaluate=2), saves(2)
TOLD = {
    "evaluated": (plain, None, EVALUATED, 1),
    "saved": (plain, None, SAVED, 1),
    "neither": (plain, None, {}, 0),
    "averaged": (plain, True, EVALUATED, 0),
    "named": (plain, [VAR], EVALUATED, 0),
    "declined": (plain, False, EVALUATED, 0),
    "without BatchNorm": (llama, None, EVALUATED, 0),
    "frozen": (frozen, None, EVALUATED, 0),
}


@pytest.mark.parametrize(("build", "use_buffers", "arguments", "count"), TOLD.values(), ids=TOLD)
def test_statistics_of_other_weights_are_told_once(
    tmp_path, monkeypatch, build, use_buffers, arguments, count
):
    monkeypatch.setattr(_warnings, "_told", {"tau", "folders"})
    assert told(build(), tmp_path, use_buffers, **arguments) == count


class Fails(TrainerCallback):
    def on_prediction_step(self, args, state, control, **kwargs):
        raise KeyboardInterrupt


@pytest.mark.parametrize("build", [plain, narrow])
def test_interrupted_evaluation_loses_neither_weights_nor_buffers(tmp_path, build):
    whole = fit(build(), tmp_path / "whole", Stops())
    model, callback = build(), EMACallback(DECAY, use_buffers=True)
    twin = Twin(model)
    with pytest.raises(KeyboardInterrupt):
        fit(model, tmp_path, callback, twin, Fails(), **saves(8, evaluate=4))
    assert not same([weights(model)[VAR]], [weights(whole.model)[VAR]])
    assert same(callback.get_ema_state(), twin.states[4])
    callback.restore_original(model)
    assert same(weights(model), weights(whole.model))


def averaged(build):
    """A wrapper as the callback makes it, after a few steps."""
    model = build()
    optimizer = _buffers.BufferedEMAOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), DECAY)
    optimizer.buffers = _buffers.BufferEMA(model, True, {"decay": DECAY})
    ids = torch.arange(24).view(2, 12) % 32
    for _ in range(3):
        optimizer.zero_grad()
        model(ids, ids)["loss"].backward()
        optimizer.step()
    return model, optimizer


def block(optimizer):
    with optimizer.swap_ema_weights():
        pass


def mode(optimizer):
    optimizer.eval()
    optimizer.train()


@pytest.mark.parametrize("swap", [mode, block])
def test_interrupt_on_the_way_of_a_swap_loses_nothing(swap):
    at, done = 1, False
    model, optimizer = averaged(plain)
    held, ema = weights(model), optimizer.get_ema_state(model)
    while not done:
        tracer = Tracer(at)
        try:
            tracer.run(swap, optimizer)
            done = True
        except Interrupt:
            optimizer.train()
        assert same([weights(model), optimizer.get_ema_state(model)], [held, ema]), at
        at += 4
    assert at > 200


def test_apply_and_reset_of_the_optimizer_take_the_buffers_along():
    model, optimizer = averaged(plain)
    held, ema = weights(model), optimizer.get_ema_state(model, copy=False)
    optimizer.reset()
    assert same([optimizer.get_ema_state(model)[VAR]], [held[VAR]])
    optimizer.load_ema_state(model, ema)
    optimizer.eval()
    optimizer.apply_ema()
    optimizer.train()
    assert same({name: weights(model)[name] for name in ema}, ema)
    assert not same([held[VAR]], [ema[VAR]])


def test_copy_made_in_an_evaluation_puts_its_own_buffers_back():
    model, optimizer = averaged(plain)
    held, ema = weights(model), optimizer.get_ema_state(model)
    optimizer.eval()
    other, copied = copy.deepcopy((model, optimizer))
    copied.train()
    assert same([weights(other), copied.get_ema_state(other)], [held, ema])
    optimizer.train()
    assert same([weights(model), optimizer.get_ema_state(model)], [held, ema])


@pytest.mark.parametrize("build", [plain, narrow])
def test_evaluation_that_writes_to_buffers_leaves_both_as_they_were(build):
    model, optimizer = averaged(build)
    held, ema = weights(model), optimizer.get_ema_state(model)
    optimizer.eval()
    model.norm.running_mean.add_(1)
    optimizer.train()
    assert same([weights(model)[MEAN]], [held[MEAN]])
    assert same(optimizer.get_ema_state(model), ema)


@pytest.mark.parametrize("build", [plain, narrow])
def test_checkpoint_in_the_middle_of_an_evaluation_holds_averages_and_own_values(build):
    model, optimizer = averaged(build)
    held, ema = weights(model), optimizer.buffers.get_ema_state()
    optimizer.eval()
    saved = copy.deepcopy((model.state_dict(), optimizer.buffers.state_dict()))
    other = build(1)
    other.load_state_dict(saved[0])
    loaded = _buffers.BufferEMA(other, True, {"decay": DECAY})
    loaded.load_state_dict(saved[1])
    assert same(loaded.get_ema_state(), ema)
    assert same([weights(other)[name] for name in ema], [held[name] for name in ema])


@pytest.mark.parametrize("door", DOORS)
def test_buffers_beside_an_optimizer_of_the_users_own_are_refused(tmp_path, door):
    model = plain()
    with pytest.raises(ValueError, match="pass its inner optimizer"):
        fit(model, tmp_path, EMACallback(use_buffers=True), **DOORS[door](model))
    fit(model, tmp_path, EMACallback(use_buffers=False), **DOORS[door](model))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [(1, "must be True, False or a list"), ([1], "must list names"), ("no", "list of names")],
)
def test_use_buffers_is_checked_at_construction(wrong, message):
    with pytest.raises(TypeError, match=message):
        EMACallback(use_buffers=wrong)


def test_name_of_no_buffer_is_refused_when_the_training_begins(tmp_path):
    with pytest.raises(ValueError, match=re.escape("'*.no', which matches none")):
        fit(plain(), tmp_path, EMACallback(use_buffers=["*.no"]))
