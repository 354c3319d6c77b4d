"""``EMACallback`` by hand: apply, restore, export and load, in this process and others."""

import pytest
import torch
from reference import same, wide
from trainers import (
    DECAY,
    LOADERS,
    Witness,
    bf16,
    close,
    fit,
    llama,
    lora,
    parameters,
    rounded,
    run_python,
    untied,
    weights,
)

from ema_optim import EMACallback

pytestmark = [
    # PEFT asks transformers for a name that transformers has renamed.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
]


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
    ema = callback.get_ema_state()
    callback.apply_ema(model)
    assert same(parameters(model), ema)
    trainer.add_callback(witness := Witness(model))  # begins at these weights
    trainer.train()
    assert witness.wrong == []
    assert close(callback.get_ema_state().values(), witness.reference.emas)
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
