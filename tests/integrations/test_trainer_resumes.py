"""The Trainer resumes with ``EMACallback``: bit for bit, with and without it, from older files."""

import copy

import pytest
import torch
import trainers
from reference import same, wide
from trainers import (
    DECAY,
    DOORS,
    FP16,
    STEPS,
    Witness,
    bf16,
    close,
    facts,
    fit,
    gpt2,
    llama,
    lora,
    make,
    parameters,
    plain,
    saves,
    unused,
    unused_bf16,
    weights,
)
from transformers import LlamaForCausalLM

from ema_optim import EMACallback, EMAOptimizer, strip_ema_state_dict, warmup_decay

pytestmark = [
    # PEFT asks transformers for a name that transformers has renamed.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
]


EMAS = {
    "every": {"decay": 0.5, "update_every": 3},
    "after": {"decay": 0.5, "update_after_step": 2},
    "late": {"decay": 0.4, "update_after_step": 5},
    "schedule": {"decay": warmup_decay(0.9)},
    "windows": {"decay": {"short": DECAY, "long": 0.4}},
    "float64": {"decay": DECAY, "dtype": torch.float64},
    "float32_compensated": {"decay": DECAY, "dtype": "float32_compensated"},
    "float24": {"decay": DECAY, "dtype": "float24"},
    "bfloat16": {"decay": DECAY, "dtype": torch.bfloat16},
}
RESUMED = {
    "fp32": (llama, {}, {}),
    "dropout": (gpt2, {}, {}),
    "bf16": (llama, {"bf16": True}, {}),
    "pure bf16": (bf16, {}, {}),
    "never a gradient": (unused, {}, {}),
    "never a gradient, bf16": (unused_bf16, {}, {}),
    "fp16": (llama, {**FP16, "optim": "adamw_torch"}, {}),
    "accumulation": (llama, {"gradient_accumulation_steps": 2}, {}),
    "adafactor": (llama, {"optim": "adafactor"}, {}),
    "sgd": (llama, {"optim": "sgd"}, {}),
    "lora": (lora, {}, {}),
    "plain module": (plain, {}, {}),
    **{name: (unused_bf16, {}, options) for name, options in EMAS.items()},
}


@pytest.mark.filterwarnings("ignore:the EMA still holds")  # large decays tell the clocks apart
@pytest.mark.filterwarnings("ignore:an EMA in bfloat16")
@pytest.mark.parametrize("evaluate", [None, 2, 3], ids=["", "evaluated", "not evaluated"])
@pytest.mark.parametrize("row", RESUMED)
def test_resumed_equals_uninterrupted_bit_for_bit(tmp_path, row, evaluate):
    build, options, ema = RESUMED[row]
    options = {**options, **saves(4, evaluate)}
    ema = {"decay": DECAY, **ema}
    runs = []
    for seed, resume in ((0, None), (5, tmp_path / "0/checkpoint-4")):
        callback = EMACallback(**ema)
        trainer = fit(build(seed), tmp_path / str(seed), callback, resume=resume, **options)
        runs.append(facts(trainer, callback))
    assert same(*runs)


@pytest.mark.parametrize(("build", "buffers"), [(llama, None), (plain, True)])
def test_every_window_is_logged_and_handed_out(tmp_path, build, buffers):
    windows = {"short": DECAY, "long": 0.4}
    trainer = fit(build(), tmp_path, callback := EMACallback(windows, use_buffers=buffers))
    for name, decay in windows.items():
        fit(build(), tmp_path, alone := EMACallback(decay, use_buffers=buffers))
        assert same(callback.get_ema_state(decay=name), alone.get_ema_state())
    logged = trainer.state.log_history[-2]
    assert {"ema_decay", "ema_distance", "ema_decay/long", "ema_distance/long"} <= logged.keys()
    callback.apply_ema(trainer.model, decay="long")
    shown, state = weights(trainer.model), callback.get_ema_state(decay="long")
    assert same({name: shown[name] for name in state}, state)
    assert not buffers or "norm.running_mean" in state
    with pytest.raises(ValueError, match="must be that of the EMAOptimizer"):
        callback.options.check_same(alone.optimizer, 1, "of the test")


