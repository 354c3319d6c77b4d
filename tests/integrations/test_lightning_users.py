"""Lightning as its users meet it: the decay by itself, logs, verbs, several optimizers."""

import csv
import logging

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.optim import SGD
from torch.utils.data import DataLoader, TensorDataset

from ema_optim import EMAOptimizer, EMAWarning, EMAWeights, compute_optimal_decay, warmup_decay

pytestmark = [
    # Lightning 2.6 asks torch 2.13's pytrees by a deprecated name.
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated"),
    # Four rows need no workers (advice on machines with many cores).
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    # Most fits here are without one.
    pytest.mark.filterwarnings("ignore:You defined a .validation_step. but have no"),
]
DECAY = 0.5


class Pair(pl.LightningModule):
    """A generator and a discriminator, each with an optimizer of its own."""

    def __init__(self, wrapped=()):
        super().__init__()
        torch.manual_seed(0)
        self.automatic_optimization = False
        self.first, self.second = nn.Linear(4, 2), nn.Linear(4, 2)
        self.wrapped, self.seen = wrapped, []

    def training_step(self, batch, batch_idx):
        for optimizer, part in zip(self.optimizers(), (self.first, self.second), strict=True):
            optimizer.zero_grad()
            self.manual_backward(part(batch[0]).square().mean())
            optimizer.step()

    def validation_step(self, batch, batch_idx):
        self.seen.append({n: p.detach().clone() for n, p in self.named_parameters()})

    def configure_optimizers(self):
        made = [SGD(part.parameters(), lr=0.1) for part in (self.first, self.second)]
        return [EMAOptimizer(o, DECAY) if i in self.wrapped else o for i, o in enumerate(made)]


class Alone(pl.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(4, 2)

    def training_step(self, batch, batch_idx):
        return self.first(batch[0]).square().mean()

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return SGD(self.parameters(), lr=0.1)


def rows():
    return DataLoader(TensorDataset(torch.randn(32, 4)), batch_size=4)


def fit(model, callbacks, folder, validates=False, resume=None, **options):
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    own = {"logger": False, "max_steps": 8, "num_sanity_val_steps": 0, "log_every_n_steps": 1}
    every = {**quiet, **own, "default_root_dir": folder, "callbacks": callbacks}
    trainer = pl.Trainer(**{**every, **options})
    trainer.fit(model, rows(), rows() if validates else None, ckpt_path=resume)
    return trainer


def parameters(model):
    return {name: param.detach().clone() for name, param in model.named_parameters()}


def equal(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[n], right[n]) for n in left)


ROWS = [  # the callback's optimizers, those that the user has wrapped, those with an EMA
    (None, (), (True, True)),
    (None, (0,), (True, False)),
    ([0], (), (True, False)),
    ([1], (), (False, True)),
    ([0, 1], (1,), (True, True)),
]


@pytest.mark.parametrize(("wanted", "wrapped", "expected"), ROWS)
def test_averaged_are_the_wanted_ones_else_the_wrapped_ones_else_all(
    tmp_path, wanted, wrapped, expected
):
    callback = EMAWeights(optimizers=wanted)
    trainer = fit(Pair(wrapped), [callback], tmp_path)
    assert tuple(isinstance(o, EMAOptimizer) for o in trainer.optimizers) == expected
    parts = [part for part, there in zip(("first", "second"), expected, strict=True) if there]
    names = {f"{part}.{name}" for part in parts for name in ("weight", "bias")}
    assert callback.get_ema_state().keys() == names


def test_optimizer_that_is_left_out_is_evaluated_as_it_is_and_resumes(tmp_path):
    model, callback = Pair(), EMAWeights(DECAY, optimizers=[1])
    trainer = fit(model, [callback], tmp_path, validates=True, max_epochs=1, max_steps=-1)
    assert torch.equal(model.seen[0]["first.weight"], model.first.weight)
    assert torch.equal(model.seen[0]["second.weight"], callback.get_ema_state()["second.weight"])
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    again, resumed = Pair(), EMAWeights(DECAY, optimizers=[1])
    fit(again, [resumed], tmp_path, resume=tmp_path / "a.ckpt", max_epochs=1, max_steps=-1)
    assert equal(parameters(again), parameters(model))
    assert equal(resumed.get_ema_state(), callback.get_ema_state())


WRONG = [("0", TypeError), ([], ValueError), ([-1], ValueError), ([0.5], ValueError)]


@pytest.mark.parametrize(("wanted", "kind"), WRONG)
def test_wrong_positions_are_refused(wanted, kind):
    with pytest.raises(kind, match="optimizers must"):
        EMAWeights(optimizers=wanted)


