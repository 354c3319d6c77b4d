"""Lightning: real trainers on a tiny model, four optimizer steps to an epoch."""

import signal
import subprocess
import sys
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning_runs import DECAY, Net, Watch, fit, loader, make_trainer, new, weights
from reference import Reference, same, wide
from torch.optim import AdamW

from ema_optim import EMAOptimizer, compute_optimal_decay, strip_ema_state_dict, warmup_decay
from ema_optim.integrations.lightning import EMAWeights

pytestmark = [
    # Lightning 2.6 asks torch 2.13's pytrees by a deprecated name.
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated"),
    # Four rows need no workers (advice on machines with many cores).
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    # The loader goes on from its beginning; the batches of this file are all alike.
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before"),
    # The saver of the first run is not wanted in the second.
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`.*:UserWarning"),
]
OWN = getattr(pl.callbacks, "EMAWeightAveraging", None)  # from Lightning 2.6 on


def training_state(trainer):
    inner = [getattr(optimizer, "inner", optimizer) for optimizer in trainer.optimizers]
    states = [strip_ema_state_dict(optimizer.state_dict()) for optimizer in inner]
    return dict(trainer.lightning_module.state_dict()), states


def ema_state(trainer):
    model = trainer.lightning_module
    return [optimizer.get_ema_state(model) for optimizer in trainer.optimizers]


def close(left, right):
    if isinstance(left, torch.Tensor):
        return torch.allclose(left, right, rtol=1e-5, atol=1e-6)
    return len(left) == len(right) and all(map(close, left, right))


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("automatic", {}),
        ("automatic", {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1}),
        ("automatic", {"precision": "bf16-mixed"}),
        ("automatic", {"precision": "bf16-true"}),
        ("manual", {}),
        ("two optimizers", {}),
    ],
    ids=str,
)
def test_training_is_bit_equal_to_one_without_the_callback(kind, options):
    bare = fit(new(kind), **options)
    averaged = fit(new(kind), [EMAWeights(DECAY)], **options)
    assert same(training_state(averaged), training_state(bare))
    steps = 6 if "accumulate_grad_batches" in options else 12
    assert [o._ema.step for o in averaged.optimizers] == [steps] * len(averaged.optimizers)
    assert {t.dtype for state in ema_state(averaged) for t in state.values()} == {torch.float32}


@pytest.mark.parametrize(
    ("kind", "accumulate"), [("automatic", 1), ("automatic", 2), ("manual", 1)]
)
def test_every_batch_is_validated_on_the_ema_and_then_the_training_weights_are_back(
    kind, accumulate
):
    watch = Watch()
    fit(new(kind), [EMAWeights(DECAY), watch], accumulate_grad_batches=accumulate)
    assert len(watch.evaluated) == 6
    assert close(watch.evaluated, watch.expected)
    assert same(watch.left_with, watch.weights)
    assert not close([watch.evaluated[-1]], [[wide(p) for p in watch.weights]])


def test_validate_test_and_predict_after_fit_use_the_ema_for_their_time():
    watch, model = Watch(), new()
    trainer = fit(model, [EMAWeights(DECAY), watch])
    watch.evaluated, watch.expected = [], []
    for run in (trainer.validate, trainer.test, trainer.predict):
        run(model, loader())
        assert same(weights(model), watch.weights)
    assert len(watch.evaluated) == 2 + 4 + 4
    assert close(watch.evaluated, watch.expected)


def test_swap_of_the_users_own_is_left_to_the_user():
    watch, model = Watch(), new()
    trainer = fit(model, [EMAWeights(DECAY), watch])
    watch.evaluated, watch.expected = [], []
    with trainer.optimizers[0].swap_ema_weights():
        trainer.validate(model, loader(), verbose=False)
        assert trainer.optimizers[0].swapped
    assert close(watch.evaluated, watch.expected)
    assert same(weights(model), watch.weights)


def test_sanity_check_before_the_first_step_changes_nothing():
    seen, model = [], new()
    start = weights(model)
    model.in_validation = lambda: seen.append(weights(model))
    fit(model, [EMAWeights(DECAY)], max_steps=4, num_sanity_val_steps=1)
    assert same(seen[0], start)
    assert not same(seen[1], start)


# How a checkpoint comes about, and which one of those written by then is resumed.
EACH = {"filename": "{epoch}", "save_top_k": -1}
MOMENTS = {
    "after a validation": ({"monitor": "val", **EACH}, "epoch=0"),
    "at a step": ({"every_n_train_steps": 3, "filename": "{step}", "save_top_k": -1}, "step=6"),
    "at the end of an epoch": ({"save_on_train_epoch_end": True, **EACH}, "epoch=0"),
    "at the end": ({"save_last": True}, "last"),
    "during a validation": (None, "during"),
}
STEPS = {"epoch=0": 4, "step=6": 6, "last": 8, "during": 4}


def interrupted(folder, moment, kind="automatic", dtype=None, **options):
    """Two of three epochs, with a checkpoint; returns its path and the trainer."""
    saver, name = MOMENTS[moment]
    callbacks = [EMAWeights(DECAY, dtype=dtype)]
    model, path = new(kind), Path(folder, f"{name}.ckpt")
    if saver is None:
        model.in_validation = lambda: save_once(trainer, path)
    else:
        callbacks.append(ModelCheckpoint(folder, **saver))
        options["enable_checkpointing"] = True
    trainer = make_trainer(callbacks, max_epochs=2, **options)
    trainer.fit(model, loader(), loader())
    return path, trainer


def save_once(trainer, path):
    if not (trainer.sanity_checking or path.exists()):
        trainer.save_checkpoint(path)


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
@pytest.mark.parametrize("moment", MOMENTS)
def test_resumed_run_equals_the_uninterrupted_one(tmp_path, moment, precision):
    path, _ = interrupted(tmp_path, moment, precision=precision)
    whole = fit(new(), [EMAWeights(DECAY)], precision=precision)
    resumed = fit(new(), [EMAWeights(DECAY)], path, precision=precision)
    assert same(training_state(resumed), training_state(whole))
    assert same(ema_state(resumed), ema_state(whole))


@pytest.mark.parametrize("moment", ["at a step", "during a validation"])
def test_resumed_run_has_every_window_of_the_uninterrupted_one(tmp_path, moment, monkeypatch):
    windows = {"short": DECAY, "long": 0.4}
    monkeypatch.setitem(globals(), "DECAY", windows)
    path, _ = interrupted(tmp_path, moment)
    whole, resumed = (fit(new(), [EMAWeights(windows)], ckpt) for ckpt in (None, path))
    assert same(training_state(resumed), training_state(whole))
    callbacks = [trainer.callbacks[0] for trainer in (whole, resumed)]
    found = [callback.get_ema_state(decay="long") for callback in callbacks]
    assert same(*found)
    assert not same(found[0], callbacks[0].get_ema_state())


@pytest.mark.filterwarnings("ignore:an EMA in bfloat16")
@pytest.mark.parametrize("format", ["float32_compensated", "float24", torch.bfloat16])
@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
@pytest.mark.parametrize("moment", ["at a step", "during a validation"])
def test_resumed_run_goes_on_in_every_storage_format(tmp_path, moment, precision, format):
    path, _ = interrupted(tmp_path, moment, dtype=format, precision=precision)
    runs = []
    for start in (None, path):
        trainer = fit(new(), [EMAWeights(DECAY, dtype=format)], start, precision=precision)
        runs.append([training_state(trainer), trainer.optimizers[0].state_dict()["state"]])
    assert same(*runs)


@pytest.mark.parametrize("moment", ["after a validation", "during a validation"])
def test_resumed_run_of_two_optimizers_equals_the_uninterrupted_one(tmp_path, moment):
    path, _ = interrupted(tmp_path, moment, kind="two optimizers")
    whole = fit(new("two optimizers"), [EMAWeights(DECAY)])
    resumed = fit(new("two optimizers"), [EMAWeights(DECAY)], path)
    assert same(training_state(resumed), training_state(whole))
    assert same(ema_state(resumed), ema_state(whole))


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
@pytest.mark.parametrize("moment", MOMENTS)
def test_state_dict_holds_the_ema_and_current_model_state_the_training_weights(
    tmp_path, moment, precision
):
    path, _ = interrupted(tmp_path, moment, precision=precision)
    steps = STEPS[path.stem]
    at_that_step = fit(new(), [EMAWeights(DECAY)], max_steps=steps, precision=precision)
    checkpoint = torch.load(path, weights_only=True)
    assert same(dict(checkpoint["current_model_state"]), training_state(at_that_step)[0])
    names = {"first.weight", "tied.weight", "last.bias", "unused", "norm.running_mean"}
    assert names < checkpoint["state_dict"].keys() == checkpoint["current_model_state"].keys()
    ema = ema_state(at_that_step)[0]
    assert same({name: checkpoint["state_dict"][name] for name in ema}, ema)
    assert checkpoint["averaging_state"]["n_averaged"] == steps


def test_checkpoint_holds_the_ema_once(tmp_path):
    path, _ = interrupted(tmp_path, "after a validation")
    checkpoint = torch.load(path, weights_only=True)
    storages = {s["ema"].data_ptr() for s in checkpoint["optimizer_states"][0]["state"].values()}
    assert {checkpoint["state_dict"][name].data_ptr() for name, _ in Net().named_parameters()} == (
        storages
    )


FRESH = """
import sys, torch, warnings
warnings.simplefilter("ignore")
from ema_optim.integrations.lightning import EMAWeights
from lightning_runs import Net, loader, make_trainer
for name, callbacks in {"with": [EMAWeights()], "without": []}.items():
    model = Net()
    make_trainer(callbacks).test(model, loader(), ckpt_path=sys.argv[1], verbose=False)
    torch.save(model.state_dict(), f"{sys.argv[1]}.{name}")
torch.save(Net.load_from_checkpoint(sys.argv[1]).state_dict(), f"{sys.argv[1]}.loaded")
"""


def test_fresh_process_tests_and_loads_the_ema_weights(tmp_path):
    path, trainer = interrupted(tmp_path, "at the end")
    command = [sys.executable, "-c", FRESH, str(path)]
    subprocess.run(command, cwd=Path(__file__).parents[1], check=True, capture_output=True)
    ema = ema_state(trainer)[0]
    for name in ("with", "without", "loaded"):
        state = torch.load(f"{path}.{name}", weights_only=True)
        assert same({name: state[name] for name in ema}, ema)


def test_weights_loaded_for_a_test_are_evaluated_as_they_are(tmp_path):
    path, trainer = interrupted(tmp_path, "after a validation")
    model = trainer.lightning_module
    trainer.test(model, loader(), ckpt_path=path, verbose=False)
    state = torch.load(path, weights_only=True)["state_dict"]
    assert same(dict(model.state_dict()), dict(state))
    watch = Watch()
    watch.reference = Reference(model.parameters(), DECAY)
    trainer.callbacks.append(watch)
    trainer.test(model, loader(), verbose=False)
    assert close(watch.evaluated, watch.expected)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("during", ["fit", "validate"])
def test_exception_during_a_validation_puts_the_training_weights_back_at_once(error, during):
    def fail():
        if not trainer.sanity_checking:
            raise error("in validation")

    watch, model, handler = Watch(), new(), signal.getsignal(signal.SIGINT)
    trainer = fit(model, [EMAWeights(DECAY), watch], max_epochs=1)
    model.in_validation = fail
    trainer.fit_loop.max_epochs = 2
    # Lightning turns an interrupt into SystemExit.
    with pytest.raises((RuntimeError, SystemExit)):
        getattr(trainer, during)(model, *[loader()] * (1 + (during == "fit")))
    signal.signal(signal.SIGINT, handler)  # Lightning leaves it ignored
    assert same(watch.left_with, watch.weights)
    assert same(weights(model), watch.weights)
    assert not trainer.optimizers[0].swapped


def test_checkpoint_written_without_the_callback_resumes_with_a_new_ema(tmp_path):
    saver = ModelCheckpoint(tmp_path, filename="plain")
    whole = fit(new(), [saver], max_epochs=1, enable_checkpointing=True)
    whole = fit(new())
    with pytest.warns(UserWarning, match="the checkpoint holds no EMA"):
        resumed = fit(new(), [EMAWeights(DECAY)], tmp_path / "plain.ckpt")
    assert same(training_state(resumed), training_state(whole))
    assert resumed.optimizers[0]._ema.step == 8


def test_checkpoint_changed_as_documented_resumes_without_the_callback(tmp_path):
    path, _ = interrupted(tmp_path, "during a validation")
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["state_dict"] = checkpoint.pop("current_model_state")
    states = checkpoint["optimizer_states"]
    checkpoint["optimizer_states"] = [strip_ema_state_dict(state) for state in states]
    torch.save(checkpoint, path)
    with pytest.warns(UserWarning, match="add the following callbacks: .*EMAWeights"):
        resumed = fit(new(), ckpt_path=path)
    assert same(training_state(resumed), training_state(fit(new())))


@pytest.mark.skipif(OWN is None, reason="Lightning has no such callback")
def test_lightnings_own_callback_reads_the_checkpoint(tmp_path):
    path, trainer = interrupted(tmp_path, "at the end")
    own = OWN(decay=DECAY)
    with pytest.raises(KeyError, match="step"):  # of the parameter that never had a gradient
        fit(new(), [own], path)
    assert own._average_model.n_averaged == 8
    ema, state = ema_state(trainer)[0], own._average_model.module.state_dict()
    assert same({name: state[name] for name in ema}, ema)


def test_every_fit_begins_a_new_ema_and_the_same_optimizer_goes_on():
    for build, steps in ((lambda o: o, 4), (KeepOne(), 8)):
        model = new(build=build)
        trainer = fit(model, [EMAWeights(DECAY)], max_epochs=1)
        trainer.fit_loop.max_epochs = 2
        trainer.fit(model, loader(), loader())
        assert trainer.optimizers[0]._ema.step == steps


class KeepOne:
    def __call__(self, optimizer):
        self.optimizer = getattr(self, "optimizer", None) or EMAOptimizer(optimizer, DECAY)
        return self.optimizer


class SaveBeforeTheStart(pl.Callback):
    def on_fit_start(self, trainer, pl_module):
        trainer.save_checkpoint(self.path)


def test_checkpoint_written_before_the_optimizers_are_wrapped_is_a_plain_one(tmp_path):
    early = SaveBeforeTheStart()
    early.path = tmp_path / "early.ckpt"
    trainer = fit(model := new(), [early, EMAWeights(DECAY)], max_epochs=1)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(model, loader(), loader())
    assert "current_model_state" not in torch.load(early.path, weights_only=True)


def test_options_reach_the_optimizer_and_those_of_the_users_optimizer_win():
    options = {"update_every": 2, "update_after_step": 3, "dtype": torch.float64}
    ema = fit(new(), [EMAWeights("auto", **options)], max_steps=2).optimizers[0]._ema
    assert (ema.decay, ema.update_every) == (warmup_decay(compute_optimal_decay(2)), 2)
    assert (ema.update_after_step, ema.dtype) == (3, torch.float64)
    for callback in (EMAWeights(), EMAWeights(DECAY)):
        trainer = fit(new(build=lambda o: EMAOptimizer(o, DECAY)), [callback], max_steps=4)
        assert trainer.optimizers[0]._ema.decay == DECAY
        assert isinstance(trainer.optimizers[0].inner, AdamW)


ERRORS = {
    "twice": (lambda: [EMAWeights(), EMAWeights()], {}, "got EMAWeights and EMAWeights: remove"),
    "decay": (lambda: [EMAWeights(0.5)], {"build": lambda o: EMAOptimizer(o, 0.9)}, "decay must"),
    "stride": (
        lambda: [EMAWeights(update_every=2)],
        {"build": lambda o: EMAOptimizer(o, 0.9)},
        r"update_every must be that of the EMAOptimizer .*\(1\), got 2: leave it out",
    ),
}
if OWN:
    ERRORS["two kinds"] = (lambda: [EMAWeights(), OWN()], {}, "EMAWeightAveraging: remove")


@pytest.mark.parametrize("case", ERRORS)
def test_contradictions_are_refused_with_a_remedy(case):
    callbacks, kwargs, message = ERRORS[case]
    with pytest.raises(ValueError, match=message):
        fit(new(**kwargs), callbacks())


@pytest.mark.parametrize(
    ("kwargs", "error"),
    [
        ({"decay": 1.5}, ValueError),
        ({"decay": "automatic"}, TypeError),
        ({"update_every": 0}, ValueError),
        ({"dtype": torch.float16}, ValueError),
    ],
)
def test_bad_arguments_are_refused_at_construction(kwargs, error):
    with pytest.raises(error, match=next(iter(kwargs))):
        EMAWeights(**kwargs)


def test_auto_needs_the_length_of_the_run():
    with pytest.raises(ValueError, match="got inf: set max_steps"):
        fit(new(), [EMAWeights("auto")], max_epochs=-1)


@pytest.mark.filterwarnings("ignore:.*this fit will run with no optimizer")  # is tested
def test_fit_without_an_optimizer_is_refused():
    model = new()
    model.configure_optimizers = lambda: None
    with pytest.raises(ValueError, match="must return an optimizer"):
        fit(model, [EMAWeights()])


def test_checkpoints_of_weights_alone_are_warned_of(tmp_path):
    saver = ModelCheckpoint(tmp_path, save_weights_only=True)
    with pytest.warns(UserWarning, match="hold the training weights"):
        fit(new(), [EMAWeights(DECAY), saver], max_steps=4, enable_checkpointing=True)


def test_missing_lightning_names_the_pip_command(monkeypatch):
    for name in ("lightning.pytorch", "pytorch_lightning"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "ema_optim.integrations.lightning")
    with pytest.raises(ImportError, match=r'pip install "ema_optim\[lightning\]"'):
        import ema_optim.integrations.lightning  # noqa: F401
