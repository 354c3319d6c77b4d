"""Whose EMA, of which step: trainings that follow each other, folders that are not whole."""

import shutil
import types

import pytest
import torch
from reference import same
from safetensors.torch import load_file, save_file
from torch.optim import AdamW
from torch.optim.lr_scheduler import ConstantLR
from trainers import (
    DECAY,
    EVAL,
    EMAAt,
    Witness,
    best,
    bf16,
    close,
    fit,
    llama,
    make,
    parameters,
    saves,
    weights,
)
from transformers import LlamaForCausalLM, Trainer
from transformers.trainer_utils import HPSearchBackend

from ema_optim import EMACallback, EMAOptimizer, compute_optimal_decay, warmup_decay
from ema_optim.integrations import _pretrained

SLOW = {"lr_scheduler_type": "constant"}


# A run without the callback carries the EMA of an earlier step along in optimizer.pt.
def test_stale_ema_of_the_best_checkpoint_is_not_loaded(tmp_path):
    fit(llama(), tmp_path, EMACallback(DECAY), **saves(4, evaluate=4), **SLOW, max_steps=4)
    between = fit(llama(), tmp_path, resume=tmp_path / "checkpoint-4", **best(8), **SLOW)
    wanted = parameters(between.model)
    options = {"resume": tmp_path / "checkpoint-8", "max_steps": 12, **SLOW}
    with pytest.warns(UserWarning, match="holds no EMA of step 8") as record:
        trainer = fit(llama(5), tmp_path, EMACallback(DECAY), **best(0), **options)
    assert trainer.state.best_global_step == 8
    assert len(record) == 2  # at the resume, and at the end
    assert same(parameters(trainer.model), wanted)


def trial(trainer, number):
    """As ``hyperparameter_search`` with optuna begins a trial."""
    trainer.hp_search_backend, trainer.hp_name = HPSearchBackend.OPTUNA, None
    trainer.hp_space = lambda _: {}
    trainer._trial = types.SimpleNamespace(number=number, params={})
    trainer._hp_search_setup = lambda _: None
    trainer.train(trial=trainer._trial)


def test_trial_writes_its_ema_into_its_own_folder(tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.integrations.hp_params", lambda _: {})
    trainer = make(llama(), tmp_path, EMACallback(DECAY), **saves(4))
    trainer.train()
    main = load_file(tmp_path / "checkpoint-4/ema/model.safetensors")
    callback = EMACallback(DECAY)
    searching = make(llama(3), tmp_path, callback, seen := EMAAt(callback), **saves(4))
    trial(searching, 1)
    assert same(load_file(tmp_path / "checkpoint-4/ema/model.safetensors"), main)
    own = LlamaForCausalLM.from_pretrained(tmp_path / "run-1/checkpoint-4/ema")
    assert same(parameters(own), seen.states[4])


class Sharded(LlamaForCausalLM):
    def save_pretrained(self, folder, **options):
        super().save_pretrained(folder, **{"max_shard_size": "2KB", **options})


def lose_a_shard(folder):
    sorted(folder.glob("model-*.safetensors"))[0].unlink()


def lose_a_key(folder):
    for file in folder.glob("*.safetensors"):
        state = load_file(file)
        state.pop("model.norm.weight", None)
        save_file(state, file, {"format": "pt"})


@pytest.mark.parametrize("damage", [lose_a_shard, lose_a_key])
def test_folder_that_does_not_cover_every_weight_is_refused(tmp_path, damage):
    model = llama(cls=Sharded)
    fit(model, tmp_path, EMACallback(DECAY), **saves(4))
    damage(tmp_path / "checkpoint-4/ema")
    before = weights(model)
    with pytest.raises(RuntimeError, match=r"it lacks .*model\."):
        _pretrained._load_saved(model, str(tmp_path / "checkpoint-4/ema"))
    assert same(weights(model), before)


def mixtral(seed=0):
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "max_position_embeddings": 16}
    heads = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    return MixtralForCausalLM(MixtralConfig(vocab_size=32, num_local_experts=2, **sizes, **heads))