def test_position_that_is_not_there_is_refused_at_the_start(tmp_path):
    with pytest.raises(ValueError, match="among the 1 that configure_optimizers"):
        fit(Alone(), [EMAWeights(optimizers=[1])], tmp_path)


@pytest.mark.parametrize("decay", [None, "auto"])
def test_decay_is_chosen_from_the_length_of_the_run_and_logged_once(tmp_path, caplog, decay):
    caplog.set_level(logging.INFO, "ema_optim")
    trainer = fit(Alone(), [EMAWeights(decay)], tmp_path)
    chosen = warmup_decay(compute_optimal_decay(8))
    assert trainer.optimizers[0]._ema.decay == chosen
    told = [r.getMessage() for r in caplog.records if r.name == "ema_optim"]
    assert told == [f"EMA decay: {chosen}, chosen for 8 steps"]


class Stops(pl.Callback):
    def on_train_batch_end(self, trainer, *args):
        trainer.should_stop = trainer.global_step > 2


ENDLESS = {"max_epochs": -1, "max_steps": -1}


def test_run_of_unknown_length_gets_a_usual_decay_and_auto_is_refused(tmp_path, caplog):
    caplog.set_level(logging.INFO, "ema_optim")
    trainer = fit(Alone(), [EMAWeights(), Stops()], tmp_path, **ENDLESS)
    assert trainer.optimizers[0]._ema.decay == warmup_decay(0.999)
    assert "of no known length" in caplog.text
    with pytest.raises(ValueError, match="decay='auto' must know the steps of the run, got inf"):
        fit(Alone(), [EMAWeights("auto"), Stops()], tmp_path, **ENDLESS)


def test_long_window_for_a_short_run_warns_when_the_training_begins(tmp_path):
    with pytest.warns(EMAWarning, match="will still hold 99% of the initial weights") as told:
        fit(Alone(), [EMAWeights(0.999)], tmp_path, validates=True)
    assert [warning.category for warning in told].count(EMAWarning) == 1


def metrics_in(logger):
    with open(f"{logger.log_dir}/metrics.csv") as file:
        return list(csv.DictReader(file))


def test_metrics_are_in_the_loggers_own_file(tmp_path):
    logger = CSVLogger(tmp_path)
    trainer = fit(Alone(), [EMAWeights(DECAY)], tmp_path, logger=logger, log_every_n_steps=2)
    found = metrics_in(logger)
    assert [row["ema_decay"] for row in found] == ["0.5"] * 4
    last = trainer.optimizers[0].ema_metrics()["ema_distance"]
    assert float(found[-1]["ema_distance"]) == pytest.approx(last, rel=1e-5)


def test_several_optimizers_are_logged_by_their_positions(tmp_path):
    logger = CSVLogger(tmp_path)
    fit(Pair(), [EMAWeights(DECAY)], tmp_path, logger=logger)
    assert {"ema_decay_0", "ema_decay_1", "ema_distance_1"} <= metrics_in(logger)[0].keys()


@pytest.mark.parametrize("build", [Alone, Pair])
def test_apply_ema_then_restore_original_is_identity(tmp_path, build):
    model, callback = build(), EMAWeights(DECAY)
    fit(model, [callback], tmp_path)
    before, state = parameters(model), callback.get_ema_state()
    callback.apply_ema(model)
    assert equal(parameters(model), state)
    assert not equal(state, before)
    callback.restore_original(model)
    assert equal(parameters(model), before)


@pytest.mark.parametrize("build", [Alone, Pair])
def test_loaded_ema_is_applied_without_training_and_goes_on_in_a_training(tmp_path, build):
    trained, fresh, model = EMAWeights(DECAY), EMAWeights(1.0), build()
    fit(build(), [trained], tmp_path)
    state = trained.get_ema_state()
    fresh.load_ema_state(state)
    fresh.apply_ema(model)
    assert equal(parameters(model), state)
    fit(build(), [fresh], tmp_path)  # with decay 1 the EMA stays what was loaded
    assert equal(fresh.get_ema_state(), state)


def test_names_of_several_optimizers_must_all_be_there_and_nothing_changes_else(tmp_path):
    callback = EMAWeights(DECAY)
    fit(Pair(), [callback], tmp_path)
    before = callback.get_ema_state()
    wrong = {name: torch.zeros_like(value) for name, value in before.items() if "bias" not in name}
    with pytest.raises(KeyError, match="bias"):
        callback.load_ema_state(wrong)
    assert equal(callback.get_ema_state(), before)


def test_verbs_before_any_training_say_what_is_missing():
    with pytest.raises(RuntimeError, match="there is no EMA yet"):
        EMAWeights().get_ema_state()
