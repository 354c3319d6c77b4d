"""``EMAWeights(use_buffers=...)``: running statistics go wherever the EMA weights go."""

import warnings

import lightning.pytorch as pl
import pytest
import torch
from lightning_runs import DECAY, Net, fit, loader, make_trainer, new
from reference import same

from ema_optim import EMAModel, EMAOptimizer, EMAWarning, EMAWeights, _warnings, export_ema

pytestmark = [
    # Lightning 2.6 asks torch 2.13's pytrees by a deprecated name.
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated"),
    # Four rows need no workers (advice on machines with many cores).
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    # The loader goes on from its beginning; the batches of this file are all alike.
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before"),
]

MEAN, VAR = "norm.running_mean", "norm.running_var"


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


class Twin(pl.Callback):
    """An ``EMAModel`` beside; what the model held in each validation, and what it should."""

    def __init__(self, use_buffers=True, **options):
        self.given = {"use_buffers": use_buffers, **options}
        self.seen, self.expected, self.left_with = [], [], None

    def on_train_start(self, trainer, pl_module):
        self.ema, self.model = EMAModel(pl_module, DECAY, **self.given), pl_module

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.ema.update()
        self.own = state(pl_module)

    def on_validation_batch_end(self, trainer, pl_module, *args):
        if not trainer.sanity_checking:
            # Not get_ema_state() alone: the weights are swapped by another object now.
            self.seen.append(state(pl_module))

    on_test_batch_end = on_validation_batch_end

    def on_validation_end(self, trainer, pl_module):
        if not trainer.sanity_checking:
            self.left_with = state(pl_module)
            self.expected.append(self.ema.get_ema_state())

    on_test_end = on_exception = lambda self, trainer, module, *args: self.on_validation_end(
        trainer, module
    )


def run(build=new, use_buffers=True, callbacks=(), options=None, **arguments):
    options, model = options or {}, build()
    callback, twin = EMAWeights(DECAY, use_buffers=use_buffers, **options), Twin(**options)
    trainer = fit(model, [callback, twin, *callbacks], **arguments)
    return model, callback, twin, trainer


ROWS = {
    "default": ({}, {}),
    "every second": ({"update_every": 2}, {}),
    "late": ({"update_after_step": 2}, {}),
    "bf16": ({}, {"precision": "bf16-true"}),
}


# EMAModel is the oracle: its buffers are tested against float64 and against torch's own class.
@pytest.mark.parametrize(("options", "arguments"), ROWS.values(), ids=ROWS)
def test_buffers_are_averaged_as_by_an_ema_model_and_validated_on(options, arguments):
    model, callback, twin, _ = run(options=options, **arguments)
    assert same(callback.get_ema_state(), twin.ema.get_ema_state())
    assert len(twin.seen) == 6
    assert len(twin.expected) == 3
    for seen, ema in zip(twin.seen, [e for e in twin.expected for _ in range(2)], strict=True):
        assert same([seen[MEAN], seen[VAR]], [ema[n].to(seen[n].dtype) for n in (MEAN, VAR)])
    assert same(twin.left_with, state(model))
    assert not same([seen[VAR]], [state(model)[VAR]])


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_training_with_buffers_is_bit_equal_to_one_without_the_callback(precision):
    bare, (model, *_) = new(), run(precision=precision)
    fit(bare, precision=precision)
    assert same(state(model), state(bare))


class SavesIn(pl.Callback):
    """Saves once, at a step or in the middle of a validation."""

    def __init__(self, path, hook):
        self.path = path
        setattr(self, hook, self.save)

    def save(self, trainer, *args):
        if trainer.global_step == 4 and not self.path.exists():
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
@pytest.mark.parametrize("hook", ["on_train_batch_end", "on_validation_batch_end"])
def test_resumed_fit_is_bit_equal_and_the_file_holds_both_statistics(tmp_path, hook, precision):
    path = tmp_path / "at.ckpt"
    model, whole, twin, _ = run(callbacks=[SavesIn(path, hook)], precision=precision)
    saved = torch.load(path, weights_only=True)
    resumed, callback = Net(), EMAWeights(DECAY, use_buffers=True)
    fit(resumed, [callback], path, precision=precision)
    assert same(state(resumed), state(model))
    assert same(callback.get_ema_state(), whole.get_ema_state())
    averages = {name: saved["state_dict"][name] for name in (MEAN, VAR)}
    assert same(averages, {name: twin.expected[0][name] for name in averages})
    assert not same([saved["current_model_state"][VAR]], [averages[VAR]])


