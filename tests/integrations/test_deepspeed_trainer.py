"""``EMACallback`` in a real ``Trainer`` under real DeepSpeed, on two ranks and on one."""

import json
from pathlib import Path

import pytest
import torch
from deepspeed_engines import (
    NEEDS,
    deepspeed,
    equal,
    everywhere,
    masters,
    on_engines,
    whole_state,
)

pytestmark = NEEDS

STEPS = 4
TRAINED = ["0 fp32", "2 bf16", "3 fp32", "3 bf16, one rank"]


def trainer_of(row, folder, *callbacks, **options):
    """A Trainer of the tiny Llama under the stage and precision of a row."""
    deepspeed()
    from accelerate.state import AcceleratorState, PartialState
    from trainers import llama
    from transformers import Trainer, TrainingArguments

    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._reset_state()
    zero = {"stage": int(row[0]), "stage3_gather_16bit_weights_on_model_save": True}
    config = {"zero_optimization": zero, "bf16": {"enabled": "auto"}}
    config.update(train_micro_batch_size_per_gpu="auto", gradient_accumulation_steps="auto")
    config.update(gradient_clipping="auto", zero_force_ds_cpu_optimizer=False)
    sizes = {"per_device_train_batch_size": 2, "per_device_eval_batch_size": 2}
    told = {"report_to": [], "disable_tqdm": True, "use_cpu": True, "logging_steps": 1}
    every = {"save_steps": 2, "eval_steps": 2, "eval_strategy": "steps", "max_steps": STEPS}
    given = {**sizes, **told, **every, "bf16": "bf16" in row, "learning_rate": 0.05, **options}
    arguments = TrainingArguments(folder, deepspeed=config, **given)
    data = [{"input_ids": torch.arange(i, i + 6) % 32} for i in range(16)]
    data = [{**each, "labels": each["input_ids"]} for each in data]
    parts = {"train_dataset": data, "eval_dataset": data[:4]}
    return Trainer(model=llama(), args=arguments, callbacks=list(callbacks), **parts)


def callback(decay=0.5, **options):
    from ema_optim import EMACallback

    return EMACallback(decay, **options)


def state_of(trainer):
    return masters(trainer.model_wrapped)


def losses(trainer):
    return [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]


@on_engines(*TRAINED, "0 bf16", "1 fp32")
def test_the_training_is_that_without_the_callback_and_the_average_by_hand(row, folder):
    from transformers import TrainerCallback

    bare = trainer_of(row, f"{folder}/bare")
    bare.train()
    ours, hand = callback(), {}

    class Watch(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            for name, weights in state_of(trainer).items():
                hand.setdefault(name, weights.clone()).lerp_(weights, 0.5)

        def on_train_begin(self, *args, **kwargs):
            hand.update(state_of(trainer))

    trainer = trainer_of(row, f"{folder}/ours", ours, Watch())
    trainer.train()
    assert equal(state_of(trainer), state_of(bare))
    assert equal(whole_state(ours.optimizer), hand)
    assert losses(trainer) != losses(bare)
    assert all("ema_distance" in e for e in trainer.state.log_history if "loss" in e)


@on_engines(*TRAINED)
def test_the_folder_of_a_checkpoint_is_what_was_evaluated(row, folder):
    from trainers import llama
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    trainer = trainer_of(row, folder, callback())
    trainer.train()
    everywhere(folder)
    unset_hf_deepspeed_config()  # from_pretrained() would shard what it loads
    made = type(llama()).from_pretrained(f"{folder}/checkpoint-{STEPS}/ema", dtype="auto")
    batch = torch.stack([torch.arange(i, i + 6) % 32 for i in range(4)])
    with torch.no_grad():
        parts = [made(input_ids=b, labels=b).loss.float() for b in batch.split(2)]
    assert losses(trainer)[-1] == pytest.approx(float(torch.stack(parts).mean()), rel=2e-3)
    step = json.loads(Path(folder, f"checkpoint-{STEPS}/trainer_state.json").read_text())
    assert step["global_step"] == STEPS


@on_engines(*TRAINED)
def test_a_resumed_training_is_the_uninterrupted_one(row, folder):
    whole = trainer_of(row, folder, ours := callback())
    whole.train()
    everywhere(folder)
    again = trainer_of(row, f"{folder}/again", resumed := callback())
    again.train(resume_from_checkpoint=f"{folder}/checkpoint-2")
    assert equal(state_of(again), state_of(whole))
    assert equal(whole_state(resumed.optimizer), whole_state(ours.optimizer))
    assert losses(again)[-1] == losses(whole)[-1]


@on_engines("2 bf16", "3 fp32")
def test_the_best_model_ends_as_the_average_that_was_evaluated(row, folder):
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss"}
    trainer = trainer_of(row, folder, ours := callback(), **best)
    trainer.train()
    assert equal(state_of(trainer), whole_state(ours.optimizer))
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(losses(trainer)[:-1]), rel=1e-6)


@on_engines("0 fp32", "2 bf16", "3 fp32")
def test_the_average_is_applied_and_taken_out_again(row, folder):
    trainer = trainer_of(row, folder, ours := callback(), save_strategy="no")
    trainer.train()
    before, average = state_of(trainer), whole_state(ours.optimizer)
    inside = losses(trainer)[-1]
    ours.apply_ema(trainer.model)
    assert equal(state_of(trainer), average)
    assert trainer.evaluate()["eval_loss"] == inside
    ours.restore_original(trainer.model)
    assert equal(state_of(trainer), before)
    assert trainer.evaluate()["eval_loss"] == inside
    assert bool(ours.get_ema_state()) == (torch.distributed.get_rank() == 0)
    ours.evaluate_with = "training"
    assert trainer.evaluate()["eval_loss"] != inside


@on_engines("2 bf16", "3 fp32")
def test_taken_out_of_the_trainer_the_callback_evaluates_nothing(row, folder):
    trainer = trainer_of(row, folder, ours := callback(), save_strategy="no")
    trainer.train()
    ours.evaluate_with = "training"
    wanted = trainer.evaluate()["eval_loss"]
    ours.evaluate_with = "ema"
    assert trainer.evaluate()["eval_loss"] != wanted
    trainer.remove_callback(ours)
    assert trainer.evaluate()["eval_loss"] == wanted


@on_engines("2 bf16")
def test_buffers_another_device_and_a_second_callback_are_refused(row, folder):
    with pytest.raises(ValueError, match="device must be left out under DeepSpeed"):
        trainer_of(row, folder, callback(device="cpu")).train()
    with pytest.raises(ValueError, match="use_buffers=True and DeepSpeed's engine"):
        trainer_of(row, folder, callback(use_buffers=True)).train()
    with pytest.raises(ValueError, match="one EMACallback"):
        trainer_of(row, folder, callback(), callback()).train()


# The Trainer makes an optimizer for it that the engine does not have, and decays that one's rate.
@on_engines("2 bf16")
def test_a_second_training_of_one_trainer_is_refused_with_a_remedy(row, folder):
    trainer = trainer_of(row, folder, callback(), save_strategy="no")
    trainer.train()
    with pytest.raises(TypeError, match="build another Trainer"):
        trainer.train()
