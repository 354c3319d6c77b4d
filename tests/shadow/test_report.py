"""Metrics against closed forms; the warnings a user gets where the EMA is read."""

import math
import re
import warnings

import numpy as np
import pytest
import torch
from steps import train_alike

from ema_optim import EMAModel, EMAOptimizer, debiased_decay, equal_average, warmup_decay

KEYS = ["ema_decay", "ema_updates", "ema_window", "ema_initial_share", "ema_distance"]
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


class Run:
    def __init__(self, decay=0.1, steps=0, weights=torch.float32, groups=({},), **options):
        torch.manual_seed(0)
        self.model = torch.nn.ModuleList([torch.nn.Linear(3, 2) for _ in groups]).to(weights)
        rows = [{"params": [*m.parameters()], **g} for m, g in zip(self.model, groups, strict=True)]
        inner = torch.optim.SGD(rows, lr=0.1)
        self.optimizer = EMAOptimizer(inner, decay=decay, **options)
        self.train(steps)

    def train(self, steps):
        train_alike(self.optimizer, steps)

    def metrics(self):
        return self.optimizer.ema_metrics()

    def distance(self):
        state = self.optimizer.get_ema_state(self.model)
        names = [n for n, _ in self.model.named_parameters() if n in state]
        weights = dict(self.model.named_parameters())
        flat = [
            np.concatenate([tensors[n].detach().double().numpy().ravel() for n in names])
            for tensors in (state, weights)
        ]
        return np.linalg.norm(flat[0] - flat[1]) / np.linalg.norm(flat[1])


def swap_block(run):
    with run.optimizer.swap_ema_weights():
        pass


def eval_and_train(run):
    run.optimizer.eval()
    run.optimizer.train()


def apply_ema(run):
    run.optimizer.apply_ema()


def get_ema_state(run):
    run.optimizer.get_ema_state(run.model)


SWAPS, EXPORTS = [swap_block, eval_and_train], [apply_ema, get_ema_state]
each_read = pytest.mark.parametrize("read", SWAPS + EXPORTS)


@pytest.mark.parametrize("steps", [0, 1, 5])
def test_metrics_are_floats_under_their_names(steps):
    metrics = Run(steps=steps).metrics()
    assert list(metrics) == KEYS
    assert {type(value) for value in metrics.values()} == {float}


@pytest.mark.parametrize(
    ("decay", "steps", "in_force", "share"),
    [
        (0.9, 5, 0.9, 0.9**5),
        (0.999, 1, 0.999, 0.999),
        (0.0, 3, 0.0, 0.0),
        (1.0, 3, 1.0, 1.0),
        (warmup_decay(0.999), 3, 4 / 13, 2 / 11 * 3 / 12 * 4 / 13),
        (warmup_decay(0.2), 3, 0.2, 2 / 11 * 0.2 * 0.2),
        (equal_average(), 4, 3 / 4, 0.0),
        (debiased_decay(0.9), 2, 0.9 * (1 - 0.9) / (1 - 0.9**2), 0.0),
    ],
)
def test_metrics_are_those_of_the_decay(decay, steps, in_force, share):
    run = Run(decay=decay, steps=steps)
    metrics = run.metrics()
    assert metrics["ema_decay"] == pytest.approx(in_force, rel=1e-12)
    assert metrics["ema_window"] == pytest.approx(1 / (1 - in_force) if in_force < 1 else math.inf)
    assert metrics["ema_initial_share"] == pytest.approx(share, rel=1e-12, abs=0)
    assert metrics["ema_updates"] == steps


@pytest.mark.parametrize(
    ("every", "after", "steps", "updates"),
    [
        (1, 0, 7, 7),
        (3, 0, 7, 2),
        (3, 0, 2, 0),
        (1, 4, 7, 3),
        (1, 9, 7, 0),
        (2, 4, 7, 1),
        (2, 4, 8, 2),
    ],
)
def test_updates_are_counted_by_stride_and_start(every, after, steps, updates):
    run = Run(decay=0.9, steps=steps, update_every=every, update_after_step=after)
    metrics = run.metrics()
    assert metrics["ema_updates"] == updates
    assert metrics["ema_initial_share"] == pytest.approx(0.9 ** (every * updates), rel=1e-12)
    assert metrics["ema_decay"] == 0.9
    assert metrics["ema_window"] == pytest.approx(10)


