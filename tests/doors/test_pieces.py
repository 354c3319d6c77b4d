"""Several optimizers in one run, and optimizers around optimizers."""

import pytest
import torch
import torch.distributed.checkpoint as dcp
from reference import Reference, same, through_file
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import SGD, Adam, AdamW

from ema_optim import EMAModel, EMAOptimizer, swap_ema_weights

# Importing torch.distributed.optim compiles some of its optimizers.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
DECAY = 0.1
STEPS = 4


def plain(optimizer):
    return optimizer


def averaged(optimizer):
    return EMAOptimizer(optimizer, decay=DECAY)


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))


def batches(start=0, stop=STEPS):
    return [
        torch.randn(8, 4, generator=torch.Generator().manual_seed(i)) for i in range(start, stop)
    ]


def backward(model, batch):
    model(batch).square().mean().backward()


def step_all(optimizers):
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


class Parts:
    """The parts of a pipeline: an optimizer for each."""

    def __init__(self, wrap, seed=0):
        self.model = net(seed)
        self.optimizers = [wrap(optimizer) for optimizer in self.made()]

    def made(self):
        return [AdamW(self.model[i].parameters(), lr=0.05) for i in (0, 2)]

    def train(self, start=0, stop=STEPS, after=lambda: None):
        for batch in batches(start, stop):
            backward(self.model, batch)
            step_all(self.optimizers)
            after()
        return self

    def load(self, saved):
        self.model.load_state_dict(saved[0])
        for optimizer, state in zip(self.optimizers, saved[1], strict=True):
            optimizer.load_state_dict(state)
        return self

    def save(self):
        return through_file([self.model.state_dict(), [o.state_dict() for o in self.optimizers]])


class MuonBesideAdamW(Parts):
    def made(self):
        muon = pytest.importorskip("torch", "2.9", reason="torch has Muon from 2.9 on").optim.Muon
        matrices = [p for p in self.model.parameters() if p.dim() == 2]
        return [
            muon(matrices, lr=0.05),
            AdamW([p for p in self.model.parameters() if p.dim() != 2], lr=0.05),
        ]


class Adversaries(Parts):
    """A generator, and a critic that makes two steps to one of it."""

    def made(self):
        return [Adam(self.model[i].parameters(), lr=0.05) for i in (0, 2)]

    def train(self, start=0, stop=STEPS, after=lambda: None):
        (generator, _, critic), (makes, judges) = self.model, self.optimizers
        for batch in batches(start, stop):
            for _ in range(2):
                (critic(generator(batch).detach()).square().mean() - critic.bias.sum()).backward()
                step_all([judges])
            (-critic(generator(batch)).square().mean()).backward()
            makes.step()
            [o.zero_grad() for o in self.optimizers]
            after()
        return self


class InBackward(Parts):
    """An optimizer for every parameter, stepped as soon as its gradient is there."""

    def made(self):
        return [AdamW([p], lr=0.05) for p in self.model.parameters()]

    def train(self, start=0, stop=STEPS, after=lambda: None):
        by_parameter = dict(zip(self.model.parameters(), self.optimizers, strict=True))
        hooks = [
            p.register_post_accumulate_grad_hook(lambda p: step_all([by_parameter[p]]))
            for p in by_parameter
        ]
        for batch in batches(start, stop):
            backward(self.model, batch)
            after()
        [hook.remove() for hook in hooks]
        return self


class AppliedInBackward(InBackward):
    """The same by torch's own helper."""

    def __init__(self, wrap, seed=0):
        from torch.distributed.optim import _apply_optimizer_in_backward

        self.model = net(seed)
        kind = AdamW if wrap is plain else EMAOptimizer.for_class(AdamW, decay=DECAY)
        _apply_optimizer_in_backward(kind, self.model.parameters(), {"lr": 0.05})
        self.optimizers = [p._in_backward_optimizers[0] for p in self.model.parameters()]

    def train(self, start=0, stop=STEPS, after=lambda: None):
        for batch in batches(start, stop):
            backward(self.model, batch)
            after()
        return self


KINDS = (Parts, MuonBesideAdamW, Adversaries, InBackward, AppliedInBackward)
kinds = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)


def weights(run):
    return {name: p.detach().clone() for name, p in run.model.named_parameters()}


def emas(run):
    return {n: v for o in run.optimizers for n, v in o.get_ema_state(run.model).items()}


def near(found, expected):
    pairs = zip(found, expected, strict=True)
    return all(torch.allclose(a.double(), b, rtol=1e-5, atol=1e-8) for a, b in pairs)


@kinds
def test_training_in_pieces_is_bit_equal_to_the_bare_optimizers(kind):
    runs = [kind(wrap).train() for wrap in (plain, averaged)]
    assert same(*map(weights, runs))
    assert not same(weights(runs[0]), weights(kind(plain)))