@pytest.mark.filterwarnings("ignore:an EMA in bfloat16")
@pytest.mark.parametrize("format", ["float32_compensated", "float24", torch.bfloat16])
def test_every_storage_format_is_deployed_and_ends_with_the_best(tmp_path, format):
    callback, options = EMACallback(DECAY, dtype=format), saves(2, evaluate=2)
    options |= {"load_best_model_at_end": True, "metric_for_best_model": "loss"}
    trainer = fit(llama(), tmp_path, callback, **options)
    last = LlamaForCausalLM.from_pretrained(tmp_path / "checkpoint-8/ema")
    assert same(parameters(last), callback.get_ema_state())
    best = LlamaForCausalLM.from_pretrained(trainer.state.best_model_checkpoint + "/ema")
    assert same(parameters(trainer.model), parameters(best))


@pytest.mark.parametrize("build", [llama, unused, unused_bf16])
@pytest.mark.parametrize("door", DOORS)
def test_resumed_equals_uninterrupted_with_the_users_own_ema_optimizer(tmp_path, door, build):
    runs = []
    for seed, resume in ((0, None), (5, tmp_path / "0/checkpoint-4")):
        model, callback = build(seed), EMACallback()
        options = {**DOORS[door](model), **saves(4, evaluate=2)}
        trainer = fit(model, tmp_path / str(seed), callback, resume=resume, **options)
        runs.append(facts(trainer, callback))
    assert same(*runs)


@pytest.mark.parametrize("evaluate", [2, 3])
def test_resuming_in_the_same_trainer_equals_uninterrupted(tmp_path, evaluate):
    callback = EMACallback(DECAY)
    trainer = fit(gpt2(), tmp_path, callback, **saves(4, evaluate))
    uninterrupted = copy.deepcopy(facts(trainer, callback))
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert same(facts(trainer, callback), uninterrupted)


def test_a_later_training_after_a_resume_goes_on_averaging(tmp_path):
    fit(llama(), tmp_path, EMACallback(0.5), **saves(4))
    model, callback = llama(5), EMACallback(0.5)
    trainer = fit(model, tmp_path, callback, resume=tmp_path / "checkpoint-4")
    witness = Witness(model, decay=0.5)
    witness.reference.emas = [wide(value) for value in callback.get_ema_state().values()]
    trainer.add_callback(witness)
    trainer.train()
    assert close(callback.get_ema_state().values(), witness.reference.emas)
    assert callback.optimizer.ema_metrics()["ema_updates"] == 2 * STEPS


@pytest.mark.parametrize("build", [llama, unused_bf16])
def test_resumed_at_the_end_of_an_epoch_equals_uninterrupted(tmp_path, build):
    options = {"save_strategy": "epoch", "eval_strategy": "epoch", "max_steps": 16}
    runs = []
    for seed, resume in ((0, None), (5, tmp_path / "0/checkpoint-8")):
        callback = EMACallback(DECAY)
        trainer = fit(build(seed), tmp_path / str(seed), callback, resume=resume, **options)
        runs.append(facts(trainer, callback))
    assert same(*runs)


@pytest.mark.parametrize("evaluate", [None, 2])
@pytest.mark.parametrize("row", [row for row in RESUMED if row not in EMAS])
def test_checkpoint_resumes_without_the_callback_on_the_training_weights(tmp_path, row, evaluate):
    build, options, _ = RESUMED[row]
    options = {**options, **saves(4, evaluate)}
    whole = fit(build(), tmp_path / "whole", **options)
    fit(build(), tmp_path / "ema", EMACallback(DECAY), **options)
    resumed = fit(build(5), tmp_path / "plain", resume=tmp_path / "ema/checkpoint-4", **options)
    assert not isinstance(resumed.optimizer.optimizer, EMAOptimizer)
    assert same(weights(resumed.model), weights(whole.model))


def test_resuming_an_adapter_loads_no_second_one(tmp_path):
    fit(lora(), tmp_path, EMACallback(DECAY), **saves(4))
    for callbacks in ([], [EMACallback(DECAY)]):
        trainer = fit(lora(5), tmp_path, *callbacks, resume=tmp_path / "checkpoint-4")
        assert list(trainer.model.peft_config) == ["default"]