# transformers 5 stacks the experts in the model and keeps them apart in files.
def test_model_whose_files_name_their_weights_otherwise_ends_with_the_best(tmp_path):
    model, callback = mixtral(), EMACallback(DECAY)
    seen = EMAAt(callback)
    fit(model, tmp_path, callback, seen, **best(), save_only_model=True)
    assert same(parameters(model), seen.states[4])


@pytest.mark.parametrize("old", [False, True])
def test_save_that_is_killed_leaves_no_folder_that_looks_whole(tmp_path, monkeypatch, old):
    if old:
        fit(llama(), tmp_path, EMACallback(DECAY), **saves(8))
        shutil.rmtree(tmp_path / "checkpoint-8/ema")
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)

    class Killed(LlamaForCausalLM):
        def save_pretrained(self, folder, **options):
            super().save_pretrained(folder, **options)
            if "ema" in str(folder).rpartition("checkpoint")[2]:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(llama(cls=Killed), tmp_path, EMACallback(DECAY), **saves(8))
    assert not (tmp_path / "checkpoint-8/ema").exists()


def test_folder_of_a_killed_save_is_written_anew(tmp_path):
    for name in ("ema", "ema.tmp/ema"):
        (tmp_path / "checkpoint-8" / name).mkdir(parents=True)
        (tmp_path / "checkpoint-8" / name / "model-00001.safetensors").write_bytes(b"half")
    fit(llama(), tmp_path, EMACallback(DECAY), **saves(8))
    assert not (tmp_path / "checkpoint-8/ema.tmp").exists()
    assert not (tmp_path / "checkpoint-8/ema/model-00001.safetensors").exists()


def test_rank_that_does_not_write_leaves_the_folders_of_the_writer_alone(tmp_path):
    half = tmp_path / "ema.tmp/ema/model.safetensors"
    half.parent.mkdir(parents=True)
    half.write_bytes(b"half")
    with _pretrained.written_aside(str(tmp_path), writes=False):
        pass
    assert half.exists()
    assert not (tmp_path / "ema").exists()


OTHERS = {
    "decay": ({"decay": 0.5}, 16),
    "stride": ({"decay": DECAY, "update_every": 2}, 8),
    "start": ({"decay": DECAY, "update_after_step": 10}, 6),
    "dtype": ({"decay": DECAY, "dtype": torch.float64}, 16),
}


@pytest.mark.parametrize("row", OTHERS)
def test_a_later_training_has_the_options_of_its_own_callback(tmp_path, row):
    options, updates = OTHERS[row]
    first, later = EMACallback(DECAY), EMACallback(**options)
    trainer = fit(llama(), tmp_path, first)
    trainer.remove_callback(first)
    trainer.add_callback(later)
    before = first.get_ema_state()
    trainer.train()
    shadow = later.optimizer._ema
    assert {name: getattr(shadow, name) for name in options} == options
    assert later.optimizer is trainer.optimizer.optimizer
    assert later.optimizer.ema_metrics()["ema_updates"] == updates
    assert same(first.get_ema_state(), before)


def test_a_later_training_averages_on_with_its_own_decay(tmp_path):
    model, first, later = llama(), EMACallback(DECAY), EMACallback(0.5)
    witness = Witness(model)
    trainer = fit(model, tmp_path, first, witness)
    trainer.remove_callback(first)
    trainer.add_callback(later)
    witness.reference.decay = lambda _: 0.5
    trainer.train()
    assert close(later.get_ema_state().values(), witness.reference.emas)


def test_auto_decay_is_that_of_the_steps_of_this_training(tmp_path):
    trainer = fit(llama(), tmp_path, EMACallback("auto"), max_steps=4)
    trainer.args.max_steps = 100
    trainer.train()
    wanted = warmup_decay(compute_optimal_decay(100))
    assert trainer.state.log_history[-2]["ema_decay"] == wanted(
        104
    )  # the EMA of the first four goes on