@kinds
def test_each_piece_has_the_average_of_its_own_steps(kind):
    run = kind(averaged)
    groups = [optimizer.param_groups[0] for optimizer in run.optimizers]
    references = [Reference(group["params"], DECAY) for group in groups]
    for optimizer, reference in zip(run.optimizers, references, strict=True):
        optimizer.inner.register_step_post_hook(lambda *_, by=reference: by.update())
    run.train()
    assert {reference.step for reference in references} <= {STEPS, 2 * STEPS}
    for optimizer, reference in zip(run.optimizers, references, strict=True):
        found = [optimizer.state[p]["ema"] for p in reference.params]
        assert near(found, reference.emas)


@kinds
def test_pieces_are_swapped_as_one(kind):
    run = kind(averaged).train()
    before = weights(run)
    with swap_ema_weights(run.optimizers):
        assert same(weights(run), emas(run))
        assert not same(weights(run), before)
    assert same(weights(run), before)


@pytest.mark.parametrize("swapped", [False, True])
@kinds
def test_pieces_resume_bit_equal(kind, swapped):
    run = kind(averaged).train(0, 2)
    with swap_ema_weights(run.optimizers, enabled=swapped):
        saved = run.save()
    again = kind(averaged, seed=9).load(saved)
    [optimizer.train() for optimizer in again.optimizers]
    again.train(2, STEPS)
    run.train(2, STEPS)
    assert same([weights(again), emas(again)], [weights(run), emas(run)])


def test_stepping_in_the_backward_gives_the_ema_of_one_optimizer_for_all():
    whole = Parts(averaged)
    whole.optimizers = [averaged(AdamW(whole.model.parameters(), lr=0.05))]
    assert same(emas(InBackward(averaged).train()), emas(whole.train()))


# A container of several model parts' optimizers, with one flat state dict

FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


class Container(Parts):
    """Model parts that keep the names of the whole; state is made by a dry step at construction."""

    def __init__(self, wrap=averaged, seed=0):
        super().__init__(wrap, seed)
        self.parts = [nn.ModuleDict({str(i): self.model[i]}) for i in (0, 2)]
        for optimizer in self.optimizers:
            self.dry_step(optimizer)

    def dry_step(self, optimizer):
        for group in optimizer.param_groups:
            rate, group["lr"] = group["lr"], 0.0
            for p in group["params"]:
                p.grad = torch.zeros_like(p)
        optimizer.step()
        optimizer.zero_grad()
        for group in optimizer.param_groups:
            group["lr"] = rate

    def state_dict(self):
        pairs = zip(self.parts, self.optimizers, strict=True)
        states = [get_optimizer_state_dict(*pair, options=FLAT) for pair in pairs]
        return {"model": self.model.state_dict()} | {k: v for s in states for k, v in s.items()}

    def save(self, folder):
        dcp.save(self.state_dict(), checkpoint_id=folder)
        return self

    def load(self, folder, **options):
        state = self.state_dict()
        dcp.load(state, checkpoint_id=folder, **options)
        self.model.load_state_dict(state.pop("model"))
        for part, optimizer in zip(self.parts, self.optimizers, strict=True):
            set_optimizer_state_dict(part, optimizer, optim_state_dict=state, options=FLAT)
        return self


def test_a_containers_flat_state_names_the_ema_and_its_dry_step_is_not_counted():
    container = Container()
    assert {o.ema_metrics()["ema_updates"] for o in container.optimizers} == {0.0}
    state = container.train().state_dict()
    assert same(state["state.2.weight.ema"], emas(container)["2.weight"])
    assert {int(state[f"state.{name}.ema_step"]) for name in weights(container)} == {STEPS}
    assert same(weights(container), weights(Container(plain).train()))


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.filterwarnings("ignore:torch.distributed is")  # a process without a group
def test_a_container_resumes_bit_equal(tmp_path, swapped):
    run = Container().train(0, 2)
    with swap_ema_weights(run.optimizers, enabled=swapped):
        run.save(tmp_path)
    again = Container(seed=9).load(tmp_path)
    [optimizer.train() for optimizer in again.optimizers]
    for one in (run, again):
        one.train(2, STEPS)
    assert same([weights(again), emas(again)], [weights(run), emas(run)])


@pytest.mark.filterwarnings("ignore:torch.distributed is")  # a process without a group
def test_a_containers_checkpoint_from_before_the_ema_loads_partially(tmp_path):
    Container(plain).train(0, 2).save(tmp_path)
    with pytest.raises(dcp.CheckpointException, match=r"Missing key in checkpoint.*ema"):
        Container(seed=9).load(tmp_path)
    planner = dcp.DefaultLoadPlanner(allow_partial_load=True)
    with pytest.warns(UserWarning, match="holds no EMA: it begins at the weights"):
        run = Container(seed=9).load(tmp_path, planner=planner)
    reference = Reference(run.model.parameters(), DECAY)
    run.train(2, STEPS, after=reference.update)
    assert same(weights(run), weights(Container(plain).train()))
    assert near(emas(run).values(), reference.emas)


