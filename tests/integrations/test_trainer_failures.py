"""An evaluation of the Trainer that fails: the training weights come back, whoever comes next."""

import pytest
import torch
from reference import same
from trainers import (
    DECAY,
    Stops,
    Witness,
    bf16,
    close,
    facts,
    fit,
    llama,
    make,
    parameters,
    rounded,
    saves,
    unused_bf16,
    weights,
)
from transformers import Trainer, TrainerCallback

from ema_optim import EMACallback

pytestmark = [
    # PEFT asks transformers for a name that transformers has renamed.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
]


class Fails(TrainerCallback):
    """Raises at the first of two batches of the evaluation of one step, once."""

    def __init__(self, error, step=4):
        self.error, self.step, self.batches = error, step, 0

    def on_prediction_step(self, args, state, control, **kwargs):
        self.batches += state.global_step == self.step
        if self.batches == 1:
            self.batches += 1
            raise self.error("no")


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
