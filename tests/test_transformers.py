"""``EMACallback`` in the real ``Trainer``, on tiny models built from a config."""

import copy
import gc
import json
import os
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
import trainers
import transformers
from reference import Reference, same, wide
from torch.optim import AdamW
from trainers import (
    DECAY,
    EVAL,
    STEPS,
    EMAAt,
    Witness,
    bert,
    best,
    bf16,
    close,
    fit,
    gpt2,
    llama,
    lora,
    make,
    parameters,
    plain,
    rounded,
    saves,
    trainable,
    untied,
    unused,
    unused_bf16,
    weights,
)
from transformers import (
    BertForMaskedLM,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
)

from ema_optim import (
    EMACallback,
    EMAOptimizer,
    compute_optimal_decay,
    strip_ema_state_dict,
    warmup_decay,
)

pytestmark = [
    # PEFT asks transformers for a name that transformers has renamed.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
]


@pytest.fixture(scope="module", autouse=True)
def _quick_collections():
    """The Trainer collects garbage at every start, most of its time on models this small."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


OVERFLOW = {"init_scale": 2.0**10, "growth_interval": 2, "growth_factor": 2.0**115}
FP16 = {"scaler": {**OVERFLOW, "backoff_factor": 2.0**-115}, "max_grad_norm": 0.0}

RUNS = {
    "plain": (llama, {}),
    "untied": (untied, {}),
    "dropout": (gpt2, {}),
    "bert": (bert, {}),
    "accumulation": (llama, {"gradient_accumulation_steps": 4, "max_steps": 4}),
    "bf16": (llama, {"bf16": True}),
    "pure bf16": (bf16, {}),
    "fp16 with overflows": (llama, {**FP16, "optim": "adamw_torch"}),
    "fp16 with overflows, fused": (llama, {**FP16, "optim": "adamw_torch_fused"}),
    "fp16 with accumulation": (
        llama,
        {**FP16, "gradient_accumulation_steps": 2, "optim": "adamw_torch"},
    ),
    "checkpointing": (llama, {"activation_checkpointing": True}),
    "adafactor": (llama, {"optim": "adafactor"}),
    "sgd": (llama, {"optim": "sgd", "learning_rate": 1.0}),
    "warm-up": (llama, {"warmup_steps": 3}),
    "lora": (lora, {}),
    "lora with checkpointing": (lora, {"activation_checkpointing": True}),
    "plain module": (plain, {}),
    "never a gradient": (unused, {}),
}


def numbers(trainer):
    """What the training logged, without the times."""
    keys = ("step", "loss", "grad_norm", "learning_rate")
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    return [{k: repr(entry[k]) for k in keys} for entry in entries]  # NaN equals NaN this way


@pytest.mark.parametrize("row", RUNS)
def test_training_is_bit_equal_to_the_one_without_the_callback(tmp_path, row):
    build, options = RUNS[row]
    runs = []
    for callbacks in ([], [EMACallback(DECAY)]):
        evaluates = {"eval_strategy": "steps", "eval_steps": 3}
        trainer = fit(build(), tmp_path, *callbacks, **evaluates, **options)
        runs.append([weights(trainer.model), numbers(trainer)])
    assert same(*runs)


@pytest.mark.parametrize("row", RUNS)
def test_ema_is_the_average_of_the_optimizer_steps(tmp_path, row):
    build, options = RUNS[row]
    model, callback = build(), EMACallback(DECAY)
    witness = Witness(model)
    fit(model, tmp_path, callback, witness, **options)
    state = callback.get_ema_state()
    assert list(state) == [n for n, p in model.named_parameters() if p.requires_grad]
    assert close(state.values(), witness.reference.emas)
    steps = options.get("max_steps", STEPS) - 2 * ("scaler" in options) - (row == "warm-up")
    assert callback.optimizer.ema_metrics()["ema_updates"] == witness.reference.step == steps


DOORS = {
    "optimizers": lambda model: {
        "optimizers": (EMAOptimizer(AdamW(trainable(model), lr=1e-2), decay=DECAY), None)
    },
    "class": lambda model: {
        "optimizer_cls_and_kwargs": (EMAOptimizer.for_class(AdamW, decay=DECAY), {"lr": 1e-2})
    },
}


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("row", ["plain", "accumulation", "pure bf16", "fp16 with accumulation"])
def test_the_users_own_ema_optimizer_is_found_and_not_wrapped_again(tmp_path, door, row):
    build, options = RUNS[row]
    model, callback = build(), EMACallback()
    witness = Witness(model)
    options = {k: v for k, v in options.items() if k != "optim"}
    trainer = fit(model, tmp_path, callback, witness, **options, **DOORS[door](model))
    assert trainer.optimizer.optimizer is callback.optimizer
    assert type(callback.optimizer.inner) is AdamW
    assert close(callback.get_ema_state().values(), witness.reference.emas)
    assert callback.optimizer.ema_metrics()["ema_updates"] == witness.reference.step


@pytest.mark.parametrize("row", ["plain", "bert", "bf16", "pure bf16", "lora", "plain module"])
def test_every_evaluation_batch_sees_the_ema_weights_and_every_other_the_training_ones(
    tmp_path, row
):
    build, options = RUNS[row]
    model = build()
    witness = Witness(model, rtol=2**-7 if row == "pure bf16" else 1e-5)
    saving = saves(4, evaluate=2)
    fit(model, tmp_path, EMACallback(DECAY), witness, **options, **saving, eval_on_start=True)
    assert witness.batches == ["ema+training"] * 2 + ["ema"] * 8
    assert witness.wrong == []
    assert witness.holds(witness.training)


@pytest.mark.parametrize("door", DOORS)
def test_the_users_own_ema_optimizer_evaluates_on_the_ema_weights(tmp_path, door):
    model = llama()
    witness = Witness(model)
    trainer = make(model, tmp_path, EMACallback(), witness, **DOORS[door](model))
    trainer.evaluate()
    trainer.train()
    trainer.evaluate()
    assert witness.batches == ["ema+training"] * 2 + ["ema"] * 2
    assert witness.wrong == []
    assert witness.holds(witness.training)


def test_evaluate_with_training_uses_the_training_weights(tmp_path):
    model = llama()
    witness = Witness(model)
    callback = EMACallback(DECAY, evaluate_with="training")
    trainer = fit(model, tmp_path, callback, witness, **saves(4, evaluate=2))
    trainer.predict(EVAL)
    assert witness.batches == ["training"] * 10
    assert close(callback.get_ema_state().values(), witness.reference.emas)


@pytest.mark.parametrize("call", ["evaluate", "predict"])
def test_evaluation_before_between_and_after_training(tmp_path, call):
    model = llama()
    witness = Witness(model)
    trainer = make(model, tmp_path, EMACallback(DECAY), witness)
    for _ in range(3):
        before = weights(model)
        getattr(trainer, call)(EVAL)
        assert same(weights(model), before)
        trainer.train()
    assert witness.batches == ["ema+training"] * 2 + ["ema"] * 4
    assert witness.wrong == []


@pytest.mark.parametrize("row", ["plain", "fp16 with overflows, fused", "fp16 with overflows"])
def test_a_later_training_goes_on_averaging(tmp_path, row):
    build, options = RUNS[row]
    model, callback = build(), EMACallback(DECAY)
    witness = Witness(model)
    trainer = make(model, tmp_path, callback, witness, **options)
    for _ in range(3):
        trainer.train()
    assert close(callback.get_ema_state().values(), witness.reference.emas)
    assert callback.optimizer.ema_metrics()["ema_updates"] == witness.reference.step


EMAS = {
    "every": {"decay": 0.5, "update_every": 3},
    "after": {"decay": 0.5, "update_after_step": 2},
    "late": {"decay": 0.4, "update_after_step": 5},
    "schedule": {"decay": warmup_decay(0.9)},
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


def facts(trainer, callback):
    """All that a resume must bring back."""
    return [weights(trainer.model), callback.get_ema_state(), trainer.optimizer.state_dict()]


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


@pytest.mark.parametrize("save_ema", [True, False])
@pytest.mark.parametrize("evaluate", [None, 2, 3])
@pytest.mark.parametrize("build", [llama, bf16, lora, plain])
def test_checkpoint_is_that_of_a_run_without_the_callback(tmp_path, build, evaluate, save_ema):
    for name, callbacks in (("a", []), ("b", [EMACallback(DECAY, save_ema=save_ema)])):
        fit(build(), tmp_path / name, *callbacks, **saves(4, evaluate))
    for step in (4, 8):
        one, other = (tmp_path / name / f"checkpoint-{step}" for name in "ab")
        assert files(other) - files(one) == ({"ema"} if save_ema else set())
        name = "adapter_model.safetensors" if build is lora else "model.safetensors"
        assert (one / name).read_bytes() == (other / name).read_bytes()
        rng = [torch.load(f / "rng_state.pth", weights_only=False)["cpu"] for f in (one, other)]
        assert same(*rng)


def files(folder):
    return set(os.listdir(folder))


LOADERS = {
    llama: lambda folder: LlamaForCausalLM.from_pretrained(folder),
    untied: lambda folder: LlamaForCausalLM.from_pretrained(folder),
    bf16: lambda folder: LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16),
    bert: lambda folder: BertForMaskedLM.from_pretrained(folder),
    lora: lambda folder: peft.PeftModel.from_pretrained(llama(), folder, is_trainable=True),
}


@pytest.mark.parametrize("evaluate", [None, 2, 3])
@pytest.mark.parametrize("build", LOADERS)
def test_ema_folder_of_a_checkpoint_is_deployed_by_from_pretrained(tmp_path, build, evaluate):
    callback = EMACallback(DECAY)
    seen, model = EMAAt(callback), build()
    witness = Witness(model)
    fit(model, tmp_path, callback, seen, witness, **saves(4, evaluate))
    for step in (4, 8):
        folder = "ema/adapter" if build is lora else "ema"
        loaded = LOADERS[build](tmp_path / f"checkpoint-{step}" / folder)
        assert same(parameters(loaded), rounded(seen.states[step], model))
        assert close(seen.states[step].values(), witness.history[step])


def test_ema_folder_of_a_plain_module_holds_its_whole_state(tmp_path):
    from safetensors.torch import load_file

    callback = EMACallback(DECAY)
    model = fit(plain(), tmp_path, callback, **saves(8)).model
    loaded = load_file(tmp_path / "checkpoint-8/ema/model.safetensors")
    assert same(loaded, {**weights(model), **callback.get_ema_state()})


def test_ema_folder_has_the_processing_class(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words)
    fit(llama(), tmp_path, EMACallback(DECAY), processing_class=tokenizer, **saves(8))
    folder = tmp_path / "checkpoint-8/ema"
    assert transformers.AutoTokenizer.from_pretrained(folder).get_vocab() == {"a": 0, "b": 1}


@pytest.mark.parametrize("limit", [1, 2])
def test_save_total_limit_removes_whole_checkpoints(tmp_path, limit):
    fit(llama(), tmp_path, EMACallback(DECAY), save_total_limit=limit, **saves(2))
    steps = [8, 6][:limit]
    assert files(tmp_path) == {f"checkpoint-{step}" for step in steps}
    assert all("ema" in files(tmp_path / f"checkpoint-{step}") for step in steps)


BESTS = {
    "plain": (llama, {}, {}),
    "untied": (untied, {}, {}),
    "pure bf16": (bf16, {}, {}),
    "lora": (lora, {}, {}),
    "plain module": (plain, {}, {}),
    "never a gradient": (unused, {}, {}),
    "no EMA folder": (llama, {}, {"save_ema": False}),
    "lora, no EMA folder": (lora, {}, {"save_ema": False}),
    "model only": (llama, {"save_only_model": True}, {}),
    "pure bf16, model only": (bf16, {"save_only_model": True}, {}),
    "lora, model only": (lora, {"save_only_model": True}, {}),
    "plain module, model only": (plain, {"save_only_model": True}, {}),
    "one checkpoint": (llama, {"save_total_limit": 1}, {}),
    "before averaging": (llama, {}, {"update_after_step": 6}),
    "float64": (llama, {}, {"dtype": torch.float64}),
}


@pytest.mark.parametrize("row", BESTS)
def test_load_best_model_at_end_leaves_the_ema_weights_of_the_best_checkpoint(tmp_path, row):
    build, options, ema = BESTS[row]
    model, callback = build(), EMACallback(DECAY, **ema)
    seen = EMAAt(callback)
    options = {"prediction_loss_only": False, **options}
    if build is plain:
        options["label_names"] = ["labels"]
    trainer = fit(model, tmp_path, callback, seen, **best(**options))
    assert trainer.state.best_global_step == 4
    wanted = rounded(seen.states[4], model)
    assert same(parameters(model), wanted)
    assert not same(parameters(model), rounded(seen.states[8], model))
    assert same(callback.get_ema_state(), seen.states[8])


@pytest.mark.parametrize("build", [llama, bf16, lora])
def test_what_follows_a_loaded_best_sees_exactly_those_weights(tmp_path, build):
    model = build()
    trainer = fit(model, tmp_path, EMACallback(DECAY), **best())
    found, used = parameters(model), []
    model.register_forward_pre_hook(lambda *_: used.append(parameters(model)))
    trainer.evaluate()
    trainer.predict(EVAL)
    assert len(used) == 4
    assert all(same(weights, found) for weights in used)
    trainer.save_model(str(tmp_path / "best"))
    assert same(parameters(LOADERS[build](tmp_path / "best")), found)
    assert same(parameters(model), found)


def test_best_checkpoint_of_an_earlier_run_is_loaded_after_a_resume(tmp_path):
    callback = EMACallback(DECAY)
    seen = EMAAt(callback)
    fit(llama(), tmp_path, callback, seen, **best())
    resumed = fit(
        llama(5), tmp_path, EMACallback(DECAY), resume=tmp_path / "checkpoint-6", **best(0)
    )
    assert same(parameters(resumed.model), seen.states[4])


@pytest.mark.parametrize("door", DOORS)
def test_best_checkpoint_of_the_users_own_ema_optimizer(tmp_path, door):
    model, callback = llama(), EMACallback()
    seen = EMAAt(callback)
    fit(model, tmp_path, callback, seen, **best(), **DOORS[door](model))
    assert same(parameters(model), seen.states[4])


def test_best_checkpoint_when_evaluated_with_the_training_weights_is_theirs(tmp_path):
    callbacks = [[], [EMACallback(DECAY, evaluate_with="training")]]
    models = [fit(llama(), tmp_path / str(len(c)), *c, **best()).model for c in callbacks]
    assert same(*map(weights, models))


def test_best_checkpoint_that_will_hold_no_ema_is_refused_at_the_start(tmp_path):
    callback = EMACallback(DECAY, save_ema=False)
    with pytest.raises(ValueError, match="save_ema"):
        fit(llama(), tmp_path, callback, **best(save_only_model=True))


def test_apply_ema_over_a_loaded_best_warns_and_restore_original_brings_it_back(tmp_path):
    model, callback = llama(), EMACallback(DECAY)
    trainer = fit(model, tmp_path, callback, **best())
    found = parameters(model)
    with pytest.warns(UserWarning, match="replaces the EMA weights of the best") as record:
        callback.apply_ema(model)
    assert record[0].filename == __file__
    assert same(parameters(model), callback.get_ema_state())
    callback.restore_original(model)
    trainer.evaluate()
    assert same(parameters(model), found)


def test_training_after_a_loaded_best_evaluates_on_the_ema_again(tmp_path):
    model, callback = llama(), EMACallback(DECAY)
    trainer = fit(model, tmp_path, callback, **best())
    trainer.args.load_best_model_at_end = False
    trainer.train()
    used = []
    model.register_forward_pre_hook(lambda *_: used.append(parameters(model)))
    trainer.evaluate()
    assert same(used[0], callback.get_ema_state())
    assert not same(parameters(model), used[0])


@pytest.mark.parametrize("build", [llama, untied, bf16, lora])
def test_guide_apply_ema_and_save_pretrained(tmp_path, build):
    model, callback = build(), EMACallback(DECAY)
    trainer = fit(model, tmp_path, callback)
    raw = weights(model)
    callback.apply_ema(model)
    callback.apply_ema(model)
    model.save_pretrained(tmp_path / "best_model")
    wanted = rounded(callback.get_ema_state(), model)
    assert same(parameters(LOADERS[build](tmp_path / "best_model")), wanted)
    trainer.evaluate()
    assert same(parameters(model), wanted)
    callback.restore_original(model)
    callback.restore_original(model)
    assert same(weights(model), raw)


def test_evaluation_sees_the_ema_weights_whether_applied_restored_or_neither(tmp_path):
    model, callback = llama(), EMACallback(DECAY)
    trainer, used = fit(model, tmp_path, callback), []
    model.register_forward_pre_hook(lambda *_: used.append(parameters(model)))
    steps = [lambda _: None, callback.apply_ema, callback.restore_original, callback.apply_ema]
    for step in steps:
        step(model)
        trainer.evaluate()
    assert all(same(weights, callback.get_ema_state()) for weights in used)


def test_apply_ema_to_another_model_leaves_the_trained_one_as_it_is(tmp_path):
    model, other, callback = llama(), llama(3), EMACallback(DECAY)
    witness = Witness(model)
    trainer = fit(model, tmp_path, callback, witness)
    raw, others = weights(model), weights(other)
    callback.apply_ema(other)
    assert same(parameters(other), callback.get_ema_state())
    trainer.evaluate()
    assert witness.batches == ["ema"] * 2
    callback.restore_original(other)
    assert same([weights(model), weights(other)], [raw, others])


def test_apply_ema_to_two_models_is_undone_for_each(tmp_path):
    models, callback = [llama(3), llama()], EMACallback(DECAY)
    fit(models[1], tmp_path, callback)
    before = [weights(model) for model in models]
    for model in models:
        callback.apply_ema(model)
    for model in models:
        callback.restore_original(model)
    assert same([weights(model) for model in models], before)


def test_training_after_apply_ema_goes_on_from_the_ema_weights(tmp_path):
    model, callback = llama(), EMACallback(DECAY)
    trainer = fit(model, tmp_path, callback)
    callback.apply_ema(model)
    reference = Reference(trainable(model), DECAY)
    found = []

    class Start(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            found.append([wide(p) for p in model.parameters()])

        def on_step_end(self, *args, **kwargs):
            reference.update()

    trainer.add_callback(Start())
    trainer.train()
    assert close(found[0], [wide(v) for v in Reference(found[0], DECAY).emas])
    assert close(callback.get_ema_state().values(), reference.emas)
    after = weights(model)
    callback.restore_original(model)  # the copy was forgotten
    assert same(weights(model), after)


OTHER_PROCESS = """
import sys, torch
from transformers import LlamaConfig, LlamaForCausalLM
from ema_optim import EMACallback