@each_dtype
@pytest.mark.parametrize("options", [{}, {"update_every": 2}, {"update_after_step": 2}])
def test_distance_is_that_of_ema_and_training_weights(dtype, options):
    run = Run(decay=0.2, steps=5, weights=dtype, **options)
    expected = run.distance()
    assert expected > 1e-4
    assert run.metrics()["ema_distance"] == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(("steps", "after"), [(0, 0), (0, 3), (3, 3)])
def test_distance_is_0_until_averaging_begins(steps, after):
    run = Run(steps=steps, update_after_step=after)
    assert run.metrics()["ema_distance"] == 0.0
    assert run.metrics()["ema_updates"] == 0.0


@each_dtype
@pytest.mark.parametrize("decay", [0.2, 0.0, warmup_decay(0.3)])
def test_metrics_are_the_same_while_swapped(dtype, decay):
    run = Run(decay=decay, steps=4, weights=dtype)
    expected = run.metrics()
    with run.optimizer.swap_ema_weights():
        assert run.metrics() == expected
    run.optimizer.eval()
    assert run.metrics() == expected
    run.optimizer.train()
    assert run.metrics() == expected


def test_distance_is_0_after_apply():
    run = Run(steps=3, decay=0.05)
    run.optimizer.apply_ema()
    assert run.metrics()["ema_distance"] == 0.0


def test_metrics_of_groups_are_the_worst_share_and_the_first_decay():
    groups = [{"ema_enabled": False}, {"ema_decay": 0.25}, {"ema_decay": 0.5}, {}]
    run = Run(decay=0.3, steps=4, groups=groups)
    metrics = run.metrics()
    assert metrics["ema_decay"] == 0.25
    assert metrics["ema_initial_share"] == 0.5**4
    assert metrics["ema_distance"] == pytest.approx(run.distance(), rel=1e-5)


def test_a_decay_changed_in_a_group_is_in_the_metrics():
    run = Run(decay=0.5, steps=2)
    run.optimizer.param_groups[0]["ema_decay"] = 0.25
    run.train(1)
    assert run.metrics()["ema_decay"] == 0.25
    assert run.metrics()["ema_initial_share"] == 0.5**2 * 0.25


def test_a_late_param_has_the_share_of_its_own_updates():
    run = Run(decay=0.5, steps=4)
    late = torch.nn.Parameter(torch.ones(2))
    run.optimizer.add_param_group({"params": [late]})
    run.train(2)
    assert run.metrics()["ema_initial_share"] == 0.5**2
    assert run.metrics()["ema_updates"] == 6


def test_share_after_a_resume_is_that_of_the_run():
    run, resumed = (
        Run(decay=warmup_decay(0.9), steps=7, update_every=2),
        Run(decay=warmup_decay(0.9), update_every=2),
    )
    resumed.optimizer.load_state_dict(run.optimizer.state_dict())
    share = run.metrics()["ema_initial_share"]
    assert resumed.metrics()["ema_initial_share"] == pytest.approx(share, rel=1e-12)


def message(share, decay, updates):
    remedy = r".*compute_optimal_decay.*warmup_decay.*update_after_step"
    return rf"{share}% of the initial weights.*decay {decay:g} after {updates} updates.*{remedy}"


@each_read
@each_dtype
@pytest.mark.parametrize(
    ("decay", "steps", "share"),
    [(0.9999, 3, "100"), (0.9, 4, "66"), (0.75, 8, "10"), (1.0, 2, "100")],
)
def test_a_read_warns_of_the_share_with_its_numbers_and_the_remedy(
    read, dtype, decay, steps, share
):
    run = Run(decay=decay, steps=steps, weights=dtype)
    with pytest.warns(UserWarning, match=message(share, decay, steps)) as caught:
        read(run)
    assert [warning.filename for warning in caught] == [__file__]


