"""What a checkpoint of the Trainer holds beside the EMA folder, and which one is the best."""

import os

import pytest
import torch
import transformers
from reference import same
from trainers import (
    DECAY,
    DOORS,
    EVAL,
    LOADERS,
    EMAAt,
    Witness,
    best,
    bf16,
    close,
    fit,
    llama,
    lora,
    parameters,
    plain,
    rounded,
    saves,
    untied,
    unused,
    weights,
)

from ema_optim import EMACallback

pytestmark = [
    # PEFT asks transformers for a name that transformers has renamed.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
]


def files(folder):
    return set(os.listdir(folder))


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