checkpoint = torch.load(sys.argv[1], weights_only=True)
model = LlamaForCausalLM(LlamaConfig.from_pretrained(sys.argv[2]))
ema_callback = EMACallback(decay=0.999)
model.load_state_dict(checkpoint["model"]); ema_callback.load_ema_state(checkpoint["ema"]); ema_callback.apply_ema(model)
applied = {name: value.clone() for name, value in model.state_dict().items()}
ema_callback.restore_original(model)
torch.save({"applied": applied, "restored": model.state_dict(), "ema": ema_callback.get_ema_state()}, sys.argv[3])
"""  # noqa: E501


def run_python(code, *arguments, **options):
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **options)


def test_guide_state_goes_to_another_process(tmp_path):
    model, ema_callback = llama(), EMACallback(DECAY)
    fit(model, tmp_path, ema_callback)
    saved = {"model": model.state_dict(), "ema": ema_callback.get_ema_state()}
    torch.save(saved, tmp_path / "checkpoint.pt")
    model.config.save_pretrained(tmp_path)
    out = tmp_path / "out.pt"
    run = run_python(OTHER_PROCESS, tmp_path / "checkpoint.pt", tmp_path, out)
    assert run.returncode == 0, run.stderr
    found = torch.load(out, weights_only=True)
    assert same({name: found["applied"][name] for name in saved["ema"]}, saved["ema"])
    assert same(found["restored"], saved["model"])
    assert same(found["ema"], saved["ema"])


def test_ema_state_is_made_of_fresh_cpu_tensors_by_name(tmp_path):
    model, callback = bf16(), EMACallback(DECAY)
    fit(model, tmp_path, callback)
    state = callback.get_ema_state()
    assert {(v.device.type, v.dtype) for v in state.values()} == {("cpu", torch.float32)}
    for value in state.values():
        value.zero_()
    assert all(value.any() for value in callback.get_ema_state().values())


@pytest.mark.parametrize("call", ["get_ema_state", "apply_ema"])
def test_nothing_trained_or_loaded_is_a_runtime_error(call):
    callback = EMACallback(DECAY)
    arguments = [llama()] if call == "apply_ema" else []
    with pytest.raises(RuntimeError, match=r"call trainer.train\(\) or load_ema_state\(\) first"):
        getattr(callback, call)(*arguments)


FOREIGN = {
    "unknown name": (lambda s: {**s, "foreign": torch.zeros(1)}, KeyError, "foreign"),
    "other shape": (
        lambda s: {**s, "model.norm.weight": torch.zeros(3)},
        ValueError,
        r"model.norm.weight must have shape \(16,\)",
    ),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_foreign_ema_state_is_refused_by_apply_ema_and_changes_nothing(case):
    damage, error, message = FOREIGN[case]
    model, callback = llama(), EMACallback(DECAY)
    before = weights(model)
    callback.load_ema_state(damage(parameters(model)))
    with pytest.raises(error, match=message):
        callback.apply_ema(model)
    assert same(weights(model), before)


@pytest.mark.parametrize("case", FOREIGN)
def test_foreign_ema_state_is_refused_at_the_start_of_the_training(tmp_path, case):
    damage, error, message = FOREIGN[case]
    model, callback = llama(), EMACallback(DECAY)
    callback.load_ema_state(damage(parameters(model)))
    with pytest.raises(error, match=message):
        fit(model, tmp_path, callback)


@pytest.mark.parametrize("case", FOREIGN)
def test_foreign_ema_state_after_training_is_refused_and_forgotten(tmp_path, case):
    damage, error, message = FOREIGN[case]
    model, callback = llama(), EMACallback(DECAY)
    trainer = fit(model, tmp_path, callback)
    before = callback.get_ema_state()
    with pytest.raises(error, match=message):
        callback.load_ema_state(damage(before))
    assert same(callback.get_ema_state(), before)
    trainer.train()


@pytest.mark.parametrize("state", [None, [1], {"model.norm.weight": 1.0}])
def test_ema_state_that_is_no_dict_of_tensors_is_a_type_error(state):
    with pytest.raises(TypeError, match="must be a dict of tensors"):
        EMACallback(DECAY).load_ema_state(state)


@pytest.mark.parametrize("build", [llama, bf16, lora])
def test_training_goes_on_averaging_into_a_loaded_ema(tmp_path, build):
    model, callback = build(), EMACallback(0.5)
    state = {name: torch.randn(p.shape) for name, p in parameters(model).items()}
    witness = Witness(model, decay=0.5)
    witness.reference.emas = [wide(value) for value in state.values()]
    callback.load_ema_state(state)
    fit(model, tmp_path, callback, witness)
    assert close(callback.get_ema_state().values(), witness.reference.emas)


def test_ema_state_loaded_after_a_training_is_that_of_the_next(tmp_path):
    model, callback = llama(), EMACallback(DECAY)
    witness = Witness(model)
    trainer = fit(model, tmp_path, callback, witness)
    state = {name: torch.randn(p.shape) for name, p in parameters(model).items()}
    witness.reference.emas = [wide(value) for value in state.values()]
    callback.load_ema_state(state)
    assert same(callback.get_ema_state(), state)
    trainer.train()
    assert close(callback.get_ema_state().values(), witness.reference.emas)


@pytest.mark.parametrize(
    ("decay", "wanted"),
    # The default and "auto" warm up: (1 + 8) / (10 + 8) is above compute_optimal_decay(8).
    [(None, 0.4217), ("auto", compute_optimal_decay(STEPS)), (0.25, 0.25), (lambda u: 0.5, 0.5)],
)
def test_decay_in_force(tmp_path, decay, wanted):
    trainer = fit(llama(), tmp_path, EMACallback(decay))
    assert trainer.state.log_history[-2]["ema_decay"] == pytest.approx(wanted, rel=1e-4)


def test_auto_decay_takes_the_steps_that_the_trainer_has_worked_out(tmp_path):
    trainer = fit(llama(), tmp_path, EMACallback("auto"), max_steps=-1, num_train_epochs=2)
    wanted = warmup_decay(compute_optimal_decay(16))
    assert trainer.state.log_history[-2]["ema_decay"] == wanted(16)


@pytest.mark.parametrize(("decay", "found"), [(None, None), (DECAY, None), (0.2, DECAY)])
@pytest.mark.parametrize("door", DOORS)
def test_decay_must_be_that_of_the_users_own_ema_optimizer(tmp_path, door, decay, found):
    model = llama()
    trainer = make(model, tmp_path, EMACallback(decay), **DOORS[door](model))
    if found is None:
        trainer.train()
        assert trainer.state.log_history[0]["ema_decay"] == DECAY
        return
    before = weights(model)
    with pytest.raises(
        ValueError, match=r"decay must be that of the EMAOptimizer .*\(0.1\), got 0.2"
    ):
        trainer.train()
    assert same(weights(model), before)


@pytest.mark.parametrize("door", [None, *DOORS])
def test_two_callbacks_are_a_value_error(tmp_path, door):
    model = llama()
    options = DOORS[door](model) if door else {}
    decay = None if door else DECAY
    with pytest.raises(ValueError, match="must have one EMACallback"):
        fit(model, tmp_path, EMACallback(decay), EMACallback(decay), **options)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"decay": 1.5}, ValueError, "1.5"),
        ({"decay": "fast"}, TypeError, "fast"),
        ({"update_every": 0}, ValueError, "update_every must be at least 1"),
        ({"update_after_step": -1}, ValueError, "update_after_step must be at least 0"),
        ({"dtype": torch.float16}, ValueError, "dtype must be"),
        ({"evaluate_with": "all"}, ValueError, "evaluate_with must be 'ema', 'training' or"),
    ],
)
def test_wrong_argument_is_refused_at_construction(options, error, message):
    with pytest.raises(error, match=message):
        EMACallback(**options)


class Logs(TrainerCallback):
    def __init__(self):
        self.seen = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.seen.append(dict(logs))


@pytest.mark.parametrize("build", [llama, bf16])
def test_metrics_are_in_the_log_history_and_in_the_logs_of_later_callbacks(tmp_path, build):
    model, later = build(), Logs()
    witness = Witness(model)
    trainer = fit(model, tmp_path, EMACallback(DECAY), witness, later, **saves(8, evaluate=2))
    pairs = zip(witness.history[STEPS], witness.training, strict=True)
    gap = sum((e - w).square().sum() for e, w in pairs).sqrt()
    distance = float(gap / sum(w.square().sum() for w in witness.training).sqrt())
    for entries in (trainer.state.log_history, later.seen):
        training = [entry for entry in entries if "loss" in entry]
        assert all(entry["ema_decay"] == DECAY for entry in training)
        assert training[-1]["ema_distance"] == pytest.approx(distance, rel=1e-4)
        assert not any("ema_decay" in entry for entry in entries if "eval_loss" in entry)


def test_metrics_survive_in_the_trainer_state_file(tmp_path):
    fit(llama(), tmp_path, EMACallback(DECAY), **saves(4))
    state = json.loads((tmp_path / "checkpoint-4/trainer_state.json").read_text())
    assert all(entry["ema_decay"] == DECAY for entry in state["log_history"] if "loss" in entry)


def test_no_metrics_before_there_is_an_average(tmp_path):
    trainer = make(llama(), tmp_path, EMACallback(DECAY, update_after_step=6))
    assert "ema_decay" not in trainer.evaluate()
    trainer.train()
    found = ["ema_decay" in entry for entry in trainer.state.log_history[:STEPS]]
    assert found == [False] * 6 + [True] * 2


class Fails(TrainerCallback):
    """Raises at the first of two batches of the evaluation of one step, once."""

    def __init__(self, error, step=4):
        self.error, self.step, self.batches = error, step, 0

    def on_prediction_step(self, args, state, control, **kwargs):
        self.batches += state.global_step == self.step
        if self.batches == 1:
            self.batches += 1
            raise self.error("no")


class Stops(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == 4


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("build", [llama, bf16])
def test_restore_original_puts_the_training_weights_back_after_a_failed_evaluation(
    tmp_path, build, error
):
    whole = fit(build(), tmp_path, Stops())
    model, callback = build(), EMACallback(DECAY)
    with pytest.raises(error, match="no"):
        fit(model, tmp_path, callback, Fails(error), **saves(8, evaluate=4))
    assert not same(weights(model), weights(whole.model))
    callback.restore_original(model)
    assert same(weights(model), weights(whole.model))


@pytest.mark.parametrize("restore", [True, False])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("build", [llama, bf16])
def test_training_again_after_a_failed_evaluation_loses_nothing(tmp_path, build, error, restore):
    whole = fit(build(), tmp_path, Stops())
    model, callback = build(), EMACallback(DECAY)
    witness = Witness(model)
    trainer = make(model, tmp_path, callback, witness, Fails(error), **saves(8, evaluate=4))
    with pytest.raises(error, match="no"):
        trainer.train()
    if restore:
        callback.restore_original(model)
    trainer.args.eval_strategy = "no"
    for run, callbacks in ((whole, [Stops]), (trainer, [Fails])):
        run.remove_callback(callbacks[0])
        torch.manual_seed(7)
        run.train()
    assert same(weights(model), weights(whole.model))
    assert close(callback.get_ema_state().values(), witness.reference.emas)


def fail(tmp_path, build):
    """A run that stops inside an evaluation, with the training weights of that moment."""
    whole = fit(build(), tmp_path / "whole", Stops())
    callback = EMACallback(DECAY)
    options = saves(2, evaluate=4)
    trainer = make(build(), tmp_path / "failed", callback, Fails(RuntimeError), **options)
    with pytest.raises(RuntimeError, match="no"):
        trainer.train()
    return trainer, callback, weights(whole.model)


@pytest.mark.parametrize("build", [llama, bf16])
def test_apply_ema_after_a_failed_evaluation_is_undone_by_restore_original(tmp_path, build):
    trainer, callback, raw = fail(tmp_path, build)
    state = callback.get_ema_state()
    callback.apply_ema(trainer.model)
    assert same(parameters(trainer.model), rounded(state, trainer.model))
    callback.restore_original(trainer.model)
    assert same(weights(trainer.model), raw)
    assert same(callback.get_ema_state(), state)


@pytest.mark.parametrize("build", [llama, bf16])
def test_evaluation_after_a_failed_one_ends_with_the_training_weights(tmp_path, build):
    trainer, _, raw = fail(tmp_path, build)
    trainer.evaluate()
    assert same(weights(trainer.model), raw)


@pytest.mark.parametrize("build", [llama, bf16])
def test_resuming_in_the_same_trainer_after_a_failed_evaluation_loses_nothing(tmp_path, build):
    trainer, callback, _ = fail(tmp_path, build)
    trainer.train(resume_from_checkpoint=str(tmp_path / "failed/checkpoint-2"))
    whole = EMACallback(DECAY)
    wanted = facts(fit(build(), tmp_path / "wanted", whole), whole)
    assert same(facts(trainer, callback), wanted)


class Forgiving(Trainer):
    """Goes on after a failed evaluation."""

    def evaluate(self, *args, **kwargs):
        try:
            return super().evaluate(*args, **kwargs)
        except RuntimeError:
            return {}


@pytest.mark.parametrize("save", [3, 4, 8])
@pytest.mark.parametrize("build", [llama, unused_bf16])
def test_training_that_goes_on_after_a_failed_evaluation_loses_nothing(tmp_path, build, save):
    whole = fit(build(), tmp_path / "whole", **saves(8, evaluate=4))
    model, callback = build(), EMACallback(DECAY)
    witness = Witness(model)
    options = {"trainer": Forgiving, **saves(save, evaluate=4)}
    fit(model, tmp_path / "a", callback, witness, Fails(RuntimeError), **options)
    assert same(weights(model), weights(whole.model))
    assert close(callback.get_ema_state().values(), witness.reference.emas)
    assert witness.wrong == []


@pytest.mark.parametrize("build", [llama, unused_bf16])
def test_checkpoint_written_after_a_failed_evaluation_resumes_bit_for_bit(tmp_path, build):
    options = {"trainer": Forgiving, **saves(4, evaluate=4)}
    runs = []
    for seed, resume in ((0, None), (5, tmp_path / "0/checkpoint-4")):
        callback = EMACallback(DECAY)
        callbacks = [callback] if resume else [callback, Fails(RuntimeError)]
        trainer = fit(build(seed), tmp_path / str(seed), *callbacks, resume=resume, **options)
        runs.append([weights(trainer.model), callback.get_ema_state()])
    assert same(*runs)


RANKS = """
import os, sys
sys.path[:0] = sys.argv[1:2]
import torch
torch.set_num_threads(1)
from test_transformers import DECAY, EMACallback, bert, facts, fit, llama, saves