def test_auto_decay_of_another_length_is_refused_with_the_users_own_optimizer(tmp_path):
    model = llama()
    own = EMAOptimizer(AdamW(model.parameters(), lr=1e-2), warmup_decay(compute_optimal_decay(4)))
    trainer = fit(model, tmp_path, EMACallback("auto"), optimizers=(own, None), max_steps=4)
    trainer.args.max_steps = 100
    with pytest.raises(ValueError, match="decay must be that of the EMAOptimizer"):
        trainer.train()


@pytest.mark.parametrize("build", [llama, bf16])
def test_removed_callback_leaves_nothing_behind(tmp_path, build):
    models = []
    for name, callbacks in (("a", []), ("b", [EMACallback(DECAY)])):
        trainer = fit(build(), tmp_path / name, *callbacks, **saves(4, evaluate=4))
        for callback in callbacks:
            trainer.remove_callback(callback)
        loss = trainer.evaluate()["eval_loss"]
        trainer.train()
        files = [torch.load(tmp_path / name / "checkpoint-4/optimizer.pt", weights_only=True)]
        models.append([weights(trainer.model), loss, trainer.evaluate()["eval_loss"], files])
    assert same(*models)


def test_callback_that_comes_back_begins_anew(tmp_path):
    model, callback = llama(), EMACallback(DECAY)
    trainer = fit(model, tmp_path, callback)
    trainer.remove_callback(callback)
    trainer.train()
    trainer.add_callback(callback)
    trainer.add_callback(witness := Witness(model))
    trainer.train()
    assert callback.optimizer.ema_metrics()["ema_updates"] == witness.reference.step == 8
    assert close(callback.get_ema_state().values(), witness.reference.emas)


def test_one_callback_in_two_trainers_leaves_no_model_on_ema_weights(tmp_path):
    callback = EMACallback(DECAY)
    first, second = (fit(llama(seed), tmp_path, callback) for seed in (0, 1))
    for trainer in (first, second, first):
        before = weights(trainer.model)
        trainer.evaluate()
        trainer.predict(EVAL)
        assert same(weights(trainer.model), before)


class Silent(Trainer):
    """Its ``predict`` fires no event, as that of transformers' question answering example."""

    def predict(self, dataset):
        return self.evaluation_loop(self.get_test_dataloader(dataset), "Prediction")


def test_prediction_without_an_event_leaves_the_training_weights(tmp_path):
    model = llama()
    trainer = fit(model, tmp_path, EMACallback(DECAY), witness := Witness(model), trainer=Silent)
    before = weights(model)
    for _ in range(2):
        trainer.predict(EVAL)
        assert same(weights(model), before)
    assert witness.batches == ["ema"] * 4


def test_weights_that_are_not_in_the_optimizer_are_named(tmp_path):
    model = llama()
    some = AdamW(list(model.parameters())[:-1], lr=1e-2)
    with pytest.raises(ValueError, match=r"it lacks model\.norm\.weight: freeze"):
        fit(model, tmp_path, EMACallback(DECAY), optimizers=(some, None))


def test_layer_wise_optimizer_is_refused(tmp_path):
    from transformers.trainer_pt_utils import LayerWiseDummyOptimizer

    dummy = LayerWiseDummyOptimizer(optimizer_dict={}, lr=1e-2)
    with pytest.raises(ValueError, match="layer-wise optimizer steps inside the backward"):
        fit(llama(), tmp_path, EMACallback(DECAY), optimizers=(dummy, ConstantLR(dummy)))


@pytest.mark.parametrize("name", ["Lomo", "AdaLomo"])
def test_lomo_is_refused_by_name(tmp_path, name):
    model = llama()
    lomo = type(name, (AdamW,), {})(model.parameters(), lr=1e-2)
    with pytest.raises(RuntimeError, match=f"EMACallback with {name}: "):
        fit(model, tmp_path, EMACallback(DECAY), optimizers=(lomo, None))
