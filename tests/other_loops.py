"""Training loops of other frameworks, each told of the optimizer as its users tell it."""

import os
import warnings
from contextlib import contextmanager, nullcontext
from functools import partial
from unittest import mock

import pytest
import torch
from reference import Reference
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim import AdamW
from torch.utils.data import DataLoader, TensorDataset

from ema_optim import EMAOptimizer

DECAY = 0.1  # after one update no more than a tenth of the initial weights is left
EMAAdamW = EMAOptimizer.for_class(AdamW, decay=DECAY)
REASON = '{} is of the extra "engines": tests/README.md says how it is installed'


@contextmanager
def quiet():
    """For what the frameworks themselves warn of, at their import and in their files."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def needs(name):
    """Import a framework, or skip the test."""
    with quiet():
        return pytest.importorskip(name, reason=REASON.format(name.partition(".")[0]))


def net(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))


def data():
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(24, 4, generator=generator)
    return inputs, torch.randint(0, 2, (24,), generator=generator)


def loader(**options):
    return DataLoader(TensorDataset(*data()), batch_size=4, **options)


class Loop:
    """A model in a framework's loop: ``train`` to the end of some epoch, evaluating after each."""

    def __init__(self, folder, kind=EMAAdamW, seed=0):
        self.folder, self.model, self.seen = folder, net(seed), []
        folder.mkdir(exist_ok=True)
        self.model.register_forward_pre_hook(self.look)
        self.build(kind)

    def look(self, module, args):
        now = [p.detach().double() for p in self.model.parameters()]
        self.seen += [] if self.model.training else [now]

    def watch(self):
        """Average by hand, after every step of the inner optimizer."""
        reference = Reference(self.model.parameters(), DECAY)
        self.optimizer.inner.register_step_post_hook(lambda *_: reference.update())
        return reference

    @property
    def swap(self):
        """The swap of the EMA weights; of the bare optimizer, nothing."""
        return getattr(self.optimizer, "swap_ema_weights", nullcontext)

    def mode(self, name):
        getattr(self.optimizer, name, lambda: None)()


class Ignite(Loop):
    name = "ignite.engine"

    def build(self, kind):
        from ignite import engine, handlers

        self.optimizer = kind(self.model.parameters(), lr=0.05)
        self.trainer = engine.create_supervised_trainer(self.model, self.optimizer, cross_entropy)
        evaluator = engine.create_supervised_evaluator(self.model)

        @self.trainer.on(engine.Events.EPOCH_COMPLETED)
        def evaluate():
            with self.swap():
                evaluator.run(loader())

        self.parts = {"model": self.model, "optimizer": self.optimizer, "trainer": self.trainer}
        saver = handlers.DiskSaver(str(self.folder), require_empty=False)
        self.checkpoint = handlers.Checkpoint(self.parts, saver)
        self.trainer.add_event_handler(engine.Events.EPOCH_COMPLETED, self.checkpoint)

    def train(self, epochs):
        self.trainer.run(loader(), max_epochs=epochs)

    def load(self, other):
        path = other.folder / other.checkpoint.last_checkpoint
        self.checkpoint.load_objects(self.parts, str(path))


class Fastai(Loop):
    name = "fastai.learner"

    def build(self, kind):
        from fastai.callback import progress  # noqa: F401, gives a Learner its no_bar
        from fastai.callback.core import Callback
        from fastai.data.core import DataLoaders
        from fastai.learner import Learner
        from fastai.optimizer import OptimWrapper

        class EvaluatesOnEMA(Callback):
            before_validate = lambda _: self.mode("eval")  # noqa: E731
            after_validate = lambda _: self.mode("train")  # noqa: E731

        options = {"opt_func": partial(OptimWrapper, opt=kind), "path": self.folder}
        loaders = DataLoaders(loader(), loader())
        callbacks = [EvaluatesOnEMA()]
        self.learner = Learner(loaders, self.model, cross_entropy, cbs=callbacks, **options)
        self.learner.create_opt()
        self.optimizer, self.epochs = self.learner.opt.opt, 0

    def train(self, epochs):
        with self.learner.no_bar(), self.learner.no_logging():
            self.learner.fit(epochs - self.epochs, lr=0.05)
        self.epochs = epochs
        self.learner.save(self.folder / "last")

    def load(self, other):
        self.learner.load(other.folder / "last")
        self.epochs = other.epochs


class Skorch(Loop):
    name = "skorch"

    def build(self, kind):
        from skorch import NeuralNet
        from skorch.helper import predefined_split

        class EvaluatesOnEMA(NeuralNet):
            def run_single_epoch(self, iterator, training, *args, **kwargs):
                with nullcontext() if training else loop.swap():
                    super().run_single_epoch(iterator, training, *args, **kwargs)

        loop = self
        options = {"optimizer": kind, "lr": 0.05, "batch_size": 4, "verbose": 0}
        split = predefined_split(TensorDataset(*data()))
        self.net = EvaluatesOnEMA(
            self.model, nn.CrossEntropyLoss, train_split=split, **options
        ).initialize()
        self.optimizer = self.net.optimizer_

    def train(self, epochs):
        self.net.partial_fit(*data(), epochs=epochs - len(self.net.history))
        self.net.save_params(**self.files(self.folder))

    def load(self, other):
        self.net.load_params(**self.files(other.folder))
        self.optimizer = self.net.optimizer_

    def files(self, folder):
        return {f"f_{part}": folder / part for part in ("params", "optimizer", "history")}


class Mmengine(Loop):
    name = "mmengine.runner"

    def build(self, kind):
        from mmengine.evaluator import BaseMetric
        from mmengine.hooks import Hook
        from mmengine.model import BaseModel
        from mmengine.optim import OptimWrapper

        class Model(BaseModel):
            def forward(self, inputs, labels, mode):
                outputs = self.net(inputs)
                return {"loss": cross_entropy(outputs, labels)} if mode == "loss" else [outputs]

        class Nothing(BaseMetric):
            process = lambda self, batch, samples: self.results.append(0)  # noqa: E731
            compute_metrics = lambda self, results: {}  # noqa: E731

        class EvaluatesOnEMA(Hook):
            before_val = lambda _, runner: self.mode("eval")  # noqa: E731
            after_val = lambda _, runner: self.mode("train")  # noqa: E731

        self.whole = Model()
        self.whole.net = self.model
        self.optimizer = kind(self.model.parameters(), lr=0.05)
        self.options = {
            "model": self.whole,
            "work_dir": str(self.folder),
            "train_dataloader": loader(),
            "val_dataloader": loader(),
            "val_cfg": {},
            "val_evaluator": [Nothing()],
            "optim_wrapper": OptimWrapper(self.optimizer),
            "custom_hooks": [EvaluatesOnEMA()],
            "default_hooks": {"logger": None},
            "log_level": "ERROR",
        }

    def train(self, epochs):
        from mmengine.runner import Runner

        cfg = {"by_epoch": True, "max_epochs": epochs}
        runner = Runner(**self.options, train_cfg=cfg, experiment_name=f"{id(self)}-{epochs}")
        # Its file holds objects of its own beside the states of model and optimizer.
        with mock.patch.dict(os.environ, {"TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"}):
            runner.train()

    def load(self, other):
        path = (other.folder / "last_checkpoint").read_text()
        self.options |= {"resume": True, "load_from": path}


LOOPS = {kind.__name__.lower(): kind for kind in (Ignite, Fastai, Skorch, Mmengine)}
