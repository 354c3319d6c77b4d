"""TRL's trainers with ``EMACallback``: nothing else is told to them."""

import pytest
from other_loops import needs, quiet
from reference import same
from tokenizers import Tokenizer, models, pre_tokenizers
from trainers import DECAY, Witness, close, facts, llama, rounded, saves, weights
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from ema_optim import EMACallback

WORDS = [f"w{i}" for i in range(29)]


def tokenizer():
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<unk>", "<eos>", *WORDS])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"pad_token": "<pad>", "unk_token": "<unk>", "eos_token": "<eos>"}
    return PreTrainedTokenizerFast(tokenizer_object=made, **names)


def text(row, words=4):
    return " ".join(WORDS[(3 * row + 7 * i) % 29] for i in range(words))


def rows(**columns):
    made = [{name: text(i + shift) for name, shift in columns.items()} for i in range(8)]
    return needs("datasets").Dataset.from_list(made)


def reward(completions, **_):
    return [float(sum(map(ord, completion)) % 7) for completion in completions]


PREFERENCES = {"prompt": 0, "chosen": 1, "rejected": 2}
SAMPLES = {"num_generations": 2, "max_completion_length": 4}
TRAINERS = {
    "SFT": ({"text": 0}, {}, dict),
    "DPO": (PREFERENCES, {}, lambda: {"ref_model": llama()}),
    "GRPO": ({"prompt": 0}, SAMPLES, lambda: {"reward_funcs": reward}),
}
trainers = pytest.mark.parametrize("name", TRAINERS)


@pytest.fixture(autouse=True)
def _their_own_warnings():
    with quiet():
        yield


def make(name, folder, model, *callbacks, **options):
    trl, (columns, own, parts) = needs("trl"), TRAINERS[name]
    quiet = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "dataloader_pin_memory": False}
    sizes = {"per_device_train_batch_size": 4, "per_device_eval_batch_size": 4, "max_steps": 4}
    options = {"save_strategy": "no", "learning_rate": 1e-2, "bf16": False, **sizes, **options}
    args = getattr(trl, f"{name}Config")(str(folder), **quiet, **own, **options)
    data = {"train_dataset": rows(**columns), "eval_dataset": rows(**columns)}
    parts = {**parts(), **data, "processing_class": tokenizer(), "callbacks": list(callbacks)}
    return getattr(trl, f"{name}Trainer")(model=model, args=args, **parts)


@trainers
def test_training_is_bit_equal_to_the_one_without_the_callback(name, tmp_path):
    after = []
    for callbacks in ([], [EMACallback(DECAY)]):  # one after the other: samples take random numbers
        trainer = make(name, tmp_path, llama(), *callbacks)
        trainer.train()
        after.append(weights(trainer.model))
    assert same(*after)
    assert not same(after[0], weights(llama()))


@trainers
def test_evaluation_and_the_saved_folder_hold_the_average_of_the_steps(name, tmp_path):
    model, callback = llama(), EMACallback(DECAY)
    witness = Witness(model)
    trainer = make(name, tmp_path, model, callback, witness, **saves(4))
    trainer.train()
    assert close(callback.get_ema_state().values(), witness.reference.emas)
    witness.batches.clear()
    trainer.evaluate()
    assert set(witness.batches) == {"ema"}
    saved = LlamaForCausalLM.from_pretrained(tmp_path / "checkpoint-4" / "ema")
    assert same(dict(saved.named_parameters()), rounded(callback.get_ema_state(), saved))


@trainers
def test_resume_equals_uninterrupted(name, tmp_path):
    runs = []
    for resume in (None, str(tmp_path / "checkpoint-2")):
        callback = EMACallback(DECAY)
        trainer = make(name, tmp_path, llama(), callback, **saves(2))
        trainer.train(resume_from_checkpoint=resume)
        runs.append(facts(trainer, callback))
    assert same(*runs)
