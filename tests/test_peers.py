"""The table "Coming from": what stands on one line there gives the same EMA, run beside the peer.

Peers of the `bench` extra that are not installed are skipped, and those whose packages do not
install beside a torch of today (NeMo, torchtitan, Ultralytics) are compared with their formulas.
"""

import importlib.util
import math
import warnings
from importlib.metadata import PackageNotFoundError, files

import pytest
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, get_swa_multi_avg_fn

from ema_optim import (
    EMAModel,
    equal_average,
    exponential_warmup_decay,
    inverse_gamma_decay,
    power_decay,
    sigma_rel_from_gamma,
    warmup_decay,
)

STEPS, DECAY = 40, 0.9
pytestmark = pytest.mark.filterwarnings("ignore:the EMA still holds")  # the runs are short


def timm():
    """timm's one file: its package wants a torchvision."""
    try:
        path = next(f for f in files("timm") if f.as_posix() == "timm/utils/model_ema.py")
    except PackageNotFoundError:
        pytest.skip("timm is not installed: pip install --no-deps timm")
    spec = importlib.util.spec_from_file_location("model_ema", path.locate())
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def peer(name):
    return pytest.importorskip(name, reason=f"{name} is of the bench extra", exc_type=ImportError)


class Peer:
    """A peer's EMA of a model: made before the first step, updated after every step."""

    def averaged_model(model, **options):
        average = AveragedModel(model, multi_avg_fn=options["fn"])
        return lambda: average.update_parameters(model), average.module.parameters

    def torch_ema(model, **options):
        average = peer("torch_ema").ExponentialMovingAverage(model.parameters(), DECAY, **options)
        return average.update, lambda: average.shadow_params

    def ema_pytorch(model, **options):
        average = peer("ema_pytorch").EMA(model, beta=DECAY, **options)
        return average.update, lambda: average.ema_model.parameters()

    def diffusers(model, **options):
        peer("diffusers")
        from diffusers.training_utils import EMAModel as Average

        average = Average(model.parameters(), decay=DECAY, **options)
        return lambda: average.step(model.parameters()), lambda: average.shadow_params

    def timm(model, **options):
        average = timm().ModelEmaV3(model, decay=DECAY, **options)
        return lambda: average.update(model), average.module.parameters


def moving(steps):
    """A model that takes a random step every time it is asked to."""
    torch.manual_seed(0)
    model = torch.nn.Linear(8, 8)
    generator = torch.Generator().manual_seed(1)

    def step():
        with torch.no_grad():
            for param in model.parameters():
                param += 0.1 * torch.randn(param.shape, generator=generator)

    return model, [step] * steps


DEFAULT = {"update_after_step": 1}
ROWS = [
    (Peer.averaged_model, {"fn": get_ema_multi_avg_fn(DECAY)}, DECAY, DEFAULT),
    (Peer.averaged_model, {"fn": get_swa_multi_avg_fn()}, equal_average(), {}),
    (Peer.torch_ema, {}, warmup_decay(DECAY), {}),
    (Peer.torch_ema, {"use_num_updates": False}, DECAY, {}),
    (
        Peer.ema_pytorch,
        {"update_every": 1, "update_after_step": 5},
        inverse_gamma_decay(DECAY),
        {"update_after_step": 6},
    ),
    (
        Peer.ema_pytorch,
        {"update_every": 4, "update_after_step": 8, "min_value": DECAY},
        DECAY ** (1 / 4),
        {"update_after_step": 9, "update_every": 4},
    ),
    (Peer.diffusers, {}, warmup_decay(DECAY), {"update_after_step": 1}),
    (Peer.diffusers, {"update_after_step": 7}, warmup_decay(DECAY), {"update_after_step": 8}),
    (
        Peer.diffusers,
        {"use_ema_warmup": True},
        inverse_gamma_decay(DECAY),
        {"update_after_step": 1},
    ),
    (Peer.timm, {}, DECAY, {}),
]


@pytest.mark.parametrize(("make", "theirs", "decay", "ours"), ROWS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_row_of_the_table_gives_the_peers_ema(make, theirs, decay, ours):
    model, steps = moving(STEPS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the peer's imports
        update, read = make(model, **theirs)
    ema = EMAModel(model, decay, **ours)
    for step in steps:
        step()
        update()
        ema.update()
    for mine, other in zip(ema.get_ema_state().values(), read(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)


def test_one_update_too_many_is_seen_in_the_comparison():
    model, steps = moving(STEPS)
    update, read = Peer.averaged_model(model, fn=get_ema_multi_avg_fn(DECAY))
    ema = EMAModel(model, DECAY, update_after_step=2)
    for step in steps:
        step()
        update()
        ema.update()
    mine = ema.get_ema_state()["weight"]
    assert (mine - next(iter(read()))).abs().max() > 1e-4


def fitted(callback):
    import lightning.pytorch as pl

    class Net(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = torch.nn.Linear(4, 2)

        def training_step(self, batch, index):
            return self.net(batch).square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    torch.manual_seed(0)
    net, batches = Net(), [torch.randn(8, 4) for _ in range(6)]
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=1, callbacks=[callback], enable_checkpointing=False, **quiet
    )
    trainer.fit(net, torch.utils.data.DataLoader(batches, batch_size=None))
    return trainer, net


@pytest.mark.filterwarnings("ignore:.*LeafSpec")  # Lightning's own call
@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.filterwarnings("ignore:the EMA will still hold")  # a short run
def test_lightning_leaves_in_the_model_what_apply_ema_puts_there():
    averaging = pytest.importorskip("lightning.pytorch.callbacks").EMAWeightAveraging
    from ema_optim.integrations.lightning import EMAWeights

    _, theirs = fitted(averaging(decay=DECAY))
    trainer, ours = fitted(EMAWeights(DECAY, update_after_step=1))
    pairs = list(zip(ours.parameters(), theirs.parameters(), strict=True))
    assert not any(torch.equal(a, b) for a, b in pairs)
    trainer.optimizers[0].apply_ema()
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("fraction", [0.05, 0.2])
def test_the_half_life_of_torchtitan_is_a_power_function(fraction):
    # torchtitan: decay of the n-th update 2 ** (-1 / (fraction * n)).
    decay = power_decay(sigma_rel_from_gamma(math.log(2) / fraction - 1))
    for n in (1_000, 10_000):
        assert math.log(decay(n)) == pytest.approx(-math.log(2) / (fraction * n), rel=2 / n)


def test_the_decay_of_ultralytics_is_the_exponential_warm_up():
    decay = exponential_warmup_decay(0.9999, tau=2000)  # ModelEMA: d * (1 - exp(-updates / tau))
    for updates in (1, 100, 10_000):
        assert decay(updates) == pytest.approx(0.9999 * (1 - math.exp(-updates / 2000)), rel=1e-12)


def test_nemos_stride_is_the_same_window_per_step():
    model, steps = moving(STEPS)  # NeMo: ema = d * ema + (1 - d) * weights, every k-th step
    expected = model.weight.detach().double()
    ema = EMAModel(model, DECAY ** (1 / 4), update_every=4)
    for number, step in enumerate(steps, 1):
        step()
        ema.update()
        if number % 4 == 0:
            expected = DECAY * expected + (1 - DECAY) * model.weight.detach().double()
    torch.testing.assert_close(ema.get_ema_state()["weight"].double(), expected, rtol=1e-5, atol=0)