@pytest.mark.parametrize("read", [*SWAPS, *EXPORTS])
@pytest.mark.parametrize(
    ("decay", "steps", "options"),
    [
        (0.75, 9, {}),
        (0.1, 1, {}),
        (warmup_decay(0.9999), 2, {}),
        (0.9999, 0, {}),
        (0.9999, 3, {"update_after_step": 3}),
        (0.9999, 3, {"update_after_step": 9}),
        (0.9999, 2, {"update_after_step": 2, "update_every": 5}),
    ],
)
def test_a_read_of_a_good_ema_or_before_averaging_does_not_warn(read, decay, steps, options):
    run = Run(decay=decay, steps=steps, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read(run)


@pytest.mark.parametrize("first", [*SWAPS, *EXPORTS])
def test_the_share_is_warned_of_once_for_swaps_and_once_for_exports(first):
    run = Run(decay=0.9999, steps=3)
    others = EXPORTS if first in SWAPS else SWAPS
    with pytest.warns(UserWarning, match="initial weights"):
        first(run)
    for read in SWAPS if first in SWAPS else EXPORTS:
        read(run)
    with pytest.warns(UserWarning, match="initial weights"):
        others[0](run)
    for read in [*SWAPS, *EXPORTS]:
        read(run)


def test_the_share_is_warned_of_for_each_object():
    for _ in range(2):
        run = Run(decay=0.9999, steps=3)
        with pytest.warns(UserWarning, match="initial weights"):
            swap_block(run)


def test_metrics_and_checkpoints_do_not_warn():
    run = Run(decay=0.9999, steps=3)
    run.metrics()
    run.optimizer.state_dict()
    with run.optimizer.swap_ema_weights(enabled=False):
        pass
    run.optimizer.state[run.model[0].weight]["ema"].clone()


def test_a_warning_that_is_an_error_leaves_the_training_weights_in():
    run = Run(decay=0.9999, steps=3)
    before = [p.detach().clone() for p in run.model.parameters()]
    for read in (swap_block, apply_ema):
        with pytest.raises(UserWarning, match="initial weights"):
            read(run)
    assert not run.optimizer.swapped
    assert all(map(torch.equal, run.model.parameters(), before))


def use_ema(ema):
    with ema.use_ema():
        pass


@pytest.mark.parametrize("read", [use_ema, EMAModel.apply_ema, EMAModel.get_ema_state])
def test_reads_of_a_model_warn_at_the_users_line_too(read):
    ema = EMAModel(torch.nn.Linear(2, 2), decay=0.9)
    ema.update()
    with pytest.warns(UserWarning, match=message("90", 0.9, 1)) as caught:
        read(ema)
    assert [warning.filename for warning in caught] == [__file__]


def spoil(run, value):
    """Averages of good weights, but for one element of the first bias."""
    with torch.no_grad():
        run.model[0].bias[1] = value
    run.train(1)


@each_read
@each_dtype
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_every_read_reports_an_ema_that_is_not_finite(read, dtype, value):
    run = Run(steps=2, weights=dtype, groups=({}, {}))
    spoil(run, value)
    for _ in range(3):
        if read is apply_ema:
            run.train(1)
        with pytest.warns(UserWarning, match=r"1 of 4 EMA tensors.*NaN or infinite") as caught:
            read(run)
        assert [warning.filename for warning in caught] == [__file__]


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize(("value", "distance"), [(math.nan, math.nan), (math.inf, math.nan)])
def test_metrics_report_weights_that_are_not_finite(swapped, value, distance):
    run = Run(steps=2)
    spoil(run, value)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with run.optimizer.swap_ema_weights(swapped):
            got = run.metrics()["ema_distance"]
    assert got == pytest.approx(distance, nan_ok=True)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_metrics_report_an_ema_that_is_not_finite_under_good_weights(value):
    run = Run(steps=2)
    good = run.model[0].bias.detach().clone()
    spoil(run, value)
    run.model[0].bias.data.copy_(good)
    run.train(1)
    assert not math.isfinite(run.metrics()["ema_distance"])


def test_bad_weights_that_are_not_averaged_are_not_reported():
    run = Run(steps=1, update_after_step=9)
    spoil(run, math.nan)
    for read in [*SWAPS, *EXPORTS]:
        read(run)


def test_both_warnings_come_where_both_apply():
    run = Run(decay=0.9999, steps=2)
    spoil(run, math.nan)
    with pytest.warns(UserWarning, match=r"EMA") as caught:
        swap_block(run)
    found = [re.search("initial weights|NaN", str(warning.message)).group() for warning in caught]
    assert found == ["initial weights", "NaN"]