@pytest.mark.parametrize("door", [None, "optimizers"])
@pytest.mark.parametrize("build", [llama, unused_bf16])
def test_ema_that_a_run_without_the_callback_left_behind_is_not_taken(tmp_path, build, door):
    options = {**saves(4), "lr_scheduler_type": "constant"}
    fit(build(), tmp_path / "a", EMACallback(DECAY), **options)
    fit(build(5), tmp_path / "b", resume=tmp_path / "a/checkpoint-4", **options)
    model, callback = build(6), EMACallback(DECAY)
    witness = Witness(model)
    options |= {"resume": tmp_path / "b/checkpoint-8", "max_steps": 12}
    if door:
        own = EMAOptimizer(make(model, tmp_path).create_optimizer(), decay=DECAY)
        options["optimizers"] = (own, None)
    with pytest.warns(UserWarning, match="holds no EMA of step 8") as record:
        fit(model, tmp_path / "c", callback, witness, **options)
    assert [w.filename for w in record] == [trainers.__file__]
    assert not any("ema_entries" in group for group in callback.optimizer.param_groups)
    assert callback.optimizer.ema_metrics()["ema_updates"] == witness.reference.step == 4
    assert close(callback.get_ema_state().values(), witness.reference.emas)


@pytest.mark.parametrize("build", [llama, unused_bf16])
def test_checkpoint_of_a_run_without_the_callback_starts_the_ema_cold_with_one_warning(
    tmp_path, build
):
    fit(build(), tmp_path, **saves(4))
    model, callback = build(6), EMACallback(DECAY)
    witness = Witness(model)
    with pytest.warns(UserWarning, match="holds no EMA") as record:
        fit(model, tmp_path, callback, witness, resume=tmp_path / "checkpoint-4")
    assert [w.filename for w in record] == [trainers.__file__]
    assert close(callback.get_ema_state().values(), witness.reference.emas)
    assert callback.optimizer.ema_metrics()["ema_updates"] == 4


@pytest.mark.parametrize("build", [llama, unused, unused_bf16])
def test_checkpoint_of_the_callback_resumes_with_the_users_own_ema_optimizer(tmp_path, build):
    callbacks = EMACallback(DECAY), EMACallback()
    whole = fit(build(), tmp_path / "a", callbacks[0], **saves(4))
    model = build(5)
    own = EMAOptimizer(make(model, tmp_path).create_optimizer(), decay=DECAY)
    options = {"resume": tmp_path / "a/checkpoint-4", "optimizers": (own, None)}
    fit(model, tmp_path / "b", callbacks[1], **options)
    assert same(weights(model), weights(whole.model))
    assert same(callbacks[1].get_ema_state(), callbacks[0].get_ema_state())


@pytest.mark.parametrize("build", [llama, bf16])
def test_checkpoint_of_the_users_own_ema_optimizer_resumes_with_the_callback_cold(tmp_path, build):
    whole, resumed = build(), build(5)
    own = EMAOptimizer(make(whole, tmp_path).create_optimizer(), decay=DECAY)
    fit(whole, tmp_path / "a", EMACallback(), optimizers=(own, None), **saves(4))
    callback, witness = EMACallback(DECAY), Witness(resumed)
    with pytest.warns(UserWarning, match="begins") as record:
        fit(resumed, tmp_path / "b", callback, witness, resume=tmp_path / "a/checkpoint-4")
    assert len(record) == 1
    assert same(weights(resumed), weights(whole))
    assert close(callback.get_ema_state().values(), witness.reference.emas)


@pytest.mark.parametrize("build", [llama, unused, unused_bf16])
@pytest.mark.parametrize("evaluate", [None, 2])
def test_optimizer_file_stripped_of_the_ema_is_that_of_a_run_without_it(tmp_path, build, evaluate):
    for name, callbacks in (("a", []), ("b", [EMACallback(DECAY)])):
        fit(build(), tmp_path / name, *callbacks, **saves(4, evaluate))
    files = [tmp_path / name / "checkpoint-4/optimizer.pt" for name in "ab"]
    without, stripped = (torch.load(file, weights_only=True) for file in files)
    assert same(strip_ema_state_dict(stripped), without)