folder, rank = sys.argv[2], os.environ["RANK"]
options = {"ddp_backend": "gloo", "ddp_find_unused_parameters": False, **saves(4, evaluate=2)}
found = []
for name, seed, resume in (("bare", 0, None), ("ema", 0, None), ("again", 5, "ema/checkpoint-4")):
    callback = EMACallback(DECAY)
    callbacks = [] if name == "bare" else [callback]
    resume = resume and os.path.join(folder, resume)
    trainer = fit(llama(seed), os.path.join(folder, name), *callbacks, resume=resume, **options)
    assert type(trainer.model_wrapped).__name__ == "DistributedDataParallel"
    loss = trainer.evaluate()["eval_loss"]
    found.append([trainer.model.state_dict(), loss])
    if callbacks:
        found[-1] += [callback.get_ema_state(), trainer.optimizer.state_dict()]
torch.save(found, os.path.join(folder, f"rank{rank}.pt"))
torch.distributed.destroy_process_group()
"""


def test_two_processes_train_average_evaluate_and_resume_alike(tmp_path):
    (tmp_path / "ranks.py").write_text(RANKS)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    arguments = ["--nproc-per-node=2", tmp_path / "ranks.py", Path(__file__).parent, tmp_path]
    run = subprocess.run(
        [*command, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert run.returncode == 0, run.stderr[-3000:]
    ranks = [torch.load(tmp_path / f"rank{r}.pt", weights_only=True) for r in (0, 1)]
    assert same(*ranks)
    bare, averaged, resumed = ranks[0]
    assert same(bare[0], averaged[0])
    assert same(resumed, averaged)
    assert bare[1] != averaged[1]  # the loss of the EMA weights
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "ema/checkpoint-8/ema")
    assert same(parameters(loaded), averaged[2])


def test_importing_the_package_imports_no_trainer():
    code = "import ema_optim, sys; print([m for m in sys.argv[1:] if m in sys.modules])"
    found = run_python(code, "transformers", "accelerate", "peft", "safetensors").stdout
    assert found.strip() == "[]"


@pytest.mark.parametrize(
    ("missing", "entrance"),
    [
        ("transformers", "from ema_optim import EMACallback"),
        ("accelerate", "import ema_optim.integrations.transformers"),
    ],
)
def test_missing_package_is_an_import_error_with_the_pip_command(missing, entrance):
    code = f"import sys; sys.modules[{missing!r}] = None; import ema_optim; {entrance}"
    run = run_python(code)
    assert "ImportError" in run.stderr.splitlines()[-1]
    assert 'pip install "ema_optim[transformers]"' in run.stderr


@pytest.mark.parametrize("evaluate", [None, 2, 4])
def test_schedule_free_training_ends_and_is_saved_as_without_the_callback(tmp_path, evaluate):
    options = {"optim": "schedule_free_adamw", "lr_scheduler_type": "constant"}
    models = []
    for name, callbacks in (("a", []), ("b", [EMACallback(DECAY)])):
        trainer = fit(llama(), tmp_path / name, *callbacks, **options, **saves(4, evaluate))
        models.append(weights(trainer.model))
    assert same(*models)
    one, other = (tmp_path / name / "checkpoint-4/model.safetensors" for name in "ab")
    assert one.read_bytes() == other.read_bytes()
