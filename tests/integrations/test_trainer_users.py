"""The Trainer as its users meet it: the decay by itself, logs, both curves, files and the Hub."""

import json
import logging

import pytest
import torch
import transformers
from reference import same
from safetensors import safe_open
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.optim import AdamW
from trainers import DECAY, STEPS, Plain, Witness, close, fit, llama, lora, make, parameters, saves
from transformers import AutoModelForCausalLM, EarlyStoppingCallback, TrainerCallback

from ema_optim import (
    EMACallback,
    EMAOptimizer,
    EMAWarning,
    _warnings,
    compute_optimal_decay,
    warmup_decay,
)

pytestmark = [
    # PEFT asks transformers for a name that transformers has renamed.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]


@pytest.mark.parametrize("decay", [None, "auto"])
def test_decay_is_chosen_from_the_length_of_the_run_and_logged_once(tmp_path, caplog, decay):
    caplog.set_level(logging.INFO, "ema_optim")
    callback = EMACallback(decay)
    fit(llama(), tmp_path, callback, max_steps=6)
    assert callback.optimizer._ema.decay == warmup_decay(compute_optimal_decay(6))
    told = [r.getMessage() for r in caplog.records if r.name == "ema_optim"]
    assert told == [f"EMA decay: {callback.optimizer._ema.decay}, chosen for 6 steps"]


def test_a_longer_second_training_chooses_again(tmp_path):
    callback = EMACallback()
    trainer = fit(llama(), tmp_path, callback, max_steps=4)
    trainer.args.max_steps = 12
    trainer.train()
    assert callback.optimizer._ema.decay == warmup_decay(compute_optimal_decay(12))


class Ends(TrainerCallback):
    """Stops a training as it begins."""

    def on_step_begin(self, args, state, control, **kwargs):
        control.should_training_stop = True


def test_long_window_for_a_short_run_warns_when_the_training_begins(tmp_path):
    share = f"{0.999**8:.0%}"
    with pytest.warns(EMAWarning, match=f"still hold {share} .* compute_optimal_decay.8.") as told:
        fit(llama(), tmp_path, EMACallback(0.999), **saves(8, evaluate=4))
    assert len(told) == 1  # neither at the evaluations nor at the save


@pytest.mark.parametrize("decay", [None, "auto", 0.7, lambda update: 0.5])
def test_window_that_fits_the_run_does_not_warn(tmp_path, decay):
    fit(llama(), tmp_path, EMACallback(decay), Ends())


def test_users_own_optimizer_with_a_long_window_warns_too(tmp_path):
    model = llama()
    own = EMAOptimizer(AdamW(model.parameters()), decay=0.9999)
    with pytest.warns(EMAWarning, match="at the end of this run: decay 0.9999 over 8 steps"):
        fit(model, tmp_path, EMACallback(), optimizers=(own, None))


def scalars(folder):
    events = EventAccumulator(str(next(folder.rglob("events.*")).parent))
    events.Reload()
    return {tag: [e.value for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_metrics_are_in_the_files_of_tensorboard(tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    callback = EMACallback(DECAY, evaluate_with="both")
    trainer = fit(llama(), tmp_path, callback, report_to=["tensorboard"], **saves(8, evaluate=4))
    found, history = scalars(tmp_path), trainer.state.log_history
    for tag, key in [("train/ema_decay", "ema_decay"), ("train/ema_distance", "ema_distance")]:
        assert found[tag] == pytest.approx([e[key] for e in history if key in e])
        assert len(found[tag]) == STEPS
    assert len(found["eval/loss"]) == len(found["eval/training_loss"]) == 2


def losses(history, key):
    return [entry[key] for entry in history if key in entry]


def test_both_evaluates_the_ema_and_then_the_training_weights(tmp_path):
    runs = {}
    for name in ("ema", "training", "both"):
        model = llama()
        witness = Witness(model)
        callbacks = (EMACallback(DECAY, evaluate_with=name), witness)
        runs[name] = fit(model, tmp_path / name, *callbacks, **saves(8, evaluate=4))
        assert not witness.wrong
    history = runs["both"].state.log_history
    assert witness.batches == 2 * (["ema"] * 2 + ["training"] * 2)
    assert losses(history, "eval_loss") == losses(runs["ema"].state.log_history, "eval_loss")
    raw = losses(runs["training"].state.log_history, "eval_loss")
    assert losses(history, "eval_training_loss") == raw
    assert same(*(parameters(runs[name].model) for name in ("both", "training")))


def test_both_leaves_the_random_numbers_of_the_training_alone(tmp_path):
    found = []
    for name in ("ema", "both"):
        fit(
            llama(), tmp_path / name, EMACallback(DECAY, evaluate_with=name), **saves(8, evaluate=2)
        )
        found.append(torch.rand(3))
    assert torch.equal(*found)


def test_both_follows_the_names_of_several_datasets(tmp_path):
    trainer = make(llama(), tmp_path, EMACallback(DECAY, evaluate_with="both"))
    trainer.train()
    trainer.evaluate({"one": trainer.eval_dataset, "two": trainer.eval_dataset})
    keys = {key for entry in trainer.state.log_history for key in entry if key.endswith("loss")}
    assert {"eval_one_loss", "eval_training_one_loss", "eval_training_two_loss"} <= keys


def test_other_callbacks_see_one_evaluation_of_both(tmp_path):
    stopping = EarlyStoppingCallback(early_stopping_patience=9)
    callback = EMACallback(DECAY, evaluate_with="both")
    options = {**saves(4, evaluate=4), "metric_for_best_model": "loss"}
    trainer = fit(llama(), tmp_path, callback, stopping, load_best_model_at_end=True, **options)
    assert trainer.state.best_metric == min(losses(trainer.state.log_history, "eval_loss"))


def test_evaluate_with_set_later_takes_effect(tmp_path):
    model, callback = llama(), EMACallback(DECAY)
    witness = Witness(model)
    trainer = fit(model, tmp_path, callback, witness)
    for name in ("training", "ema"):
        callback.evaluate_with = name
        trainer.evaluate()
    assert witness.batches == ["training"] * 2 + ["ema"] * 2
    with pytest.raises(ValueError, match="evaluate_with must be 'ema', 'training' or 'both'"):
        callback.evaluate_with = "raw"


@pytest.fixture
def nothing_told(monkeypatch):
    monkeypatch.setattr(_warnings, "_told", set())


def test_metric_of_other_weights_than_the_best_checkpoints_is_told_once(tmp_path, nothing_told):
    options = {**saves(4, evaluate=4), "metric_for_best_model": "loss"}
    with pytest.warns(EMAWarning, match=r"best_model_checkpoint, whose .* in its folder ema"):
        fit(llama(), tmp_path / "a", EMACallback(0.5), **options)
    fit(llama(), tmp_path / "b", EMACallback(0.5), **options)


def header(file):
    with safe_open(file, "pt") as opened:
        return opened.metadata()


@pytest.mark.parametrize("build", [llama, lora, Plain])
def test_files_of_the_ema_say_so_and_those_of_the_trainer_do_not(tmp_path, build):
    trainer = fit(build(), tmp_path, EMACallback(DECAY), **saves(8))
    files = {f.relative_to(tmp_path).parts[1]: f for f in tmp_path.rglob("*.safetensors")}
    own = header(files.pop("ema"))
    assert (own["ema_optim"], own["ema_step"]) == (__import__("ema_optim").__version__, "8")
    assert (own["ema_decay"], own["ema_global_step"]) == (str(DECAY), "8")
    assert [key for file in files.values() for key in header(file) or () if "ema" in key] == []
    card = next((tmp_path / "checkpoint-8" / "ema").rglob("README.md")).read_text()
    assert f"ema_step: {trainer.state.global_step}" in card


def test_folder_is_in_shards_as_the_models_own_save_and_every_shard_says_so(tmp_path, monkeypatch):
    model = llama()
    save = type(model).save_pretrained
    small = lambda self, *args, **kwargs: save(self, *args, max_shard_size="2KB", **kwargs)  # noqa: E731
    monkeypatch.setattr(type(model), "save_pretrained", small)
    callback = EMACallback(DECAY)
    fit(model, tmp_path, callback, **saves(8))
    folder = tmp_path / "checkpoint-8" / "ema"
    shards = list(folder.glob("*.safetensors"))
    assert len(shards) > 2
    assert all(header(shard)["ema_step"] == "8" for shard in shards)
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert close(parameters(loaded).values(), callback.get_ema_state().values())


def test_folder_that_is_written_is_logged(tmp_path, caplog):
    caplog.set_level(logging.INFO, "ema_optim")
    fit(llama(), tmp_path, EMACallback(DECAY), **saves(4))
    told = [r.getMessage() for r in caplog.records if r.name == "ema_optim"]
    assert [text.split(" in ")[0] for text in told] == [f"EMA weights of step {n}" for n in (4, 8)]


class Hub:
    """Keeps what is uploaded."""

    def __init__(self):
        self.pushed = []

    def create_repo(self, name, **kwargs):
        return type("Repo", (), {"repo_id": name})

    def upload_folder(self, folder_path, run_as_future=False, **kwargs):
        file = f"{folder_path}/model.safetensors"
        self.pushed.append((transformers.modeling_utils.load_state_dict(file), header(file)))
        return type("Job", (), {"done": lambda self: True})()


def put_in_place(monkeypatch, hub):
    """Of the client that transformers 5 asks for, or of the functions that transformers 4 calls."""
    monkeypatch.setattr(transformers.trainer, "hf_api", lambda: hub, raising=False)
    for name in ("create_repo", "upload_folder"):
        monkeypatch.setattr(transformers.trainer, name, getattr(hub, name), raising=False)


@pytest.mark.parametrize("weights", ["training", "ema"])
def test_what_is_pushed_is_what_was_asked_for(tmp_path, monkeypatch, nothing_told, weights):
    hub, callback = Hub(), EMACallback(0.5, hub_weights=weights)
    put_in_place(monkeypatch, hub)
    options = {"push_to_hub": True, "hub_model_id": "a/b", **saves(4)}
    trainer = make(llama(), tmp_path, callback, **options)
    monkeypatch.setattr(trainer, "create_model_card", lambda **kwargs: None)
    if weights == "training":
        with pytest.warns(EMAWarning, match="what is pushed to the Hub"):
            trainer.train()
    else:
        trainer.train()
    trainer.push_to_hub()
    state = callback.get_ema_state() if weights == "ema" else parameters(trainer.model)
    assert len(hub.pushed) == 3
    for pushed, told in hub.pushed[1:]:
        assert close([pushed[name] for name in state], state.values())
        assert ("ema_step" in told) == (weights == "ema")


WRONG = [
    ({"hub_weights": "both"}, "hub_weights must be 'training' or 'ema'"),
    ({"hub_weights": "ema", "save_ema": False}, "hub_weights='ema' must find the EMA weights"),
]


@pytest.mark.parametrize(("options", "message"), WRONG)
def test_wrong_hub_weights_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        EMACallback(**options)


def test_pushing_whole_checkpoints_of_ema_weights_is_refused(tmp_path, monkeypatch):
    put_in_place(monkeypatch, Hub())
    options = {"push_to_hub": True, "hub_model_id": "a/b", "hub_strategy": "checkpoint"}
    trainer = make(llama(), tmp_path, EMACallback(DECAY, hub_weights="ema"), **options)
    with pytest.raises(ValueError, match="hub_weights='ema' must go with hub_strategy"):
        trainer.train()


def test_trainer_state_file_holds_both_curves(tmp_path):
    fit(llama(), tmp_path, EMACallback(DECAY, evaluate_with="both"), **saves(8, evaluate=4))
    state = json.loads((tmp_path / "checkpoint-8" / "trainer_state.json").read_text())
    assert len(losses(state["log_history"], "eval_training_loss")) == 2