# Optimizers around optimizers


def peer(name):
    module = pytest.importorskip("pytorch_optimizer", reason="it is of the test extra")
    return getattr(module, name)


def is_averaged(model, optimizer, step):
    """Whether the EMA is the average by hand of the weights after every step."""
    reference = Reference(model.parameters(), DECAY)
    for batch in batches():
        step(batch)
        reference.update()
    return near(optimizer.get_ema_state(model).values(), reference.emas)


@pytest.mark.parametrize("outside", [True, False])
def test_lookahead_belongs_inside(outside):
    model = net()
    inner = SGD(model.parameters(), lr=0.5)
    if outside:
        optimizer = ema = averaged(peer("Lookahead")(inner, k=2))
    else:
        optimizer = peer("Lookahead")(ema := averaged(inner), k=2)

    def step(batch):
        backward(model, batch)
        step_all([optimizer])

    assert is_averaged(model, ema, step) is outside


class Sharp(Parts):
    """SAM in two calls; ``wrap`` goes around its base."""

    def __init__(self, wrap, seed=0, dtype=torch.float32):
        self.model = net(seed).to(dtype)

        def base(params, **options):
            return wrap(AdamW(params, **options))

        self.sam = peer("SAM")(self.model.parameters(), base, lr=0.05)
        self.optimizers = [self.sam.base_optimizer]

    def step(self, batch):
        batch = batch.to(self.model[0].weight.dtype)
        for step in (self.sam.first_step, self.sam.second_step):
            backward(self.model, batch)
            step(zero_grad=True)

    def train(self, start=0, stop=STEPS):
        [self.step(batch) for batch in batches(start, stop)]
        return self


def test_sam_around_it_trains_bit_equal_and_averages_its_second_steps():
    run = Sharp(averaged)
    assert is_averaged(run.model, run.optimizers[0], run.step)
    assert same(weights(run), weights(Sharp(plain).train()))


def stepped_by_a_closure(optimizer, model, batch):
    def closure():
        optimizer.zero_grad()
        backward(model, batch)

    closure()
    optimizer.step(closure)
    optimizer.zero_grad()


@pytest.mark.parametrize("closures", [STEPS, 1])
def test_sam_inside_takes_a_closure_or_after_its_first_step_an_update(closures):
    model = net()
    optimizer = averaged(peer("SAM")(model.parameters(), AdamW, lr=0.05))
    for batch in batches(0, closures):
        stepped_by_a_closure(optimizer, model, batch)
    for batch in batches(closures, STEPS):
        for step in (optimizer.inner.first_step, optimizer.inner.second_step):
            backward(model, batch)
            step(zero_grad=True)
        optimizer.update()
    run = Sharp(averaged).train()
    assert same(optimizer.get_ema_state(model), emas(run))
    assert same(list(model.parameters()), list(run.model.parameters()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sam_resumes_by_its_base_optimizer(dtype):
    run = Sharp(averaged, dtype=dtype).train(0, 2)
    again = Sharp(averaged, seed=9, dtype=dtype).load(run.save())
    for one in (run, again):
        one.train(2, STEPS)
    assert same([weights(again), emas(again)], [weights(run), emas(run)])


def test_sams_own_checkpoint_is_read_and_holds_the_ema():
    # The states of the parameters were objects that no file could be read with.
    run, again = Sharp(averaged).train(), Sharp(averaged, seed=9)
    saved = through_file([run.model.state_dict(), run.sam.state_dict()])
    again.model.load_state_dict(saved[0])
    again.sam.load_state_dict(saved[1])
    assert same(emas(again), emas(run))


def test_methods_of_the_inner_alone_say_that_step_averages():
    run = Sharp(plain)
    optimizer = averaged(peer("SAM")(run.model.parameters(), AdamW, lr=0.05))
    with pytest.raises(AttributeError, match=r"use \.inner\.first_step\. Only step\(\) and update"):
        optimizer.first_step()
    run.sam = optimizer.inner
    run.train()
    with (
        pytest.warns(UserWarning, match="nothing was averaged though the weights have moved"),
        optimizer.swap_ema_weights(),
    ):
        pass


def test_a_model_average_stands_beside_an_optimizer_of_other_names():
    run = Sharp(plain)
    ema = EMAModel(run.model, DECAY)
    reference = Reference(run.model.parameters(), DECAY)
    for batch in batches():
        run.step(batch)
        ema.update()
        reference.update()
    assert near(ema.get_ema_state().values(), reference.emas)
