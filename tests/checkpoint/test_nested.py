"""Inner optimizers whose own state dict has another form than torch's."""

import pytest
import runs
import torch
from reference import same, through_file
from torch.optim import SGD, AdamW, Optimizer

from ema_optim import EMAOptimizer, strip_ema_state_dict


class Chain(Optimizer):
    """Two optimizers as one, as training scripts put Muon and AdamW together."""

    def __init__(self, *optimizers):
        self.optimizers = optimizers
        self._optimizer_step_pre_hooks, self._optimizer_step_post_hooks = {}, {}

    param_groups = property(lambda self: [g for o in self.optimizers for g in o.param_groups])

    def zero_grad(self, set_to_none=True):
        [o.zero_grad(set_to_none) for o in self.optimizers]

    def step(self, closure=None):
        [o.step() for o in self.optimizers]

    def state_dict(self):
        return [o.state_dict() for o in self.optimizers]

    def load_state_dict(self, state_dict):
        for optimizer, state in zip(self.optimizers, state_dict, strict=True):
            optimizer.load_state_dict(state)


class Offloaded(Chain):
    """The form of torchao's CPUOffloadOptimizer, which runs on an accelerator alone."""

    def state_dict(self):
        first, *others = super().state_dict()
        return {"offloaded": others, "on-device": first}

    def load_state_dict(self, state_dict):
        super().load_state_dict([state_dict["on-device"], *state_dict["offloaded"]])


def peer(name):
    module = pytest.importorskip("pytorch_optimizer")
    return getattr(module, name)


def two(params, lr=0.1):
    first, *others = params
    return AdamW([first], lr=lr), SGD(others, lr=lr, momentum=0.9)


INNERS = {
    "chain": lambda params, lr: Chain(*two(params, lr)),
    "offloaded": lambda params, lr: Offloaded(*two(params, lr)),
    "Lookahead": lambda params, lr: peer("Lookahead")(AdamW(params, lr=lr), k=2),
    "ScheduleFreeWrapper": lambda params, lr: peer("ScheduleFreeWrapper")(SGD(params, lr=lr)),
}
inners = pytest.mark.parametrize("name", INNERS)


class Run(runs.Run):
    def __init__(self, name, seed=0):
        super().__init__(seed=seed, optimizer=INNERS[name])

    def train(self, steps=3):
        self.optimizer.train()
        return super().train(steps)


@pytest.mark.parametrize("swapped", [False, True])
@inners
def test_resume_of_another_form_equals_uninterrupted(name, swapped):
    # It trained, and failed at the first save: KeyError: 'param_groups'.
    run = Run(name).train()
    if swapped:
        run.optimizer.eval()
    again = Run(name, seed=9).load(run.save())
    assert same(again.train().facts(), run.train().facts())


@inners
def test_stripped_it_is_what_the_inner_alone_has_written(name):
    bare = Run(name)
    bare.optimizer = INNERS[name](bare.model.parameters(), lr=0.05)
    bare.optimizer.train = getattr(bare.optimizer, "train", lambda: None)
    bare.train()
    run = Run(name).train()
    stripped = strip_ema_state_dict(run.save()["o"])
    assert same(stripped, through_file(bare.optimizer.state_dict()))
    INNERS[name](bare.model.parameters(), lr=0.05).load_state_dict(stripped)


@inners
def test_checkpoint_of_the_inner_alone_begins_anew_with_a_warning(name):
    run = Run(name).train()
    with pytest.warns(UserWarning, match="holds no EMA"):
        Run(name, seed=9).optimizer.load_state_dict(strip_ema_state_dict(run.save()["o"]))


def test_options_of_a_group_are_saved_beside_another_form():
    run = Run("chain")
    run.optimizer.param_groups[1]["ema_decay"] = 0.125
    again = Run("chain", seed=9).load(run.train().save())
    assert again.optimizer.param_groups[1]["ema_decay"] == 0.125


def test_swapped_checkpoint_of_another_form_is_not_stripped():
    run = Run("chain").train()
    run.optimizer.eval()
    with pytest.raises(ValueError, match="must not be written while swapped"):
        strip_ema_state_dict(run.save()["o"])


class Copies(Chain):
    param_groups = property(lambda self: [dict(g) for o in self.optimizers for g in o.param_groups])


class NoGroups(Chain):
    param_groups = None


@pytest.mark.parametrize(
    ("kind", "message"),
    [(Copies, "got copies made at every look by Copies"), (NoGroups, "must have param_groups")],
)
def test_what_cannot_be_served_says_so_at_construction(kind, message):
    with pytest.raises(TypeError, match=message):
        EMAOptimizer(kind(*two(torch.nn.Linear(3, 2).parameters())))