def test_file_is_tested_and_exported_with_the_averaged_statistics(tmp_path):
    from safetensors.torch import load_file

    _, callback, twin, trainer = run(max_epochs=1)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    fresh = Net()
    make_trainer([EMAWeights(use_buffers=True), twin]).test(
        fresh, loader(), ckpt_path=tmp_path / "a.ckpt", verbose=False, weights_only=True
    )
    ema = callback.get_ema_state()
    assert same({name: twin.seen[-1][name] for name in ema}, ema)
    export_ema(tmp_path / "a.ckpt", tmp_path / "ema.safetensors")
    assert same(load_file(tmp_path / "ema.safetensors"), ema)


def test_file_without_averaged_buffers_resumes_with_a_warning(tmp_path):
    *_, trainer = run(use_buffers=False, max_epochs=1)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    callback = EMAWeights(DECAY, use_buffers=True)
    with pytest.warns(EMAWarning, match="no averaged buffers"):
        fit(Net(), [callback], tmp_path / "a.ckpt")
    assert MEAN in callback.get_ema_state()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_exception_in_a_validation_loses_neither_weights_nor_buffers(error):
    class Fails(Net):
        def validation_step(self, batch, batch_idx):
            if self.global_step == 4:
                raise error("no")

    torch.manual_seed(0)
    model, callback, twin = Fails(), EMAWeights(DECAY, use_buffers=True), Twin()
    with pytest.raises((error, SystemExit)):
        fit(model, [callback, twin], num_sanity_val_steps=0)
    assert same(state(model), twin.own)
    assert same(callback.get_ema_state(), twin.ema.get_ema_state())


def told(build, use_buffers, monkeypatch):
    monkeypatch.setattr(_warnings, "_told", {"tau"})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(build(), [EMAWeights(DECAY, use_buffers=use_buffers)])
    return sum("running statistics" in str(warning.message) for warning in caught)


class Without(Net):
    def __init__(self):
        super().__init__()
        self.norm = torch.nn.Identity()


TOLD = [(new, None, 1), (new, True, 0), (new, False, 0), (new, [VAR], 0), (Without, None, 0)]


@pytest.mark.parametrize(("build", "use_buffers", "count"), TOLD)
def test_statistics_of_other_weights_are_told_once(monkeypatch, build, use_buffers, count):
    assert told(build, use_buffers, monkeypatch) == count


def two(build=lambda optimizer: optimizer):
    return lambda: new("two optimizers", build)


def wrapped(optimizer):
    return EMAOptimizer(optimizer, DECAY)


REFUSED = {
    "wrapped": (lambda: new(build=wrapped), {"use_buffers": True}, "pass its inner optimizer"),
    "one of two": (two(), {"use_buffers": True, "optimizers": [0]}, "must list names where not"),
    "no such name": (new, {"use_buffers": ["no"]}, "must name buffers"),
}


@pytest.mark.parametrize(("build", "options", "message"), REFUSED.values(), ids=REFUSED)
def test_buffers_that_cannot_be_followed_are_refused(build, options, message):
    with pytest.raises(ValueError, match=message):
        fit(build(), [EMAWeights(DECAY, **options)])


class OnStep(pl.Callback):
    """Calls a function after every step of the first optimizer."""

    def __init__(self, function):
        self.function = function

    def on_train_start(self, trainer, pl_module):
        trainer.optimizers[0].register_step_post_hook(lambda *args: self.function())


@pytest.mark.parametrize("options", [{"use_buffers": True}, {"use_buffers": ["norm.*_var"]}])
def test_buffers_of_several_optimizers_are_averaged_once(options):
    only = {} if options["use_buffers"] is True else {"optimizers": [0]}
    callback, twin = EMAWeights(DECAY, **options, **only), Twin(**options)
    twin.on_train_batch_end = lambda trainer, module, *args: None
    at_the_first = OnStep(lambda: twin.ema.update())
    fit(two()(), [callback, twin, at_the_first])
    ema, expected = callback.get_ema_state(), twin.ema.get_ema_state()
    assert same([ema[VAR]], [expected[VAR]])
    assert (MEAN in ema) == (MEAN in expected)
